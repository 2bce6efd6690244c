"""The house style: one hue per model, and the few plots that notebooks, chat and benchmark share.

The hues are from Okabe and Ito's palette, which colour-blind readers can tell apart. Plots return
their axes.
"""

import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..settings import InputError
from . import lab

HUES = {"gpt": "#0072B2", "thinker": "#D55E00", "diffusion": "#009E73", "mamba": "#CC79A7"}
INK, PALE, ACCENT = "#222222", "#767676", "#E69F00"
SPARE = (ACCENT, "#56B4E9", "#000000")  # for what has no hue of its own
SMALL = 9  # points; no letter is smaller
NATS = "nats per character"
SEEN = {"step": "step", "seconds": "seconds", "characters": "characters seen"}

# Nats per character of the validation part, knowing nothing, the letters' frequencies, and add-one
# pairs of letters. A test computes them anew.
REFERENCES = {"uniform": 4.17439, "unigram": 3.34733, "bigram": 2.48189}


def use() -> None:
    """Set the house style for every figure that follows: dark on white, whatever page is around it,
    and in a notebook twice as sharp as it is large: an inch is 100 pixels of the page, each of them
    2 x 2 of the picture.
    """
    import matplotlib.pyplot as plt

    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")
        lab.attend()
    plt.rcParams.update(style())


def style() -> dict[Any, Any]:
    """-> the house style, as matplotlib's settings."""
    from cycler import cycler

    return {
        "figure.figsize": (7.2, 3.4),
        "figure.dpi": 100,
        "savefig.dpi": 200,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "axes.prop_cycle": cycler(color=[*HUES.values(), *SPARE]),
        "image.cmap": "viridis",
        "legend.frameon": True,
        "legend.framealpha": 0.9,
        "legend.edgecolor": "none",
        "legend.fontsize": SMALL,
    }


def colour(name: str) -> str:
    """-> the hue of a model, by its name in the zoo up to the first hyphen, or a spare one."""
    family = name.split("-")[0]
    return HUES.get(family, SPARE[sum(map(ord, family)) % len(SPARE)])


def show(fn: Any) -> None:
    """Print the source of a function or class, as the package has it."""
    print(textwrap.dedent(inspect.getsource(fn)).rstrip())


