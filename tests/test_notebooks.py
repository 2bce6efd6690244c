"""The chapters: .md and .ipynb hold the same cells, and every cell ran in order without an error. (That
running again prints the same is tested by nbval, cell by cell: see pyproject.toml.) They keep a measure that a reader can finish, and the numbers of
their prose stand in an output, a report or a card.

A chapter is a complete pair in notebooks/. A .md without its .ipynb is a draft and is left out.
"""

import ast
import json
import math
import re
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest

from irann import figures, zoo

FOLDER = Path(__file__).parent.parent / "notebooks"
PAIRS = [page for page in sorted(FOLDER.glob("*.md")) if page.with_suffix(".ipynb").exists()]
chapters = pytest.mark.parametrize("page", PAIRS, ids=lambda page: page.stem)
APPENDIX = re.compile(r"\d\d[b-z]_|07_")  # for the curious, as long as it has to be
main_chapters = pytest.mark.parametrize(
    "page", [page for page in PAIRS if not APPENDIX.match(page.stem)], ids=lambda page: page.stem
)


def executed(page: Path):
    return nbformat.read(page.with_suffix(".ipynb"), as_version=4)


def cells(notebook) -> list[tuple]:
    keep = ("tags", "jupyter", "mystnb")
    return [
        (cell.cell_type, cell.source, {key: cell.metadata.get(key) for key in keep})
        for cell in notebook.cells
    ]


def test_the_first_chapter_is_a_complete_pair():
    assert "01_gpt" in [page.stem for page in PAIRS]


@chapters
def test_both_sides_hold_the_same_cells(page):
    assert cells(jupytext.read(page)) == cells(executed(page))


@chapters
def test_the_source_is_what_jupyterlab_would_save(page):
    """Else an edit there changes half of the file."""
    whole = executed(page)
    assert jupytext.writes(whole, fmt="md:myst") == page.read_text()
    assert whole.metadata.jupytext.formats == "ipynb,md:myst"


@chapters
def test_every_code_cell_ran_in_order_without_an_error(page):
    cells = code(executed(page))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out.evalue for cell in cells for out in cell.outputs if out.output_type == "error"]


@chapters
def test_the_stored_notebook_is_small_and_clean(page):
    raw = page.with_suffix(".ipynb").read_bytes()
    assert len(raw) < 500_000 and b"widget-view+json" not in raw
    notebook = executed(page)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert not [cell.metadata for cell in notebook.cells if "execution" in cell.metadata]
    assert str(Path.home()).encode() + b"/" not in raw and str(FOLDER.parent).encode() not in raw
    assert f"{tempfile.gettempdir()}/".encode() not in raw


