"""irann where only its base dependencies are installed."""

import sys

sys.modules["ipywidgets"] = None

import irann  # noqa: E402
from irann import *  # noqa: E402, F403

assert hasattr(irann, "Chat") and callable(train)  # noqa: F405
try:
    irann.Chat("gpt")
except ImportError as error:
    print(error)
