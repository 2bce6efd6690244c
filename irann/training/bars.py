"""How far something is: bars in a notebook or a terminal, and a curve that grows."""

import io
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import figures

if TYPE_CHECKING:
    from .loop import Tick

EVERY = 1.5  # seconds between two drawings of a curve at least
PART = 0.1  # of the time at most is spent on drawing


def bar(items: Iterable | None = None, **options: Any) -> Any:
    """tqdm's bar over the items, or one set by hand; none is drawn without a standard error."""
    from tqdm.auto import tqdm

    if sys.stderr is None:
        options["disable"] = True
    return tqdm(items, **options)


def progress(ticks: "Iterable[Tick]", steps: int, **options: Any) -> "Iterator[Tick]":
    """Pass the ticks on and draw a bar: loss, validation, characters per second, time left.

    Who leaves the loop ends the training, which then saves what it has.
    """
    # closed here: a caller that still holds the generator would keep it alive
    ending = closing(ticks) if isinstance(ticks, Generator) else nullcontext()
    with ending, bar(total=steps, unit="step", **options) as drawn:
        validation = ""
        for tick in ticks:
            if tick.validation is not None:
                validation = f", val {tick.validation:.4f}"
            if not drawn.n:  # a resumed run's bar begins where the run stood
                drawn.initial = drawn.n = drawn.last_print_n = tick.step - 1
            speed = f"{tick.chars_per_second:,.0f} chars/s"
            drawn.set_postfix_str(f"loss {tick.loss:.3f}{validation}, {speed}", refresh=False)
            drawn.update(tick.step - drawn.n)
            yield tick


def watch(ticks: "Iterable[Tick]", steps: int, **looks: Any) -> "Iterator[Tick]":
    """As `progress`, and in a notebook with the curve of the loss, drawn anew while it grows.

    `looks` are for `figures.learning_curve`, such as name="mamba" or against="step".
    """
    handle = (
        updatable_output({"text/plain": "the curve follows"}) if find_spec("matplotlib") else None
    )
    seen: list[Tick] = []
    due = time.monotonic() + EVERY
    try:
        for tick in progress(ticks, steps):
            seen.append(tick)
            if handle is not None and time.monotonic() > due:
                began = time.monotonic()
                handle.update(_curve(seen, looks))
                now = time.monotonic()
                due = now + max(EVERY, (now - began) / PART)
            yield tick
    finally:
        if handle is not None and seen:
            handle.update(_curve(seen, looks))


def updatable_output(bundle: dict[str, str]) -> Any:
    """-> an output that can be changed, where there is a notebook; else None."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    if getattr(get_ipython(), "kernel", None) is None:
        return None
    return display(bundle, raw=True, display_id=True)


def _curve(seen: "list[Tick]", looks: dict[str, Any]) -> Any:
    """-> the learning curve so far, as a picture."""
    import matplotlib.pyplot as plt
    from IPython.display import Image

    file = io.BytesIO()
    with plt.rc_context(figures.style()):
        figure, ax = plt.subplots()
        figures.learning_curve(seen, ax=ax, **looks)
        figure.savefig(file, format="png")
        plt.close(figure)
    return Image(data=file.getvalue(), format="png")