# ------------------------------------------------------------------------- the measure of a chapter


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def folded(cell) -> bool:
    return bool({"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])))


def lines(cell) -> list[str]:
    return [line for line in cell.source.split("\n") if line.strip()]


def prose(cell) -> str:
    """-> a markdown cell without maths, code, addresses (and arXiv's numbers), and marks of HTML."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", " ", cell.source, flags=re.S)
    text = re.sub(r"\$[^$]*\$|`[^`]*`", " ", text)
    return re.sub(r"\]\([^)]*\)|<[^>]*>|\w+://\S+|\b\d{4}\.\d{4,5}\b", " ", text)


@main_chapters
def test_a_student_finishes_it(page):
    notebook = executed(page)
    text = " ".join(prose(cell) for cell in notebook.cells if cell.cell_type == "markdown")
    words = len(re.findall(r"[^\W\d_][\w'’-]*", text))
    read = [len(lines(cell)) for cell in code(notebook) if not folded(cell)]
    assert words <= 3000 and len(notebook.cells) <= 45
    assert statistics.median(read) <= 8, sorted(read)


@chapters
def test_no_line_of_code_is_wider_than_the_page(page):
    wide = [line for cell in code(executed(page)) for line in lines(cell) if len(line) > 80]
    assert not wide, "\n".join(wide)


@main_chapters
def test_a_cell_is_short_but_where_it_writes_the_model(page):
    long = [cell for cell in code(executed(page)) if len(lines(cell)) > 30]
    assert not [cell.source for cell in long if "nn.Module" not in cell.source]


@chapters
def test_what_is_folded_on_the_site_is_folded_in_jupyterlab(page):
    for cell in code(executed(page)):
        tags, lab = set(cell.metadata.get("tags", [])), cell.metadata.get("jupyter", {})
        if folded(cell):
            assert lab.get("source_hidden"), cell.source
        assert bool(lab.get("outputs_hidden")) == ("hide-cell" in tags), cell.source


@chapters
def test_plots_and_solutions_are_folded(page):
    cells = executed(page).cells
    for above, cell in zip(cells, cells[1:]):
        if "<summary>Solution" in above.source and cell.cell_type == "code":
            assert "hide-cell" in cell.metadata.get("tags", []), cell.source
    for cell in code(executed(page)):
        strokes = re.findall(r"\bax\w*(?:\[[^]]*\])*\.|\bplt\.", cell.source)
        assert len(strokes) <= 5 or len(lines(cell)) <= 12 or folded(cell), cell.source


# ----------------------------------------------------------------------------- numbers in the prose

NUMBER = re.compile(r"(?<![\w.,/])(\d[\d,]*\.\d+)(?![\w]|\.\d)(\s*%|\s+million|\s+thousand|)")
# What a chapter says from elsewhere, and where that is.
FORMS = """1.70 1.4796 1.4737 1.737 1.697 1.654 1.656 1.623 1.741 1.718 1.693 1.702 1.659 1.648 1.663
1.652 1.662 1.643 1.5401 1.5375 1.657 1.5027 1.5022 1.5007 1.5035 1.4969 1.4981 1.3569 1.3676 1.3565
1.3645 1.054"""
ELSEWHERE = {
    "01b_recipe": dict.fromkeys("0.27 0.15 0.08 0.05 0.07".split(), "the legend of the picture"),
    "02_thinker": dict.fromkeys(("5.25", "5.625"), "sums by hand"),
    "03c_page": {"2.186": "a log of that race with the later form"},
    "02b_forms": {"0.053": "chapter 5: 0.0730 - 0.0202", "0.093": "chapter 5: 0.0730 + 0.0202"}
    | dict.fromkeys(FORMS.split(), "logs of the first races, which no report keeps"),
    "03_diffusion": {"0.464": "the sum stands before it"},
    "03b_bound": dict.fromkeys(("2.234", "2.105", "0.012"), "a run on a CPU, its log"),
    "05_compare": dict.fromkeys(("1.4697", "10.65"), "nanoGPT's README")
    | {"0.126": "1.558 less 1.432, both in the reports"},
    "05b_speedrun": {"10.65": "counted by nanoGPT's script"}
    | dict.fromkeys(("1.4868", "1.4737", "0.004", "6.1", "1.22"), "runs of one seed, their logs"),
}


def numbers(text: str) -> list[float]:
    return [
        float(found.replace(",", ""))
        for found in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text)
        if found.strip(",")
    ]


def printed(notebook) -> str:
    """-> all that the cells of a notebook say, in code and in outputs."""
    said = []
    for cell in code(notebook):
        said.append(cell.source)
        for out in cell.outputs:
            said += [out.get("text", ""), out.get("data", {}).get("text/plain", "")]
    return "\n".join(said)


def leaves(tree) -> list[float]:
    if isinstance(tree, dict | list):
        parts = tree.values() if isinstance(tree, dict) else tree
        return [leaf for part in parts for leaf in leaves(part)]
    return [tree] if isinstance(tree, int | float) and math.isfinite(tree) else []


@pytest.fixture(scope="module")
def measured() -> tuple[list[float], list[float]]:
    """-> what tables of reports say, and cards; and all that any report or chapter holds."""
    reports = FOLDER.parent / "book" / "report"
    tables = [number for page in reports.glob("*.md") for number in numbers(page.read_text())]
    tables += figures.REFERENCES.values()
    tables += [number for name in zoo.shipped() for number in leaves(zoo.load(name).card)]
    all_of_it = [
        leaf for page in reports.glob("*.json") for leaf in leaves(json.loads(page.read_text()))
    ]
    all_of_it += [number for page in PAIRS for number in numbers(printed(executed(page)))]
    return tables, all_of_it


@chapters
def test_a_number_in_the_prose_was_printed_or_measured(page, measured):
    """Numbers with a decimal point, within rounding. Those with three decimals or more may come from
    another chapter or the depth of a report: so many have one or two that anything would be found.
    """
    tables, all_of_it = measured
    notebook = executed(page)
    near = [*numbers(printed(notebook)), *tables]
    lost = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for said, unit in NUMBER.findall(prose(cell)):
                decimals = len(said.partition(".")[2])
                scales = {"%": (1, 0.01), "million": (1, 1e6), "thousand": (1, 1e3)}
                value = float(said.replace(",", ""))
                found = any(
                    abs(value * scale - number) <= scale * (0.5 + 1e-6) * 10**-decimals
                    for scale in scales.get(unit.strip(), (1,))
                    for number in (near if decimals < 3 else [*near, *all_of_it])
                )
                if not found and said not in ELSEWHERE.get(page.stem, {}):
                    start = max(0, cell.source.find(said) - 50)
                    lost.append(f"{said}: {cell.source[start : start + 110]!r}")
    assert not lost, "\n".join(lost)


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
