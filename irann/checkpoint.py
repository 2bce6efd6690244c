"""Checkpoints that are whole or are not there: safetensors and JSON, hashed, written aside and renamed as one.

A checkpoint is a directory, `checkpoints/step-00000100` of its run:

    model.safetensors       the weights
    optimizer.safetensors   what the optimizer remembers, and averaged weights if the recipe keeps them
    rng.safetensors         the state of every random generator that training draws from
    config.json             which model, its config, its recipe, how far it is, the corpus
    vocabulary.json         the characters, in order of id
    manifest.json           format version, versions, threads, processor, size and SHA-256 of each file; written last

It is written under a temporary name, flushed to the disk and renamed, so a kill at any moment leaves the old ones whole.
Nothing here can execute anything: no pickle, and no name in a file is ever imported.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

FORMAT = 1
TENSORS = ("model", "optimizer", "rng")
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "config.json",
    "vocabulary.json",
)
UNFINISHED = ".unfinished-"


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted, or does not fit; the message names the file and the reason."""


class DiskError(Exception):
    """A checkpoint that could not be written, most often because the disk is full; the older ones are intact."""


@dataclass(frozen=True)
class Snapshot:
    """Everything training needs to go on as if it had never stopped."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    config: dict
    vocabulary: str
    environment: dict | None = None  # versions and threads of the machine that saved it


def environment() -> dict:
    """-> what bitwise resume depends on beside the files: versions, the number of threads, the processor's instructions, and
    whether core/scan.c can be had, as far as that shows without building it.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernel": os.environ.get("IRANN_KERNEL") != "0"
        and shutil.which(os.environ.get("CC", "cc")) is not None,
    }


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot to `folder`, which appears whole or not at all -> folder. Raises DiskError."""
    folder = Path(folder)
    files = {
        f"{part}.safetensors": tensors_to_bytes(_plain(getattr(snapshot, part))) for part in TENSORS
    }
    files["config.json"] = _json(snapshot.config)
    files["vocabulary.json"] = _json(list(snapshot.vocabulary))
    listing = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    files["manifest.json"] = _manifest(
        {"format": FORMAT, "environment": environment(), "files": listing}
    )
    aside = before = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        for name, data in files.items():
            with open(aside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _fsync(aside)
        if folder.exists():  # out of the way in no time, and removed when the new one is there
            before = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
            os.rename(folder, before / folder.name)
        os.rename(aside, folder)
        _fsync(folder.parent)
    except OSError as error:
        raise DiskError(
            f"the checkpoint {folder} could not be written ({why(error)}); the older ones are intact"
        ) from None
    finally:
        for left in filter(None, (before, aside)):
            _put_back_and_remove(left)
    return folder


def _put_back_and_remove(unfinished: Path) -> None:
    """Remove a temporary folder; a whole checkpoint in it, which was about to be replaced by one that never came, is put back first."""
    for whole in unfinished.glob("step-*"):
        if not (unfinished.parent / whole.name).exists():
            try:
                os.rename(whole, unfinished.parent / whole.name)
            except OSError:
                return  # it stays where it is, for the next sweep
    shutil.rmtree(unfinished, ignore_errors=True)


def why(error: OSError) -> str:
    """-> the reason of a failed write, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full: free some space"
    return error.strerror or str(error)


def load(folder: Path) -> Snapshot:
    """A checkpoint directory -> its snapshot, every byte checked first. Raises CheckpointError with file and reason."""
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; a checkpoint is a directory of safetensors and JSON with a manifest.json, "
            "and pickled files (.pt, .pth, .bin) are never opened"
        )
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    manifest = _read_manifest(folder / "manifest.json")
    data = {}
    for name in FILES:
        data[name] = _read(folder / name)
        try:
            size, digest = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
            told = f"{size:,}"
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{folder / 'manifest.json'} does not list {name}") from None
        if len(data[name]) != size:
            raise CheckpointError(
                f"{folder / name} has {len(data[name]):,} bytes, its manifest says {told}: it was cut off or padded"
            )
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is not the one in its manifest"
            )
    try:
        tensors = {part: tensors_from_bytes(data[f"{part}.safetensors"]) for part in TENSORS}
        config, characters = json.loads(data["config.json"]), json.loads(data["vocabulary.json"])
        vocabulary = "".join(characters)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error})") from None
    if (
        not isinstance(config, dict) or sorted(set(vocabulary)) != characters
    ):  # well hashed, and yet not what `save` writes
        raise CheckpointError(f"{folder} cannot be read (its config or its vocabulary is not one)")
    return Snapshot(
        **tensors, config=config, vocabulary=vocabulary, environment=manifest.get("environment")
    )


