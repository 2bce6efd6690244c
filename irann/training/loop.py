"""The training loop of every model: a generator of ticks to watch, stop, and resume bitwise.

    for tick in train(model, text, recipe, run="runs/mine"):
        print(tick.step, tick.loss)

A notebook plots the ticks, the command line prints them, a test stops after five. The loop knows of
a model only what `lm.LanguageModel` promises.
"""

import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from .. import checkpoint
from ..lm import LanguageModel, Loss
from ..settings import InputError
from ..text import Text, window_positions
from .distillation import check_targets
from .evaluation import check_kinds, check_trainable, check_vocabulary, evaluate
from .processes import gathered, summed
from .recipe import Recipe
from .run import Run
from .signals import Signals
from .state import NotFinite, State

TRAINS = "a training goes on while one goes through it, as in: for tick in irann.train(...): ..."


@dataclass(frozen=True)
class Tick:
    """A step: `loss` in nats per character, `seconds` of the run, earlier sittings included."""

    step: int
    loss: float
    parts: dict[str, float]
    lr: float  # AdamW's in this step; Muon's is as much of `muon_lr`
    seconds: float
    chars_per_second: float
    grad_norm: float = 0.0  # before clipping
    characters: int = 0  # trained on so far
    validation: float | None = None  # nats per character, where it was measured
    saved: Path | None = None
    interrupted: int = 0  # the signal that ends training after this step
    notes: tuple[str, ...] = ()  # what happened on resuming


def train(
    model: LanguageModel,
    text: Text,
    recipe: Recipe,
    *,
    run: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], int | None] | None = None,
    targets: Float[Tensor, "t v"] | None = None,
) -> Generator[Tick, None, None]:
    """Train `model` in place, yielding a Tick per step.

    `targets`, as `soft_targets` gives them, are probabilities of every character of the training
    part, which a model that reads from left to right learns in place of the characters themselves.

    With `run`, a directory, checkpoints and metrics.jsonl are kept there; `resume` goes on from its
    newest valid checkpoint, on a CPU bitwise as if never stopped; `overwrite` starts it anew.
    Without `run` nothing is written. `stop` is asked after each step. Once it answers with a
    signal's number (as `Signals` does), a checkpoint is saved and the ticks end, the last one with
    `interrupted`. A SIGINT, SIGTERM or SIGHUP that comes while a step runs does the same where its
    handler is the default one; a second SIGINT quits at once. Between two steps the generator holds
    no handler; whatever else ends the loop there, a checkpoint is saved too: at once in `watch` and
    `progress` or where the generator has no name, else at its `close()`. The model stays in
    training mode, with its averaged weights if the recipe keeps them, or after a `break` with the
    raw ones.

    Raises NotFinite; InputError for what cannot be trained; CheckpointError when the run's
    checkpoints cannot be used or belong to another model, vocabulary or corpus; RunError when the
    directory holds a run and neither `resume` nor `overwrite` is given; InUse; DiskError.
    """
    check_kinds(model, text)
    if not isinstance(recipe, Recipe):
        raise InputError(
            "a recipe comes third: irann.Recipe(...), or the second of what irann.recipe gives; "
            f"got a {type(recipe).__name__}"
        )
    if run is not None and not os.fspath(run):
        raise InputError("run is empty: name a directory, or leave it out to keep nothing")
    folder = None if run is None else Path(run)
    if not (resume and folder is not None and checkpoint.listed(folder)):
        check_vocabulary(model, text)  # otherwise the run's checkpoints say what fits
    check_trainable(model, text, recipe)
    if targets is not None:
        check_targets(targets, model, text)
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other")
    if folder is None and (resume or overwrite):
        raise InputError("resume and overwrite are about a run: say which, with run=...")
    begun: list[bool] = []  # not empty once the first step is asked for
    ticks = _train(model, text, recipe, targets, folder, resume, overwrite, stop, begun)
    # Who writes `irann.train(...)` without a loop trains nothing: the repr that a notebook shows
    # says so, and so does a warning when the unused generator is thrown away.
    ticks.__qualname__ = TRAINS  # pyright: ignore[reportAttributeAccessIssue]
    weakref.finalize(ticks, _check_begun, begun).atexit = False
    return ticks