def learning_curve(
    ticks: Sequence[Any],
    *,
    name: str = "gpt",
    against: str = "characters",
    references: dict[str, float] | None = None,
    ax: Any = None,
    label: str | None = None,
) -> Any:
    """Draw the loss of ticks, against step, seconds or characters, and reference lines, such as
    `figures.REFERENCES` for tiny-shakespeare. Raises InputError without ticks.
    """
    if against not in SEEN:
        raise InputError(f"against is one of {', '.join(SEEN)}; got {against!r}")
    if not ticks:
        raise InputError("there is no step to draw: a run that is done takes none")
    ax = _axes(ax)
    losses = torch.tensor([tick.loss for tick in ticks], device="cpu")
    span = max(1, min(20, len(losses) // 4))
    x = [getattr(tick, against) for tick in ticks]
    ax.plot(x, losses, color=colour(name), alpha=0.25, lw=0.8)
    mean = losses.unfold(0, span, 1).mean(1)
    middle = x[span // 2 :][: len(mean)]
    label = label or f"{name}, training, mean of {span} steps"
    ax.plot(middle, mean, color=colour(name), label=label)
    validated = [(at, tick.validation) for at, tick in zip(x, ticks) if tick.validation is not None]
    if validated:
        ax.plot(*zip(*validated), "o", color=colour(name), mec="white", label="validation")
    lines(ax, references or {})
    ax.set(xlabel=SEEN[against], ylabel=NATS)
    ax.legend(loc="upper right")
    return ax


def lines(ax: Any, references: dict[str, float] = REFERENCES) -> None:
    """Draw the reference losses as pale horizontal lines with their names."""
    from matplotlib import patheffects

    outline = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # read across curves
    for name, nats in references.items():
        ax.axhline(nats, color=PALE, lw=1, ls=":")
        style = {"va": "bottom", "color": PALE, "fontsize": SMALL, "path_effects": outline}
        at = {"xycoords": ("axes fraction", "data")}
        ax.annotate(f"{name} {nats:.2f}", (0.3, nats), **at, **style)


def heat(
    weights: Any,
    rows: str,
    columns: str,
    *,
    ax: Any = None,
    title: str = "",
    cmap: str = "magma_r",
    vmin: float = 0,
    vmax: float | None = None,
    xlabel: str = "character",
    ylabel: str = "character",
    label: str = "",
    bar: bool = True,
) -> Any:
    """Draw a matrix (rows columns) of characters; `label` names the colours of the bar."""
    inches = 1.5 + 0.15 * max(len(rows), len(columns), 20)
    ax = _axes(ax, figsize=(inches, inches))
    weights = torch.as_tensor(weights).cpu()  # a model on a GPU gives them there
    image = ax.imshow(weights, cmap=cmap, vmin=vmin, vmax=vmax, aspect="equal")
    ax.set_xticks(range(len(columns)), visible(columns), fontsize=SMALL, family="monospace")
    ax.set_yticks(range(len(rows)), visible(rows), fontsize=SMALL, family="monospace")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(False)
    if bar:
        ax.figure.colorbar(image, ax=ax, label=label, fraction=0.046, pad=0.02)
    return ax


def visible(text: str) -> list[str]:
    """-> the characters of a text, with newline and space made visible."""
    return [{"\n": "\u21b5", " ": "\u2423"}.get(c, c) for c in text]


def on_text(
    text: str,
    values: Any,
    *,
    cmap: str = "YlOrRd",
    low: float | None = None,
    high: float | None = None,
    width: int = 64,
    label: str = "",
    ax: Any = None,
) -> Any:
    """Draw a text in fixed width with one value per character as the colour behind it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    positions = []
    row = 0
    column = 0
    for character in text:
        positions.append((column, row))
        column += 1
        if character == "\n" or column == width:
            row, column = row + 1, 0
    ax = _axes(ax, figsize=(width * 0.115, 0.24 * (row + 1) + 0.5))
    values = torch.as_tensor(values).cpu().double()  # not every device has doubles
    if not text or values.shape != (len(text),):
        got = f"{tuple(values.shape)} for {len(text)} characters"
        raise InputError(f"a text is drawn with a value for each of its characters; got {got}")
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    shades = ScalarMappable(Normalize(low, high), cmap)
    style = {"ha": "center", "va": "center", "family": "monospace", "fontsize": SMALL}
    for character, (x, y), value in zip(visible(text), positions, values.tolist(), strict=True):
        red, green, blue, alpha = shades.to_rgba(value)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=(red, green, blue, alpha), lw=0))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(x, y, character, color="white" if dark else INK, **style)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(row + 0.6, -0.6))
    ax.axis("off")
    if label:
        ax.figure.colorbar(shades, ax=ax, label=label, fraction=0.03, pad=0.01)
    return ax


def _axes(ax: Any, **figure: Any) -> Any:
    import matplotlib.pyplot as plt

    return ax or plt.subplots(**figure)[1]


# ---------------------------------------------- what `irann bench` measured, as its report holds it


def race(report: dict, *, against: str = "characters", ax: Any = None) -> Any:
    """Draw a race's validation against characters or seconds: a line per seed, bounds dashed."""
    ax = _axes(ax)
    i, unit, xlabel = {
        "characters": (0, 1e6, "millions of characters trained on"),
        "seconds": (1, 1, "seconds of training"),
    }[against]
    spare = itertools.cycle(SPARE)
    for name, row in report["rows"].items():
        hue = HUES.get(name.split("-")[0]) or next(spare)
        for seed, curve in enumerate(row["curves"]):
            points = [(point[i] / unit, point[2]) for point in curve]
            style = {"color": hue, "ls": _dashes(row), "marker": ".", "lw": 1}
            ax.plot(*zip(*points), label=name if seed == 0 else None, **style)
    ax.set(xlabel=xlabel, ylabel=f"validation, {NATS}")
    ax.legend()
    return ax


def positions(models: dict, *, ax: Any = None) -> Any:
    """Draw what a character costs against its position in the window, bounds dashed."""
    ax = _axes(ax)
    for name, row in models.items():
        if "by_position" in row:
            points = [(position + 1, nats) for position, nats in row["by_position"]]
            style = {"color": colour(name), "ls": _dashes(row), "marker": "o", "ms": 4}
            ax.plot(*zip(*points), label=name, **style)
    ax.set_xscale("log")
    _plain(ax.xaxis)
    ax.set(xlabel="position in the window", ylabel=NATS, title="What a longer past is worth")
    ax.legend()
    return ax


def windows(measured: dict, *, ax: Any = None) -> Any:
    """Draw what one layer costs, forward and backward, against the window, both logarithmic."""
    ax = _axes(ax)
    for name, hue in (("attention", HUES["gpt"]), ("mamba", HUES["mamba"])):
        _band(ax, measured["lengths"], measured["rows"][name], color=hue, label=name)
    title = "One layer, forward and backward"
    ax.set(xscale="log", yscale="log", xlabel="characters in the window", ylabel="ms", title=title)
    ax.set_xticks(measured["lengths"], measured["lengths"])
    ax.minorticks_off()
    _plain(ax.yaxis)
    ax.legend()
    return ax


def lengths(measured: dict, *, ax: Any = None) -> Any:
    """Draw characters per second by prompt length, for the longest reply; the range is shaded."""
    ax = _axes(ax)
    longest = max(one["reply"] for row in measured.values() for one in row)
    for name, row in measured.items():
        kept = [one for one in row if one["reply"] == longest]
        prompts = [one["prompt"] for one in kept]
        dashes = "--" if name == "thinker-page" else "-"
        rates = [one["chars_per_second"] for one in kept]
        _band(ax, prompts, rates, color=colour(name), ls=dashes, label=name)
    labels = {"xlabel": "characters in the prompt", "ylabel": "characters per second"}
    ax.set(xscale="log", yscale="log", title=f"Replies of {longest}", **labels)
    ax.set_ylim(top=4 * ax.get_ylim()[1])
    ax.legend(ncols=2, loc="upper left")  # in the room just made: the curves may go anywhere
    _plain(ax.xaxis, 1)
    _plain(ax.yaxis)
    return ax


def _band(
    ax: Any, x: Sequence[float], summaries: Iterable[dict], *, color: str, **style: Any
) -> None:
    """Draw medians, and lowest to highest as a band."""
    low, median, high = zip(*((each["low"], each["median"], each["high"]) for each in summaries))
    ax.plot(x, median, marker="o", color=color, **style)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def parallel(measured: dict, *, ax: Any = None) -> Any:
    """Draw words that exist against characters per second; the page models by their steps."""
    ax = _axes(ax)
    for name, row in measured.items():
        points = [(one["chars_per_second"]["median"], one["words"]["median"]) for one in row]
        marker = "s" if name == "thinker-page" else "o"
        ax.plot(*zip(*points), marker=marker, lw=1, color=colour(name), label=name)
        style = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": SMALL}
        for one, point in zip(row, points, strict=True):
            if "steps" in one:
                ax.annotate(str(one["steps"]), point, color=colour(name), **style)
    labels = {"xlabel": "characters per second, batch 1", "ylabel": "words that exist"}
    ax.set(xscale="log", title="Numbers: steps for a page", **labels)
    _plain(ax.xaxis)
    ax.legend()
    return ax


def _plain(axis: Any, *at: float) -> None:
    """Write a logarithmic axis as one says numbers: 1, 2, 5, 10, 20, 50 (or `at` and its tens)."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=at or (1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _dashes(row: dict) -> str:
    return "-" if row["exact"] else "--"
