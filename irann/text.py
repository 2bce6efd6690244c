"""Text as whole numbers and back: the vocabulary of characters, the split, random windows."""

import codecs
import difflib
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from . import machine
from .settings import InputError, Setting

# characters of a large text that are encoded at once, so that little memory is needed beside it
ENCODED_AT_ONCE = 1 << 20
BOM = ", without its byte order mark"  # what `source` says of a file that was not read as it is
CRLF = ", its line ends (CR LF or CR) read as LF"
FEW = 5  # a character that occurs less often cannot be learned


class CorpusError(Exception):
    """The corpus cannot be had, or is not what it should be."""


class Vocabulary:
    """The characters of a text in sorted order; a character's id is its position in that order."""

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise InputError("a vocabulary needs at least one character; the text is empty")
        self._id = {character: i for i, character in enumerate(self.characters)}
        self._points = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary of {len(self)} characters: {self.characters!r}"

    def unknown(self, text: str) -> str:
        """-> the characters of `text` that are not in here, each once, in the order they appear."""
        return "".join(dict.fromkeys(c for c in text if c not in self._id))

    def spelt(self, text: str) -> str:
        """-> the text as spelt here: CR LF as LF, accents composed or apart, whichever is known."""
        if not self.unknown(text):
            return text
        if "\r" not in self._id:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        return min((composed, text, apart), key=lambda form: len(self.unknown(form)))

    def encode(self, text: str) -> Int[Tensor, "t"]:
        """-> ids, int64. Raises InputError that shows the characters it does not know."""
        if not isinstance(text, str):
            raise InputError(f"a text is wanted, such as 'ROMEO:'; got {text!r}")
        ids = np.empty(len(text), dtype=np.int64)
        for start, piece in pieces(text):
            points = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            found = np.searchsorted(self._points, points).clip(max=len(self) - 1)
            if not np.array_equal(self._points[found], points):
                unknown = self.unknown(text)
                shown = unknown if len(unknown) <= 20 else unknown[:20] + "..."
                raise InputError(
                    f"these characters are not among the {len(self)} of the vocabulary: "
                    f"{shown!r}; leave them out"
                )
            ids[start : start + len(piece)] = found
        return torch.from_numpy(ids)

    def decode(self, ids: Any) -> str:
        """Ids, as a tensor (t), an array or a list -> text. Raises InputError for what is none, and
        for an unknown id.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            ids = list(ids)
            if ids and not 0 <= min(ids) <= max(ids) < len(self):
                raise InputError(
                    f"ids of this vocabulary lie in 0..{len(self) - 1}; got {min(ids)}..{max(ids)}"
                )
            return "".join(self.characters[i] for i in ids)
        except TypeError:
            raise InputError("ids are whole numbers of shape (t), such as draft.ids[0]") from None


@dataclass(frozen=True, eq=False)
class Text:
    """A corpus made of ids: `train` and `val` of int64, the vocabulary, and where it came from."""

    train: Int[Tensor, "train"]
    val: Int[Tensor, "val"]
    vocabulary: Vocabulary
    source: str = "a string"
    sha256: str = ""

    @classmethod
    def of(
        cls,
        text: str,
        *,
        vocabulary: Vocabulary | None = None,
        split: float = 0.9,
        source: str = "a string",
        sha256: str = "",
    ) -> "Text":
        """Cut a string into a training part, the first `split` of it, and a validation part.

        `vocabulary` is its own, or a trained model's; `source` and `sha256` say where it is from.
        Raises InputError for too few characters, and for those that the vocabulary lacks.
        """
        if not isinstance(text, str):
            raise InputError(f"a text is a string; got a {type(text).__name__}")
        if len(text) < 300 and os.path.isfile(text):
            raise InputError(f"{text!r} is the name of a file: irann.text.read_text reads it")
        split = Setting(0.9, "", above=0.0, below=1.0).check("split", split)
        if not isinstance(vocabulary, Vocabulary | None):
            raise InputError(f"a vocabulary is one such as model.vocabulary; got {vocabulary!r}")
        vocabulary = vocabulary or Vocabulary(text)
        ids = vocabulary.encode(text)
        cut = int(split * len(ids))
        if cut < 2 or len(ids) - cut < 1:
            raise InputError(
                f"{source} has {len(text)} characters: too few to train on and to validate with"
            )
        if not sha256:
            digest = hashlib.sha256()
            for _, piece in pieces(text):
                digest.update(piece.encode("utf-8", "surrogatepass"))
            sha256 = digest.hexdigest()
        return cls(ids[:cut], ids[cut:], vocabulary, source, sha256)

    def write(self, folder: str | os.PathLike) -> list[Path]:
        """Write train_encoded.npy, val_encoded.npy (uint16, or uint32 beyond 65,536 characters) and
        vocab.json (the characters in order of id) -> their paths.

        Raises OSError that names the file; an older one is then as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        characters = json.dumps(list(self.vocabulary.characters), ensure_ascii=False) + "\n"
        kind = np.uint16 if len(self.vocabulary) <= 2**16 else np.uint32
        files = {
            folder / "train_encoded.npy": npy(self.train, kind),
            folder / "val_encoded.npy": npy(self.val, kind),
            folder / "vocab.json": characters.encode(),
        }
        for path, data in files.items():
            machine.write_atomically(path.resolve(), data)  # of a link, what it points to
        return list(files)


