"""What tests of several files make and do."""

from collections.abc import Iterator
from itertools import islice

import torch

from irann import zoo
from irann.lm import LanguageModel
from irann.text import Vocabulary
from irann.training import Tick


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(b: int, t: int, v: int = 65, seed: int = 0) -> torch.Tensor:
    return torch.randint(v, (b, t), generator=rng(seed))


def model_of(characters: str, name: str = "gpt", **changes) -> LanguageModel:
    """-> a tiny model, new, whose vocabulary is these characters."""
    vocabulary = Vocabulary(characters)
    config, _ = zoo.recipe(name, "tiny", vocabulary=len(vocabulary), **changes)
    model = zoo.build(name, config, seed=0)
    model.vocabulary = vocabulary
    return model


def left_after(n: int, ticks: Iterator[Tick]) -> list[Tick]:
    """-> the first steps of a training that is then left."""
    taken = list(islice(ticks, n))
    ticks.close()
    return taken
