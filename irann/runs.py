"""What the command line says around a training: the text before it, models, runs, a run's curve."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from . import checkpoint, machine, shakespeare, zoo
from .chat import streams
from .checkpoint import CheckpointError
from .settings import InputError
from .text import BOM, CRLF, Text, describe
from .training import Recipe

LASTS = {
    "tiny": "seconds",
    "demo": "a minute or two of two idle cores",
    "full": "an hour or more of two cores",
    "gpu": "minutes of a GPU",
}
LITTLE = 20_000  # characters: less says hardly anything about a language
MUCH = 1_000_000  # enough for the recipe full
PASSES = 30  # a text that is read more often is learned by heart
GAP = 0.4  # nats that a training loss may lie below the validation without a word


def advice(
    text: Text, name: str, config, recipe: Recipe, *, changed: bool = False
) -> Iterator[str]:
    """What to expect of a recipe on a text: yields lines. How long it lasts is known of a recipe
    that was not `changed`.
    """
    if len(text.train) <= config.window:
        yield (
            f"too little text for windows of {config.window:,} characters: a longer one is needed, "
            "or a smaller window, as by --set window=8"
        )
        return
    characters = recipe.steps * recipe.batch * config.window
    passes = characters / len(text.train)
    lasts = f", {LASTS[name]}" if name in LASTS and not changed else ""
    read = f"recipe {name} reads {characters:,} characters"
    yield f"{read}, the training part {passes:.1f} times{lasts}"
    size = len(text.train) + len(text.val)
    if passes > PASSES:
        steps = max(1, round(recipe.steps * PASSES / passes))
        yield (
            "that often it may learn the text by heart; the checkpoint with the lowest validation "
            f"is kept; shorter: --set steps={steps}"
        )
    if size < LITTLE:
        yield f"little text: from some {LITTLE:,} characters on a model learns words of its own"
    elif size >= MUCH and name == "demo":
        yield f"enough text for more: --recipe full, {LASTS['full']}"


def look(text: Text, config, recipe: Recipe, name: str, *, changed: bool = False) -> Iterator[str]:
    """Yields what to know of a text, and what to expect of a recipe on it."""
    yield from describe(text)
    yield from advice(text, name, config, recipe, changed=changed)


def evaluations(text: Text, config, recipe: Recipe) -> int:
    """-> after how many steps to validate on a text of one's own, so that the best checkpoint is
    kept: about ten times, less often where that would take long.
    """
    cost = max(1, len(text.val))
    affordable = 0.3 * recipe.steps * recipe.batch * config.window / cost
    times = min(10, int(affordable))
    return recipe.steps // times if times > 1 else 0


def by_heart(training: float, validation: float, passes: float) -> str:
    """-> what it means that a training loss lies far below its validation, or ''."""
    if validation - training < GAP:
        return ""
    if passes < 1:
        return (
            f"on what it trained with it is at {training:.2f}, and has read none of it twice: the "
            "end of the text, which it is measured on, seems of another kind than its beginning"
        )
    return (
        f"on what it trained with it is at {training:.2f}: it knows part of the text by heart "
        "(overfitting), which does not help with new text; more text helps, or fewer steps, "
        "or --set dropout=0.2"
    )


def nexts(run: Path) -> Iterator[str]:
    """Yields the commands that go on with a run."""
    place = f".{os.sep}{run}" if str(run) in zoo.names() else str(run)  # a plain name is the book's
    for command, what in (
        ("sample", "it writes"),
        ("chat", "it answers"),
        ("eval", "what a character of its text costs it"),
        ("plot", "how it learned"),
        ("export", "a page to give away, in which it is live"),
    ):
        yield f"  irann {command} {quoted(place)}".ljust(44) + f"  # {what}"


def quoted(*words: str) -> str:
    """-> words as they are typed in this system's shell: that of Windows has no single quotes."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def listing() -> Iterator[str]:
    """Yields the models and what ships of each, then the runs under runs/."""
    rows = [("model", "ships with", "nats per character", "talk with it")]
    for name in zoo.names():
        row = (name, "no weights", "", "")
        if name in zoo.shipped():
            card = zoo.card(name)
            parameters = f"{card['parameters']:,} parameters"
            row = (name, parameters, _nats(card), f"irann chat {name}")
        rows.append(row)
    yield from _table(rows)
    yield ""
    found = zoo.runs()
    if not found:
        yield f"no runs in {Path('runs').absolute()}; one begins with: irann train gpt"
        return
    names = {entry.model.__name__: name for name, entry in zoo.MODELS.items()}
    rows = [("run", "model", "step", "nats per character", "text", "saved")]
    for run, (when, config) in found.items():
        steps = _part(config, "recipe").get("steps", "?")
        text = file_of(str(_part(config, "corpus").get("source", "?"))).name
        if _part(config, "corpus").get("sha256") == shakespeare.SHA256:
            text = "tiny-shakespeare"
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
        model = names.get(str(config.get("model")), "?")
        progress = f"{config.get('step')} of {steps}"
        best = checkpoint.by_validation(checkpoint.listed(run))  # the first of them speaks
        nats = _nats(checkpoint.config_of(best[0]) if best else config)
        rows.append((str(run), model, progress, nats, text[:40], date))
    yield from _table(rows)


