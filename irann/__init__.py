"""irann: four language models, derived in notebooks and verified in code.

import irann
model = irann.load("gpt")                      # trained weights
print(irann.generate(model, "ROMEO:", 200))    # a string
irann.Chat()                                   # in a notebook cell

text = irann.shakespeare.load()
model = irann.build("gpt")
for tick in irann.train(model, text, irann.Recipe(steps=500), run="runs/mine"):
    ...                                        # irann.watch draws the curve while it grows
irann.save(model, "mine")                      # irann.load("mine") makes it again
"""

from typing import TYPE_CHECKING, Any

from . import machine, shakespeare, text
from .checkpoint import CheckpointError
from .lm import Draft, generate
from .settings import InputError
from .text import Text, Vocabulary
from .training import NotFinite, Recipe, Signals, evaluate, progress, train, watch
from .zoo import build, load, recipe, save

if TYPE_CHECKING:
    from .chat.widget import Chat

__version__ = "0.2.0"
__all__ = [
    "Chat",
    "CheckpointError",
    "Draft",
    "InputError",
    "NotFinite",
    "Recipe",
    "Signals",
    "Text",
    "Vocabulary",
    "build",
    "evaluate",
    "generate",
    "load",
    "progress",
    "recipe",
    "save",
    "shakespeare",
    "text",
    "train",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name != "Chat":
        raise AttributeError(f"module 'irann' has no attribute {name!r}")
    try:  # ipywidgets loads when it is used, not when irann is imported
        from .chat.widget import Chat
    except ModuleNotFoundError as error:
        if error.name not in ("ipywidgets", "IPython"):
            raise
        return _no_chat
    return Chat


def _no_chat(*_: Any, **__: Any) -> None:
    raise ImportError('irann.Chat needs ipywidgets and IPython: pip install "irann[book]"')


# a watcher thread, on Linux with few cores: how torch's threads wait; see machine.py
machine.share_cores()