def npy(ids: Int[Tensor, "t"], kind: Any) -> bytes:
    """-> the bytes of a .npy file; numpy's own writing does not say why it failed."""
    file = io.BytesIO()
    np.save(file, ids.numpy().astype(kind))
    return file.getvalue()


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """-> pieces of a text, each with where it starts."""
    for start in range(0, len(text), ENCODED_AT_ONCE):
        yield start, text[start : start + ENCODED_AT_ONCE]


def window_positions(
    length: int, window: int, batch: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b {window}+1"]:
    """-> the positions of `batch` windows of a text, each start as likely as any other; drawn on
    the CPU.
    """
    if length < window + 1:
        raise InputError(
            f"the text has {length} characters, too few for one window of {window} and the "
            "character after it"
        )
    starts = torch.randint(length - window, (batch, 1), generator=generator, device="cpu")
    return starts + torch.arange(window + 1, device="cpu")


def windows(
    ids: Int[Tensor, "t"], window: int, batch: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b {window}+1"]:
    """-> stretches of the text that start at random positions, as `window_positions` draws them."""
    return ids[window_positions(len(ids), window, batch, generator)]


def read_text(path: str | os.PathLike) -> Text:
    """-> a file of UTF-8 text as a corpus with a vocabulary of its own; a byte order mark at its
    start is dropped, and CR LF or CR is read as LF: `source` says so.

    Raises CorpusError for a file that cannot be read or is not such a text; InputError for too few
    characters.
    """
    name = printable(path)
    data = read_bytes(path)
    if not data.removeprefix(codecs.BOM_UTF8):
        raise CorpusError(
            f"{name} is empty: give a text of some thousand characters, or none for "
            "tiny-shakespeare"
        )
    if b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{name} looks like UTF-16 or is no text (NUL bytes): save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name} is not UTF-8 text (byte {error.start:,} is "
            f"{error.object[error.start]:#04x}): save it as UTF-8"
        ) from None
    if data.startswith(codecs.BOM_UTF8):
        name += BOM
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        name += CRLF
    return Text.of(text, source=name, sha256=hashlib.sha256(data).hexdigest())


def read_bytes(path: str | os.PathLike, hint: str = "") -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = f"{printable(path)} cannot be read ({error.strerror or error})"
        raise CorpusError(f"the corpus {reason}{hint or near(path)}") from None


def near(path: str | os.PathLike) -> str:
    """-> a hint for a file that cannot be read: another of nearly that name, or what is wanted."""
    folder = Path(path).parent
    with suppress(OSError):
        names = set(os.listdir(folder)) - {Path(path).name}
        if found := difflib.get_close_matches(Path(path).name, names, 1):
            return f"; there is {printable(folder / found[0])}"
    return "; give the path of a text in UTF-8"


def slug(path: str | os.PathLike) -> str:
    """-> the name of a file as a part of the name of a folder: its letters and digits."""
    return re.sub(r"[\W_]+", "-", Path(printable(path)).stem).strip("-")[:40] or "text"


def describe(text: Text) -> Iterator[str]:
    """What to know of a text before a model is trained on it: yields lines, the odd things last."""
    vocabulary = text.vocabulary.characters
    train = torch.bincount(text.train, minlength=len(vocabulary))
    counts = train + torch.bincount(text.val, minlength=len(vocabulary))
    yield (
        f"{text.source}: {len(text.train) + len(text.val):,} characters, {len(vocabulary):,} "
        f"different ones; the last {len(text.val):,} are kept to validate with"
    )
    rare = [c for c, count in zip(vocabulary, counts.tolist()) if count < FEW]
    if rare:
        shown = "".join(rare[:20]) + ("..." if rare[20:] else "")
        yield f"rare: {len(rare)} of them occur less than {FEW} times: {shown!r}"
    new = int(((train == 0) & (counts > 0)).sum())
    if new:
        yield f"new: {new} occur in the validation part only, where no model can expect them"
    odd = {c: n for c, n in zip(vocabulary, counts.tolist()) if _odd(c)}
    if odd:
        listed = ", ".join(f"{c!r} {n:,} times" for c, n in list(odd.items())[:5])
        yield f"odd: {listed}; a sign of another encoding, or of what is no text?"
    if "\n" not in vocabulary:
        yield "odd: it has no line breaks"


def _odd(character: str) -> bool:
    """Whether a character is seldom meant: a control character, U+FFFD, one for private use."""
    kind = unicodedata.category(character)
    return character == "\ufffd" or (kind in ("Cc", "Co", "Cn", "Cs") and character not in "\n\t")


def printable(path: str | os.PathLike) -> str:
    """-> a path with bytes that are no text escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()
