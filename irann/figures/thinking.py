"""Chapter 2's drawings: the thinker unrolled over its rounds, what it answers after each and where
it looks, and where losses and a prior stop it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.halting import expected_rounds, halting_distribution, log_geometric
from . import ACCENT, HUES, INK, PALE, SMALL, _axes, sliders
from .sketch import arrow, box, canvas, label


def unrolled(halt: Sequence[float], nats: Sequence[float], *, character: str = "e") -> Any:
    """Draw rounds of thinking about one character, with its halting probabilities and losses.

    Solid arrows carry the training gradient back; dashed ones do not. -> the axes
    """
    rounds = len(halt)
    p = halting_distribution(torch.tensor(halt, dtype=torch.float64)).tolist()
    red = HUES["thinker"]
    ax = canvas(4.4 + 3.6 * rounds, 7.2)
    box(ax, 1.3, 6.6, 1.7, 0.8, f"embedding\nof '{character}'")
    box(ax, 3.3, 6.6, 1.0, 0.8, "norm")
    arrow(ax, (2.15, 6.6), (2.8, 6.6))
    box(ax, 1.3, 4.4, 1.7, 0.8, "$z_0 = 0$")
    arrow(ax, (2.15, 4.4), (4.1, 4.4))
    for r in range(rounds):
        x = 4.3 + 3.6 * r
        last = r == rounds - 1
        arrow(ax, (x, 6.6), (x, 4.62), "$u$", color=ACCENT)
        box(ax, x, 4.4, 0.44, 0.44, "+")
        box(ax, x + 1.15, 4.4, 1.15, 1.0, "core\n+ norm", color=red, fill="#fbe9df")
        arrow(ax, (x + 0.22, 4.4), (x + 0.57, 4.4))
        arrow(ax, (x + 1.72, 4.4), (x + (2.9 if last else 3.38), 4.4))
        label(ax, x + 2.5, 4.55, f"$z_{r + 1}$", fontsize=11, va="top")
        box(ax, x + 1.15, 2.7, 1.6, 0.9, f"$z_{r + 1} W$\n{nats[r]:.2f} nats", color=HUES["gpt"])
        arrow(ax, (x + 2.0, 4.4), (x + 1.4, 3.15))
        coin = "takes the rest" if last else f"stop: {halt[r]:.2f}"
        box(ax, x + 2.5, 1.3, 2.1, 0.8, coin, color=PALE, fill="#f4f4f4")
        arrow(ax, (x + 2.5, 4.4), (x + 2.5, 1.7), color=PALE, dashed=True)
        label(ax, x + 2.5, 0.6, f"$p_{r + 1}$ = {p[r]:.2f}", va="baseline")
    ax.plot([3.8, 4.3 + 3.6 * (rounds - 1)], [6.6, 6.6], color=ACCENT, lw=1.2, zorder=1)
    label(ax, 6.1, 5.6, f"the same weights\n{rounds} times", color=red)
    label(ax, 2.3, 2.7, "dashed: no gradient\ngoes back", color=PALE)
    return ax


def hops(right: Tensor, weights: Tensor, names: Sequence[str], *, trained: int) -> Any:
    """Draw right answers (hops rounds) against rounds, a curve for each number of hops but the
    first and the last; beside it the attention weights of one program's statements.

    `trained` is the last round of the training. -> both axes
    """
    import matplotlib.pyplot as plt

    _, (left, beside) = plt.subplots(1, 2, figsize=(7.2, 3.1), width_ratios=[1.6, 1])
    shades = plt.get_cmap("viridis")(torch.linspace(0.9, 0, len(right)).numpy())
    for far in range(1, len(right) - 1):
        style = {"color": shades[far], "label": f"{far}"}
        left.plot(range(1, right.shape[1] + 1), right[far], ".-", **style)
    left.axvline(trained, color=INK, ls=":", lw=1)
    left.set(xlabel="round", ylabel="right answers", ylim=(0.3, 1.03), title="h hops take h rounds")
    left.legend(title="hops", ncols=2, loc="lower right")
    image = beside.imshow(weights, cmap="magma_r", vmin=0, vmax=1)
    style = {"family": "monospace", "fontsize": SMALL}
    beside.set_xticks(range(len(names)), names, rotation=90, **style)
    beside.set_yticks(range(len(names)), names, **style)
    beside.set(title="who looks where", xlabel="looked at", ylabel="looks")
    beside.grid(False)
    beside.figure.colorbar(image, ax=beside, label="attention weight", fraction=0.046)
    return left, beside


def stopping(nats: Sequence[float], beta: float, prior: float, *, ax: Any = None) -> Any:
    """Draw where the best coins stop, p* in proportion to g exp(-nats / beta), beside the prior g.

    -> the axes
    """
    ax = _axes(ax, figsize=(7.2, 2.8))
    losses = torch.tensor(nats, dtype=torch.float64)
    log_g = log_geometric(prior, len(losses))
    best = (log_g - losses / beta).softmax(-1)
    r = torch.arange(1, len(losses) + 1)
    ax.bar(r - 0.2, log_g.exp(), width=0.38, color=PALE, label=f"prior, $\\lambda_g$ = {prior:.2f}")
    label = f"best $p$, $\\beta$ = {beta:.2f}: {expected_rounds(best):.2f} rounds"
    ax.bar(r + 0.2, best, width=0.38, color=HUES["thinker"], label=label)
    ticks = [f"{i}\n{loss:.4f}" for i, loss in enumerate(losses.tolist(), 1)]
    ax.set_xticks(r, ticks)
    ax.set(xlabel="round, and its loss in nats", ylabel="probability to stop", ylim=(0, 1))
    ax.legend(loc="upper left")
    return ax


def drag(nats: Sequence[float], *, beta: float = 0.02, prior: float = 0.3) -> Any:
    """-> `stopping` with a slider for beta and one for the prior, as a widget."""
    from ipywidgets import FloatSlider

    return sliders.drag(
        lambda beta, prior: stopping(nats, beta, prior),
        beta=FloatSlider(beta, min=0.002, max=0.3, step=0.002, readout_format=".3f"),
        prior=FloatSlider(prior, min=0.02, max=0.9, step=0.02),
    )
