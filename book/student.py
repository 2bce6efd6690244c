"""python book/student.py FOLDER [CHAPTER:FUNCTION ...]: the chapters as students get them.

In FOLDER is then each chapter in which they write: without solutions and without outputs, and with
the functions empty that they are to write (by default those of book/teaching.md; a method is
CLASS.METHOD). The checks stay. Reports and pages that chapters look for come along.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

import jupytext
import nbformat

BOOK = Path(__file__).parent
WRITTEN = """
    00_text:kneser_ney 01_gpt:Head.forward 01_gpt:Norm.forward 02_thinker:distribution
    03_diffusion:naive_step 04_mamba:loop 04_mamba:compose 06_chat:naive
""".split()
SOLUTION = re.compile(r"\n*<details>.*?</details>", re.DOTALL)


def for_students(page: Path, functions: list[str]) -> nbformat.NotebookNode:
    """A chapter's .md -> its notebook. Raises ValueError for a function that it does not define."""
    notebook = jupytext.read(page)
    exercises = False
    cells = []
    for cell in notebook.cells:
        exercises = exercises or "## Exercises" in cell.source.splitlines()
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("", cell.source)
        elif not (exercises and "hide-cell" in cell.metadata.get("tags", [])):
            cell.source, emptied = empty(cell.source, functions)
            functions = [name for name in functions if name not in emptied]
        else:
            continue
        if cell.source:
            cells.append(cell)
    if functions:
        raise ValueError(f"{page.name} defines no {', '.join(functions)}")
    notebook.cells = cells
    notebook.metadata.pop("jupytext", None)  # no .md stands beside it
    return notebook


def empty(source: str, functions: list[str]) -> tuple[str, list[str]]:
    """A cell -> the same with these functions' bodies to be written, and which of them it had."""
    lines = source.splitlines()
    found = []
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell for IPython alone
        return source, found
    for name in functions:
        scope = body
        for part in name.split("."):
            named = (node for node in scope if getattr(node, "name", None) == part)
            node = next(named, None)
            scope = getattr(node, "body", [])
        if scope:
            found.append(name)
            kept = scope[0].end_lineno if ast.get_docstring(node) else scope[0].lineno - 1
            todo = " " * scope[0].col_offset + f'raise NotImplementedError("write {name}")'
            gone = [None] * (scope[-1].end_lineno - kept - 1)  # the lines below keep their numbers
            lines[kept : scope[-1].end_lineno] = [todo, *gone]
    return "\n".join(line for line in lines if line is not None), found


def main(folder: str, *written: str) -> None:
    chapters = {}
    for entry in written or WRITTEN:
        chapter, _, function = entry.partition(":")
        chapters.setdefault(chapter, []).append(function)
    pages = BOOK.parent / "notebooks"
    made = {name: for_students(pages / f"{name}.md", chapters[name]) for name in chapters}
    out = Path(folder)
    (out / "notebooks").mkdir(parents=True)
    for name, notebook in made.items():
        nbformat.write(notebook, out / "notebooks" / f"{name}.ipynb")
    shutil.copytree(BOOK / "report", out / "book" / "report")
    for page in BOOK.glob("*.md"):  # what they link to
        shutil.copy(page, out / "book")
    print(f"{len(chapters)} chapters in {out}: open them with jupyter lab {out / 'notebooks'}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("where to? python book/student.py FOLDER")
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
