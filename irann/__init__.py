"""irann: four language models, derived in notebooks and verified in code."""

__version__ = "0.1.0"
