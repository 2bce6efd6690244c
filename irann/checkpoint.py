"""Whole checkpoints or none: safetensors and JSON, hashed, written aside and renamed as one.

A checkpoint is a directory, `checkpoints/step-00000100` of its run:

    model.safetensors       the weights
    optimizer.safetensors   what optimizers remember, by parameter, and averages
    rng.safetensors         the state of every random generator that training draws from
    config.json             model, config, recipe, how far it is, corpus, machine
    vocabulary.json         the characters, in order of id
    manifest.json           format version, size and SHA-256 of each file; written last

It is written under a temporary name, flushed to the disk and renamed, so a kill at any moment
leaves the old ones whole. Nothing here can execute anything: no pickle, and no name in a file is
ever imported.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from .kernels import native

FORMAT = 2
TENSORS = ("model", "optimizer", "rng")
FILES = (*(f"{part}.safetensors" for part in TENSORS), "config.json", "vocabulary.json")
UNFINISHED = ".unfinished-"
OLDER_RECIPE = {"average": "ema_decay", "decay": "lr_schedule", "final_lr": "final_lr_factor"}


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted or does not fit; the message names file and reason."""


class DiskError(Exception):
    """A checkpoint that could not be written, most often for a full disk; older ones are intact."""


@dataclass(frozen=True)
class Snapshot:
    """Everything training needs to go on as if it had never stopped."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    config: dict
    vocabulary: str


def environment() -> dict[str, Any]:
    """-> what bitwise resume depends on beside the files, as far as this machine goes.

    `kernel` says whether the scan's kernel in C can be had, as far as that shows without building
    it.
    """
    try:
        compiler = (shlex.split(os.environ.get("CC", "")) or ["cc"])[0]
    except ValueError:  # a quote is not closed
        compiler = ""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernel": not native.switched_off() and shutil.which(compiler) is not None,
    }


def packed(snapshot: Snapshot) -> dict[str, bytes]:
    """-> the files of a checkpoint, manifest last. Raises TypeError, ValueError or RuntimeError for
    what they cannot hold.
    """
    files = {}
    for part in TENSORS:
        # on the CPU, contiguous, and no two sharing memory, as safetensors wants them
        tensors = getattr(snapshot, part).items()
        plain = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors}
        files[f"{part}.safetensors"] = tensors_to_bytes(plain)
    files["config.json"] = _json(snapshot.config)
    files["vocabulary.json"] = _json(list(snapshot.vocabulary))
    listing = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    environment = snapshot.config.get("environment", {})
    manifest = {"format": FORMAT, "environment": environment, "files": listing}
    files["manifest.json"] = _json(manifest)
    return files


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot to `folder`, there whole or not at all -> folder. Raises DiskError."""
    folder = Path(folder)
    files = packed(snapshot)
    older = list(_moved_away(folder))  # by processes that were killed, or that we overtake
    aside = before = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = _folder_beside(folder)
        for name, data in files.items():
            with open(aside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _fsync(aside)
        if folder.exists():  # out of the way, put back below unless the new one takes its place
            before = _folder_beside(folder)
            os.rename(folder, before / folder.name)
        os.rename(aside, folder)
        _fsync(folder.parent)
        for replaced in older:
            shutil.rmtree(replaced, ignore_errors=True)
            with suppress(OSError):
                replaced.parent.rmdir()
    except OSError as error:
        raise DiskError(
            f"the checkpoint {folder} could not be written ({why(error)}); the older ones are "
            "intact"
        ) from None
    finally:
        for unfinished in (before, aside):
            if unfinished is not None:
                _put_back_and_remove(unfinished)
    return folder


def _folder_beside(folder: Path) -> Path:
    """-> a new folder, which others may read as the umask has it; tempfile's are for us alone."""
    made = folder.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
    made.mkdir()
    return made


def _put_back_and_remove(unfinished: Path) -> None:
    """Remove a temporary folder; first put back a whole checkpoint in it that was not replaced."""
    for whole in unfinished.glob("*/"):
        if not (unfinished.parent / whole.name).exists():
            try:
                os.rename(whole, unfinished.parent / whole.name)
            except OSError:
                return  # it stays where it is, for the next sweep
    shutil.rmtree(unfinished, ignore_errors=True)


def found(folder: Path) -> Path:
    """-> the folder, or, if a process was killed while it replaced it, where the old one lies."""
    if folder.exists():
        return folder
    return next(_moved_away(folder), folder)


def _moved_away(folder: Path) -> Iterator[Path]:
    """Yields the older versions of a checkpoint that were being replaced."""
    return folder.parent.glob(f"{UNFINISHED}*/{glob.escape(folder.name)}")


def holds_any(folder: Path) -> bool:
    """-> whether any file of a checkpoint is in a folder."""
    return any((folder / name).exists() for name in (*FILES, "manifest.json"))


def replaceable(folder: Path) -> bool:
    """-> whether nothing but a checkpoint is lost with what lies at `folder`: it is nothing, an
    empty folder, or one that holds the files of a checkpoint and no others.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    names = os.listdir(folder)
    if not names:
        return True
    if set(names) - {*FILES, "manifest.json"}:
        return False
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
        return type(content["format"]) is int and isinstance(content["files"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def why(error: OSError) -> str:
    """-> the reason of a failed write, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full: free some space"
    return error.strerror or str(error)


def load(folder: Path) -> Snapshot:
    """A checkpoint directory -> its snapshot, every byte checked first. Raises CheckpointError."""
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; a checkpoint is a directory of safetensors and JSON with a "
            "manifest.json, and pickled files (.pt, .pth, .bin) are never opened"
        )
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    manifest = _read_manifest(folder / "manifest.json")
    listing = manifest["files"]
    data = {}
    for name in FILES:
        data[name] = _read(folder / name)
        size = len(data[name])
        listed_size = listing[name]["size"]
        if size != listed_size:
            raise CheckpointError(
                f"{folder / name} has {size:,} bytes, its manifest.json says {listed_size!r}: it "
                "was cut off or padded"
            )
        if _sha256(data[name]) != listing[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is not the one in its manifest.json"
            )
    try:
        tensors = {part: tensors_from_bytes(data[f"{part}.safetensors"]) for part in TENSORS}
        config = json.loads(data["config.json"])
        characters = json.loads(data["vocabulary.json"])
        vocabulary = "".join(characters)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error})") from None
    if not isinstance(config, dict) or sorted(set(vocabulary)) != characters:
        raise CheckpointError(f"{folder} cannot be read (its config or its vocabulary is not one)")
    environment = config.get("environment", {})
    if manifest.get("environment", environment) != environment:  # older ones have none
        raise CheckpointError(
            f"{folder / 'manifest.json'} is damaged: its environment is not the one in config.json"
        )
    if isinstance(recipe := config.get("recipe"), dict):
        config["recipe"] = renamed(recipe)
    return Snapshot(**tensors, config=config, vocabulary=vocabulary)


