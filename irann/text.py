"""Text as whole numbers and back: the vocabulary of characters, the split, random windows."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .settings import InputError


class Vocabulary:
    """The characters of a text in sorted order; a character's id is its place in that order."""

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise InputError("a vocabulary needs at least one character; the text is empty")
        self._id = {character: i for i, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary of {len(self)} characters: {self.characters!r}"

    def unknown(self, text: str) -> str:
        """-> the characters of `text` that are not in here, each once, in the order they appear."""
        return "".join(dict.fromkeys(c for c in text if c not in self._id))

    def encode(self, text: str) -> Tensor:
        """-> (t) of int64. Raises ValueError that shows the characters it does not know."""
        try:
            return torch.tensor([self._id[c] for c in text], dtype=torch.long, device="cpu")
        except KeyError:
            unknown = self.unknown(text)
            shown = unknown if len(unknown) <= 20 else unknown[:20] + "..."
            raise InputError(
                f"these characters are not among the {len(self)} of the vocabulary: {shown!r}; leave them out"
            ) from None

    def decode(self, ids) -> str:
        """(t) of ids, as a tensor, an array or a list -> text. Raises ValueError for an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise InputError(
                f"ids of this vocabulary lie in 0..{len(self) - 1}; got {min(ids)}..{max(ids)}"
            )
        return "".join(self.characters[i] for i in ids)


@dataclass(frozen=True)
class Text:
    """A corpus made of ids: `train` and `val` (t) of int64, the vocabulary, and where it came from."""

    train: Tensor
    val: Tensor
    vocabulary: Vocabulary
    source: str = "a string"
    sha256: str = ""

    @classmethod
    def of(
        cls,
        text: str,
        *,
        vocabulary: Vocabulary | None = None,
        split=0.9,
        source="a string",
        sha256="",
    ) -> "Text":
        """Cut a string into a training part (the first `split` of it) and a validation part (the rest)."""
        vocabulary = vocabulary or Vocabulary(text)
        ids = encode_fast(text, vocabulary)
        cut = int(split * len(ids))
        if cut < 2 or len(ids) - cut < 1:
            raise InputError(
                f"{source} has {len(text)} characters: too few to train on and to validate with"
            )
        return cls(
            ids[:cut],
            ids[cut:],
            vocabulary,
            source,
            sha256 or hashlib.sha256(text.encode()).hexdigest(),
        )

    def write(self, folder) -> list[Path]:
        """Write train_encoded.npy, val_encoded.npy (uint16) and vocab.json (the characters in order of id) -> their paths.

        Raises OSError that names the file; one that broke off half-way is removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            folder / f"{part}_encoded.npy": npy(getattr(self, part)) for part in ("train", "val")
        }
        files[folder / "vocab.json"] = (
            json.dumps(list(self.vocabulary.characters), ensure_ascii=False) + "\n"
        ).encode()
        for path, data in files.items():
            try:
                path.write_bytes(data)
            except OSError as error:
                if error.filename is None:  # it was open already
                    error.filename = str(path)
                    path.unlink()
                raise
        return list(files)


def npy(ids: Tensor) -> bytes:
    """(t) -> the bytes of a .npy file of uint16; numpy's own writing does not say why it failed."""
    file = io.BytesIO()
    np.save(file, ids.numpy().astype(np.uint16))
    return file.getvalue()


def encode_fast(text: str, vocabulary: Vocabulary) -> Tensor:
    """-> (t) of int64: `vocabulary.encode` for a whole corpus, by table instead of by dictionary."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.array(
        [ord(c) for c in vocabulary.characters], dtype=np.uint32
    )  # sorted, as the characters are
    ids = np.searchsorted(known, points).clip(max=len(known) - 1)
    if not np.array_equal(known[ids], points):
        vocabulary.encode(text)  # raises, and names the strangers
    return torch.from_numpy(ids.astype(np.int64))


def windows(
    ids: Tensor, window: int, batch: int, generator: torch.Generator | None = None
) -> Tensor:
    """(t) -> (batch window+1): stretches of the text that start at random places, every place as likely as any other."""
    if len(ids) < window + 1:
        raise InputError(
            f"the text has {len(ids)} characters, too few for one window of {window} and the character after it"
        )
    starts = torch.randint(len(ids) - window, (batch, 1), generator=generator, device="cpu")
    return ids[starts + torch.arange(window + 1, device="cpu")]
