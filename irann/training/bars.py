"""Bars that show how far something is, in a notebook or a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import Tick


def bar(items: Iterable | None = None, **options: Any) -> Any:
    """tqdm's bar over the items, or one that is set by hand; where there is no standard error, none
    is drawn.
    """
    from tqdm.auto import tqdm

    if sys.stderr is None:
        options["disable"] = True
    return tqdm(items, **options)


def progress(ticks: "Iterable[Tick]", steps: int, **options: Any) -> "Iterator[Tick]":
    """Pass the ticks on and draw a bar: loss, validation, characters per second, time left."""
    with bar(total=steps, unit="step", **options) as drawn:
        validation = ""
        for tick in ticks:
            if tick.validation is not None:
                validation = f", val {tick.validation:.4f}"
            if not drawn.n:
                drawn.initial = drawn.n = drawn.last_print_n = tick.step - 1
            speed = f"{tick.chars_per_second:,.0f} chars/s"
            drawn.set_postfix_str(f"loss {tick.loss:.3f}{validation}, {speed}", refresh=False)
            drawn.update(tick.step - drawn.n)
            yield tick
