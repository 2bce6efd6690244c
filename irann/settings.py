"""One description of a value that a user can set: its type, its range, its meaning.

Model sizes, recipes, the settings of writing, the command line and the chat all describe their
values by `Setting`, so that each of them is checked by the same rules and refused in the same
words.

    @dataclass(frozen=True)
    class Sizes(Checked):
        layers: int = field(4, "Transformer blocks", low=1)
"""

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """What a user gave cannot be used; the message names it, its range, and the way out."""


@dataclass(frozen=True)
class Setting:
    """A value that can be set: its default, its meaning, and what it may be.

    The type is that of the default (of `kind` where the default is None, which then stays allowed).
    `low` and `high` belong to the range, `above` and `below` are the first numbers that do not.
    """

    default: int | float | str | bool | None
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    kind: type | None = None

    @property
    def type(self) -> type:
        return self.kind or type(self.default)

    def check(self, name: str, value: Any) -> Any:
        """-> the value in the setting's type. Raises InputError that names setting and range."""
        if value is None and self.default is None:
            return None
        accepted = self._accepted(value)
        if accepted is None:
            raise InputError(f"{name} is {self.words()}; got {_shortly(value)}")
        return accepted

    def read(self, name: str, value: Any) -> Any:
        """As `check`, but a text is first read as a value: what command line and chat hand over."""
        if isinstance(value, str) and self.type is not str:
            return self.check(name, _parsed(value, self.type))
        return self.check(name, value)

    def words(self) -> str:
        """-> what the value may be, as in "a whole number from 1 up"."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.type is bool:
            return "true or false"
        if self.type is str:
            return "a text"
        noun = "a whole number" if self.type is int else "a number"
        start = ""
        if self.low is not None:
            start = f" from {_shown(self.low)}"
        elif self.above is not None:
            start = f" above {_shown(self.above)}"
        if self.below is not None:
            end = f" to below {_shown(self.below)}"
        elif self.high is not None:
            end = f" to {_shown(self.high)}"
        else:
            end = " up" if start else ""
        return noun + start + end + (", or null" if self.default is None else "")

    def _accepted(self, value: Any) -> Any:
        """-> the value in the setting's type; None for what it may not be."""
        if self.choices is not None or self.type is bool:
            allowed = self.choices or (True, False)
            return value if type(value) is self.type and value in allowed else None
        if self.type is str:
            return value if isinstance(value, str) else None
        number = _scalar(value)
        if number is None or not self._fits(number):
            return None
        with suppress(OverflowError):  # a whole number that no float can hold
            return self.type(number)
        return None

    def _fits(self, number: int | float) -> bool:
        if isinstance(number, float):  # a whole number may be too large for these questions
            if not math.isfinite(number) or (self.type is int and number != int(number)):
                return False
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def field(default: int | float | str | bool | None, help: str, **limits: Any) -> Any:
    """A dataclass field of a `Checked` class; `limits` are those of `Setting`."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(default, help, **limits)}
    )


class Checked:
    """A frozen dataclass whose fields are settings: each value is checked, and kept in its type."""

    def __post_init__(self) -> None:
        for name, setting in self.settings().items():
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """-> what can be set, by name."""
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return {f.name: f.metadata["setting"] for f in fields}


def _shown(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _shortly(value: Any) -> str:
    """-> the value as one would type it; of a very large number only how large it is."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {value.bit_length():,} bits"
    return repr(value)


def _scalar(value: Any) -> int | float | None:
    """-> a number, alone or in a numpy scalar or a tensor of one; None for anything else."""
    if hasattr(value, "item") and not getattr(value, "ndim", 0):
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _parsed(text: str, kind: type) -> Any:
    """-> the number, truth value or null that a text spells; the text itself if it spells none."""
    word = text.strip().lower()
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            word, text
        )
    if word in ("null", "none"):
        return None
    for number in (int, float):  # whole numbers first: a float cannot hold all of the large ones
        try:
            return number(word)
        except ValueError:
            continue
    return text
