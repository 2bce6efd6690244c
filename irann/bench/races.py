"""Races: models trained side by side on the same text, to see what a design is worth.

Within a race and a seed, arms of one window and batch see the very same characters. Losses are over
the whole validation part, every character once. An arm that was interrupted goes on where it
stopped, and an arm that is done is not run again.
"""

import functools
import json
import math
import platform
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checkpoint, shakespeare, zoo
from ..lm import cross_entropy
from ..machine import write_atomically
from ..models.diffusion import DiffusionConfig
from ..models.gpt import GPTConfig
from ..models.mamba import MambaConfig
from ..models.thinker import ThinkerConfig
from ..settings import InputError
from ..text import Text
from ..training import Recipe, Signals, evaluate, progress, train
from . import quality

PUBLISHED = 1.4697  # nats per character: nanoGPT's readme, 10.65 million parameters, a GPU
ROUNDS, THRESHOLDS = (1, 2, 3, 4, 5, 6, 8, 12), (0.1, 0.2, 0.3, 0.5, 0.7)
MUON = Recipe(batch=12, lr=4e-3, optimizer="muon", muon_lr=0.012)
FREE = ("seed", "save_every")  # what may differ from a stored row: each run has its own seed
Rows = dict[str, dict]


@dataclass(frozen=True)
class Arm:
    """One model of a race: its zoo name, sizes, recipe, and what else to measure once trained."""

    model: str
    config: Any
    recipe: Recipe
    measure: Callable[[Any, Text], dict] | None = None

    def settings(self) -> dict:
        """-> sizes and recipe, flat, as a report keeps them beside what they gave."""
        settings = {"model": self.model} | asdict(self.config) | asdict(self.recipe)
        del settings["seed"]
        return settings


