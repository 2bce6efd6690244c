"""The book builds from the stored notebooks without a warning, and its pages say what is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    options = ["--path-output", str(out), "--config", "book/_config.yml", "--toc", "book/_toc.yml", "-W"]
    built = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", ".", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]
    return out / "_build" / "html"


def test_every_page_is_built(site):
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text())
    for page in [toc["root"], *(chapter["file"] for chapter in toc["chapters"])]:
        assert "<h1>" in (site / f"{page}.html").read_text(), page


def test_every_notebook_is_in_the_book():
    toc = (ROOT / "book/_toc.yml").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.stem}" in toc, notebook.name


def test_the_notation_page_has_every_letter_of_the_legend():
    from irann import core

    page = (ROOT / "book/notation.md").read_text()
    letters = re.findall(r"\| (\w+) +\| [a-z]", core.__doc__)
    assert {"b", "t", "s", "d", "h", "c", "e", "n", "r", "v", "tau"} <= set(letters)
    for letter in set(letters) - {"letter"}:
        assert f"`{letter}`" in page, letter


def test_the_page_of_promises_names_tests_that_exist():
    for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "book/promises.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name
