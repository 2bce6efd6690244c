"""One training loop for every model: a generator of ticks that can be watched, stopped, and resumed bitwise.

    for tick in train(model, text, recipe, run="runs/mine"):
        print(tick.step, tick.loss)

A notebook plots the ticks, the command line prints them, a test stops after five. The loop knows of a model only what
`lm.LanguageModel` promises.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import CheckpointError, DiskError, Snapshot
from ..lm import LanguageModel, evaluating
from ..settings import InputError
from ..text import Text, windows
from .muon import Muon


class NotFinite(Exception):
    """Loss, gradient or weights became infinite or NaN; training stopped before using or saving them."""


NOT_FINITE = (
    "the newest checkpoint is from before; try a lower lr, a longer warmup or a smaller clip"
)


class RunError(InputError):
    """The run directory holds another run."""


class InUse(Exception):
    """Another trainer holds the run directory."""


@dataclass(frozen=True)
class Recipe:
    """How to train. `lr` is AdamW's; with `optimizer="muon"`, Muon takes the hidden matrices at `muon_lr`, AdamW the rest."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1  # a step's batch is computed in this many parts
    optimizer: str = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.99
    muon_lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.1  # of matrices; times the learning rate
    clip: float = 1.0  # largest norm of the gradient
    warmup: int = 20
    decay: str = "linear"
    final_lr: float = 0.0  # as a share of the full rate
    average: float = 0.0  # keep an exponential average of the weights with this decay; 0: none
    evaluate_every: int = 0  # steps; 0: only at the end
    save_every: int = 0  # steps; 0: with every evaluation
    precision: str = (
        "float32"  # bfloat16: mixed precision, for GPUs and for CPUs with bfloat16 units
    )
    compile: bool = False  # torch.compile, for GPUs
    seed: int = 1337

    def __post_init__(self):
        least = {"steps": 1, "batch": 1, "accumulate": 1}
        most = {"beta1": 1, "beta2": 1, "momentum": 1, "final_lr": 1, "average": 1}
        choices = {
            "optimizer": ("adamw", "muon"),
            "decay": ("linear", "cosine", "none"),
            "precision": ("float32", "bfloat16"),
        }
        whole, below = (
            {f.name for f in dataclasses.fields(self) if f.type is int or f.type == "int"},
            ("beta1", "beta2", "momentum"),
        )
        for name, value in dataclasses.asdict(self).items():
            low, high = least.get(name, 0), most.get(name, 2**62 if name in whole else math.inf)
            if name in choices:
                if value not in choices[name]:
                    raise InputError(f"{name} is one of {', '.join(choices[name])}; got {value!r}")
            elif not (
                isinstance(value, int if name in whole else (int, float))
                and low <= value <= high
                and math.isfinite(value)
            ) or (name in below and value == high):
                kind = "whole number" if name in whole else "number"
                much = isinstance(value, (int, float)) and value > high
                top = (
                    f"to below {high}"
                    if name in below
                    else "up"
                    if high > 1 and not much
                    else f"to {high:,}"
                )
                raise InputError(f"{name} is a {kind} from {low} {top}; got {value!r}")
        if self.batch % self.accumulate:
            raise InputError(
                f"a batch of {self.batch} cannot be computed in {self.accumulate} equal parts"
            )

    def rate(self, step: int) -> float:
        """-> the learning rate at a step (from 0), as a share of the full one: a linear warm-up, then the decay."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        fall = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "none": 1.0}[
            self.decay
        ]
        return self.final_lr + (1 - self.final_lr) * fall


@dataclass(frozen=True)
class Tick:
    """One step of training. `loss` in nats per character; `seconds` spent on this run so far, earlier sittings included."""

    step: int
    loss: float
    parts: dict[str, float]
    lr: float
    seconds: float
    chars_per_second: float
    gradient: float = 0.0  # norm, before clipping
    characters: int = 0  # trained on so far
    validation: float | None = None  # nats per character, where it was measured
    saved: Path | None = None
    interrupted: int = 0  # the signal that ends training after this step
    notes: tuple[str, ...] = field(default=())  # what happened on resuming


@dataclass(frozen=True)
class Likelihood:
    """Nats per character over a whole text: exact, or an upper bound with a standard error.

    The error is that of the mean over windows, by their spread. It counts how they differ as well as the noise of the draws,
    and is larger than the latter alone.
    """

    nats_per_char: float
    standard_error: float
    characters: int
    exact: bool

    @property
    def bits_per_char(self) -> float:
        return self.nats_per_char / math.log(2)

    def __str__(self) -> str:
        bound = (
            "" if self.exact else f"at most, a bound (standard error {self.standard_error:.4f}), "
        )
        return f"{bound}{self.nats_per_char:.4f} nats per character ({self.bits_per_char:.4f} bits) over {self.characters:,} characters"


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    text: Text,
    *,
    part="val",
    window: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> Likelihood:
    """The likelihood of every character of the validation (or training) part, each scored once.

    The context rule, the same for all models: the part is cut into windows of the model's own length that do not overlap;
    a character is predicted from those before it in its window and the one before the window (for the first window of the
    validation part, the last character of the training part; a text without one before it skips its first character).
    Raises ValueError for a text in another vocabulary than the model's.
    """
    _check_vocabulary(model, text)
    window = window or model.config.window
    ids = getattr(text, part)
    ids = torch.cat([text.train[-1:], ids]) if part == "val" else ids
    whole = (len(ids) - 1) // window
    pages = (
        list(ids[: whole * window + 1].unfold(0, window + 1, window).split(batch)) if whole else []
    )
    if rest := (len(ids) - 1) % window:
        pages.append(ids[None, -rest - 1 :])
    generator = torch.Generator(model.device).manual_seed(seed)
    nats, squares, count = 0.0, 0.0, 0
    with evaluating(model):
        for page in pages:
            row = (
                model.nll(page.to(model.device), generator=generator).cpu().double()
            )  # not every device has doubles
            nats, count = nats + row.sum().item(), count + row.numel()
            squares += (
                ((row.mean(1)) ** 2 * row.shape[1]).sum().item()
            )  # windows weigh by their length
    mean = nats / count
    spread = math.sqrt(
        max(0.0, squares / count - mean**2) / max(1, sum(len(page) for page in pages) - 1)
    )
    return Likelihood(mean, 0.0 if model.exact else spread, count, model.exact)


def _check_vocabulary(model: LanguageModel, text: Text) -> None:
    known = getattr(model, "vocabulary", None)
    if known is not None and known != text.vocabulary:
        raise InputError(
            "the text's characters are not those that the model was trained on: cut the text with the model's vocabulary, "
            "as Text.of(characters, vocabulary=model.vocabulary), or build a new model"
        )


def train(
    model: LanguageModel,
    text: Text,
    recipe: Recipe,
    *,
    run: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Tick]:
    """Train `model` in place, yielding a Tick per step.

    With `run`, a directory, checkpoints and metrics.jsonl are kept there; `resume` goes on from its newest valid
    checkpoint, bitwise as if never stopped; `overwrite` starts it anew. Without `run` nothing is written.
    SIGINT, SIGTERM or SIGHUP (Ctrl-C, an interrupted kernel, a closed terminal): the step ends, a checkpoint is saved and
    the ticks end, the last one with `interrupted`; a second SIGINT quits at once. Whatever else ends the loop between two
    steps, a checkpoint is saved too.

    Raises NotFinite; CheckpointError when the run's checkpoints cannot be used or belong to another model, vocabulary or
    corpus; RunError when the directory holds a run and neither `resume` nor `overwrite` is given; InUse; DiskError.
    """
    if not (
        resume and run is not None and checkpoint.listed(Path(run))
    ):  # or the run's checkpoints say what fits
        _check_vocabulary(model, text)
    if len(text.vocabulary) != model.config.vocabulary:
        raise InputError(
            f"the text has {len(text.vocabulary)} different characters, the model was made for {model.config.vocabulary}"
        )
    if len(text.train) < model.config.window + 1:
        raise InputError(
            f"the training part has {len(text.train):,} characters; one window and its target take {model.config.window + 1}"
        )
    if not len(text.val):
        raise InputError(
            "the validation part is empty: give a longer text, or a smaller share of it to train on"
        )
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if recipe.batch % (world * recipe.accumulate):
        raise InputError(
            f"a batch of {recipe.batch} cannot be shared by {world} processes in {recipe.accumulate} parts each"
        )
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other")
    return _train(model, text, recipe, Path(run) if run is not None else None, resume, overwrite)


def _train(model, text, recipe, run, resume, overwrite):
    validates = lambda step: (
        step == recipe.steps or (recipe.evaluate_every and step % recipe.evaluate_every == 0)
    )
    trainer = Trainer(model, text, recipe)  # what it refuses must not cost an older run
    with _claimed(run, resume, overwrite), _signals() as (caught, listen):
        if trainer.world > 1:
            dist.barrier()  # what the first process swept or put back, all must see
        notes, metrics = trainer.resume(run) if run and resume else (), None
        model.vocabulary = text.vocabulary
        saved_at = trainer.step
        try:
            if (
                trainer.step and trainer.validation is None and validates(trainer.step)
            ):  # the stop came before it
                trainer.validate()
                trainer.save(run)
            metrics = (
                _Metrics(run / "metrics.jsonl", trainer.step, trainer.validation)
                if run and trainer.rank == 0
                else None
            )
            if trainer.step == recipe.steps:  # resumed when there was nothing left to do
                trainer.use_average()
            while trainer.step < recipe.steps:
                tick = trainer.advance()
                last = trainer.step == recipe.steps
                stop = trainer.agree(caught[0] if caught else 0)
                validate = validates(trainer.step)
                due = recipe.save_every and trainer.step % recipe.save_every == 0
                if validate or due or stop:
                    trainer.check_finite(tick.lr)
                if validate and (last or not stop):
                    tick = dataclasses.replace(tick, validation=trainer.validate())
                tick = dataclasses.replace(tick, notes=notes, seconds=trainer.seconds)
                if metrics:  # before the checkpoint: resuming drops a line too many, and cannot write one that is missing
                    metrics.write(tick)
                if run and (validate or due or stop):
                    tick = dataclasses.replace(tick, saved=trainer.save(run))
                    saved_at = trainer.step
                if last:
                    stop = trainer.agree(
                        caught[0] if caught else 0
                    )  # it may have come while validating, and no step follows
                    trainer.use_average()
                notes = ()
                yield dataclasses.replace(tick, interrupted=stop)
                if stop:
                    return
                listen()  # a kernel takes Ctrl-C back with each new cell
        except BaseException as error:  # GeneratorExit too: the caller left the loop
            for note in notes[:-1]:  # why one was skipped, which no tick has told
                warnings.warn(note, stacklevel=2)
            whole = (
                not trainer.midstep
                and trainer.step != saved_at
                and not isinstance(error, (NotFinite, DiskError))
            )
            if run and whole and trainer.world == 1 and trainer.finite():
                if metrics.step < trainer.step:
                    metrics.write(tick)
                trainer.save(run)
            raise
        finally:
            if metrics:
                metrics.close()


class Trainer:
    """The state of one training run and its one step. `train` drives it; use this only to look inside."""

    def __init__(self, model: LanguageModel, text: Text, recipe: Recipe):
        self.model, self.text, self.recipe = model, text, recipe
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else (0, 1)
        )
        self.device = model.device
        self.optimizers = optimizers(model, recipe)
        self.order = torch.Generator().manual_seed(
            recipe.seed
        )  # of the windows; the same in every process
        self.rng = _Rng(
            recipe.seed + 1 + self.rank, self.device
        )  # of dropout and noise; each process its own
        self.average = (
            {n: p.detach().clone() for n, p in model.named_parameters()} if recipe.average else {}
        )
        self.sha256 = (
            text.sha256
            or hashlib.sha256(torch.cat([text.train, text.val]).cpu().numpy().tobytes()).hexdigest()
        )
        self.step, self.seconds, self.speed, self.validation, self.midstep = (
            0,
            0.0,
            0.0,
            None,
            False,
        )
        call = _Loss(model)
        if recipe.compile:
            call = torch.compile(call)
        self.call = nn.parallel.DistributedDataParallel(call) if self.world > 1 else call

    def advance(self) -> Tick:
        """One step: windows, loss, gradients, clip, update. Raises NotFinite before an update that would use it."""
        recipe, began = self.recipe, time.perf_counter()
        self.midstep = True
        rate = recipe.rate(self.step)
        ids = windows(self.text.train, self.model.config.window, recipe.batch, self.order)
        mine = ids[self.rank :: self.world].to(self.device)
        self.model.train()
        loss, parts = 0.0, {}
        with self.rng:
            for i, piece in enumerate(mine.chunk(recipe.accumulate)):
                last = i == recipe.accumulate - 1
                with self.call.no_sync() if self.world > 1 and not last else nullcontext():
                    with torch.autocast(
                        self.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
                    ):
                        piece_loss, piece_parts = self.call(piece)
                    (piece_loss / recipe.accumulate).backward()
                loss += piece_loss.item() / recipe.accumulate
                for name, value in piece_parts.items():
                    parts[name] = parts.get(name, 0.0) + float(value) / recipe.accumulate
        gradient = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            raise NotFinite(
                f"at step {self.step + 1} the loss is {loss:g} and the gradient's norm {gradient:g}, learning rate {recipe.lr * rate:g}: "
                f"stopped before the update; {NOT_FINITE}"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.validation = self.step + 1, None
        if self.average:
            decay = min(
                recipe.average, self.step / (self.step + 10)
            )  # a short memory first, so the start is soon forgotten
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
        spent = time.perf_counter() - began
        speed = ids[:, 1:].numel() / spent
        self.speed = speed if not self.speed else 0.95 * self.speed + 0.05 * speed
        self.seconds += spent
        self.midstep = False
        return Tick(
            self.step,
            loss,
            parts,
            recipe.lr * rate,
            self.seconds,
            self.speed,
            gradient,
            self.characters,
        )

    @property
    def characters(self) -> int:
        return self.step * self.recipe.batch * self.model.config.window

    def validate(self) -> float:
        """-> nats per character over the whole validation part, with the averaged weights if the recipe keeps them."""
        began = time.perf_counter()
        with self.averaged():
            nats = evaluate(self.model, self.text).nats_per_char
        if not math.isfinite(nats):
            raise NotFinite(
                f"after step {self.step} the validation loss is {nats:g}: not saved; {NOT_FINITE}"
            )
        self.validation = nats
        self.seconds += time.perf_counter() - began
        return self.validation

    @contextmanager
    def averaged(self):
        """With the averaged weights inside the block; without an average, nothing changes."""
        if not self.average:
            yield
            return
        raw = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(raw)

    def finite(self) -> bool:
        return all(
            bool(w.isfinite().all())
            for w in (*self.model.state_dict().values(), *self.average.values())
        )

    def check_finite(self, lr: float) -> None:
        """Raises NotFinite before weights that are not finite could be measured or saved: a finite gradient times a huge rate."""
        if not self.finite():
            raise NotFinite(
                f"after step {self.step} the weights are not finite, learning rate {lr:g}: not saved; {NOT_FINITE}"
            )

    def use_average(self) -> None:
        if self.average:
            self._put(self.average)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def agree(self, signum: int) -> int:
        """-> the signal that any of the processes caught, so that all stop after the same step."""
        if self.world == 1:
            return signum
        caught = torch.tensor(signum, device=self.device)
        dist.all_reduce(caught, dist.ReduceOp.MAX)
        return int(caught)

    def describe(self) -> dict:
        return {
            "model": type(self.model).__name__,
            "config": dataclasses.asdict(self.model.config),
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "characters": self.characters,
            "seconds": self.seconds,
            "validation": self.validation,
            "exact": self.model.exact,
            "device": self.device.type,
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "corpus": {
                "source": self.text.source,
                "sha256": self.sha256,
                "training_characters": len(self.text.train),
            },
        }

    def snapshot(self) -> Snapshot:
        memory = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for i, optimizer in enumerate(self.optimizers):
            for p, state in optimizer.state_dict()["state"].items():
                memory |= {f"{i}.{p}.{key}": torch.as_tensor(value) for key, value in state.items()}
        rng = {"order": self.order.get_state()} | self.rng.state(self.world)
        return Snapshot(
            self.model.state_dict(), memory, rng, self.describe(), self.text.vocabulary.characters
        )

    def save(self, run: Path) -> Path | None:
        snapshot = self.snapshot()
        if self.rank != 0:
            return None
        folder = checkpoint.save(run / "checkpoints" / f"step-{self.step:08d}", snapshot)
        checkpoint.tidy(run)
        return folder

    def resume(self, run: Path) -> tuple[str, ...]:
        """Go on from the newest valid checkpoint, if there is any -> what there is to say. Raises CheckpointError."""
        found = checkpoint.listed(run)
        if not found:
            return (f"there is no checkpoint in {run} yet: beginning with step 1",)
        folder, saved, skipped = checkpoint.newest(run)
        try:
            self.fit(folder, saved)
            self.model.load_state_dict(saved.model)
            for i, optimizer in enumerate(self.optimizers):
                state: dict[int, dict] = {}
                for name, tensor in saved.optimizer.items():
                    head, _, rest = name.partition(".")
                    if head == str(i):
                        p, _, key = rest.partition(".")
                        state.setdefault(int(p), {})[key] = tensor
                optimizer.load_state_dict(
                    {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
                )
            for name in self.average:
                self.average[name] = saved.optimizer[f"average.{name}"].to(self.device)
            self.order.set_state(saved.rng["order"])
            self.rng.restore(saved.rng, self.rank)
            self.step, self.seconds = int(saved.config["step"]), float(saved.config["seconds"])
            self.validation = (
                None if saved.config["validation"] is None else float(saved.config["validation"])
            )
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} does not fit: {' '.join(str(error).split())}"
            ) from None
        now = checkpoint.environment() | _around(self.describe(), self.world)
        before = (saved.environment or {}) | _around(
            saved.config, sum(name.startswith("cpu.") for name in saved.rng)
        )
        for name, here in now.items():
            then = before.get(name)  # an older irann did not note all of them
            if None not in (here, then) and here != then:
                warnings.warn(
                    f"{folder} was saved with {name} {then}, here it is {here}: not bitwise from here on",
                    stacklevel=2,
                )
        if self.device.type == "mps":
            warnings.warn(
                f"{folder} does not keep the random generator of mps: not bitwise from here on",
                stacklevel=2,
            )
        newer = found[: found.index(folder)] if self.rank == 0 else []
        names = [checkpoint.set_aside(damaged) for damaged in newer]
        notes = [
            f"skipped, and set aside as {name}: {reason}" for name, reason in zip(names, skipped)
        ]
        return (*notes, f"resumed from {folder} at step {self.step}")

    def fit(self, folder: Path, saved: Snapshot) -> None:
        """Raises CheckpointError that names both values if the checkpoint belongs to another model, text or recipe."""
        ours, theirs = self.describe(), saved.config
        if theirs["model"] != ours["model"]:
            raise CheckpointError(
                f"{folder} holds a {theirs['model']}, not a {ours['model']}: train that, or start another run"
            )
        free = (
            "evaluate_every",
            "save_every",
            "compile",
        )  # the first two do not change the path; of the third, `resume` warns
        for what in ("config", "recipe"):
            for name in sorted(ours[what].keys() | theirs[what].keys()):
                a, b = theirs[what].get(name), ours[what].get(name)
                if a != b and name not in free:
                    raise CheckpointError(
                        f"{folder} was trained with {name} = {a!r}, asked for is {name} = {b!r}: resume as it began, or start another run"
                    )
        if saved.vocabulary != self.text.vocabulary.characters:
            raise CheckpointError(
                f"{folder} knows the characters {saved.vocabulary!r}, this text has {self.text.vocabulary.characters!r}: "
                "resume with the text it began with, or start another run"
            )
        if theirs["corpus"]["sha256"] not in (
            self.sha256,
            self.text.sha256,
        ):  # an older irann noted none where the text has none
            raise CheckpointError(
                f"{folder} was trained on another text: {theirs['corpus']['source']}, "
                f"SHA-256 {theirs['corpus']['sha256'][:12] or 'unknown'}; "
                f"this one is {self.text.source}, {self.sha256[:12]}: resume with the text it began with, or start another run"
            )
        then, here = (
            theirs["corpus"].get("training_characters", len(self.text.train)),
            len(self.text.train),
        )
        if then != here:
            raise CheckpointError(
                f"{folder} was trained on the first {then:,} characters, this text has {here:,} to train on: cut it as before"
            )


def _around(config: dict, processes: int) -> dict:
    """-> of a checkpoint's config, what bitwise resume depends on beside `checkpoint.environment`."""
    return {
        "device": config.get("device"),
        "gpu": config.get("gpu"),
        "compile": config["recipe"].get("compile"),
        "processes": processes,
    }


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of linear layers other than the `head`, and AdamW for the rest.

    Weight decay is for matrices; vectors and parameters marked `no_decay` go without.
    """
    hidden: dict[int, list] = {}
    if recipe.optimizer == "muon":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("head"):
                hidden.setdefault(getattr(module, "stacked", 1), []).append(module.weight)
    taken = {id(p) for group in hidden.values() for p in group}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    decays = [p for n, p in rest if p.ndim >= 2 and not n.endswith(model.no_decay)]
    spared = [p for n, p in rest if p.ndim < 2 or n.endswith(model.no_decay)]
    groups = [
        {"params": decays, "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made = (
        [torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)]
        if groups
        else []
    )
    if hidden:
        made.append(
            Muon(
                [{"params": group, "stacked": k} for k, group in hidden.items()],
                lr=recipe.muon_lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
            )
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return made


class _Loss(nn.Module):
    """The model's loss as a module's call, which is what DistributedDataParallel and torch.compile take hold of."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.loss(ids)