def models_arms(quick: bool) -> dict[str, Arm]:
    """All five: 0.8 million parameters (within 4 %), 1.5 million characters each, one optimizer."""
    window, width, steps = (32, 32, 20) if quick else (128, 128, 1000)
    wide, narrow = round(width * 1.4 / 4) * 4, round(width * 0.94 / 4) * 4
    gpt = GPTConfig.fast(window=window, layers=4, heads=2, width=width)
    mamba = MambaConfig.fast(window=window, layers=7, width=width)
    thinker = ThinkerConfig(window=window, width=wide, rounds=6, **zoo.DEEP)
    page = ThinkerConfig(window=window, width=wide, rounds=4)
    diffusion = DiffusionConfig(window=window, page=window // 2, layers=4, heads=2, width=narrow)
    recipe = replace(MUON, steps=steps, evaluate_every=steps // 5)
    averaged = replace(recipe, ema_decay=0.99)
    measure = functools.partial(text_quality, count=2, n=40) if quick else text_quality
    return {
        "gpt": Arm("gpt", gpt, recipe, measure),
        "mamba": Arm("mamba", mamba, recipe, measure),
        "thinker": Arm("thinker", thinker, recipe, measure),
        "thinker-page": Arm("thinker-page", page, recipe, measure),
        "diffusion": Arm("diffusion", diffusion, averaged, measure),
    }


def models_long_arms(quick: bool) -> dict[str, Arm]:
    """For a GPU: all five at 1.7 million parameters (within 8 %), 20 million characters each.

    Batches are of 32. Step, averaging and dropout are those of each one's recipe `gpu`; the
    thinker, whose own batches are smaller, has more dropout. Its halting head is the plain one.
    """
    which, steps, batch = ("tiny", 20, 8) if quick else ("gpu", 2500, 32)
    measure = functools.partial(text_quality, count=2, n=40) if quick else text_quality
    changes = {"diffusion": {"heads": 2, "width": 176}}
    changes["thinker"] = zoo.DEEP | {"dropout": 0.15, "halt_width": 0}
    same = {"steps": steps, "batch": batch, "evaluate_every": steps // 5, "precision": "float32"}
    arms = {}
    for name in zoo.MODELS:
        config, recipe = zoo.recipe(name, which, **({} if quick else changes.get(name, {})))
        arms[name] = Arm(name, config, replace(recipe, **same), measure)
    return arms


def thinker_arms(quick: bool) -> dict[str, Arm]:
    """At 0.41 million parameters, beside GPTs as deep as some of its rounds, and as all of them."""
    window, width, some, rounds, steps = (32, 32, 2, 3, 20) if quick else (128, 128, 4, 6, 1200)
    recipe = replace(MUON, steps=steps, evaluate_every=steps // 3)
    sizes = {"window": window, "width": width, "heads": 2}
    return _two_blocks(sizes, recipe, rounds, (some, rounds))


def thinker_long_arms(quick: bool) -> dict[str, Arm]:
    """1.7 million parameters, near those that ship, eleven epochs: size is not the only limit."""
    sizes = {"window": 256, "width": 264, "heads": 3, "dropout": 0.1}
    steps = 5500
    save_every = 250
    some = 4
    rounds = 6
    if quick:
        sizes |= {"window": 32, "width": 32, "heads": 2}
        steps = 20
        save_every = 0
        some = 2
        rounds = 3
    recipe = replace(MUON, steps=steps, batch=8, ema_decay=0.998, precision="bfloat16")
    recipe = replace(recipe, evaluate_every=steps // 5, save_every=save_every)
    return _two_blocks(sizes, recipe, rounds, (some,))


def _two_blocks(sizes: dict, recipe: Recipe, rounds: int, deep: tuple[int, ...]) -> dict[str, Arm]:
    """A thinker with two blocks in its core, a GPT of two, and GPTs as deep as `deep` rounds."""
    plain = GPTConfig.fast(**sizes, layers=2)
    thinker = ThinkerConfig(**sizes, rounds=rounds, **zoo.DEEP)
    arms = {
        "gpt, equal parameters": Arm("gpt", plain, recipe),
        "thinker": Arm("thinker", thinker, recipe, nll_by_rounds),
    }
    for r in deep:
        arms[f"gpt, as deep as {r} rounds"] = Arm("gpt", replace(plain, layers=2 * r), recipe)
    return arms


def nanogpt_arms(quick: bool) -> dict[str, Arm]:
    """nanoGPT's CPU recipe, from its readme and defaults, in our code; and ours, short and long.

    4 layers, 4 heads, width 128, block 64, batch 12, 2,000 steps of AdamW at 1e-3 (betas .9, .99,
    decay .1) down to 1e-4 on a cosine after 100 steps of warm-up, no dropout, no biases. Ours reads
    windows of 128, so all three are also measured in windows of 64.
    """
    scale = 100 if quick else 1
    measure = functools.partial(nll_in, window=64)
    theirs = GPTConfig(window=64, layers=4, heads=4, width=128, bias=False)
    cosine = {"lr_schedule": "cosine", "warmup": 100 // scale, "final_lr_factor": 0.1}
    slow = Recipe(steps=2000 // scale, batch=12, lr=1e-3, **cosine)
    ours, fast = zoo.recipe("gpt", "demo")
    return {
        "nanoGPT's recipe": Arm("gpt", theirs, slow, measure),
        "ours, short": Arm("gpt", ours, replace(fast, steps=200 // scale), measure),
        "ours, long": Arm("gpt", ours, replace(fast, steps=700 // scale), measure),
    }


def speedrun_arms(quick: bool) -> dict[str, Arm]:
    """What reaches `PUBLISHED` soonest: on two cores of a CPU, and on a GPU. A race runs the arm of
    its device. The rules, and what else was tried, stand in appendix 5b.

    All are measured in windows of 256, as nanoGPT is. Mamba is trained on shorter ones: its state
    has no window.
    """
    once = {"ema_decay": 0.0, "evaluate_every": 0}
    mamba = once | {"window": 128, "width": 128, "dropout": 0.1}
    mamba |= {"batch": 16, "steps": 2500, "save_every": 250}
    gpt = once | {"batch": 48, "steps": 1000}
    if quick:
        small = {"width": 32, "batch": 8, "steps": 20}
        mamba |= small
        gpt |= small | {"heads": 2}
    measure = functools.partial(nll_in, window=256)
    return {
        "two CPU cores": Arm("mamba", *zoo.recipe("mamba", "full", **mamba), measure),
        "one GPU": Arm("gpt", *zoo.recipe("gpt", "gpu", **gpt), measure),
    }


RACES = {
    "models": models_arms,
    "models-long": models_long_arms,
    "thinker": thinker_arms,
    "thinker-long": thinker_long_arms,
    "nanogpt": nanogpt_arms,
    "speedrun": speedrun_arms,
}


def run(
    name: str, *, seeds: int = 3, quick: bool = False, out: Path, device: str | torch.device = "cpu"
) -> dict:
    """Run a race -> what it ran on, and `rows`: by arm its parameters, characters, whether its nats
    are `exact`, and lists.

    One entry per seed in `nats`, `seconds` (of training, without validation), `clock` (seconds with
    it, as they passed, but without those of saving), `curves` (points of characters, seconds, nats)
    and `measured` (what else the race measures of a trained arm).
    Written to `out`/NAME.json after each arm.
    """
    arms = RACES[name](quick)
    text = shakespeare.load()
    threads = torch.get_num_threads()
    if name == "speedrun":
        on_cpu = torch.device(device).type == "cpu"
        kind = "two CPU cores" if on_cpu else "one GPU"
        arms = {f"{threads} CPU threads" if on_cpu and threads != 2 else kind: arms[kind]}
    page = out / f"{name}.json"
    machine = {"device": hardware(device), "torch": torch.__version__, "threads": threads}
    report = {"race": name, "quick": quick, **machine, "seeds": seeds, "notes": [], "rows": {}}
    if before := stored(page, quick):
        report |= {"device": "cpu"} | before | {"seeds": seeds}  # older ones name no device
    for seed in range(seeds):
        for arm_name, arm in arms.items():
            fresh = {"arm": arm.settings(), "nats": [], "seconds": [], "curves": [], "measured": []}
            row = report["rows"].setdefault(arm_name, fresh)
            folder = out / "runs" / f"{name}-{arm_name.replace(', ', '-').replace(' ', '-')}-{seed}"
            _check_same(arm, row, f"{page} holds '{arm_name}'", folder)
            if len(row["nats"]) > seed:
                continue
            print(f"{name}, {arm_name}, seed {seed}", file=sys.stderr)
            saved = checkpoint.listed(folder)
            config = checkpoint.config_of(saved[0]) if saved else {}
            places = [elsewhere(config, report, machine)]
            if ran_on(machine) != ran_on(report):
                trained = config.get("step") == arm.recipe.steps
                places.append(f"measured on {ran_on(machine)}" if trained else ran_on(machine))
            notes = [f"{arm_name}, seed {seed}: {place}" for place in places if place]
            report["notes"] = list(dict.fromkeys([*report["notes"], *notes]))
            keep(report, page)  # before the work, which may be stopped and go on elsewhere
            run_arm(arm, text, seed, folder, row, device)
            keep(report, page)
    return report


def keep(report: dict, page: Path) -> None:
    write_atomically(page, (json.dumps(report, indent=1) + "\n").encode())


def stored(page: Path, quick: bool) -> dict:
    """-> the report in a file, or {}. Raises InputError if damaged, or not as `quick` says."""
    if not page.exists():
        return {}
    try:
        report = json.loads(page.read_text())
        other = report["quick"] != quick
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{page} is not a report: delete it, or choose another --out") from None
    if other:
        kind = "full" if quick else "quick"
        raise InputError(
            f"{page} holds a {kind} report: delete it and its runs, or choose another --out"
        )
    return report


def _check_same(arm: Arm, row: dict, subject: str, folder: Path) -> None:
    """Raises InputError for a stored row of other settings."""
    was, now = checkpoint.renamed(row.get("arm", {})), arm.settings()
    changed = [key for key in now | was if was.get(key) != now.get(key) and key not in FREE]
    if changed:
        runs = f"{str(folder).rpartition('-')[0]}-[0-9]*"
        raise InputError(
            f"{subject} with other settings ({', '.join(changed)}): delete that row and "
            f"{runs}, or choose another --out"
        )


def hardware(device: str | torch.device) -> str:
    """-> what a report calls a device: a GPU by its name, a CPU by its own and its threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    return cpu if device.type == "cpu" else device.type


def processor() -> str:
    """-> the name of this machine's processor, as far as the system knows it."""
    with suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()


def ran_on(report: dict) -> str:
    """-> the machine of a report, or of a checkpoint, in words; older reports name no device."""
    device = report.get("gpu") or report.get("device", "cpu")
    device = f"{report['threads']} threads" if device == "cpu" else device
    return f"{device}, torch {report['torch']}"


def elsewhere(config: dict, *known: dict) -> str:
    """-> where a checkpoint was saved, by its config, if not on one of these machines."""
    place = ran_on(config["environment"]) if "environment" in config else ""
    return "" if any(f" {ran_on(one)}".endswith(f" {place}") for one in known) else place


def run_arm(
    arm: Arm, text: Text, seed: int, folder: Path, row: dict, device: str | torch.device = "cpu"
) -> None:
    """Train an arm, or the rest of it, and enter what it reached into its row under this seed."""
    model = zoo.build(arm.model, arm.config, seed=seed).to(device)
    recipe = replace(arm.recipe, seed=seed)
    with Signals() as stop:
        ticks = train(model, text, recipe, run=folder, resume=True, stop=stop)
        for tick in progress(ticks, recipe.steps):
            if tick.interrupted:
                words = f"saved in {tick.saved}; the same command goes on from there"
                print(words, file=sys.stderr)
                if tick.interrupted == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(128 + tick.interrupted)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not log:
        raise InputError(
            f"{folder} has lost its metrics.jsonl: delete that folder, and the same command "
            "trains this arm anew"
        )
    if log[-1]["step"] < recipe.steps:  # a kill took the last line
        log.append({"step": recipe.steps, "validation": evaluate(model, text).nats_per_char})
    per_step = recipe.batch * arm.config.window
    seconds = training_seconds(log)
    curve = []
    for line in log:
        if "validation" in line:
            spent = round(seconds * line["step"] / recipe.steps, 1)
            curve.append([line["step"] * per_step, spent, line["validation"]])
    row["parameters"] = model.num_parameters
    row["characters"] = recipe.steps * per_step
    row["exact"] = model.exact
    results = {"nats": log[-1]["validation"], "seconds": round(seconds, 3), "curves": curve}
    results["clock"] = log[-1].get("seconds", math.nan)  # with validation, and all that disturbed
    if arm.measure:
        results["measured"] = arm.measure(model, text)
    for key, value in results.items():
        values = row.setdefault(key, [])
        values += [math.nan] * (seed - len(values))  # older reports lack what is new
        values.append(value)


def training_seconds(log: list[dict]) -> float:
    """Lines of metrics.jsonl -> what the steps took: the mean of the middle half of those that did
    not validate, times all.

    So a busy minute does not count, nor a line that was lost; and of steps that are of two kinds,
    as the page thinker's, both do.
    """
    pairs = zip([{"seconds": 0.0}, *log], log, strict=False)
    spent = sorted(b["seconds"] - a["seconds"] for a, b in pairs if "validation" not in b)
    quarter = len(spent) // 4
    return statistics.mean(spent[quarter : len(spent) - quarter]) * log[-1]["step"]


# ---------------------------------------------------------------- what is measured of a trained arm


def text_quality(
    model: Any, text: Text, count: int = quality.SAMPLES, n: int = quality.LENGTH
) -> dict:
    """-> by temperature, the means of what quality.written says of `count` texts of length n."""
    measured, _ = quality.written(model, text, count, n)
    for row in measured.values():
        row |= {name: value["mean"] for name, value in row.items() if isinstance(value, dict)}
    return measured


def nll_in(model: Any, text: Text, window: int) -> dict:
    """-> nats per character in windows of that length, where no model has a longer past."""
    return {f"windows of {window}": evaluate(model, text, window=window).nats_per_char}


def nll_by_rounds(model: Any, text: Text) -> dict:
    """-> nats per character with `all` rounds, by `fixed` numbers of them, and by the learned rule:
    threshold -> nats, mean rounds.

    Keys are text, as JSON has them.
    """
    trained = model.config.rounds
    fixed = {
        str(rounds): nats_and_rounds(model, text, stop="fixed", rounds=rounds)[0]
        for rounds in sorted({*ROUNDS, trained})
    }
    learned = {str(x): nats_and_rounds(model, text, threshold=x) for x in THRESHOLDS}
    return {"all": fixed[str(trained)], "trained": trained, "fixed": fixed, "learned": learned}


def nats_and_rounds(model: Any, text: Text, **settings: Any) -> list[float]:
    """-> what a thinker pays per character by these settings, and the mean of its rounds."""
    taken: list[Tensor] = []

    def nll(
        ids: Int[Tensor, "b t+1"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b t"]:
        logits, state = model.read(ids[:, :-1], generator=generator, **settings)
        taken.append(state.rounds.flatten().cpu())
        return cross_entropy(logits, ids[:, 1:])

    nats = evaluate(model, text, nll=nll).nats_per_char
    return [nats, torch.cat(taken).double().mean().item()]


# ------------------------------------------------------------------ what the rows of a race come to


def gap(rows: Rows) -> dict[str, tuple[list[float], list[float]]]:
    """-> by rounds for which there is a GPT as deep, two lists by seed: the part of the gap between
    that GPT and the one of equal parameters that the thinker closes with so many rounds, and its
    lead on the latter in nats per character.
    """
    small = rows["gpt, equal parameters"]["nats"]
    by_rounds = {}
    for name, row in rows.items():
        if not name.startswith("gpt, as deep as "):
            continue
        rounds = name.split()[4]
        thinker = [measured["fixed"][rounds] for measured in rows["thinker"]["measured"]]
        seeds = list(zip(thinker, small, row["nats"], strict=False))
        by_rounds[rounds] = [(b - a) / (b - c) for a, b, c in seeds], [b - a for a, b, _ in seeds]
    return by_rounds


def mean_by_rounds(measured: list[dict]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`nll_by_rounds` by seed -> means: nats by fixed rounds; nats and rounds by threshold."""
    mean = statistics.mean
    fixed = {r: mean(seed["fixed"][r] for seed in measured) for r in measured[0]["fixed"]}
    learned = {}
    for x in measured[0]["learned"]:
        learned[x] = [mean(each) for each in zip(*(seed["learned"][x] for seed in measured))]
    return fixed, learned


def at_seconds(curve: list[list[float]], seconds: float) -> float:
    """-> nats after so many seconds, linear in between; NaN before the first or after the last."""
    return between([(then, nats) for _, then, nats in curve], seconds)


def between(points: Iterable[Sequence[float]], x: float) -> float:
    """-> y at x of points (x, y) in the order of x, linear in between; NaN outside."""
    xs, ys = zip(*points, strict=True)
    return float(np.interp(x, xs, ys, left=math.nan, right=math.nan))


def lowest(row: dict) -> list[tuple[int, float]]:
    """-> by seed, where on the way an arm's loss was lowest: characters, nats."""
    points = [min(curve, key=lambda point: point[2]) for curve in row["curves"]]
    return [(characters, nats) for characters, _, nats in points]
