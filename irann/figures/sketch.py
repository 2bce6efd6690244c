"""The few strokes that every schematic is made of: a canvas, a text, a box, an arrow, a matrix with
its numbers and its shape. Coordinates are the drawing's own, y grows downwards like text.
"""

import math
from typing import Any

import torch

from . import INK, PALE, SMALL


def canvas(width: float, height: float) -> Any:
    """-> axes without ticks whose coordinates run from 0 to `width` and, downwards, to `height`."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(7.2, 7.2 * height / width))
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    ax.axis("off")
    return ax


def label(ax: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Write a text around the centre (x, y), small and dark unless `style` says otherwise."""
    centred = {"ha": "center", "va": "center", "fontsize": SMALL, "color": INK}
    ax.text(x, y, text, **centred | style)


def box(
    ax: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    *,
    color: str = INK,
    fill: str = "white",
    size: float = SMALL,
) -> None:
    """Draw a rounded box around the centre (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    shape = f"round,pad=0,rounding_size={0.2 * min(width, height)}"
    ax.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=shape, ec=color, fc=fill, lw=1.3, zorder=2)
    )
    label(ax, x, y, text, fontsize=size, zorder=3)


def arrow(
    ax: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    *,
    color: str = INK,
    dashed: bool = False,
) -> None:
    """Draw an arrow; `text` stands at its middle."""
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "lw": 1.2,
        "ls": "--" if dashed else "-",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=1)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        background = {"fc": "white", "ec": "none", "pad": 1}
        label(ax, *middle, text, color=color, bbox=background)


def matrix(
    ax: Any,
    x: float,
    y: float,
    values: Any,
    *,
    name: str = "",
    digits: int = 1,
    cmap: str = "Blues",
    rows: str = "",
    columns: str = "",
) -> None:
    """Draw a matrix with its numbers; its upper left corner is (x, y). NaN is an empty cell. Above
    it stands `name` with the shape.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    table = torch.as_tensor(values).double()
    finite = table[table.isfinite()]
    top = finite.abs().max().item() or 1.0
    high, wide = table.shape
    for i in range(high):
        for j in range(wide):
            value = table[i, j].item()
            known = math.isfinite(value)
            shade = 0.75 * abs(value) / top if known else 0.0
            face = colormaps[cmap](shade) if known else "white"
            ax.add_patch(Rectangle((x + j, y + i), 1, 1, fc=face, ec=PALE, lw=0.6, zorder=2))
            text = f"{value:.{digits}f}" if known else ""
            hue = "white" if shade > 0.55 else INK
            label(ax, x + j + 0.5, y + i + 0.5, text, color=hue, zorder=3)
    for i, character in enumerate(rows):
        label(ax, x - 0.4, y + i + 0.5, character, family="monospace")
    for j, character in enumerate(columns):
        label(ax, x + j + 0.5, y + high + 0.4, character, family="monospace")
    if name:
        label(ax, x + wide / 2, y - 0.35, f"{name}  {high} × {wide}", va="baseline")
