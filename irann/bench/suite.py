"""What `irann bench` measures: part after part on one thread, each kept in `out` when it is done: a
second start goes on from there. Implementations that are compared run in turn, in one process, and
how much longer one takes is the median over rounds. Races are in races.py.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import shakespeare, zoo
from ..checkpoint import CheckpointError
from ..lm import evaluating
from ..settings import InputError, Setting
from ..text import Text
from ..training import InUse, evaluate
from . import engine, quality, races, regressions, report, scan, speed, stopping, waiting

ALONE: dict[str, Callable[[bool], dict]] = {
    "engine": engine.beside_pytorch,
    "waiting": waiting.waiting,
    "stopping": stopping.stopping,
    "regressions": regressions.regressions,
}
PEERS = {
    "scan": ["mambapy"],
    "step": ["mambapy"],
    "writing": ["transformers"],
    "gpt": ["transformers"],
    "regressions": ["mambapy", "transformers"],
    "engine": ["wasmtime"],
}
EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # where stretches of a window begin


def main(
    what: str = "all",
    *,
    quick: bool = False,
    out: Path = Path("bench-report"),
    seeds: int | None = None,
    device: str | torch.device = "cpu",
) -> dict:
    """Run, print the report as Markdown, and write it and the numbers under `out`. `seeds` (by
    default 3) and `device` are those of a race.

    Raises InputError for another `what`, for a report in `out` that this one would not go on from,
    for a race of no seeds, and for seeds or a device other than the CPU where no race is run;
    CheckpointError for a model's name where it has no weights; InUse where another process writes
    the same report.
    """
    known = dict.fromkeys(("all", "scan", *ALONE, *races.RACES, *zoo.MODELS))  # `thinker` is a race
    if what not in known:
        raise InputError(f"bench takes one of {', '.join(known)}; got {what!r}")
    race = what in races.RACES
    if not race and (seeds is not None or torch.device(device).type != "cpu"):
        raise InputError(
            f"{what} is measured on the CPU, with seeds of its own: leave --device and --seeds "
            f"out, they are for races ({', '.join(races.RACES)})"
        )
    count = Setting(3, "", low=1).check("seeds", 3 if seeds is None else seeds)
    out.mkdir(parents=True, exist_ok=True)
    try:
        alone = FileLock(out / f".{what}.lock").acquire(timeout=0)
    except Timeout:
        raise InUse(
            f"another process writes {out / what}.json: wait for it, or choose another --out"
        ) from None
    with alone:
        if race:
            measured = races.run(what, seeds=count, quick=quick, out=out, device=device)
        else:
            measured = measure(what, quick, out)
        page = report.markdown(measured)
        print(page)
        (out / f"{what}.md").write_text(page + "\n", encoding="utf-8")
    return measured


def parts_of(what: str) -> dict[str, Callable[[bool], dict]]:
    """-> what is measured, by its name in the report: functions of `quick`."""
    if what in zoo.MODELS:
        return {"models": partial(trained_models, only=what)}
    if what in ALONE:
        return {what: ALONE[what]}
    parts: dict[str, Callable[[bool], dict]] = {
        "scan": scan.times,
        "step": scan.training_step,
        "writing": scan.writing,
    }
    if what == "all":
        parts |= {
            "cache": speed.cache_gain,
            "steps": speed.training_steps,
            "gpt": speed.gpt_beside_transformers,
            "windows": speed.layer_against_window,
            "lengths": speed.writing_by_length,
            "parallel": speed.speed_against_quality,
            "models": trained_models,
        }
    return parts


def measure(what: str, quick: bool, out: Path) -> dict:
    """Part after part, each kept in `out` when it is done -> the report. One thread."""
    parts = parts_of(what)
    page = out / f"{what}.json"
    before = races.stored(page, quick)
    here = conditions(what)
    measured: dict = here | {"threads": 1, "quick": quick, "without": {}} | before
    lacked = measured["without"]
    missing = {name for name in parts if name not in before}
    missing |= {name for name in parts if set(without(name)) < set(lacked.get(name, ()))}
    others = [
        f"{key} {before.get(key, 'unknown')} (here {value})"
        for key, value in here.items()
        if before.get(key) != value
    ]
    if before and missing and others:
        raise InputError(
            f"{page} was measured with {', '.join(others)}: delete it, or choose another --out"
        )
    if not missing:
        told = "all of it is measured already"
        if others:
            told += f", with {', '.join(others)}"
        print(f"{told}; to measure again, delete {page}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, part in parts.items():
            if name in missing:
                print(f"measuring: {name}", file=sys.stderr)
                measured[name] = part(quick)
                lacked[name] = without(name)
                races.keep(measured, page)
    finally:
        torch.set_num_threads(threads)
    return measured


def conditions(what: str) -> dict[str, str]:
    """-> what parts that are measured one after another have to share, by name."""
    import irann

    shared = {
        "irann": irann.__version__,
        "torch": torch.__version__,
        "processor": races.processor(),
    }
    alone = [what] if what in zoo.MODELS else []
    models = {"all": zoo.MODELS, "engine": zoo.MODELS, "stopping": ["thinker"]}
    for name in models.get(what, alone):
        with suppress(CheckpointError):  # there are none
            card = zoo.card(name) if name in zoo.shipped() else zoo.load(name).card or {}
            shared[f"weights of {name}"] = weights_of(card)
    return shared


def without(part: str) -> list[str]:
    """-> what a part compares with, or needs, and is not installed."""
    return [name for name in PEERS.get(part, ()) if find_spec(name) is None]


def trained_models(quick: bool, only: str | None = None) -> dict:
    """-> by name, each model with weights or a run: parameters, likelihood, text quality,
    characters written per second.

    And `validation text`, pieces of the real thing measured like a model's: what the measures say
    of Shakespeare.
    """
    text = shakespeare.load()
    count, n = (2, 40) if quick else (quality.SAMPLES, quality.LENGTH)
    real = quality.real(text, count, n)
    rows: dict[str, dict] = {
        "validation text": {"quality": dict.fromkeys(map(str, quality.TEMPERATURES), real)}
    }
    for name in [only] if only else zoo.MODELS:
        try:
            model = zoo.load(name)
        except CheckpointError as error:
            if only:
                raise
            rows[name] = {"missing": str(error)}
            continue
        rows[name] = _trained_model(model, text, quick, count, n)
    return rows


def _trained_model(model: Any, text: Text, quick: bool, count: int, n: int) -> dict:
    card = model.card or {}
    row: dict[str, Any] = {"parameters": model.num_parameters, "exact": model.exact}
    if quick:
        row |= {"nats_per_char": card.get("validation"), "measured": False}
        row["standard_error"] = card.get("standard_error")
    else:
        likelihood = evaluate(model, text)
        row["nats_per_char"] = likelihood.nats_per_char
        row["standard_error"] = likelihood.standard_error
    row["by_position"] = by_position(model, text, pages=2 if quick else 60)
    row["quality"], row["samples"] = quality.written(model, text, count, n)
    long, seeds = (10, 1) if quick else (200, 3)
    for key, batch in (("chars_per_second", 1), ("chars_per_second_of_a_batch", count)):
        rates = []
        for seed in range(seeds):
            write = partial(quality.samples, model, batch, long, 1.0, seed)
            rates.append(batch * long / speed.seconds(write))
        row[key] = speed.summary(rates)
    return row


def weights_of(card: dict) -> str:
    """-> which weights a card is of: their hash, or the run's step and loss."""
    return card["sha256"][:12] if "sha256" in card else f"step {card['step']}, {card['validation']}"


def by_position(model: Any, text: Any, pages: int = 60) -> list[list[float]]:
    """-> pairs: a position in the window, mean nats from there to the next (the last: to the end),
    of each model the same first windows of the validation part.
    """
    window = model.config.window
    ids = text.val[: pages * window + 1].unfold(0, window + 1, window)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), evaluating(model):
        nats = torch.cat([model.nll(part, generator=generator) for part in ids.split(20)]).mean(0)
    edges = [edge for edge in EDGES if edge < window]
    return [[a, nats[a:b].mean().item()] for a, b in pairwise([*edges, window])]
