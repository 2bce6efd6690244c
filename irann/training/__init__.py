"""Training: a recipe, one loop for every model, and a run directory that loses nothing.

`loop` is the page to read; `recipe`, `evaluation`, `run`, `state` and `signals` are what it calls
by name.
"""

from .bars import progress, watch
from .distillation import soft_targets
from .evaluation import Likelihood, evaluate
from .loop import Tick, train
from .recipe import Recipe, optimizers
from .run import InUse, RunError
from .signals import Signals
from .state import NotFinite

__all__ = [
    "InUse",
    "Likelihood",
    "NotFinite",
    "Recipe",
    "RunError",
    "Signals",
    "Tick",
    "evaluate",
    "optimizers",
    "progress",
    "soft_targets",
    "train",
    "watch",
]
