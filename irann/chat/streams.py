"""Troubles of standard input and a terminal: closed streams, other encodings, wide characters."""

import os
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress

from ..settings import InputError

JOINERS = "\u200c\u200d"  # without them some scripts cannot be written


def prepare() -> None:
    """Once, as a program begins: no file may be opened as a standard stream that is closed, and
    output never breaks off at a character that its encoding does not have."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):  # the C locale's
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def check_encoding(characters: str) -> None:
    """Say beforehand that some of these characters will become question marks, and the way out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    lost = characters.encode(encoding, "replace").decode(encoding) != characters
    if lost:
        tell(
            f"standard output is {encoding}, and what it cannot hold becomes a question mark: "
            "set PYTHONIOENCODING=utf-8"
        )


def heard(read: Callable[[], str] | None = None) -> str:
    """-> the rest of standard input, or what `read` reads. Raises InputError if that fails."""
    check_stdin()
    try:
        return (read or sys.stdin.read)().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        words = f"what was said on standard input is not text ({error}): say it in UTF-8"
    except OSError as error:
        words = f"standard input cannot be read ({error.strerror or error})"
    raise InputError(words)


def check_stdin() -> None:
    """Raises InputError if there is no standard input."""
    if sys.stdin is None:
        raise InputError("standard input is closed: there is nobody to listen to")


def tell(message: str, bare: bool = False) -> None:
    """Say something beside the output, on standard error, if there is one; '' is not said."""
    if sys.stdout is not None:
        with suppress(OSError):  # `main` meets it, and says so
            sys.stdout.flush()
    if message and sys.stderr is not None:
        print(message if bare else f"irann: {visible(message)}", file=sys.stderr, flush=True)


def visible(text: str, tab: str = "\t") -> str:
    """-> the text without what a terminal obeys; line breaks (CR LF: one), spaces, joiners stay."""
    shown = (c if _harmless(c) else "\ufffd" for c in text.replace("\r", ""))
    return "".join(shown).replace("\t", tab)


def _harmless(character: str) -> bool:
    known = character.isprintable() or character in "\t\n" + JOINERS
    return known or unicodedata.category(character) == "Zs"


def cells(character: str) -> int:
    """-> the columns a character takes in a terminal: 2 if wide, 0 if it joins the one before."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def advance(column: int, text: str, width: int) -> int:
    """-> the cursor's column after `text`; at `width` it still stands on the full line."""
    for character in text:
        taken = cells(character)
        if character == "\n":
            column = 0
        elif column + taken > width:
            column = taken
        else:
            column += taken
    return column
