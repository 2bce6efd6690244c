"""`irann book`: the chapters in JupyterLab, beginning with the page that welcomes."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from .settings import InputError

BESIDE = Path(__file__).parents[1] / "notebooks"  # in the book's own folder
INSTALLED = Path(sys.prefix) / "share" / "irann" / "notebooks"  # beside an installed package
COPY = Path("irann-book")
WELCOME = "welcome.ipynb"
# A chapter is a pair, and a reader wants its notebook: the .md is neither shown nor written.
OPTIONS = (
    "--ContentsManager.hide_globs=['*.md', '__pycache__', 'runs']",
    "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}",
    f"--LabApp.default_url=/lab/tree/{WELCOME}",
)


def folder() -> Path:
    """-> where the chapters are: those of the book's folder, or, of an installed package, a copy of
    one's own in ./irann-book, made now if it is not there. Raises InputError if there are none.
    """
    if (BESIDE / WELCOME).is_file():
        return BESIDE
    if not (INSTALLED / WELCOME).is_file():
        raise InputError(
            "the chapters are not on this machine: get the book's folder, and in it "
            "pip install -e '.[book]'"
        )
    for chapter in sorted(INSTALLED.glob("*.ipynb")):  # what the reader has changed stays
        if not (COPY / chapter.name).exists():
            COPY.mkdir(exist_ok=True)
            shutil.copy(chapter, COPY / chapter.name)
    return COPY


def command(*more: str) -> list[str]:
    """-> the book's command; JupyterLab gets `more`. Raises InputError for what is missing."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise InputError("the book opens in JupyterLab: pip install 'irann[book]'")
    return [sys.executable, "-m", "jupyter", "lab", str(folder()), *OPTIONS, *more]


def main(*more: str) -> None:
    """Open the book: JupyterLab takes the place of this process."""
    words = command(*more)
    print(f"opening {Path(words[4]) / WELCOME} in JupyterLab; Ctrl-C here closes it", flush=True)
    # the labconfig beside this file: a first start does not ask whether it may fetch news
    known = os.environ.get("JUPYTER_CONFIG_PATH")
    paths = os.pathsep.join(filter(None, [known, str(Path(__file__).parent)]))
    os.execve(words[0], words, os.environ | {"JUPYTER_CONFIG_PATH": paths})
