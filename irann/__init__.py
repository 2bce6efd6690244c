"""irann: four language models, derived in notebooks and verified in code.

import irann
model = irann.load("gpt")                      # trained weights
print(irann.generate(model, "ROMEO:", 200))    # a string
irann.Chat()                                   # in a notebook cell

text = irann.shakespeare.load()
model = irann.build("gpt")
for tick in irann.train(model, text, irann.Recipe(steps=500)):
    ...
"""

from . import shakespeare, text
from .lm import Draft, generate
from .text import Text, Vocabulary
from .training import Recipe, evaluate, progress, train
from .zoo import build, load, recipe

__version__ = "0.1.0"
__all__ = [
    "Chat",
    "Draft",
    "Recipe",
    "Text",
    "Vocabulary",
    "build",
    "evaluate",
    "generate",
    "load",
    "progress",
    "recipe",
    "shakespeare",
    "text",
    "train",
]


def __getattr__(name: str):
    if name == "Chat":  # ipywidgets loads when it is used, not when irann is imported
        from .chat.widget import Chat

        return Chat
    raise AttributeError(f"module 'irann' has no attribute {name!r}")
