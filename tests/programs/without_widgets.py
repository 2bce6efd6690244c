"""irann where only its base dependencies are installed."""

import sys

sys.modules["ipywidgets"] = None

import irann  # noqa: E402

later = {"matplotlib", "IPython", "typer", "transformers", "triton", "irann.chat.widget"}
assert not later & set(sys.modules), later & set(sys.modules)
told = (irann.text.read_text, irann.shakespeare.load, irann.watch, irann.save, irann.generate)
assert all(map(callable, told))

from irann import *  # noqa: E402, F403

assert hasattr(irann, "Chat") and callable(train)  # noqa: F405
try:
    irann.Chat("gpt")
except ImportError as error:
    print(error)
