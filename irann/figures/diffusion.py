"""Drawings of chapter 3: the forward process and one step of the reverse process, with real
numbers; schedules, the two humps of a step, what each decision adds, texts at several noise levels,
cosines between points.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import ACCENT, INK, PALE, colour, heat, on_text
from .sketch import arrow, box, canvas, label
from .sliders import drag


def forward_process(
    levels: Sequence[int], values: Sequence[float], alpha_bar: Sequence[float]
) -> Any:
    """Draw a number's way from data (level 0) to noise, the signal left; dashed, the way back."""
    ax = canvas(7.2 * len(levels), 12.5)
    green = colour("diffusion")
    centres = [7.2 * i + 3.6 for i in range(len(levels))]
    for x, tau, value, left in zip(centres, levels, values, alpha_bar, strict=True):
        box(ax, x, 5.5, 4.2, 3.4, f"{value:+.2f}", color=INK if tau else green, size=11)
        label(ax, x, 2.4, f"$x_{{{tau}}}$", va="baseline", fontsize=11)
        label(ax, x, 9.2, f"$\\bar\\alpha$ = {left:.2f}", color=PALE)
    for x, after in zip(centres, centres[1:]):
        arrow(ax, (x + 2.3, 4.9), (after - 2.3, 4.9))
        arrow(ax, (after - 2.3, 6.3), (x + 2.3, 6.3), color=green, dashed=True)
    middle = 3.6 * len(levels)
    label(ax, middle, 0.6, "q adds noise  →", fontsize=10)
    label(ax, middle, 11.6, "←  p, the model, guesses its way back", fontsize=10, color=green)
    return ax


def reverse_step(
    x: float,
    guess: float,
    tau: int,
    tau_next: int,
    alpha_bar: Sequence[float],
    eta: float,
    eps: float,
) -> Any:
    """Draw equation (6) on one number: the guess, the noise that follows from it, and the three
    terms of the next x. Entry tau of `alpha_bar` is that of level tau.
    """
    a, b = float(alpha_bar[tau]), float(alpha_bar[tau_next])
    s = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
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
    label(ax, 13.5, 0.8, "the network's guess", va="baseline", color=PALE)
    label(ax, 13.5, 14.6, "fresh noise", va="baseline", color=PALE)
    return ax


def schedules(curves: Mapping[str, tuple[torch.Tensor, Sequence[float]]], taus: Any) -> Any:
    """Draw schedules side by side: alpha_bar (entry 0 is level 0), the log of the SNR, and the
    fraction of characters that are still read at the levels `taus`. `curves` holds for each name
    its alpha_bar and its fractions.
    """
    import matplotlib.pyplot as plt

    looks = {"linear": (PALE, "--"), "cosine": (colour("diffusion"), "-"), "sqrt": (ACCENT, "-")}
    axes = plt.subplots(1, 3, figsize=(7.2, 2.6), sharex=True)[1]
    for name, (alpha_bar, read) in curves.items():
        look = dict(zip(("color", "ls"), looks[name]))
        signal = alpha_bar[1:]
        levels = range(1, len(signal) + 1)
        axes[0].plot(levels, signal, label=name, **look)
        axes[1].plot(levels, torch.log(signal / (1 - signal)), **look)
        axes[2].plot(taus, read, **look)
    axes[0].set(title="signal left, $\\bar\\alpha_\\tau$", ylim=(0, 1.02))
    axes[1].set(title="$\\ln$ SNR", ylim=(-12, 12))
    axes[2].set(title="fraction still read", ylim=(0, 1.02))
    axes[0].legend()
    for ax in axes:
        ax.set_xlabel("noise level $\\tau$")
    return axes


def humps(ax: Any, grid: torch.Tensor, truth: torch.Tensor, model: torch.Tensor, x: float) -> Any:
    """Draw on `ax` the true density of a step from `x` and the model's, over `grid`."""
    ax.fill_between(grid, truth, color=colour("diffusion"), alpha=0.3, label="true")
    ax.plot(grid, model, color=INK, lw=1.2, label="the model's")
    ax.axvline(x, color=ACCENT, ls=":", lw=1.2, label="$x_\\tau$")
    ax.set(xlabel="$x$ after the step", ylabel="density")
    return ax


def cosines(ax: Any, points: torch.Tensor, characters: str) -> Any:
    """Draw on `ax` the cosines between the points `(c d)` of `characters`, with a colour bar."""
    unit = torch.nn.functional.normalize(points, dim=-1)
    looks: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "label": "cosine", "ax": ax}
    return heat(unit @ unit.T, characters, characters, title="cosine between two points", **looks)


def film(rows: Sequence[str], same: Sequence[Any], levels: Sequence[int], title: str = "") -> Any:
    """Draw one text at noise levels, a row each; dark where it is the `same` as in the end."""
    import matplotlib.pyplot as plt

    width = len(rows[0])
    ax = plt.subplots(figsize=(7.2, 0.2 * len(rows) + 0.5))[1]
    text = "".join(rows).replace("\n", "\u21b5")
    values = torch.stack([torch.as_tensor(row) for row in same]).flatten()
    on_text(text, values, width=width, cmap="YlGn", low=-0.3, high=1.6, ax=ax)
    for y, tau in enumerate(levels):
        label(ax, -1.2, y, str(tau), ha="right", color=PALE)
    ax.set_title(title)
    return ax


def ladder(curves: Mapping[str, Sequence[tuple[int, float, float]]], unigram: float) -> Any:
    """Draw the loss and the bound of each curve, rows of (step, loss, bound), by name. From the
    second on a curve is darker than the one before; the first is dashed, the last stands out.
    """
    import matplotlib.pyplot as plt

    axes = plt.subplots(1, 2, figsize=(7.2, 3.7))[1]
    steps = torch.linspace(0.35, 1, len(curves) - 2).tolist()
    hues = [PALE, *map(plt.get_cmap("YlGn"), steps), ACCENT]
    for (name, rows), hue in zip(curves.items(), hues, strict=True):
        look: dict[str, Any] = {"color": hue, "ls": "--" if hue == PALE else "-", "label": name}
        at, *values = zip(*rows)
        for ax, column in zip(axes, values):
            ax.plot(at, column, marker=".", **look)
    axes[1].axhline(unigram, color=PALE, ls=":", label="letter frequencies")
    axes[0].set(title="loss (13), on new text", ylabel="nats per character")
    axes[1].set(title="bound, on new text", yscale="log")
    axes[1].set_yticks([3, 4, 5, 7, 10], [3, 4, 5, 7, 10])
    axes[1].minorticks_off()
    names = axes[1].get_legend_handles_labels()
    axes[0].figure.legend(*names, loc="outside lower center", ncols=4)
    for ax in axes:
        ax.set(xlabel="step", xscale="log")
        ax.set_xticks([50, 100, 150, 300], [50, 100, 150, 300])
        ax.minorticks_off()
    return axes


def slide(draw: Callable[..., Any], **ranges: tuple[float, float, float]) -> Any:
    """-> a widget: a slider for each of `ranges` (its value, lowest and highest; whole numbers if
    the value is one), and below them the axes on which `draw(ax, **values)` has drawn.
    """
    import matplotlib.pyplot as plt
    from ipywidgets import FloatSlider, IntSlider

    def draw_alone(**values: float) -> None:
        _, ax = plt.subplots(figsize=(7.2, 2.7))
        draw(ax, **values)

    sliders = {
        name: (IntSlider if isinstance(value, int) else FloatSlider)(value, min=low, max=high)
        for name, (value, low, high) in ranges.items()
    }
    return drag(draw_alone, **sliders)
