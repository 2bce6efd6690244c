"""`irann book`: the chapters in JupyterLab, beginning with the page that welcomes."""

import hashlib
import importlib.util
import json
import os
import site
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from .machine import write_atomically
from .settings import InputError

BESIDE = Path(__file__).parents[1] / "notebooks"  # in the book's own folder
# Beside an installed package, wherever pip put its data: as it does by default, or for one user
INSTALLED = [
    Path(place) / "share" / "irann"
    for place in (sys.prefix, sysconfig.get_path("data"), site.getuserbase())
]
COPY = Path("irann-book", "notebooks")
WELCOME = "welcome.ipynb"
# A chapter is a pair, and a reader wants its notebook: the .md is neither shown nor written.
OPTIONS = (
    "--ContentsManager.hide_globs=['*.md', '__pycache__', 'runs']",
    "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}",
    f"--LabApp.default_url=/lab/tree/{WELCOME}",
)


def folder() -> Path:
    """-> where the chapters are: those of the book's folder, or, of an installed package, a copy of
    one's own under ./irann-book, made now or brought up to date. Raises InputError if there are
    none.
    """
    if (BESIDE / WELCOME).is_file():
        return BESIDE
    known = (place for place in INSTALLED if (place / "notebooks" / WELCOME).is_file())
    installed = next(known, None)
    if installed is None:
        raise InputError(
            "the chapters are not on this machine: get the book's folder, and in it "
            'pip install -e ".[book]"'
        )
    copy = COPY
    for inside in (Path("notebooks"), Path()):  # who stands in the copy gets no copy of it
        if (inside / WELCOME).resolve().parts[-3:-1] == COPY.parts and (inside / WELCOME).is_file():
            copy = inside
    reports = copy / ".." / "book" / "report"  # where the chapters look for what was measured
    for place in (copy, reports):
        place.mkdir(parents=True, exist_ok=True)
    record = copy / ".." / "book" / "copied.json"  # each chapter's SHA-256 as it was copied
    copied = {}
    with suppress(OSError, ValueError):
        copied = json.loads(record.read_bytes())
    for chapter in installed.glob("notebooks/*.ipynb"):
        mine = copy / chapter.name
        # What the reader has changed stays; a chapter as an older edition had it is replaced.
        if not mine.exists() or _sha256(mine) in (copied.get(chapter.name), _sha256(chapter)):
            write_atomically(mine, chapter.read_bytes())
            copied[chapter.name] = _sha256(mine)
    write_atomically(record, json.dumps(copied).encode())
    for report in installed.glob("book/report/*.json"):
        write_atomically(reports / report.name, report.read_bytes())
    return copy


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(*more: str) -> None:
    """Open the book: JupyterLab, which gets `more`, takes the place of this process. Raises
    InputError for what is missing.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise InputError('the book opens in JupyterLab: pip install "irann[book]"')
    chapters = folder()
    print(f"opening {chapters / WELCOME} in JupyterLab; Ctrl-C here closes it", flush=True)
    words = [sys.executable, "-m", "jupyter", "lab", str(chapters), *OPTIONS, *more]
    # the labconfig beside this file: a first start does not ask whether it may fetch news
    known = os.environ.get("JUPYTER_CONFIG_PATH")
    paths = os.pathsep.join(filter(None, [known, str(Path(__file__).parent)]))
    environment = os.environ | {"JUPYTER_CONFIG_PATH": paths}
    if os.name == "nt":  # no program takes another's place there
        sys.exit(subprocess.call(words, env=environment))
    os.execve(words[0], words, environment)
