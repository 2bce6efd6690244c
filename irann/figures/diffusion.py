"""Schematics of chapter 3: the forward process, and one step of the reverse process, both with real
numbers.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import INK, PALE, SMALL, colour, on_text
from .sketch import arrow, box, canvas


def forward_process(
    levels: Sequence[int], values: Sequence[float], alpha_bar: Sequence[float]
) -> Any:
    """Draw one number on its way from clean data (level 0) to noise, with the signal that is left
    at each level; dashed, the way back.
    """
    ax = canvas(7.2 * len(levels), 12.5)
    green = colour("diffusion")
    centres = [7.2 * i + 3.6 for i in range(len(levels))]
    for x, tau, value, left in zip(centres, levels, values, alpha_bar, strict=True):
        box(ax, x, 5.5, 4.2, 3.4, f"{value:+.2f}", color=INK if tau else green, size=11)
        ax.text(x, 2.4, f"$x_{{{tau}}}$", ha="center", fontsize=11)
        left_over = f"$\\bar\\alpha$ = {left:.2f}"
        ax.text(x, 9.2, left_over, ha="center", va="center", fontsize=SMALL, color=PALE)
    for x, after in zip(centres, centres[1:]):
        arrow(ax, (x + 2.3, 4.9), (after - 2.3, 4.9))
        arrow(ax, (after - 2.3, 6.3), (x + 2.3, 6.3), color=green, dashed=True)
    middle = 3.6 * len(levels)
    ax.text(middle, 0.6, "q adds noise  →", ha="center", va="center", fontsize=10)
    style = {"ha": "center", "va": "center", "fontsize": 10, "color": green}
    ax.text(middle, 11.6, "←  p, the model, guesses its way back", **style)
    return ax


def reverse_step(
    x: float,
    guess: float,
    tau: int,
    tau_next: int,
    alpha_bar: Sequence[float],
    s: float,
    eps: float,
) -> Any:
    """Draw equation (6) on one number: the guess, the noise that follows from it, and the three
    terms of the next x. `alpha_bar` is that of both levels.
    """
    a, b = torch.tensor(alpha_bar, dtype=torch.float64).tolist()
    noise = (x - a**0.5 * guess) / (1 - a) ** 0.5
    keep = (1 - b - s**2) ** 0.5
    after = b**0.5 * guess + keep * noise + s * eps
    green = colour("diffusion")
    ax = canvas(40, 15)
    box(ax, 3.5, 7.5, 6, 3.4, f"$x_{{{tau}}}$ = {x:+.2f}", size=10)
    box(ax, 13.5, 3, 7.4, 3.4, f"$\\hat x_0$ = {guess:+.2f}", color=green, size=10)
    box(ax, 13.5, 7.5, 7.4, 3.4, f"$\\hat\\varepsilon$ = {noise:+.2f}", size=10)
    box(ax, 13.5, 12, 7.4, 3.4, f"$\\varepsilon$ = {eps:+.2f}", color=PALE, size=10)
    box(ax, 35.6, 7.5, 7.4, 3.4, f"$x_{{{tau_next}}}$ = {after:+.2f}", size=10)
    arrow(ax, (6.5, 6.6), (9.8, 3.6), color=green)
    arrow(ax, (6.5, 7.5), (9.8, 7.5))
    for y, weight, part, target in (
        (3, b**0.5, guess, 6.6),
        (7.5, keep, noise, 7.5),
        (12, s, eps, 8.4),
    ):
        arrow(ax, (17.2, y), (31.9, target), f"{weight:.2f} · ({part:+.2f})")
    style = {"ha": "center", "fontsize": SMALL, "color": PALE}
    ax.text(13.5, 0.8, "the network's guess", **style)
    ax.text(13.5, 14.6, "fresh noise", **style)
    return ax


def film(rows: Sequence[str], same: Sequence[Any], levels: Sequence[int]) -> Any:
    """Draw one text at several noise levels, a row for each; `same` says for each character of a
    row whether it is as in the end, which is drawn dark.
    """
    import matplotlib.pyplot as plt

    width = len(rows[0])
    ax = plt.subplots(figsize=(7.2, 0.2 * len(rows) + 0.5))[1]
    text = "".join(rows).replace("\n", "\u21b5")
    values = torch.stack([torch.as_tensor(row) for row in same]).flatten()
    on_text(text, values, width=width, cmap="YlGn", low=-0.3, high=1.6, ax=ax)
    for y, tau in enumerate(levels):
        ax.text(-1.2, y, str(tau), ha="right", va="center", fontsize=SMALL, color=PALE)
    return ax


def slide(draw: Callable[..., Any], **ranges: tuple[float, float, float]) -> Any:
    """-> a widget: a slider for each of `ranges` (its value, lowest and highest; whole numbers if
    the value is one), and below them the axes on which `draw(ax, **values)` has drawn.
    """
    import matplotlib.pyplot as plt
    from ipywidgets import FloatSlider, Image, IntSlider, VBox

    sliders = {}
    for name, (value, low, high) in ranges.items():
        kind = IntSlider if isinstance(value, int) else FloatSlider
        sliders[name] = kind(value, min=low, max=high, description=name)
    picture = Image(format="png", width=720)

    def redraw(_: Any = None) -> None:
        figure, ax = plt.subplots(figsize=(7.2, 2.7))
        draw(ax, **{name: slider.value for name, slider in sliders.items()})
        file = io.BytesIO()
        figure.savefig(file)
        plt.close(figure)
        picture.value = file.getvalue()

    for slider in sliders.values():
        slider.observe(redraw, "value")
    redraw()
    return VBox([*sliders.values(), picture])
