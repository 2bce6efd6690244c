"""Knowledge distillation: a model learns what others expect, not only which character came.

A character says one thing: it was this one. The probabilities that trained models give to all
characters say what else could have come, and how likely. One model can so learn much of what
several know together. Hinton, Vinyals and Dean 2015 (arXiv 1503.02531).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..lm import Ids, LanguageModel, Reader
from ..settings import InputError
from ..text import Text
from .bars import bar
from .evaluation import BATCH, check_vocabulary

Read = Callable[[Ids], tuple[Float[Tensor, "b t v"], Any]]


@torch.no_grad()
def soft_targets(
    reads: Sequence[Read], text: Text, window: int, *, batch: int = 32
) -> Float[Tensor, "t v"]:
    """-> what teachers expect at each position of the training part: the mean of the probabilities
    that each gives to each character, in half precision.

    `reads` are the teachers' `read`, in eval mode and on the CPU, with settings bound as by
    `functools.partial`. A position is predicted from at least half a `window` before it; at the
    beginning of the text from all that is there, and the very first, from nothing, is uniform.
    Raises InputError without teachers, for one that expects other characters, and for a window that
    the text does not hold.
    """
    several = isinstance(reads, Sequence) and len(reads) > 0
    if not several or any(isinstance(read, LanguageModel) for read in reads):
        raise InputError("at least one teacher is needed, by its reading: [irann.load('gpt').read]")
    batch = BATCH.check("batch", batch)
    for read in reads:
        teacher = getattr(getattr(read, "func", read), "__self__", None)
        if isinstance(teacher, LanguageModel):
            check_vocabulary(teacher, text)
    half = window // 2
    last = len(text.train) - window - 1
    if last < 0 or half < 1:
        raise InputError(
            f"a window is of 2 to {len(text.train) - 1:,} characters of this training part; "
            f"got {window}"
        )
    starts = torch.tensor([*range(0, last, half), last], device="cpu")
    shape = (len(text.train), len(text.vocabulary))
    targets = torch.full(shape, 1 / shape[1], dtype=torch.float16, device="cpu")
    for some in bar(starts.split(batch), desc="teachers read", leave=False, delay=5, disable=None):
        ids = text.train[some[:, None] + torch.arange(window, device="cpu")]
        logits = [read(ids)[0] for read in reads]
        if other := [len(each[0, 0]) for each in logits if len(each[0, 0]) != shape[1]]:
            raise InputError(
                f"a teacher expects {other[0]} different characters, the text has {shape[1]}"
            )
        p = torch.stack([each.softmax(-1) for each in logits]).mean(0).half()
        for start, row in zip(some.tolist(), p, strict=True):
            late = half if start else 0
            targets[start + late + 1 : start + window + 1] = row[late:]
    return targets


def check_targets(targets: Any, model: LanguageModel, text: Text) -> None:
    """Raises InputError for targets that are none of this text, or that the model cannot learn."""
    if not isinstance(model, Reader):
        raise InputError("targets are for models that read from left to right")
    shape = (len(text.train), len(text.vocabulary))
    fits = isinstance(targets, Tensor) and targets.is_floating_point()
    fits = fits and tuple(targets.shape) == shape and bool((targets >= 0).all())
    if not fits or ((targets.sum(-1, dtype=torch.float32) - 1).abs() > 0.02).any():
        raise InputError(
            f"targets are probabilities of shape {shape}, for each character of the training part "
            "one of every character, as irann.training.soft_targets gives them"
        )
