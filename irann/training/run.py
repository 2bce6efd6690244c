"""A run directory: its lock, its metrics, its checkpoints, and what must fit to go on from them."""

import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from .. import checkpoint
from ..checkpoint import CheckpointError, DiskError, Snapshot
from ..machine import lacks_memory, write_atomically
from ..settings import InputError
from . import replaced
from .processes import gathered
from .state import NotFinite, State

if TYPE_CHECKING:
    from .loop import Tick

FREE = ("evaluate_every", "save_every", "compile")  # a recipe may change these on the way
INEXACT = {  # why a run on such a device cannot be gone on with bitwise
    "cuda": "is of a GPU, where torch adds up some gradients in no fixed order",
    "mps": "does not keep the random generator of mps",
}
IDS = "train and val of SHA-256"  # which an older edition's runs do not tell


class RunError(InputError):
    """The run directory holds another run."""


class InUse(Exception):
    """Another trainer holds the run directory."""


class Run:
    """`with Run(folder, state) as run:` holds the folder while training; None writes nothing.

    Of several processes the first one writes. When the block ends in an error between two steps, as
    when the caller leaves the loop, a checkpoint is saved. The lock is the operating system's, so
    it never outlives its process.
    """

    def __init__(self, folder: Path | None, state: State, *, resume=False, overwrite=False):
        self.state = state
        self.folder = folder or Path()
        self.kept = folder is not None
        self.writes = self.kept and state.rank == 0
        self.resume = resume and self.kept
        self.overwrite = overwrite
        self.saved_at = 0
        self.tick: Tick | None = None  # of the last step that was taken
        self.notes: tuple[str, ...] = ()
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self.lock = filelock.FileLock(self.folder / ".lock", thread_local=False)

    def __enter__(self) -> "Run":
        if not self.kept:
            return self
        size = _check_saveable(self.state.snapshot()) + self.state.memory_to_come()
        try:
            # all wait for the first one, see what it swept or put back, and are refused with it
            refusals = [refusal for refusal in gathered(self._begin(size)) if refusal is not None]
            if refusals:
                raise refusals[0]
            if self.resume:
                self.notes = self._go_on()
            self.saved_at = self.state.step
            if self.writes:
                self.metrics.keep(self.state.step)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                self._rescue(error)
        finally:
            self._release()

    def take_notes(self) -> tuple[str, ...]:
        """-> what happened on resuming, once."""
        notes = self.notes
        self.notes = ()
        return notes

    def write(self, tick: "Tick") -> None:
        if self.writes:
            self.metrics.write(tick)

    def save(self) -> Path | None:
        """Save a checkpoint -> its folder, in the process that writes. Raises DiskError."""
        if not self.kept:
            return None
        snapshot = self.state.snapshot()
        self.saved_at = self.state.step
        if not self.writes:
            return None
        name = f"step-{self.state.step:08d}"
        folder = checkpoint.save(self.folder / "checkpoints" / name, snapshot)
        replaced.settle(self.folder)
        checkpoint.tidy(self.folder)
        return folder

    def amend(self) -> None:
        """Put a validation that was made up for into the newest checkpoint and its metrics."""
        if self.writes:
            self.metrics.keep(self.state.step, self.state.validation)
        self.save()

    # ---------------------------------------------------------------------------- beginning and end

    def _begin(self, size: int) -> Exception | None:
        """Take the folder, in the process that writes -> why that is refused."""
        if not self.writes:
            return None
        try:
            self._claim()
            with _disk(f"the run directory {self.folder} cannot be written"):
                self._clear(size)
        except (InputError, InUse, DiskError) as refusal:
            return refusal
        return None

    def _claim(self) -> None:
        """Take the lock. Raises InUse that names who has it, RunError where a model was saved."""
        if (self.folder / "manifest.json").exists() and not checkpoint.listed(self.folder):
            raise RunError(f"{self.folder} holds a saved model; choose another --run")
        try:
            with _disk(f"the run directory {self.folder} cannot be used"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = "another process"
            with suppress(OSError):
                owner = (self.folder / "owner.txt").read_text("utf-8", "replace").strip()
            way_out = "wait for it, stop it, or choose another --run"
            if owner.startswith(f"process {os.getpid()} on {platform.node()},"):
                way_out = "that is this one: close() its ticks that are still open"
            raise InUse(f"{self.folder} is in use by {owner}; {way_out}") from None

    def _clear(self, size: int) -> None:
        """Make room for this run, or refuse it; sweep what a kill left; say who we are."""
        metrics = self.metrics.path
        checkpoints = self.folder / "checkpoints"
        checkpoint.sweep(self.folder)
        replaced.settle(self.folder)
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        another = bool(checkpoint.listed(self.folder)) or has_metrics
        if another and not self.resume and not self.overwrite:
            raise RunError(
                f"{self.folder} holds another run; resume it (--resume), start it anew "
                "(--overwrite) or choose another --run; in Python: resume=True, overwrite=True"
            )
        old = replaced.of_run(checkpoints, replaced.CHECKPOINT) if self.overwrite else []
        freed = sum(path.stat().st_size for folder in old for path in folder.glob("*"))
        free = shutil.disk_usage(self.folder).free
        if free + freed < size:
            raise DiskError(
                f"a checkpoint of {size:,} bytes in {self.folder} could not be written "
                "(the disk is full: free some space); what is there is intact"
            )
        if old and size <= free:
            replaced.put_aside(self.folder)
        elif self.overwrite:  # nothing to keep, or no room for both
            replaced.remove(self.folder)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {platform.node()}, since {since}\n"
        (self.folder / "owner.txt").write_text(owner, "utf-8", "replace")

    def _release(self) -> None:
        if self.lock.is_locked:
            try:
                replaced.settle(self.folder)
            finally:
                (self.folder / "owner.txt").unlink(missing_ok=True)
                self.lock.release()

    def _rescue(self, error: BaseException) -> None:
        """Save what an error between two steps, or the caller who leaves there, would lose."""
        state = self.state
        # the run ended before its first tick, which would have said why checkpoints were skipped
        for note in self.notes[:-1]:
            warnings.warn(note, stacklevel=2)
        news = state.step != self.saved_at and not state.midstep and state.undisturbed()
        expected = isinstance(error, NotFinite | DiskError)
        if self.writes and news and not expected and state.world == 1 and state.finite():
            if self.tick is not None and self.metrics.step < state.step:
                self.metrics.write(self.tick)
            self.save()

    # ------------------------------------------------------------------------------------- going on

    def _go_on(self) -> tuple[str, ...]:
        """Take over the newest valid checkpoint -> what to say. Raises CheckpointError."""
        found = checkpoint.listed(self.folder)
        if not found:
            return (f"there is no checkpoint in {self.folder} yet: beginning with step 1",)
        folder, saved, skipped = checkpoint.newest(self.folder)
        try:
            _check_fits(folder, saved, self.state)
            self.state.restore(saved)
            self._warn_of_differences(folder, saved)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            if lacks_memory(error):  # which is no fault of the checkpoint
                raise
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder} does not fit: {reason}") from None
        notes = []
        for damaged, reason in zip(found, skipped if self.writes else (), strict=False):
            aside = checkpoint.set_aside(damaged)
            notes.append(f"skipped, and set aside as {aside}: {reason}")
        return (*notes, f"resumed from {folder} at step {self.state.step}")

    def _warn_of_differences(self, folder: Path, saved: Snapshot) -> None:
        before = saved.config["environment"]
        for name, now in self.state.describe()["environment"].items():
            if before.get(name) != now:
                warnings.warn(
                    f"{folder} was saved with {name} {before.get(name)}, here it is {now}: "
                    "not bitwise from here on",
                    stacklevel=2,
                )
        device = self.state.device.type
        if device in INEXACT:
            warnings.warn(f"{folder} {INEXACT[device]}: not bitwise from here on", stacklevel=2)