class _Rng:
    """A private stream for dropout and noise: `with rng:` swaps it in for torch's global one, and out again.

    What the caller draws between two steps, a sample or a plot, therefore cannot change what training draws.
    """

    def __init__(self, seed: int, device: torch.device):
        self.cuda = device if device.type == "cuda" else None
        self.cpu_state = torch.Generator().manual_seed(seed).get_state()
        self.cuda_state = (
            torch.Generator(device).manual_seed(seed).get_state() if self.cuda else None
        )

    def __enter__(self):
        self.outer = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self.cuda) if self.cuda else None,
        )
        torch.set_rng_state(self.cpu_state)
        if self.cuda:
            torch.cuda.set_rng_state(self.cuda_state, self.cuda)

    def __exit__(self, *_):
        self.cpu_state = torch.get_rng_state()
        torch.set_rng_state(self.outer[0])
        if self.cuda:
            self.cuda_state = torch.cuda.get_rng_state(self.cuda)
            torch.cuda.set_rng_state(self.outer[1], self.cuda)

    def state(self, world: int) -> dict[str, Tensor]:
        """-> the states of all processes, by rank."""
        mine = {"cpu": self.cpu_state} | ({"cuda": self.cuda_state} if self.cuda else {})
        if world == 1:
            return {f"{name}.0": state for name, state in mine.items()}
        everyone: list = [None] * world
        dist.all_gather_object(everyone, mine)
        return {
            f"{name}.{rank}": state
            for rank, one in enumerate(everyone)
            for name, state in one.items()
        }

    def restore(self, saved: dict[str, Tensor], rank: int) -> None:
        self.cpu_state = saved.get(f"cpu.{rank}", self.cpu_state)  # none of another device's
        if self.cuda:
            self.cuda_state = saved.get(f"cuda.{rank}", self.cuda_state)


