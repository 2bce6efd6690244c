"""The house style: one hue per model everywhere, and the few plots that notebooks, chat and benchmark share.

The hues are from Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

import inspect
import itertools
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor, nn

HUES = {"gpt": "#0072B2", "thinker": "#D55E00", "diffusion": "#009E73", "mamba": "#CC79A7"}
INK, PALE, ACCENT = "#222222", "#9a9a9a", "#E69F00"
SPARE = (ACCENT, "#56B4E9", "#000000")  # for what has no hue of its own

# Nats per character of the validation part that know nothing, the letters' frequencies, and add-one pairs of letters.
# A test computes them anew.
REFERENCES = {"uniform": 4.17439, "unigram": 3.34733, "bigram": 2.48189}


def use() -> None:
    """Set the house style for every figure that follows."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.4),
            "figure.dpi": 96,
            "savefig.dpi": 96,
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
            "axes.prop_cycle": plt.cycler(color=[*HUES.values(), *SPARE]),
            "image.cmap": "viridis",
            "legend.frameon": False,
        }
    )


def colour(name: str) -> str:
    """-> the hue of a model, by its name in the zoo (`thinker-page` has the thinker's); one that is not listed gets a spare one."""
    family = name.split("-")[0]
    return HUES.get(family, SPARE[sum(map(ord, family)) % len(SPARE)])


def show(fn) -> None:
    """Print the source of a function or class, as the package has it."""
    print(textwrap.dedent(inspect.getsource(fn)).rstrip())


@torch.no_grad()
def trip(model: nn.Module, ids: Tensor, depth: int = 3) -> None:
    """Send ids through a model and print the shape that leaves each part, in the order they are passed."""
    rows, hooks = [], []

    def note(name):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                rows.append((name, type(module).__name__, tuple(first.shape)))

        return hook

    for name, module in model.named_modules():
        if name and name.count(".") < depth and not isinstance(module, (nn.Dropout, nn.ModuleList)):
            hooks.append(module.register_forward_hook(note(name)))
    training = model.training
    try:
        model.eval()
        out = model(ids)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    wide = max(len(name) for name, *_ in [("ids",), *rows])
    print(f"{'ids':{wide}}  {tuple(ids.shape)}")
    for name, kind, shape in rows:
        print(f"{name:{wide}}  {shape!s:20} {kind}")
    print(f"{'out':{wide}}  {tuple(out.shape)}")


def learning_curve(
    ticks,
    *,
    name: str = "gpt",
    against: str = "characters",
    references=REFERENCES,
    smooth: int = 20,
    ax=None,
    label=None,
):
    """Draw the loss of a list of ticks and the reference lines -> the axes. `against` is step, seconds or characters."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    losses = torch.tensor([tick.loss for tick in ticks])
    smooth = max(1, min(smooth, len(losses) // 4))
    mean = losses.unfold(0, smooth, 1).mean(1)
    x = {
        "step": [tick.step for tick in ticks],
        "seconds": [tick.seconds for tick in ticks],
        "characters": [tick.characters for tick in ticks],
    }[against]
    ax.plot(x, losses, color=colour(name), alpha=0.25, lw=0.8)
    ax.plot(x[smooth - 1 :], mean, color=colour(name), label=label or f"{name}, training")
    measured = [
        (place, tick.validation) for place, tick in zip(x, ticks) if tick.validation is not None
    ]
    if measured:
        ax.plot(*zip(*measured), "o", color=colour(name), mec="white", label="validation")
    lines(ax, references)
    ax.set(
        xlabel={"step": "step", "seconds": "seconds", "characters": "characters seen"}[against],
        ylabel="nats per character",
    )
    ax.legend(loc="upper right")
    return ax


def lines(ax, references=REFERENCES) -> None:
    """Draw the reference losses as pale horizontal lines with their names."""
    for name, nats in references.items():
        ax.axhline(nats, color=PALE, lw=1, ls=":")
        ax.annotate(
            f"{name} {nats:.2f}",
            (0.01, nats),
            xycoords=("axes fraction", "data"),
            va="bottom",
            color=PALE,
            fontsize=8,
        )


def heat(weights, rows: str, columns: str, *, ax=None, title: str = "", vmax=None):
    """Draw a matrix (rows columns) whose rows and columns belong to characters -> the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(5, 5))[1]
    ax.imshow(torch.as_tensor(weights), cmap="magma_r", vmin=0, vmax=vmax, aspect="equal")
    ax.set_xticks(range(len(columns)), visible(columns), fontsize=7, family="monospace")
    ax.set_yticks(range(len(rows)), visible(rows), fontsize=7, family="monospace")
    ax.set_title(title)
    ax.grid(False)
    return ax


def visible(text: str) -> list[str]:
    """-> the characters of a text, with newline and space made visible."""
    return [{"\n": "\u21b5", " ": "\u00b7"}.get(c, c) for c in text]


