"""How the tests hold every call of the package to its types: jaxtyping for the shapes, beartype for
the rest.

Whether a call fits is decided by the types, dtypes and shapes of what goes in and comes out, and by
whole numbers where a shape names one ("{rows} t"). Each kind of call is looked at once; the thousand like it in a training or a text are let through.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook
from torch import Tensor

_jaxtyped = jaxtyping.jaxtyped
# a whole number is a number too, as type checkers have it
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))


@contextmanager
def checking(package: str) -> Iterator[None]:
    """What is imported of a package inside the block is held to its types."""
    with patch.object(jaxtyping, "jaxtyped", checked), install_import_hook(package, None):
        yield


def checked(what: Any = None, *, typechecker: None = None) -> Any:
    """The decorator that jaxtyping's hook puts on each function and class of the package."""
    if what is None:
        return partial(checked, typechecker=typechecker)
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__)
    elif isinstance(what, classmethod | staticmethod):
        return type(what)(checked(what.__func__))
    elif isinstance(what, property):
        return property(*(f and checked(f) for f in (what.fget, what.fset, what.fdel)))
    elif inspect.isfunction(what):
        hints = what.__annotations__.values()
        return _by_kind(what) if any(map(_has_shape, hints)) else _without_shapes(what)
    return what


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and not isinstance(hint, types.GenericAlias):
        return issubclass(hint, AbstractArray)
    return any(map(_has_shape, typing.get_args(hint)))


def _without_shapes(function: Callable) -> Callable:
    try:
        typing.get_type_hints(function)
        held = _beartype(function)
    except NameError:  # of what is imported for the eye alone; jaxtyping knows to pass it by
        held = _jaxtyped(function, typechecker=_once)

    @wraps(function)
    def call(*args, **kwargs):
        asked = function if jaxtyping.config.jaxtyping_disable else held
        return asked(*args, **kwargs)

    return call


def _by_kind(function: Callable) -> Callable:
    """A call of a kind that was seen goes straight through, if what comes back was seen too."""
    returned = []
    careful = _jaxtyped(function, typechecker=_once)
    returns = _jaxtyped(wraps(function)(lambda *_, **__: returned.pop()), typechecker=_once)
    seen = set()
    numbers = any("{" in str(hint) for hint in function.__annotations__.values())

    @wraps(function)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        kind = _kind(args, numbers), _kind(kwargs, numbers)
        if kind not in seen:
            result = careful(*args, **kwargs)
            seen.update((kind, (kind, _kind(result))))
            return result
        result = function(*args, **kwargs)
        if (kind, _kind(result)) not in seen:
            returned.append(result)
            returns(*args, **kwargs)
            seen.add((kind, _kind(result)))
        return result

    return call


def _kind(value: Any, numbers: bool = False) -> Any:
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, tuple | list):
        return type(value), *(_kind(entry, numbers) for entry in value)
    if isinstance(value, dict):
        return dict, *((name, _kind(entry, numbers)) for name, entry in value.items())
    return (int, value) if numbers and isinstance(value, int) else type(value)


def _once(function: Callable) -> Callable:
    """beartype, which jaxtyping asks for twice per function: for its arguments, and, with what they
    have bound, for what it returns. By then the arguments have been looked at, and are not again.
    """
    hints = function.__annotations__
    if hints.get("return", Any) is not Any:
        function.__annotations__ = {"return": hints["return"]}
    return _beartype(function)
