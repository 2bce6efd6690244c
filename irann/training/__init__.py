"""Training: a recipe, one loop for every model, and a run directory that loses nothing.

`loop` is the page to read; `recipe`, `evaluation`, `run`, `state` and `signals` are what it calls
by name.
"""

from .bars import progress as progress
from .bars import watch as watch
from .distillation import soft_targets as soft_targets
from .evaluation import Likelihood as Likelihood
from .evaluation import evaluate as evaluate
from .loop import Tick as Tick
from .loop import train as train
from .recipe import Recipe as Recipe
from .recipe import optimizers as optimizers
from .run import InUse as InUse
from .run import RunError as RunError
from .signals import Signals as Signals
from .state import NotFinite as NotFinite