def renamed(recipe: dict) -> dict:
    """A recipe as an older irann may have called its settings -> as they are called now."""
    recipe = {OLDER_RECIPE.get(name, name): value for name, value in recipe.items()}
    if recipe.get("lr_schedule") == "none":
        recipe["lr_schedule"] = "constant"
    return recipe


def listed(run: Path) -> list[Path]:
    """-> the checkpoints of a run, newest first, valid or not. Raises OSError if it may not be
    read.
    """
    folder = Path(run) / "checkpoints"
    found = [
        p
        for p in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"step-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest(run: Path) -> tuple[Path, Snapshot, list[str]]:
    """-> a run's newest valid checkpoint, why newer ones failed. Raises CheckpointError if none."""
    return _first_whole(run, listed(run))


def best(run: Path) -> tuple[Path, Snapshot, list[str]]:
    """-> the valid checkpoint of lowest validation loss, else the newest; and what was skipped."""
    folders = listed(run)
    # one whose config cannot be read may be the best: it is tried first, so that it is named
    unreadable = [folder for folder in folders if not config_of(folder)]
    return _first_whole(run, unreadable + by_validation(folders) + folders)


def _first_whole(run: Path, folders: list[Path]) -> tuple[Path, Snapshot, list[str]]:
    """-> the first checkpoint that can be loaded, why those before cannot. CheckpointError: none"""
    skipped: list[str] = []
    for folder in dict.fromkeys(folders):
        try:
            return folder, load(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    if not skipped:
        raise CheckpointError(f"{run} has no checkpoint yet; wait for it, or go on (--resume)")
    reasons = "; ".join(skipped)
    raise CheckpointError(f"no valid checkpoint in {run}: {reasons}; train it anew (--overwrite)")


def by_validation(folders: list[Path]) -> list[Path]:
    """-> those that recorded a validation loss, the lowest first."""
    scored = [(value, folder) for folder in folders if (value := validation_of(folder)) is not None]
    return [folder for _, folder in sorted(scored)]


def validation_of(folder: Path) -> float | None:
    """-> the validation loss that a checkpoint recorded; None if it has none or is unreadable."""
    value = config_of(folder).get("validation")
    return float(value) if isinstance(value, int | float) else None


def config_of(folder: Path) -> dict:
    """-> what a checkpoint says of itself, unchecked; {} where that cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def tidy(run: Path) -> None:
    """Keep only the two newest checkpoints, the best, and if that is damaged the next best."""
    folders = listed(run)
    if not folders[2:]:
        return
    spared = set(folders[:2])
    for folder in by_validation(folders):
        spared.add(folder)
        with suppress(CheckpointError):
            load(folder)
            break
    for folder in set(folders) - spared:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> str:
    """Rename a checkpoint that was skipped -> its new name: it counts no more, but can be seen.

    Its steps are trained again; under its old name `tidy` would take it for the newest and remove
    valid ones behind it.
    """
    aside = folder.with_name("skipped-" + folder.name)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    except OSError as error:
        raise DiskError(f"{folder} cannot be renamed ({why(error)})") from None
    return aside.name


def sweep(run: Path) -> int:
    """Remove what a kill left half-written -> how many; what was being replaced is put back."""
    left = list((Path(run) / "checkpoints").glob(UNFINISHED + "*"))
    for folder in left:
        _put_back_and_remove(folder)
    return len(left)


def check_file(path: Path, digest: str) -> None:
    """Raises CheckpointError if the file at `path` does not have this SHA-256."""
    if _sha256(_read(Path(path))) != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one on its card")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """-> format, environment, size and SHA-256 of each file. Another spelling of the same content
    is refused, too.
    """
    data = _read(path)
    try:
        content = json.loads(data)
        version = content["format"]
        known = {"environment", "files", "format"}
        whole = {"files", "format"} <= content.keys() <= known and _json(content) == data
        listing = content["files"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not the manifest of a checkpoint") from None
    if type(version) is int and version != FORMAT:
        raise CheckpointError(
            f"{path} has format version {version}, this irann reads version {FORMAT}: train "
            "the run anew (--overwrite), or go on with the irann that began it"
        )
    if not whole or type(version) is not int:
        raise CheckpointError(f"{path} is damaged: it is not as it was written")
    for name in FILES:
        entry = listing.get(name) if isinstance(listing, dict) else None
        if not isinstance(entry, dict) or sorted(entry) != ["sha256", "size"]:
            raise CheckpointError(f"{path} does not list {name}")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def _fsync(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
