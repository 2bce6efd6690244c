"""How well a model predicts a text: the likelihood of every character, each scored once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lm import SEED, LanguageModel, evaluating
from ..settings import InputError, Setting
from ..text import Text
from .bars import bar
from .processes import rank_and_world, summed
from .recipe import Recipe

PART = Setting("val", "of the text", choices=("train", "val"))
WINDOW = Setting(None, "characters seen at once", low=1, kind=int)
BATCH = Setting(32, "windows at once", low=1)


@dataclass(frozen=True)
class Likelihood:
    """Nats per character over a whole text: exact, or an upper bound with a standard error.

    The error is that of the mean over windows, by their variance: NaN of a single one. It counts
    how they differ as well as the noise of the draws, and is larger than the latter alone.
    """

    nats_per_char: float
    standard_error: float
    characters: int
    exact: bool

    @property
    def bits_per_char(self) -> float:
        return self.nats_per_char / math.log(2)

    def __str__(self) -> str:
        error = "unknown" if math.isnan(self.standard_error) else f"{self.standard_error:.4f}"
        bound = f"at most, a bound (standard error {error}), "
        return (
            f"{'' if self.exact else bound}{self.nats_per_char:.4f} nats per character "
            f"({self.bits_per_char:.4f} bits) over {self.characters:,} characters"
        )


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    text: Text,
    *,
    part: str = "val",
    window: int | None = None,
    batch: int = 32,
    seed: int = 0,
    nll: Callable[..., Tensor] | None = None,
    share: bool = False,
) -> Likelihood:
    """The likelihood of every character of the validation (or training) part, each scored once.

    The context rule, the same for all models: the part is cut into windows of the model's own
    length that do not overlap; a character is predicted from those before it in its window and the
    one before the window (for the first window of the validation part, the last character of the
    training part; a text without one before it skips its first character). `window` sets another
    length, no longer than the model can read; what a bound draws follows from `seed` and `batch`.
    `nll`, a callable like the model's, scores in its place. With `share`, each process of a group
    scores its share of the windows, and all get the whole. Raises InputError for a text in another
    vocabulary.
    """
    check_vocabulary(model, text)
    part = PART.check("part", part)
    batch = BATCH.check("batch", batch)
    seed = SEED.check("seed", seed)
    length = WINDOW.check("window", window) or model.config.window
    rank, world = rank_and_world() if share else (0, 1)
    batches = _windows(text, part, length, batch)
    if not batches:
        raise InputError(f"the {part} part has no character to be predicted")
    generator = torch.Generator(model.device)
    mine = range(rank, len(batches), world)
    nats = squares = count = 0.0
    for i in bar(mine, desc="validating", leave=False, delay=5, disable=None):
        ids = batches[i]
        generator.manual_seed(seed + i)  # so that a bound does not depend on who scores what
        with evaluating(model, ids.numel()):
            row = (nll or model.nll)(ids.to(model.device), generator=generator)
        row = row.cpu().double()  # not every device has doubles
        nats += row.sum().item()
        squares += (row.mean(1) ** 2 * row.shape[1]).sum().item()  # windows weigh by their length
        count += row.numel()
    if share:
        nats, squares, count = summed([nats, squares, count])
    mean = nats / count
    windows = sum(len(ids) for ids in batches)
    spread = math.sqrt(max(0.0, squares / count - mean**2))
    error = spread / math.sqrt(windows - 1) if windows > 1 else math.nan
    return Likelihood(mean, 0.0 if model.exact else error, int(count), model.exact)


def _windows(text: Text, part: str, window: int, batch: int) -> list[Tensor]:
    """-> (b window+1) at a time, and last (1 t+1) of what remains."""
    ids = getattr(text, part)
    if part == "val":
        ids = torch.cat([text.train[-1:], ids])
    full, remaining = divmod(len(ids) - 1, window)
    batches = []
    if full:
        batches += ids[: full * window + 1].unfold(0, window + 1, window).split(batch)
    if remaining:
        batches.append(ids[None, -remaining - 1 :])
    return batches


def check_kinds(model: Any, text: Any) -> None:
    """Raises InputError for what is no model, and for what is no text."""
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"a model comes first, as irann.build or irann.load gives it; got {model!r}"
        )
    if not isinstance(text, Text):
        raise InputError(
            "a text comes second, as irann.shakespeare.load(), irann.text.read_text(FILE) or "
            f"irann.Text.of(CHARACTERS) gives it; got a {type(text).__name__}"
        )


def check_vocabulary(model: LanguageModel, text: Text) -> None:
    check_kinds(model, text)
    if model.vocabulary is not None and model.vocabulary != text.vocabulary:
        raise InputError(
            "the text's characters are not those that the model was trained on: cut the text "
            "with the model's "
            "vocabulary, as Text.of(characters, vocabulary=model.vocabulary), or build a new model"
        )


def check_mode(model: LanguageModel) -> None:
    """Raises InputError where autograd is off for good."""
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise InputError(
            "nothing can be trained under torch.inference_mode, nor weights that were made "
            "there: leave it, and build the model outside"
        )


def check_trainable(model: LanguageModel, text: Text, recipe: Recipe) -> None:
    """Raises InputError for what cannot be trained, before anything is touched."""
    found, made_for = len(text.vocabulary), model.config.vocabulary
    if found != made_for:
        raise InputError(
            f"the text has {found} different characters, the model was made for {made_for}: "
            f"build it with vocabulary={found}"
        )
    for part in (text.train, text.val):  # once: a step does not look again where it would wait
        model.check_ids(part[None])
    if len(text.train) < model.config.window + 1:
        raise InputError(
            f"the training part has {len(text.train):,} characters; one window and its target take "
            f"{model.config.window + 1}: give a longer text, or a smaller window (--set window=8)"
        )
    if not len(text.val):
        raise InputError(
            "the validation part is empty: give a longer text, or a smaller part of it to train on"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "every parameter of the model is frozen: there is nothing to train; unfreeze "
            "some with requires_grad_()"
        )
    check_mode(model)
    _, world = rank_and_world()
    if recipe.batch % (world * recipe.accumulate):
        raise InputError(
            f"a batch of {recipe.batch} cannot be shared by {world} processes in "
            f"{recipe.accumulate} pieces each"
        )