def _check_fits(folder: Path, saved: Snapshot, state: State) -> None:
    """Raises CheckpointError naming both values for another model's, text's or recipe's one."""
    vocabulary = state.text.vocabulary.characters
    theirs = _identity(saved.config, saved.vocabulary)
    ours = _identity(json.loads(json.dumps(state.describe())), vocabulary)
    known = state.model.config.settings() | state.recipe.settings()
    # what an older irann could not be told was as it is by default
    default = {name: setting.default for name, setting in known.items()}
    for name in theirs | ours:
        then, now = theirs.get(name, default.get(name)), ours.get(name)
        older = name == IDS and not then
        if then != now and name not in FREE and not older:
            raise CheckpointError(
                f"{folder} was trained with {name} = {then!r}, asked for is {name} = {now!r}: "
                "resume as it began, or start another run"
            )


def _identity(config: dict[str, Any], vocabulary: str) -> dict[str, Any]:
    """-> what a run is and stays, by name; a text is known by its SHA-256."""
    corpus = config["corpus"]
    return {
        "model": config["model"],
        **config["config"],
        **config["recipe"],
        "frozen parameters": config["frozen"],
        "targets of SHA-256": (config.get("targets") or "none")[:16],
        "characters": vocabulary,
        "text of SHA-256": corpus["sha256"][:16],
        "training characters": corpus["training_characters"],
        IDS: corpus.get("ids", "")[:16],
    }


def _check_saveable(snapshot: Snapshot) -> int:
    """-> its checkpoint's size in bytes, nearly. Raises InputError early for what none can hold."""
    try:
        size = len(json.dumps(snapshot.config, allow_nan=False))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"this training could not be saved: {reason}") from None
    parts = (snapshot.model, snapshot.optimizer, snapshot.rng)
    return size + sum(tensor.nbytes for part in parts for tensor in part.values())


class Metrics:
    """metrics.jsonl: one JSON object per step; resuming drops the lines after the checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.step = 0

    def keep(self, step: int, validation: float | None = None) -> None:
        """Keep the lines up to `step`; its own learns a validation that was measured only now."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        lines = [line for line in lines if _step_of(line) <= step]
        if lines and validation is not None and _step_of(lines[-1]) == step:
            lines[-1] = json.dumps(json.loads(lines[-1]) | {"validation": validation})
        with _disk(f"{self.path} could not be written", "; the checkpoints are intact"):
            write_atomically(self.path, "".join(line + "\n" for line in lines).encode())
        self.step = step

    def write(self, tick: "Tick") -> None:
        row = {"step": tick.step, "loss": tick.loss, **tick.parts}
        row |= {"lr": tick.lr, "grad_norm": tick.grad_norm, "seconds": round(tick.seconds, 3)}
        row["chars_per_second"] = round(tick.chars_per_second)
        if tick.validation is not None:
            row["validation"] = tick.validation
        with _disk(f"{self.path} could not be written", "; the checkpoints are intact"):
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.step = tick.step


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a line that a kill cut off


@contextmanager
def _disk(what: str, consequence: str = "") -> Iterator[None]:
    """What the operating system refuses inside the block is a DiskError in one sentence."""
    try:
        yield
    except OSError as error:
        if isinstance(error, filelock.Timeout):  # which is one, too
            raise
        raise DiskError(f"{what} ({checkpoint.why(error)}){consequence}") from None
