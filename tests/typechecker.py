"""beartype as the tests use it: a whole number is a number too, as type checkers have it."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """What jaxtyping asks for twice per function: to hold its arguments, and then, with what they
    have bound, what it returns. By then the arguments have been looked at, and are not again.
    """
    hints = function.__annotations__
    if hints.get("return", Any) is not Any:
        function.__annotations__ = {"return": hints["return"]}
    return _beartype(function)