def file_of(source: str) -> Path:
    """-> the file that a text was read from, without what was said about how it was read."""
    return Path(source.removesuffix(CRLF).removesuffix(BOM))


def _part(config: dict, name: str) -> dict:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _nats(config: dict) -> str:
    value = config.get("validation")
    if not isinstance(value, int | float):
        return "not yet measured"
    return f"{'' if config.get('exact', True) else 'at most '}{value:.3f}"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    taken = [[sum(map(streams.cells, cell)) for cell in row] for row in rows]
    widths = [max(column) for column in zip(*taken)]
    for row, lengths in zip(rows, taken):
        padded = [cell + " " * (w - n) for cell, w, n in zip(row, widths, lengths)]
        yield "  ".join(padded).rstrip()


# ------------------------------------------------------------------------------------- the curve


def metrics(run: Path) -> list[dict]:
    """-> the steps of a run. Raises CheckpointError without any, InputError if it is no folder."""
    if not run.is_dir():
        raise InputError(f"there is no run {run}; irann list shows those there are")
    rows = []
    path = run / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"]), "loss": float(row["loss"])})
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
    if not rows:
        raise CheckpointError(f"{run} has no metrics.jsonl with steps in it: is it a run?")
    return rows


def plot(run: Path, width: int = 72, height: int = 16) -> Iterator[str]:
    """Yields a run's curve in characters: each column's mean loss as a line, validation as `o`."""
    rows = metrics(run)
    last = rows[-1]["step"]
    width = min(width, len(rows))
    columns: list[list[float]] = [[] for _ in range(width)]
    validated = []
    for row in rows:
        x = min(width - 1, row["step"] * width // (last + 1))
        columns[x].append(row["loss"])
        if row.get("validation") is not None:
            validated.append((x, row["validation"]))
    means = [(x, sum(losses) / len(losses)) for x, losses in enumerate(columns) if losses]
    values = [value for _, value in means + validated]
    high = max(values)
    step = (high - min(values)) / (height - 1) or 1.0
    page = [[" "] * width for _ in range(height)]
    for mark, points in (("*", means), ("o", validated)):
        for x, value in points:
            page[round((high - value) / step)][x] = mark
    for i, line in enumerate(page):
        label = f"{high - i * step:6.2f}" if i % 5 == 0 or i == height - 1 else " " * 6
        yield f"{label} |{''.join(line).rstrip()}"
    yield " " * 7 + "+" + "-" * width
    yield " " * 8 + "1 " + f"{last:,} steps".rjust(width - 2)
    caption = f"* nats per character while training, last {rows[-1]['loss']:.3f}"
    if validated:
        caption += f"; o validation, lowest {min(value for _, value in validated):.3f}"
    yield caption


def picture(run: Path, path: Path) -> Path:
    """Write a run's curve as a picture of matplotlib, a PNG unless the name says another -> its
    path. Raises InputError where there is no matplotlib, and for what is no file's name; OSError.
    """
    if not path.name or path.is_dir():
        raise InputError(f"--out takes the name of a file, such as curve.png; {path} is a folder")
    path = path if path.suffix else path.with_suffix(".png")
    try:
        import matplotlib
    except ImportError:
        raise InputError('--out needs matplotlib: pip install "irann[book]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from . import figures

    ticks = [SimpleNamespace(**{"validation": None} | row) for row in metrics(run)]
    figures.use()
    ax = figures.learning_curve(ticks, against="step", references={}, label="training")
    ax.set_title(str(run), parse_math=False)
    drawn = io.BytesIO()
    try:
        ax.figure.savefig(drawn, format=path.suffix[1:])
    except ValueError as error:  # an ending that is no picture's
        raise InputError(f"{path} cannot be drawn: {error}") from None
    finally:
        plt.close(ax.figure)
    write(path, drawn.getvalue())
    return path


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or leave what is there. Raises OSError that names it."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
    else:
        machine.write_atomically(path.resolve(), data)
