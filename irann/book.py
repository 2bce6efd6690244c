"""`irann book`: the chapters in JupyterLab, beginning with the page that welcomes."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from .settings import InputError

BESIDE = Path(__file__).parents[1] / "notebooks"  # in the book's own folder
INSTALLED = Path(sys.prefix) / "share" / "irann" / "notebooks"  # beside an installed package
COPY = Path("irann-book")
WELCOME = "welcome.ipynb"
# A chapter is a pair, and a reader wants its notebook: the .md is neither shown nor written, and
# nothing asks for a network.
OPTIONS = (
    "--ContentsManager.hide_globs=['*.md', '__pycache__', 'runs']",
    "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=None",
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
    """-> the command that opens the book; `more` is for JupyterLab. Raises InputError for what is
    missing.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise InputError("the book opens in JupyterLab: pip install 'irann[book]'")
    return [sys.executable, "-m", "jupyter", "lab", str(folder() / WELCOME), *OPTIONS, *more]


def main(*more: str) -> int:
    """Open the book, and wait until JupyterLab is closed -> its exit code."""
    words = command(*more)
    print(f"opening {words[4]} in JupyterLab; Ctrl-C here closes it", flush=True)
    with subprocess.Popen(words) as lab:
        while True:
            try:
                return lab.wait()
            except KeyboardInterrupt:
                continue  # JupyterLab hears it too, and asks whether to end