def on_text(
    text: str,
    values,
    *,
    cmap: str = "YlOrRd",
    low=None,
    high=None,
    width: int = 64,
    label: str = "",
    ax=None,
):
    """Draw a text in fixed width with one value per character as the colour behind it -> the axes."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    places, row, column = [], 0, 0
    for character in text:
        places.append((row, column))
        column += 1
        if character == "\n" or column == width:
            row, column = row + 1, 0
    ax = ax or plt.subplots(figsize=(width * 0.115, 0.24 * (row + 1) + 0.5))[1]
    values = torch.as_tensor(values).double()
    norm = plt.Normalize(
        values.min() if low is None else low, values.max() if high is None else high
    )
    shades = plt.get_cmap(cmap)
    for character, (r, c), value in zip(visible(text), places, values.tolist(), strict=True):
        shade = shades(norm(value))
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
        ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=shade, lw=0))
        ax.text(
            c,
            r,
            character,
            ha="center",
            va="center",
            family="monospace",
            fontsize=8,
            color="white" if dark else INK,
        )
    ax.set(xlim=(-0.6, width - 0.4), ylim=(row + 0.6, -0.6))
    ax.axis("off")
    if label:
        ax.figure.colorbar(
            plt.cm.ScalarMappable(norm, shades), ax=ax, label=label, fraction=0.03, pad=0.01
        )
    return ax


# -------------------------------------------------------------------- what `irann bench` measured, as its report holds it


def race(report: dict, *, against: str = "characters", ax=None):
    """Draw the validation curves of a race, one thin line per seed, bounds dashed -> the axes. `against` is characters or seconds."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    place, unit = {"characters": (0, 1e6), "seconds": (1, 1)}[against]
    spare = itertools.cycle(SPARE)
    for name, row in report["rows"].items():
        hue = HUES.get(name.split("-")[0]) or next(spare)
        for k, curve in enumerate(row["curves"]):
            x, y = [point[place] / unit for point in curve], [point[2] for point in curve]
            ax.plot(
                x,
                y,
                marker=".",
                lw=1,
                color=hue,
                ls="-" if row["exact"] else "--",
                label=None if k else name,
            )
    ax.set(
        xlabel={
            "characters": "millions of characters trained on",
            "seconds": "seconds of training",
        }[against],
        ylabel="validation, nats per character",
    )
    ax.legend()
    return ax


def learning(models: dict, *, ax=None):
    """Draw the validation losses that the models' cards keep, against characters, bounds dashed -> the axes."""
    ax = _each(models, "curve", lambda characters: characters / 1e6, ax)
    ax.set(xlabel="millions of characters trained on", ylabel="validation, nats per character")
    return ax


def places(models: dict, *, ax=None):
    """Draw what a character costs against its place in the window, bounds dashed -> the axes."""
    ax = _each(models, "by_place", lambda place: place + 1, ax)
    ax.set(
        xlabel="place in the window",
        ylabel="nats per character",
        title="What a longer past is worth",
    )
    return ax


def _each(models: dict, key: str, scaled: Callable[[float], float], ax):
    """Draw the nats that each model has under `key`, against the numbers beside them, on a logarithmic scale -> the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    for name, row in models.items():
        if key in row:
            x, nats = zip(*row[key], strict=True)
            dashes = "-" if row["exact"] else "--"
            ax.plot(
                [scaled(at) for at in x],
                nats,
                marker="o",
                ms=4,
                color=colour(name),
                label=name,
                ls=dashes,
            )
    ax.set_xscale("log")
    ax.legend()
    return ax


def windows(measured: dict, *, ax=None):
    """Draw what one layer costs, forward and backward, against the window -> the axes, both logarithmic."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    for name, hue in (("attention", HUES["gpt"]), ("mamba", HUES["mamba"])):
        times = measured["rows"][name]
        ax.plot(measured["lengths"], [ms["median"] for ms in times], "o-", color=hue, label=name)
        ax.fill_between(
            measured["lengths"],
            [ms["low"] for ms in times],
            [ms["high"] for ms in times],
            color=hue,
            alpha=0.2,
            lw=0,
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="characters in the window",
        ylabel="ms",
        title="One layer, forward and backward",
    )
    ax.set_xticks(measured["lengths"], measured["lengths"])
    ax.minorticks_off()
    ax.legend()
    return ax


def lengths(measured: dict, *, ax=None):
    """Draw characters per second against the length of the prompt, for the longest reply, bounds of the spread shaded -> the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    longest = max(one["reply"] for row in measured.values() for one in row)
    for name, row in measured.items():
        kept = [one for one in row if one["reply"] == longest]
        x, speeds = [one["prompt"] for one in kept], [one["chars_per_second"] for one in kept]
        ax.plot(
            x,
            [s["median"] for s in speeds],
            marker="o",
            color=colour(name),
            ls="--" if name == "thinker-page" else "-",
            label=name,
        )
        ax.fill_between(
            x,
            [s["low"] for s in speeds],
            [s["high"] for s in speeds],
            color=colour(name),
            alpha=0.15,
            lw=0,
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="characters in the prompt",
        ylabel="characters per second",
        title=f"Replies of {longest}",
    )
    ax.set_ylim(top=2.5 * ax.get_ylim()[1])
    ax.legend(
        fontsize=8, ncols=3, loc="upper center"
    )  # in the room just made: the curves may go anywhere
    return ax


def parallel(measured: dict, *, ax=None):
    """Draw words that exist against characters per second; the page models by their steps -> the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    for name, row in measured.items():
        x, y = (
            [one["chars_per_second"]["median"] for one in row],
            [one["words"]["median"] for one in row],
        )
        ax.plot(
            x,
            y,
            marker="s" if name == "thinker-page" else "o",
            lw=1,
            color=colour(name),
            label=name,
        )
        for one, a, b in zip(row, x, y, strict=True):
            if "steps" in one:
                ax.annotate(
                    f"{one['steps']}",
                    (a, b),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=7,
                    color=colour(name),
                )
    ax.set(
        xscale="log",
        xlabel="characters per second, batch 1",
        ylabel="words that exist",
        title="Numbers: steps for a page",
    )
    ax.legend(fontsize=8)
    return ax
