"""Races: models trained side by side on the same text, to see what a design is worth.

| race         | the question                                                                                                   |
|--------------|----------------------------------------------------------------------------------------------------------------|
| models       | how well do all five learn and write, with as many parameters, from as many characters, in as many seconds?    |
| models-long  | how do all five end at the size of those that ship, after twenty passes? For a GPU (`--device cuda`)           |
| thinker      | what do rounds of two shared blocks buy, beside a plain GPT of as many parameters and one of as many layers?   |
| thinker-long | the same from eleven passes over the text: hours of a CPU, or minutes of a GPU                                 |
| nanogpt      | how much sooner does this book's GPT reach the loss at which nanoGPT's published recipe for a CPU ends?        |

Within a race and a seed, arms of one window and batch see the very same characters. Losses are over the whole validation
part, every character once. An arm that was interrupted goes on where it stopped, and an arm that is done is not run again.
"""

import functools
import json
import math
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import shakespeare, zoo
from ..models.diffusion import DiffusionConfig
from ..models.gpt import GPTConfig
from ..models.mamba import MambaConfig
from ..models.thinker import ThinkerConfig
from ..settings import InputError
from ..shakespeare import write_atomically
from ..text import Text
from ..training import Recipe, evaluate, progress, train
from . import quality

ROUNDS, THRESHOLDS = (1, 2, 3, 4, 5, 6, 8, 12), (0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Arm:
    """One model of a race: its name in the zoo, its sizes, how it is trained, and what to measure when it is."""

    model: str
    config: object
    recipe: Recipe
    look: Callable[[object, Text], dict] | None = None

    def settings(self) -> dict:
        """-> sizes and recipe, flat, as a report keeps them beside what they gave; without a seed, for each run has its own."""
        return {
            "model": self.model,
            **asdict(self.config),
            **{k: v for k, v in asdict(self.recipe).items() if k != "seed"},
        }


def model_arms(quick: bool) -> dict[str, Arm]:
    """All five at 0.8 million parameters (within 4 %), 1.5 million characters each, by the same optimizer."""
    window, width, steps = (32, 32, 20) if quick else (128, 128, 1000)
    recipe = Recipe(
        steps=steps, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.012, evaluate_every=steps // 5
    )
    wide, narrow = round(width * 1.4 / 4) * 4, round(width * 0.94 / 4) * 4
    page = DiffusionConfig(window=window, page=window // 2, layers=4, heads=2, width=narrow)
    look = functools.partial(look_at_text, count=2, n=40) if quick else look_at_text
    return {
        "gpt": Arm(
            "gpt", GPTConfig.fast(window=window, layers=4, heads=2, width=width), recipe, look
        ),
        "mamba": Arm("mamba", MambaConfig.fast(window=window, layers=7, width=width), recipe, look),
        "thinker": Arm(
            "thinker", ThinkerConfig(window=window, width=wide, rounds=6, **zoo.DEEP), recipe, look
        ),
        "thinker-page": Arm(
            "thinker-page", ThinkerConfig(window=window, width=wide, rounds=4), recipe, look
        ),
        "diffusion": Arm("diffusion", page, replace(recipe, average=0.99), look),
    }


def models_long_arms(quick: bool) -> dict[str, Arm]:
    """All five at 1.7 million parameters (within 8 %), 20 million characters each, in batches of 32 windows.

    Step, averaging and dropout are those of each one's recipe `gpu`; the thinker, whose own batches are smaller, has more dropout.
    """
    arms = {}
    steps, batch = (20, 8) if quick else (2500, 32)
    look = functools.partial(look_at_text, count=2, n=40) if quick else look_at_text
    sizes = {} if quick else {"diffusion": {"heads": 2, "width": 176}, "thinker": {"dropout": 0.15}}
    for name in zoo.MODELS:
        config, recipe = zoo.recipe(name, "tiny" if quick else "gpu", **sizes.get(name, {}))
        recipe = replace(
            recipe, steps=steps, batch=batch, evaluate_every=steps // 5, precision="float32"
        )
        arms[name] = Arm(name, config, recipe, look)
    return arms


def thinker_arms(quick: bool) -> dict[str, Arm]:
    """At 0.41 million parameters, beside GPTs as deep as some of its rounds, and as all of them."""
    window, width, some, rounds, steps = (32, 32, 2, 3, 20) if quick else (128, 128, 4, 6, 1200)
    recipe = Recipe(
        steps=steps, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.012, evaluate_every=steps // 3
    )
    return _two_blocks(
        {"window": window, "width": width, "heads": 2}, recipe, rounds, (some, rounds)
    )


def long_arms(quick: bool) -> dict[str, Arm]:
    """At 1.7 million parameters, near those that ship, and eleven passes over the text, so that not size alone is the limit."""
    sizes = (
        {"window": 32, "width": 32, "heads": 2}
        if quick
        else {"window": 256, "width": 264, "heads": 3}
    )
    steps, some, rounds = (20, 2, 3) if quick else (5500, 4, 6)
    recipe = Recipe(
        steps=steps,
        batch=8,
        lr=4e-3,
        optimizer="muon",
        muon_lr=0.012,
        average=0.998,
        precision="bfloat16",
    )
    recipe = replace(recipe, evaluate_every=steps // 5, save_every=0 if quick else 250)
    return _two_blocks(sizes | {"dropout": 0.1}, recipe, rounds, (some,))


def _two_blocks(sizes: dict, recipe: Recipe, rounds: int, deep: tuple[int, ...]) -> dict[str, Arm]:
    """A thinker with two blocks in its core, a GPT of two blocks, and GPTs of as many as the thinker passes in so many rounds."""
    plain = GPTConfig.fast(**sizes, layers=2)
    thinker = ThinkerConfig(**sizes, rounds=rounds, **zoo.DEEP)
    arms = {
        "gpt, equal parameters": Arm("gpt", plain, recipe),
        "thinker": Arm("thinker", thinker, recipe, look_at_rounds),
    }
    return arms | {
        f"gpt, as deep as {r} rounds": Arm("gpt", replace(plain, layers=2 * r), recipe)
        for r in deep
    }


def nanogpt_arms(quick: bool) -> dict[str, Arm]:
    """nanoGPT's recipe for a CPU, as its repository's readme and defaults give it, in our code; and ours, short and long.

    4 layers, 4 heads, width 128, block 64, batch 12, 2,000 steps of AdamW at 1e-3 (betas .9, .99, decay .1) down to 1e-4
    on a cosine after 100 steps of warm-up, no dropout, no biases. Ours reads windows of 128, so all three are also measured
    in windows of 64.
    """
    scale = 100 if quick else 1
    theirs = GPTConfig(window=64, layers=4, heads=4, width=128, bias=False)
    slow = Recipe(
        steps=2000 // scale, batch=12, lr=1e-3, decay="cosine", warmup=100 // scale, final_lr=0.1
    )
    ours, fast = zoo.recipe("gpt", "demo")
    return {
        "nanoGPT's recipe": Arm("gpt", theirs, slow, look_at_64),
        "ours, short": Arm("gpt", ours, replace(fast, steps=200 // scale), look_at_64),
        "ours, long": Arm("gpt", ours, replace(fast, steps=700 // scale), look_at_64),
    }


RACES = {
    "models": model_arms,
    "models-long": models_long_arms,
    "thinker": thinker_arms,
    "thinker-long": long_arms,
    "nanogpt": nanogpt_arms,
}


def run(
    name: str, *, seeds: int = 3, quick: bool = False, out: Path, device: str | torch.device = "cpu"
) -> dict:
    """Run a race -> what it ran on, and `rows`: by arm its parameters, characters, whether its nats are `exact`, and lists.

    One entry per seed in `nats`, `seconds` (of training, without validation), `curves` (points of characters, seconds,
    nats) and `looks` (what else the race measures of a trained arm). Written to `out`/NAME.json after each arm.
    """
    arms, text, out = RACES[name](quick), shakespeare.load(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{name}.json"
    before, save = (
        stored(page, quick),
        lambda report: write_atomically(page, (json.dumps(report, indent=1) + "\n").encode()),
    )
    here = {
        "device": hardware(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    report = {"race": name, "quick": quick, **here, "seeds": seeds, "notes": [], "rows": {}}
    if before:
        report |= {"device": "cpu"} | before  # older reports do not name it
    else:
        save(report)  # what it began on, should it be stopped before a row is there
    report["seeds"] = seeds
    for seed in range(seeds):
        for arm_name, arm in arms.items():
            row = report["rows"].setdefault(
                arm_name,
                {"arm": arm.settings(), "nats": [], "seconds": [], "curves": [], "looks": []},
            )
            folder = out / "runs" / f"{name}-{arm_name.replace(', ', '-').replace(' ', '-')}-{seed}"
            was, now = row.get("arm", {}), arm.settings()
            changed = [
                key
                for key in now | was
                if was.get(key) != now.get(key) and key not in ("seed", "save_every")
            ]
            if changed:  # how often it is saved changes nothing, and older reports name a seed
                raise InputError(
                    f"{page} holds '{arm_name}' with other settings ({', '.join(changed)}): delete that row and "
                    f"{folder.with_name(folder.name.removesuffix(str(seed)) + '[0-9]*')}, or choose another --out"
                )
            if len(row["nats"]) > seed and (not arm.look or len(row["looks"]) > seed):
                continue
            print(f"{name}, {arm_name}, seed {seed}", file=sys.stderr)
            if _around(here) != _around(report):
                note = f"{arm_name}, seed {seed}: {'looked at on ' if len(row['nats']) > seed else ''}{_around(here)}"
                if note not in report["notes"]:
                    report["notes"].append(note)
                    save(report)  # before the work, which may be stopped and go on elsewhere
            run_arm(arm, text, seed, folder, row, device)
            save(report)
    return report


def hardware(device: str | torch.device) -> str:
    """-> what a report calls a device: a GPU by its name, any other by its kind."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _around(here: dict) -> str:
    """What a report ran on, in words; older ones do not say that it was a CPU."""
    device = here.get("device", "cpu")
    return (
        f"{here['threads']} threads, torch {here['torch']}"
        if device == "cpu"
        else f"{device}, torch {here['torch']}"
    )


def stored(page: Path, quick: bool) -> dict:
    """-> the report in a file, or {} if there is none. Raises ValueError for a damaged one, and for a quick one beside a full one."""
    if not page.exists():
        return {}
    try:
        report = json.loads(page.read_text())
        other = report["quick"] != quick
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{page} is not a report: delete it, or choose another --out") from None
    if other:
        raise InputError(
            f"{page} holds a {'full' if quick else 'quick'} report: delete it and its runs, or choose another --out"
        )
    return report


def run_arm(
    arm: Arm, text: Text, seed: int, folder: Path, row: dict, device: str | torch.device = "cpu"
) -> None:
    """Train one arm, or the rest of it, and put what it reached into its row, in the seed's place."""
    model = zoo.build(arm.model, arm.config, seed=seed).to(device)
    recipe = replace(arm.recipe, seed=seed)
    for tick in progress(train(model, text, recipe, run=folder, resume=True), recipe.steps):
        if tick.interrupted:
            print(f"saved in {tick.saved}; the same command goes on from there", file=sys.stderr)
            raise (
                KeyboardInterrupt
                if tick.interrupted == signal.SIGINT
                else SystemExit(128 + tick.interrupted)
            )
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not log:
        raise InputError(
            f"{folder} has lost its metrics.jsonl: delete that folder, and the same command trains this arm anew"
        )
    if log[-1]["step"] < recipe.steps:  # a kill took the last line
        log.append({"step": recipe.steps, "validation": evaluate(model, text).nats_per_char})
    each = recipe.batch * arm.config.window
    row["parameters"], row["characters"] = (
        sum(p.numel() for p in model.parameters()),
        recipe.steps * each,
    )
    row["exact"], seconds = model.exact, training_seconds(log)
    met = [line for line in log if "validation" in line]
    here = slice(seed, seed + 1)  # later seeds may be there already
    row["nats"][here] = [log[-1]["validation"]]
    row["seconds"][here] = [round(seconds, 1)]
    row["curves"][here] = [
        [
            [
                line["step"] * each,
                round(seconds * line["step"] / recipe.steps, 1),
                line["validation"],
            ]
            for line in met
        ]
    ]
    if arm.look:
        row["looks"][here] = [arm.look(model, text)]


def training_seconds(log: list[dict]) -> float:
    """Lines of metrics.jsonl -> what the steps took: the mean of the middle half of those that did not validate, times all.

    So a busy minute does not count, nor a line that was lost; and of steps that are of two kinds, as the page thinker's, both do.
    """
    spent = sorted(
        b["seconds"] - a["seconds"]
        for a, b in zip([{"seconds": 0.0}, *log], log, strict=False)
        if "validation" not in b
    )
    quarter = len(spent) // 4
    return statistics.mean(spent[quarter : len(spent) - quarter]) * log[-1]["step"]


def look_at_text(
    model, text: Text, count: int = quality.SAMPLES, n: int = quality.LENGTH
) -> dict[str, dict[str, float]]:
    """-> by temperature, the means of what quality.written says of `count` texts of n characters."""
    told, _ = quality.written(model, text, count, n)
    return {
        temperature: {
            name: value["mean"] if isinstance(value, dict) else value
            for name, value in measures.items()
        }
        for temperature, measures in told.items()
    }


def look_at_64(model, text: Text) -> dict:
    """-> nats per character in windows of 64, so that no character has a longer past than another model's."""
    return {"windows of 64": evaluate(model, text, window=64).nats_per_char}


def look_at_rounds(model, text: Text) -> dict:
    """-> nats per character with `all` rounds, by `fixed` numbers of them, and by the learned rule: threshold -> nats, mean rounds.

    Keys are text, as JSON has them.
    """
    trained = model.config.rounds
    fixed = {
        str(rounds): evaluate(_With(model, stop="fixed", rounds=rounds), text).nats_per_char
        for rounds in sorted({*ROUNDS, trained})
    }
    learned = {}
    for threshold in THRESHOLDS:
        asked = _With(model, threshold=threshold)
        learned[str(threshold)] = [evaluate(asked, text).nats_per_char, asked.rounds / asked.places]
    return {"all": fixed[str(trained)], "trained": trained, "fixed": fixed, "learned": learned}


class _With:
    """A thinker that is asked by chosen settings, and that counts the rounds it took."""

    def __init__(self, model, **settings):
        self.model, self.settings, self.rounds, self.places = model, settings, 0, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def nll(self, ids, *, generator=None):
        logits, state = self.model.read(
            ids[:, :-1], packed=True, generator=generator, **self.settings
        )
        self.rounds, self.places = (
            self.rounds + int(state.rounds.sum()),
            self.places + state.rounds.numel(),
        )
        return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


def markdown(report: dict) -> str:
    """A race as a page: every arm's losses, and what the question's answer comes to."""
    rows, counts = report["rows"], sorted({len(row["nats"]) for row in report["rows"].values()})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    page = [f"## {report['race']}: {seeds} seeds, {_around(report)}", ""]
    page += [line for note in report.get("notes", ()) for line in (f"({note})", "")]
    page += [
        "| arm | parameters | characters | nats per character (lowest, highest) | seconds of training, by seed |"
    ]
    page += ["|---|---|---|---|---|"]
    for name, row in rows.items():
        told, seconds = (
            _bounded(row, row["nats"]),
            ", ".join(f"{spent:.0f}" for spent in row["seconds"]),
        )
        page.append(
            f"| {name} | {row['parameters']:,} | {row['characters']:,} | {told} | {seconds} |"
        )
    answers = {
        "models": _of_all,
        "models-long": _of_long,
        "thinker": _gap,
        "thinker-long": _gap,
        "nanogpt": _sooner,
    }
    return "\n".join([*page, "", *answers[report["race"]](rows)])


def gap(rows: dict) -> dict[str, tuple[list[float], list[float]]]:
    """-> by rounds, for which there is a GPT as deep: by seed, the share of the gap between it and the one of equal parameters
    that the thinker closes with so many rounds, and its lead on the latter in nats per character.
    """
    small, looks, told = rows["gpt, equal parameters"]["nats"], rows["thinker"]["looks"], {}
    for name, row in rows.items():
        if name.startswith("gpt, as deep as "):
            rounds = name.split()[4]
            seeds = list(
                zip((look["fixed"][rounds] for look in looks), small, row["nats"], strict=False)
            )
            told[rounds] = [(b - a) / (b - c) for a, b, c in seeds], [b - a for a, b, _ in seeds]
    return told


def mean_look(looks: list[dict]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What `look_at_rounds` gave, by seed -> means over seeds: nats by fixed rounds; nats and rounds by threshold of the learned rule."""
    mean = statistics.mean
    fixed = {r: mean(look["fixed"][r] for look in looks) for r in looks[0]["fixed"]}
    return fixed, {
        x: [mean(look["learned"][x][i] for look in looks) for i in (0, 1)]
        for x in looks[0]["learned"]
    }


def at_seconds(curve: list[list[float]], seconds: float) -> float:
    """-> nats after so many seconds, on a line between the two measurements around them; NaN before the first and after the last."""
    for (_, a, nats), (_, b, later) in zip(curve, curve[1:], strict=False):
        if a <= seconds <= b:
            return nats + (later - nats) * (seconds - a) / (b - a) if b > a else later
    return math.nan


def _bounded(row: dict, nats: list[float]) -> str:
    """-> mean (lowest, highest), called a bound where the arm gives one."""
    return f"{'' if row['exact'] else 'at most '}{statistics.mean(nats):.4f} ({min(nats):.4f}, {max(nats):.4f})"


def lowest(row: dict) -> list[tuple[int, float]]:
    """-> by seed, where on the way an arm's loss was lowest: characters, nats."""
    return [
        min(((point[0], point[2]) for point in curve), key=lambda point: point[1])
        for curve in row["curves"]
    ]


def _of_all(rows: dict) -> list[str]:
    return [*_at_equal_time(rows), *_texts(rows)]


def _of_long(rows: dict) -> list[str]:
    page = ["Where each was lowest, by the validation part itself:", ""]
    page += [
        "| arm | nats per character (lowest, highest) | after characters, by seed |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        seen, nats = zip(*lowest(row), strict=True)
        page.append(f"| {name} | {_bounded(row, nats)} | {', '.join(f'{n:,}' for n in seen)} |")
    return [*page, *_texts(rows)]


def _at_equal_time(rows: dict) -> list[str]:
    """Where all stand when the fastest is done, seed by seed: those of one seed ran side by side, others perhaps on a busier machine."""
    done = [
        min(seconds) for seconds in zip(*(row["seconds"] for row in rows.values()), strict=False)
    ]
    told = []
    for name, row in rows.items():
        there = [
            at_seconds(curve, min(then, curve[-1][1]))
            for curve, then in zip(row["curves"], done, strict=False)
        ]
        unknown, bound = any(map(math.isnan, there)), "" if row["exact"] else "at most "
        told.append(
            f"{name} not measured yet" if unknown else f"{name} {bound}{_over_seeds(there)}"
        )
    after = " or ".join(f"{then:.0f}" for then in sorted(done))
    return [
        f"When the fastest of them is done, after {after} s of training by seed, they stand at: {', '.join(told)}."
    ]


def _texts(rows: dict) -> list[str]:
    """What the models of a race write, as tables, where that was measured."""
    page, rows = [], {name: row for name, row in rows.items() if row["looks"]}
    for temperature in map(str, quality.TEMPERATURES if rows else ()):
        measures = list(next(iter(rows.values()))["looks"][0][temperature])
        page += [
            "",
            f"## Text at temperature {temperature} (means over seeds, lowest and highest seed)",
            "",
        ]
        page += ["| text of | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for name, row in rows.items():
            cells = (
                _over_seeds([look[temperature][measure] for look in row["looks"]])
                for measure in measures
            )
            page.append(f"| {name} | " + " | ".join(cells) + " |")
    return page


def _over_seeds(values: list[float]) -> str:
    """-> mean (lowest, highest), whole numbers without a point."""
    low, high = (f"{x}" if isinstance(x, int) else f"{x:.3f}" for x in (min(values), max(values)))
    return f"{statistics.mean(values):.3f} ({low}, {high})"


def _gap(rows: dict) -> list[str]:
    looks, mean = rows["thinker"]["looks"], statistics.mean
    told = [
        f"With {rounds} rounds the thinker closes {mean(closed):.0%} of the gap to a GPT as deep ({min(closed):.0%} to {max(closed):.0%} "
        f"by seed) and is {mean(lead):.4f} nats under the GPT of equal parameters ({min(lead):.4f} to {max(lead):.4f})."
        for rounds, (closed, lead) in gap(rows).items()
    ]
    fixed, learned = mean_look(looks)
    return [
        *told,
        "",
        f"By rounds: {', '.join(f'{r}: {nats:.4f}' for r, nats in fixed.items())}; trained with {looks[0]['trained']}.",
        "",
        "By its learned rule, at a threshold of "
        + ", ".join(f"{x}: {nats:.4f} with {r:.2f} rounds" for x, (nats, r) in learned.items())
        + ".",
    ]


def _sooner(rows: dict) -> list[str]:
    theirs, short, long = (rows[name] for name in ("nanoGPT's recipe", "ours, short", "ours, long"))
    times = [a / b for a, b in zip(theirs["seconds"], short["seconds"], strict=False)]
    there, *reached = (
        [look["windows of 64"] for look in row["looks"]] for row in (theirs, short, long)
    )
    below, lower = ([a - b for a, b in zip(there, ours, strict=False)] for ours in reached)
    took = [b / a for a, b in zip(theirs["seconds"], long["seconds"], strict=False)]
    return [
        f"All in windows of 64: ours, short, takes 1/{statistics.median(times):.1f} of its time ({min(times):.1f} to {max(times):.1f}) "
        f"and ends {statistics.median(below):.3f} nats lower ({min(below):.3f} to {max(below):.3f}); ours, long, takes "
        f"{statistics.median(took):.2f} times its time and ends {statistics.median(lower):.3f} nats lower."
    ]