def _check_begun(begun: list[bool]) -> None:
    if not begun:
        warnings.warn(f"nothing was trained: {TRAINS}", stacklevel=2)


def _train(
    model: LanguageModel,
    text: Text,
    recipe: Recipe,
    targets: Tensor | None,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    stop: Callable[[], int | None] | None,
    begun: list[bool],
) -> Generator[Tick, None, None]:
    begun.append(True)
    state = State(model, text, recipe, targets)
    loss_of = _loss_of(model, recipe, state.world)
    characters = recipe.batch * model.config.window
    speed = 0.0
    with Run(folder, state, resume=resume, overwrite=overwrite) as run:
        model.vocabulary = text.vocabulary
        if state.average is not None:
            state.average.vocabulary = text.vocabulary
        model.card = {"corpus": state.corpus()}  # a card of other weights says nothing of these
        if state.step and state.validation is None and _is_validation_due(recipe, state.step):
            _validate(state, "measured on resuming")  # the run was stopped before it
            run.amend()
        if state.step == recipe.steps:
            state.use_average()
        for step in range(state.step + 1, recipe.steps + 1):
            with Signals() as caught:
                began = time.perf_counter()
                lr = recipe.lr * recipe.lr_factor(step - 1)
                with state.stepping():
                    loss, parts, grad_norm = _step(state, loss_of)
                spent = time.perf_counter() - began
                state.seconds += spent
                now = characters / spent
                speed = 0.95 * speed + 0.05 * now if speed else now  # a running mean
                tick = Tick(
                    step, loss, parts, lr, state.seconds, speed, grad_norm, state.characters
                )
                tick = _after(state, run, tick, partial(_agreed, caught, stop))
            yield tick
            if tick.interrupted:
                return


def _step(state: State, loss_of: nn.Module) -> tuple[float, dict[str, float], float]:
    """One update of the weights -> the loss, its parts, and the gradient's norm before clipping."""
    model, recipe = state.model, state.recipe
    model.train()
    for total in model.observed():
        # left over from a step that failed, or from a loss computed outside the trainer
        total.zero_()
    # Every process draws the whole batch, windows and noise, and takes its rows: the objective of a
    # step does not depend on how a batch is cut into pieces.
    text = state.text.train
    where = window_positions(len(text), model.config.window, recipe.batch, state.order)
    ids = text[where].to(state.device)
    draws = model.draw(ids, generator=state.draws)
    if state.targets is not None:
        draws["targets"] = state.targets[where].to(state.device)
    model.zero_grad(set_to_none=True)  # a notebook may have called backward itself
    told = _gradients(loss_of, state, ids, draws)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
    loss, parts, grad_norm = _read(told, norm, state.world)
    factor = recipe.lr_factor(state.step)
    _check_step(state, loss, grad_norm, recipe.lr * factor)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
    model.zero_grad(set_to_none=True)
    if state.world > 1:
        for total in model.observed():
            dist.all_reduce(total)
    model.absorb()
    state.step += 1
    state.validation = None
    state.update_average()
    return loss, parts, grad_norm


def _after(state: State, run: Run, tick: Tick, asked: Callable[[], int]) -> Tick:
    """After an update: validate and save where it is time, or where a signal ends the training."""
    run.tick = tick
    last = state.step == state.recipe.steps
    validates = _is_validation_due(state.recipe, state.step)
    interrupted = asked()
    saves = validates or interrupted or _due(state.recipe.save_every, state.step)
    update = f"gradient's norm {tick.grad_norm:g}, learning rate {tick.lr:g}"
    if saves:
        state.check_finite(update)
    if validates and (last or not interrupted):
        _validate(state, update)
        interrupted = interrupted or asked()
    tick = replace(
        tick,
        seconds=state.seconds,
        validation=state.validation,
        interrupted=interrupted,
        notes=run.take_notes(),
    )
    # the line before the checkpoint: resuming drops a line too many, but cannot write a missing one
    run.write(tick)
    if saves:
        saved = run.save()
        interrupted = interrupted or asked()
        tick = replace(tick, saved=saved, interrupted=interrupted)
    if last or interrupted:
        state.use_average()
    return tick