def listed(run: Path) -> list[Path]:
    """-> the checkpoints of a run, newest first, valid or not."""
    found = [
        p
        for p in (Path(run) / "checkpoints").glob("step-*")
        if p.name[5:].isdecimal() and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def newest(run: Path) -> tuple[Path, Snapshot, list[str]]:
    """-> the newest valid checkpoint of a run, and why each newer one was skipped. Raises CheckpointError if none is valid."""
    skipped = []
    for folder in listed(run):
        try:
            return folder, load(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    reasons = "; ".join(skipped) or "it has none yet"
    raise CheckpointError(f"no valid checkpoint in {run}: {reasons}; train it anew (--overwrite)")


def best(run: Path) -> tuple[Path, Snapshot, list[str]]:
    """-> the valid checkpoint with the lowest validation loss, or the newest where none was validated; and what was skipped."""
    scored = [
        (value, folder) for folder in listed(run) if (value := validation_of(folder)) is not None
    ]
    skipped = []
    for _, folder in sorted(scored):
        try:
            return folder, load(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    folder, snapshot, more = newest(run)
    return folder, snapshot, skipped + more


def validation_of(folder: Path) -> float | None:
    """-> the validation loss that a checkpoint recorded, None where it has none or cannot be read."""
    try:
        value = json.loads((folder / "config.json").read_bytes()).get("validation")
        return float(value) if value is not None else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def tidy(run: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` checkpoints and the best by validation loss; if that is damaged, the next best stays too."""
    folders = listed(run)
    spared = set(folders[:keep])
    scored = [(value, folder) for folder in folders if (value := validation_of(folder)) is not None]
    for _, folder in sorted(scored) if folders[keep:] else ():
        spared.add(folder)
        with suppress(CheckpointError):
            load(folder)
            break
    for folder in folders:
        if folder not in spared:
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> str:
    """Rename a checkpoint that had to be skipped, so that it counts no more and stays for whoever wants to look -> its new name.

    Its steps are trained again; under its old name `tidy` would take it for the newest, and remove the valid ones behind it.
    """
    aside = folder.with_name("skipped-" + folder.name)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    except OSError as error:
        raise DiskError(f"{folder} cannot be renamed ({why(error)})") from None
    return aside.name


def sweep(run: Path) -> int:
    """Remove what a kill left half-written -> how many. What it caught half-way through being replaced is put back."""
    left = list((Path(run) / "checkpoints").glob(UNFINISHED + "*"))
    for folder in left:
        _put_back_and_remove(folder)
    return len(left)


def check_file(path: Path, digest: str) -> None:
    """Raises CheckpointError if the file at `path` does not have this SHA-256."""
    if hashlib.sha256(_read(Path(path))).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one on its card")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two sharing memory, as safetensors wants them."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _json(value) -> bytes:
    return (
        json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n"
    ).encode()


def _manifest(content: dict) -> bytes:
    """The manifest carries its own hash, so that no byte of it can change unnoticed either."""
    return _json(content | {"sha256": hashlib.sha256(_json(content)).hexdigest()})


def _read_manifest(path: Path) -> dict:
    data = _read(path)
    try:
        content = json.loads(data)
        content.pop("sha256")
        whole = _manifest(content) == data
        version = content["format"]
        content["environment"] = {} | (content.get("environment") or {})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is not the manifest of a checkpoint") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged: its content does not fit its own SHA-256")
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format version {version}, this irann reads version {FORMAT}"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (
            "is missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({error.strerror})"
        )
        raise CheckpointError(f"{path} {reason}") from None


def _fsync(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