class _Metrics:
    """metrics.jsonl: one JSON object per step; on resuming, the lines after the checkpoint are dropped.

    The checkpoint's own line is given its `validation`, which may have been measured only now.
    """

    def __init__(self, path: Path, step: int, validation: float | None = None):
        lines = (
            [
                line
                for line in path.read_text(errors="replace").splitlines()
                if _step_of(line) <= step
            ]
            if path.is_file() and step
            else []
        )
        if lines and validation is not None and _step_of(lines[-1]) == step:
            lines[-1] = json.dumps(json.loads(lines[-1]) | {"validation": validation})
        self.path, self.step = path, step
        with self.writing():
            kept = "".join(line + "\n" for line in lines)
            aside = path.with_suffix(".new")
            aside.write_text(kept)
            os.replace(aside, path)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115  closed by close()

    def write(self, tick: Tick) -> None:
        row = {
            "step": tick.step,
            "loss": tick.loss,
            **tick.parts,
            "lr": tick.lr,
            "gradient": tick.gradient,
        }
        row |= {"seconds": round(tick.seconds, 3), "chars_per_second": round(tick.chars_per_second)}
        if tick.validation is not None:
            row["validation"] = tick.validation
        with self.writing():
            self.file.write(json.dumps(row) + "\n")
        self.step = tick.step

    @contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"{self.path} could not be written ({checkpoint.why(error)}); the checkpoints are intact"
            ) from None

    def close(self) -> None:
        with self.writing():
            self.file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a line that a kill cut off