def _gradients(loss_of: nn.Module, state: State, ids: Tensor, draws: dict[str, Any]) -> list[Loss]:
    """Backward through the whole batch -> each piece's loss and parts, which nobody has read."""
    recipe = state.recipe
    told = []
    size = recipe.batch // recipe.accumulate  # of a piece, in all processes together
    for i in range(recipe.accumulate):
        rows = slice(i * size + state.rank, (i + 1) * size, state.world)
        last = i + 1 == recipe.accumulate
        alone = state.world == 1 or last  # gradients are exchanged once, with the last piece
        with nullcontext() if alone else loss_of.no_sync():  # pyright: ignore[reportCallIssue]
            mixed = recipe.precision == "bfloat16"
            with torch.autocast(state.device.type, torch.bfloat16, enabled=mixed):
                piece_loss, piece_parts = loss_of(ids[rows], _rows_of(draws, rows))
            (piece_loss / recipe.accumulate).backward()
        told.append((piece_loss.detach(), piece_parts))
    return told


def _read(told: list[Loss], norm: Tensor, world: int) -> tuple[float, dict[str, float], float]:
    """-> the loss and its parts, means over pieces and processes, and the gradient's norm.

    To read makes a GPU wait: once, when it has been given all that leads to the gradient.
    """
    names = list(told[0][1])
    pieces = [[piece_loss, *(parts[name] for name in names)] for piece_loss, parts in told]
    unread = [torch.as_tensor(value, device=norm.device) for piece in pieces for value in piece]
    grad_norm, *numbers = torch.hstack([norm, *unread]).tolist()
    means = [sum(numbers[i :: len(pieces[0])]) / len(told) for i in range(len(pieces[0]))]
    loss, *parts = (total / world for total in summed(means))
    return loss, dict(zip(names, parts, strict=True)), grad_norm


def _rows_of(draws: dict[str, Any], rows: slice) -> dict[str, Any]:
    """-> the draws of some rows of the batch; what has no batch axis is everybody's."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim else value
        for name, value in draws.items()
    }


def _check_step(state: State, loss: float, grad_norm: float, lr: float) -> None:
    """Raises NotFinite before an update that would spoil the weights."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        state.model.zero_grad(set_to_none=True)
        raise NotFinite(
            f"at step {state.step + 1} the loss is {loss:g} and the gradient's norm {grad_norm:g}, "
            f"learning rate {lr:g}: stopped before the update"
        )


def _is_validation_due(recipe: Recipe, step: int) -> bool:
    return _due(recipe.evaluate_every, step) or step == recipe.steps


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _validate(state: State, update: str) -> None:
    """Nats per character of the validation part, with averaged weights if the recipe has them."""
    began = time.perf_counter()
    nats = evaluate(state.averaged(), state.text, share=True).nats_per_char
    if not math.isfinite(nats):
        told = f"after step {state.step} the validation loss is {nats:g}, {update}: not saved"
        raise NotFinite(told)
    state.validation = nats
    state.seconds += time.perf_counter() - began


def _agreed(caught: Signals, stop: Callable | None) -> int:
    """-> the signal that ends training, if any process has one: all stop after the same step."""
    signum = caught()
    if stop is not None:
        signum = int(stop() or signum)
    return max(gathered(signum))


class _Loss(nn.Module):
    """The model's loss as a module's call, for DistributedDataParallel and torch.compile."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, draws: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(ids, draws)


def _loss_of(model: LanguageModel, recipe: Recipe, world: int) -> nn.Module:
    call: Any = _Loss(model)
    if recipe.compile:
        call = torch.compile(call)
    if world > 1:
        call = nn.parallel.DistributedDataParallel(call, broadcast_buffers=False)
    return call
