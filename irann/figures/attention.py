"""Chapter 1's drawings: a head and its matrices, the residual stream, attention weights, losses."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import ACCENT, HUES, NATS, PALE, SMALL, heat
from .sketch import arrow, box, canvas, label, matrix
from .sliders import drag


def head(
    line: str,
    x: Float[Tensor, "t d"],
    W_q: Float[Tensor, "d c"],
    W_k: Float[Tensor, "d c"],
    W_v: Float[Tensor, "d c"],
) -> Any:
    """Draw one causal head at work on a few characters, every number of it: the stream x, the three
    maps, queries, keys and values, scores, mask, softmax, output.
    """
    t, d = x.shape
    c = W_q.shape[1]
    q, k, v = x @ W_q, x @ W_k, x @ W_v
    z = q @ k.mT / math.sqrt(c)
    past = torch.ones_like(z).tril() == 1
    a = z.masked_fill(~past, -torch.inf).softmax(-1)
    pitch = max(t, d) + 1.7  # from a row of matrices to the next
    maps, parts = d + 3.2, d + c + 6.4  # where the columns of matrices begin
    scores = parts + c + 3.2
    weights = scores + t + 2.4
    ax = canvas(weights + t + 0.2, 3 * pitch + 0.4)
    first, second, third = (1.2 + i * pitch for i in range(3))
    between = (first + second) / 2
    matrix(ax, 1, second, x, name="x", rows=line, cmap="Greys")
    for top, name, W, y in ((first, "q", W_q, q), (second, "k", W_k, k), (third, "v", W_v, v)):
        matrix(ax, maps, top, W, name=f"$W_{name}$", cmap="Greys")
        matrix(ax, parts, top, y, name=name, rows=line)
        arrow(ax, (1.1 + d, second + t / 2), (maps - 0.15, top + d / 2), color=PALE)
        arrow(ax, (maps + c + 0.15, top + d / 2), (parts - 0.8, top + d / 2), color=PALE)
    matrix(ax, scores, between, z, name="z", rows=line, cmap="Oranges")
    masked = z.masked_fill(~past, torch.nan)
    matrix(ax, weights, between, masked, name="masked", rows=line, cmap="Oranges")
    percent = 100 * a.masked_fill(~past, torch.nan)
    matrix(ax, weights, third, percent, name="a in %", digits=0, rows=line, columns=line)
    matrix(ax, scores, third, a @ v, name="y", rows=line)
    right, down = parts + c + 0.15, weights + t / 2
    arrow(ax, (right, first + t / 2), (scores - 0.8, between + 1), color=PALE)
    arrow(ax, (right, second + t / 2), (scores - 0.8, between + t - 0.5), color=PALE)
    arrow(ax, (scores + t + 0.1, between + t / 2), (weights - 0.8, between + t / 2), color=PALE)
    arrow(ax, (down, between + t + 0.1), (down, third - 0.9), "softmax", color=PALE)
    arrow(ax, (weights - 0.8, third + t / 2), (scores + c + 0.15, third + t / 2), color=PALE)
    arrow(ax, (right, third + t / 2), (scores - 0.8, third + t / 2), color=PALE)
    return ax


def model(*, b: int, t: int, d: int, h: int, layers: int, v: int) -> Any:
    """Draw a GPT as its residual stream, with shapes: what is written into it and what reads it."""
    ax = canvas(24, 10.6)
    c = d // h
    stream = 8.8
    hue = HUES["gpt"]
    ax.plot([4.4, 20.8], [stream, stream], color=hue, lw=5, alpha=0.35, zorder=0)
    box(ax, 1.8, stream, 2.8, 1.9, f"ids\n({b} {t})")
    box(ax, 2.6, stream - 4, 3.4, 2.2, f"E: {v} × {d}\nP: {t} × {d}")
    arrow(ax, (1.8, stream - 0.95), (1.8, stream - 2.9))
    arrow(ax, (3.6, stream - 2.9), (4.4, stream - 0.1), color=hue)
    many = f"{h} heads\nq, k, v: ({b} {t} {c})\nz, a: ({b} {t} {t})"
    mlp = f"MLP\ninner: ({b} {t} {4 * d})"
    for left, right, text, out in ((6.7, 11.5, many, "$W_o$"), (13.4, 18.2, mlp, "$W_2$")):
        box(ax, left, stream - 2.4, 2.2, 1.2, "norm")
        arrow(ax, (left, stream - 0.1), (left, stream - 1.8))
        arrow(ax, (left, stream - 3.0), (left, stream - 4.7))
        box(ax, (left + right) / 2, stream - 6.0, right - left + 1.4, 2.6, text)
        arrow(ax, (right, stream - 4.7), (right, stream - 0.5), out)
        box(ax, right, stream, 0.9, 0.9, "+", color=hue)
    across, down = [5.2, 19.6, 19.6, 5.2, 5.2], [stream + 0.8, stream + 0.8, 1.1, 1.1, stream + 0.8]
    ax.plot(across, down, color=ACCENT, ls="--", lw=1)
    times = f"block, {layers} times"
    label(ax, 19.4, 0.8, times, ha="right", va="baseline", color=ACCENT)
    named = f"residual stream x: ({b} {t} {d}), all the way"
    label(ax, 12.4, stream + 1, named, va="top", color=hue)
    box(ax, 21.9, stream, 2.2, 1.2, "norm")
    arrow(ax, (21.9, stream - 0.6), (21.9, stream - 3.1), f"$E^T$: {d} × {v}")
    box(ax, 21.9, stream - 4.1, 3.6, 1.9, f"logits\n({b} {t} {v})")
    return ax


def widths(scores: dict[int, dict[str, Float[Tensor, "n s"]]]) -> Any:
    """Draw, against the channels c, the largest attention weight and the slope that is left.
    `scores` has for each c the rows of scores by their names.
    """
    import matplotlib.pyplot as plt

    _, panels = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True)
    for name, hue in zip(next(iter(scores.values())), (ACCENT, HUES["gpt"])):
        a = [rows[name].softmax(-1) for rows in scores.values()]
        largest = [one.amax(-1).mean() for one in a]
        slope = [(1 - one.square().sum(-1)).mean() for one in a]
        for ax, y in zip(panels, (largest, slope)):
            ax.plot(list(scores), y, "o-", color=hue, label=name)
    for ax, title in zip(panels, ("largest weight", "slope that is left")):
        ax.set(xscale="log", xlabel="channels c", title=title, ylim=(0, 1))
    panels[0].legend(loc="center right")
    return panels


def bars(scores: dict[str, Float[Tensor, "1 s"]]) -> Any:
    """Draw the attention weights that rows of scores make, side by side."""
    import matplotlib.pyplot as plt

    size = {"figsize": (7.2, 2.2), "sharey": True, "squeeze": False}
    panels = plt.subplots(1, len(scores), **size)[1][0]
    for ax, (name, z) in zip(panels, scores.items()):
        ax.bar(range(1, z.shape[1] + 1), z[0].softmax(-1), color=HUES["gpt"])
        ax.set(title=name, xlabel="key", ylabel="attention weight", ylim=(0, 1))
    return panels


def slide(draw: Callable[[Any], Any], options: Sequence[Any], *, value: Any, name: str) -> Any:
    """-> a widget: a slider, and below it what `draw`, given its value, draws."""
    from ipywidgets import SelectionSlider

    slider = SelectionSlider(options=options, value=value, description=name)
    return drag(lambda value: draw(value), value=slider)


def curve(ax: Any, losses: Sequence[float], characters: int, *, color: str, label: str) -> Any:
    """Draw losses pale, and their centred mean over 21 steps, or all of fewer; a step has so many
    `characters`.
    """
    span = min(21, len(losses))
    at = characters * torch.arange(1, len(losses) + 1) / 1000
    ax.plot(at, losses, color=color, alpha=0.25, lw=0.8)
    mean = torch.tensor(losses).unfold(0, span, 1).mean(1)
    ax.plot(at[span // 2 :][: len(mean)], mean, color=color, label=label)
    ax.set(xlabel="thousands of characters seen", ylabel=NATS)
    return ax


def maps(weights: Float[Tensor, "layers h t s"], line: str) -> Any:
    """Draw every head small, and below two of them with their characters: the one that looks most
    at the position just before, and the one that agrees most on one position. -> the figure
    """
    import matplotlib.pyplot as plt

    weights = weights.cpu()  # a model on a GPU gives them there
    layers, h = weights.shape[:2]
    figure: Any = plt.figure(figsize=(7.2, 3.9 + 1.35 * layers), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.35 * layers, 3.9))
    grid = above.subplots(layers, h, squeeze=False)
    for i, ax in enumerate(grid.flat):
        image = ax.imshow(weights[i // h, i % h], cmap="magma_r", vmin=0, vmax=1)
        ax.set_title(f"{i // h + 1}.{i % h + 1}", fontsize=SMALL)
        ax.set(xticks=[], yticks=[])
    above.supylabel("query", fontsize=SMALL)
    above.colorbar(image, ax=grid, label="attention weight", shrink=0.7)
    before = weights.diagonal(-1, -2, -1).mean(-1)
    one = weights[..., 1:, :].mean(-2)[..., 1:].amax(-1)
    pair = below.subplots(1, 2)
    for ax, score, what in zip(pair, (before, one), ("the one before", "one for all")):
        layer, i = divmod(int(score.argmax()), h)
        title = f"{what}: layer {layer + 1}, head {i + 1}"
        names: dict[str, Any] = {"xlabel": "key", "ylabel": "query"}
        heat(weights[layer, i], line, line, ax=ax, title=title, vmax=1, bar=False, **names)
    return figure
