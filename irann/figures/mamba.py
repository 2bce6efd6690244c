"""The schematics of chapter 4: the recurrence unrolled, the tree of the scan, the block. The first
two show the numbers that they are given, the last the sizes.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from . import HUES, INK, PALE
from .sketch import arrow, box, canvas, label

HUE, FILL = HUES["mamba"], "#f7e6f0"


def unrolled(keep: Sequence[float], add: Sequence[float], states: Sequence[float]) -> Any:
    """Draw h_t = a_t h_{t-1} + x_t rolled up, and beside it each position with its numbers."""
    ax = canvas(72, 23)
    label(ax, 7, 21, "rolled up")
    label(ax, 45, 21, "unrolled")
    box(ax, 7, 10, 7, 4.4, "$h_t$", color=HUE, fill=FILL)
    ax.plot([10.5, 13.5, 13.5, 8.5], [10, 10, 5.6, 5.6], color=HUE, lw=1.2, zorder=1)
    arrow(ax, (8.5, 5.6), (8.5, 7.8), color=HUE)
    label(ax, 16, 8, "$\\times\\, a_t$")
    arrow(ax, (7, 17), (7, 12.3))
    label(ax, 7, 18.2, "$x_t = \\delta_t B_t u_t$")
    arrow(ax, (7, 7.7), (7, 4))
    label(ax, 7, 2.7, "$y_t = C_t h_t$")
    gap = 47.5 / len(states)
    left = 21.0
    label(ax, left, 10, "0")
    for t, (a, x, h) in enumerate(zip(keep, add, states, strict=True), start=1):
        at = left + gap * t - 0.5
        begin = left + 1 if t == 1 else at - gap + 3.5
        arrow(ax, (begin, 10), (at - 3.5, 10), color=HUE)
        label(ax, (begin + at - 3.5) / 2, 8.4, f"$\\times\\,${_number(a)}")
        box(ax, at, 10, 7, 4.4, f"$h_{t}$ = {_number(h)}", color=HUE, fill=FILL)
        arrow(ax, (at, 17), (at, 12.3))
        label(ax, at, 18.2, f"$x_{t}$ = {_number(x)}")
        arrow(ax, (at, 7.7), (at, 4))
        label(ax, at, 2.7, f"$y_{t}$")
    return ax


def scan_tree(
    rows: Sequence[Sequence[tuple[float, float]]], levels: Sequence[Sequence[tuple[int, int]]]
) -> Any:
    """Draw the pairs (a, x) of all positions before, between and after the levels of a tree; in a
    level, j takes in i for each of its (i, j), counted from 0. What has just been composed is
    coloured; a grey frame will still change.
    """
    t = len(rows[0])
    cell, step = 72 / (t + 0.8), 8.5
    ax = canvas(72, step * len(levels) + 9)
    left = 1.3 * cell
    last = {j: number for number, level in enumerate(levels, start=1) for _, j in level}
    for number, row in enumerate(rows):
        y = 5.5 + step * number
        changed = {j for _, j in levels[number - 1]} if number else set()
        for j, (a, x) in enumerate(row):
            done = number >= last.get(j, 0)
            color, fill = (HUE, FILL) if j in changed else (INK if done else PALE, "white")
            text = f"{_number(a)}, {_number(x)}"
            box(ax, left + j * cell, y, 0.8 * cell, 4, text, color=color, fill=fill)
        name = "start" if number == 0 else f"level {number}"
        label(ax, 0, y, name, ha="left", color=PALE)
        if number < len(levels):
            for i, j in levels[number]:
                arrow(ax, (left + i * cell, y + 2), (left + j * cell, y + step - 2), color=HUE)
                arrow(ax, (left + j * cell, y + 2), (left + j * cell, y + step - 2), color=PALE)
    for j in range(t):
        label(ax, left + j * cell, 1.5, f"$t$ = {j + 1}")
    return ax


def block(*, d: int, e: int, n: int, k: int, rank: int) -> Any:
    """Draw one Mamba block with the size of what leaves its parts: signal in the middle, gate above
    it, below what selects, and at the bottom the residual stream.
    """
    ax = canvas(80, 33)
    signal = 12
    gate = 3.5
    chosen = 22
    stream = 30
    parts = [
        (9, signal, 7, "norm"),
        (20, signal, 9, "in_proj"),
        (32, signal, 9, f"conv1d\n{k} positions"),
        (43, signal, 6, "SiLU"),
        (55, signal, 8, "scan\n$A$, $D$"),
        (63.5, signal, 3.2, "$\\times$"),
        (71, signal, 8, "out_proj"),
        (78, signal, 2.6, "+"),
        (43, gate, 6, "SiLU"),
        (43, chosen, 8, "x_proj"),
        (55, chosen, 9.5, "dt_proj,\nsoftplus"),
    ]
    for x, y, width, name in parts:
        mine = name.startswith("scan")
        style: dict[str, Any] = {"color": HUE, "fill": FILL} if mine else {}
        box(ax, x, y, width, 5 if width > 4 else 3.2, name, **style)
    across = [
        (1, 5.5, ""),
        (12.5, 15.5, f"{d}"),
        (24.5, 27.5, f"{e}"),
        (36.5, 40, ""),
        (46, 51, ""),
    ]
    across += [(59, 61.9, f"{e}"), (65.1, 67, ""), (75, 76.7, "")]
    for begin, end, size in across:
        arrow(ax, (begin, signal), (end, signal))
        label(ax, (begin + end) / 2, signal - 3.4, size)
    label(ax, 48.5, signal - 3.4, f"$u$: {e}")
    corners = [([20, 20, 40], [signal - 2.5, gate, gate]), ([46, 63.5, 63.5], [gate, gate, 10.4])]
    corners += [([3, 3, 78, 78], [signal, stream, stream, 13.6])]
    for xs, ys in corners:
        ax.plot(xs[:-1], ys[:-1], color=INK, lw=1.2, zorder=1)
        arrow(ax, (xs[-2], ys[-2]), (xs[-1], ys[-1]))
    arrow(ax, (43, signal + 2.5), (43, chosen - 2.5))
    arrow(ax, (47, chosen), (50.2, chosen))
    arrow(ax, (46, chosen - 2.5), (52.2, signal + 2.5))
    arrow(ax, (55, chosen - 2.5), (55, signal + 2.5))
    label(ax, 48.6, chosen + 1.6, f"{rank}")
    label(ax, 45.6, 16.2, f"$B$, $C$:\n2×{n}")
    label(ax, 55.8, 17, f"$\\delta$: {e}", ha="left")
    label(ax, 30, gate - 1.5, f"gate: {e}")
    label(ax, 40, stream - 1.5, f"residual stream: {d}")
    return ax


def _number(value):
    """-> a number as one writes it by hand: 3, 1/8, 0.37."""
    exact = Fraction(value).limit_denominator(64)
    if abs(float(exact) - value) < 1e-9 and exact.denominator in (1, 2, 4, 8, 16, 32, 64):
        return str(exact)
    return f"{value:.2g}"