@contextmanager
def _claimed(run: Path | None, resume: bool, overwrite: bool):
    """Hold the run directory while training. The lock is the operating system's, so it never outlives its process."""
    if run is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(
            run / ".lock", thread_local=False
        )  # whichever thread ends the run frees it
        lock.acquire(timeout=0)
    except filelock.Timeout:
        try:
            owner = (run / "owner.txt").read_text().strip()
        except OSError:
            owner = "another process"
        raise InUse(
            f"{run} is in use by {owner}; wait for it, stop it, or choose another --run"
        ) from None
    except OSError as error:
        raise DiskError(
            f"the run directory {run} cannot be used ({checkpoint.why(error)})"
        ) from None
    try:
        try:
            if overwrite:
                if (run / "checkpoints").exists():
                    shutil.rmtree(run / "checkpoints")
                (run / "metrics.jsonl").unlink(missing_ok=True)
            elif not resume and (
                checkpoint.listed(run)
                or ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
            ):
                raise RunError(
                    f"{run} holds another run; resume it (--resume), start it anew (--overwrite) or choose another --run"
                )
            checkpoint.sweep(run)
            (run / "owner.txt").write_text(
                f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
        except OSError as error:
            raise DiskError(
                f"the run directory {run} cannot be written ({checkpoint.why(error)})"
            ) from None
        yield
    finally:
        (run / "owner.txt").unlink(missing_ok=True)
        lock.release()


@contextmanager
def _signals():
    """Catch SIGINT, SIGTERM and SIGHUP while training -> a list that holds the signal once one came, and a function that
    catches SIGINT anew if Python's own handler has come back. A second SIGINT quits at once.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught, lambda: None
        return

    def note(signum, frame):
        if over:  # a run that began later put us back after we were done
            signal.signal(signum, before[signum])
            signal.raise_signal(signum)
        elif caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            caught.append(signum)
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step; interrupt again to quit at once\n")

    def listen():
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, note)

    over = False
    stops, hangup = (
        [signal.SIGINT, signal.SIGTERM],
        getattr(signal, "SIGHUP", None),
    )  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        stops.append(hangup)
    before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in stops}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught, listen
    finally:
        over = True
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere it may not be set, and `note` steps aside
            for signum, handler in before.items():
                if signal.getsignal(signum) is note:
                    signal.signal(signum, handler)


def progress(ticks: Iterator[Tick], steps: int, **options) -> Iterator[Tick]:
    """Pass the ticks on and draw a bar, in a notebook or a terminal: loss, validation, characters per second, time left."""
    from tqdm.auto import tqdm

    with tqdm(total=steps, unit="step", **options) as bar:
        validation = ""
        for tick in ticks:
            if tick.validation is not None:
                validation = f", val {tick.validation:.4f}"
            if not bar.n:
                bar.initial = bar.n = bar.last_print_n = tick.step - 1
            bar.set_postfix_str(
                f"loss {tick.loss:.3f}{validation}, {tick.chars_per_second:,.0f} chars/s",
                refresh=False,
            )
            bar.update(tick.step - bar.n)
            yield tick
