"""The chapters: .md and .ipynb hold the same cells, every cell ran in order without an error, and
running again prints the same.

A chapter is a complete pair in notebooks/. A .md without its .ipynb is a draft and is left out.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
PAIRS = [page for page in sorted(FOLDER.glob("*.md")) if page.with_suffix(".ipynb").exists()]
chapters = pytest.mark.parametrize("page", PAIRS, ids=lambda page: page.stem)


def executed(page: Path):
    return nbformat.read(page.with_suffix(".ipynb"), as_version=4)


def cells(notebook) -> list[tuple]:
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_the_first_chapter_is_a_complete_pair():
    assert "01_gpt" in [page.stem for page in PAIRS]


@chapters
def test_both_sides_hold_the_same_cells(page):
    assert cells(jupytext.read(page)) == cells(executed(page))


@chapters
def test_every_code_cell_ran_in_order_without_an_error(page):
    code = [cell for cell in executed(page).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out.evalue for cell in code for out in cell.outputs if out.output_type == "error"]


@chapters
def test_the_stored_notebook_is_small_and_clean(page):
    raw = page.with_suffix(".ipynb").read_bytes()
    assert len(raw) < 500_000
    notebook = executed(page)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert not [cell.metadata for cell in notebook.cells if "execution" in cell.metadata]
    assert str(Path.home()).encode() + b"/" not in raw and str(FOLDER.parent).encode() not in raw


@chapters
def test_it_needs_nothing_that_the_readme_does_not_install(page):
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["book"]]
    there = (
        {re.match(r"[\w-]+", name)[0] for name in wanted} | set(sys.stdlib_module_names) | {"irann"}
    )
    tree = ast.parse(
        "\n".join(cell.source for cell in executed(page).cells if cell.cell_type == "code")
    )
    used = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    used |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in used} <= there


@chapters
def test_running_it_again_prints_the_same(page, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout=600",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "addopts=", str(page.with_suffix(".ipynb"))]
    quiet = {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=FOLDER, env=os.environ | quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
