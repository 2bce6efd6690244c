"""A report's numbers as a page of Markdown."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import quality, races, stopping
from .races import Rows

TITLES = {
    "waiting": "Seconds of training the tiny GPT beside other work",
    "regressions": "Time over a peer's, in the stored report and now",
    "engine": "Greedy text, batch 1, one thread",
    "scan": "Selective scan, forward and backward",
    "step": "A training step of Mamba",
    "writing": "Mamba writes, batch 1, characters/s",
    "cache": "GPT writes",
    "steps": "A training step of every model, at its size",
    "gpt": "GPT-2 of the same shape: a training step; writing, batch 1, with the cache",
    "windows": "One layer, width 192, forward and backward, ms by window",
    "lengths": "Writing, batch 1",
    "parallel": "Speed against quality, temperature 0.8",
}
HEADINGS = {
    "times": "times as long as the first",
    "first": "s to the first character",
    "chars_per_second": "characters/s",
    "words": "words that exist",
    "steps": "steps for a page",
}


def markdown(report: dict) -> str:
    """A race, or whatever else was measured, as a page."""
    if "race" in report:
        return "\n".join(_race(report))
    page = []
    for name, measured in report.items():
        if name == "stopping":
            page += _stopping(measured)
        elif name == "models":
            page += _models(measured)
        elif name in TITLES:
            page += part(TITLES[name], measured)
    for name, lacked in report.get("without", {}).items():
        if lacked:
            extra = 'pip install "irann[test]", and the same command measures it again'
            page += [
                "",
                f"Not beside {name}, for it is not installed: {', '.join(lacked)} ({extra}).",
            ]
    return "\n".join([*page[1:], "", f"Medians (lowest, highest). {settings(report)}".rstrip()])


def part(title: str, measured: dict) -> list[str]:
    """What was measured as a table, and beside its title with what settings; then its notes."""
    if "lengths" in measured:  # rows are lists, by length
        rows = measured["rows"].items()
        measured = {name: dict(zip(measured["lengths"], row)) for name, row in rows}
    given = settings(measured)
    page = section(f"{title} ({given})" if given else title, rows_of(measured))
    return page + [line for note in measured.get("notes", ()) for line in ("", note)]


def rows_of(measured: dict, name: str = "") -> Iterator[dict]:
    """-> the dicts in it, however deep, that hold numbers and summaries only, and their names."""
    inner = [
        (key, one)
        for key, value in measured.items()
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, dict) and "low" not in one
    ]
    if not inner:
        yield ({"": name} if name else {}) | measured
    for key, one in inner:
        yield from rows_of(one, name if key == "rows" else f"{name}, {key}".removeprefix(", "))


def settings(measured: dict) -> str:
    """-> the numbers and words that stand beside what was measured."""
    given = (pair for pair in measured.items() if not isinstance(pair[1], dict | list))
    return ", ".join(f"{key} {value}" for key, value in given)


def section(title: str, rows: Iterable[dict]) -> list[str]:
    return ["", f"## {title}", "", *table(rows)]


def table(rows: Iterable[dict]) -> list[str]:
    """A line for each row, a column for each key of any."""
    rows = list(rows)
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[HEADINGS.get(key, key) for key in header]]
    lines += [[cell(row[key]) if key in row else "" for key in header] for row in rows]
    first, *others = (f"| {' | '.join(map(str, line))} |" for line in lines)
    return [first, "|---" * len(header) + "|", *others]


def cell(value: Any) -> str:
    """-> a value in words; a summary as its middle (lowest, highest), medians to three digits."""
    if isinstance(value, dict):
        middle, form = ("mean", "{:.3f}".format) if "mean" in value else ("median", digits)
        return "{} ({}, {})".format(*(form(value[key]) for key in (middle, "low", "high")))
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return "none" if value is None else str(value)


def digits(x: float) -> str:
    """-> a positive number to three digits."""
    if not x:
        return "0"
    tens = math.floor(math.log10(float(f"{x:.2e}")))  # of 9.996, which is 10.0, one
    return f"{x:.{max(0, 2 - tens)}f}"


def over(values: Sequence[float | None], form: str = ".3f") -> str:
    """-> mean (lowest, highest) of what there is."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    numbers = (statistics.mean(known), min(known), max(known))
    return "{} ({}, {})".format(*(f"{x:{form}}" for x in numbers))


def bound(row: dict) -> str:
    return "" if row["exact"] else "at most "


def _stopping(measured: dict) -> list[str]:
    """Each rule against the line of fixed rounds, and where its points lie."""
    rules = {
        rule: [{"limit": x, "nats": nats, "mean rounds": n} for x, (nats, n) in points.items()]
        for rule, points in measured["rules"].items()
    }
    page = part("Nats against the line of fixed rounds, by mean rounds", measured["against"])
    page += part("Nats by rounds", {"fixed": measured["fixed"]}) + part("Each rule by limit", rules)
    return page + part("Writing, batch 1", measured["writing"])


def _models(rows: Rows) -> list[str]:
    lines = [
        {"model": name} | ({"parameters": row["missing"]} if "missing" in row else _model(row))
        for name, row in rows.items()
        if "missing" in row or "parameters" in row
    ]
    page = section("Models", lines)
    for temperature in map(str, quality.TEMPERATURES):
        title = f"Text at temperature {temperature} (means, and bootstrap intervals over the texts)"
        texts = {k: row["quality"][temperature] for k, row in rows.items() if "quality" in row}
        page += section(title, ({"text of": name} | text for name, text in texts.items()))
    return page


def _model(row: dict) -> dict:
    """One model's parameters, likelihood and speeds."""
    nll = row["nats_per_char"]
    nats, bits = "not measured", ""
    if nll is not None:
        nats, bits = f"{bound(row)}{nll:.4f}", f"{bound(row)}{nll / math.log(2):.3f}"
        if row.get("standard_error"):
            nats += f" ± {row['standard_error']:.4f}"
        if not row.get("measured", True):
            nats += " (from its card)"
    line = {"parameters": row["parameters"], "nats per character": nats, "bits": bits}
    line["characters/s, batch 1"] = row["chars_per_second"]
    return line | {"of a batch": row["chars_per_second_of_a_batch"]}


# -------------------------------------------------------------------------------------------- races


def _race(report: dict) -> list[str]:
    """Every arm's losses, and what the question's answer comes to."""
    rows = {name: row for name, row in report["rows"].items() if row["nats"]}
    counts = sorted({len(row["nats"]) for row in rows.values()})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    words = "seed" if seeds == "1" else "seeds"
    page = [f"## {report['race']}: {seeds} {words}, {races.ran_on(report)}", ""]
    for note in report.get("notes", ()):
        page += [f"({note})", ""]
    lines = [
        {
            "arm": name,
            "parameters": row["parameters"],
            "characters": row["characters"],
            "nats per character (lowest, highest)": bound(row) + over(row["nats"], ".4f"),
            "seconds of training, by seed": ", ".join(f"{spent:.0f}" for spent in row["seconds"]),
        }
        for name, row in rows.items()
    ]
    return [*page, *table(lines), "", *ANSWERS[report["race"]](rows)]


def of_models(rows: Rows) -> list[str]:
    """Where all stand when the fastest is done, seed by seed: those of one seed ran side by side,
    others perhaps on a busier machine.
    """
    by_seed = zip(*(row["seconds"] for row in rows.values()), strict=False)
    done = [min(seconds) for seconds in by_seed]
    standings = []
    for name, row in rows.items():
        pairs = zip(row["curves"], done, strict=False)
        nats = [races.at_seconds(curve, min(then, curve[-1][1])) for curve, then in pairs]
        known = not any(map(math.isnan, nats))
        standings.append(f"{name} {bound(row) + over(nats) if known else 'not measured yet'}")
    after = " or ".join(f"{then:.0f}" for then in sorted(done))
    return [
        f"When the fastest of them is done, after {after} s of training by seed, they stand "
        f"at: {', '.join(standings)}.",
        *texts_of_seeds(rows),
    ]


def of_models_long(rows: Rows) -> list[str]:
    lines = []
    for name, row in rows.items():
        seen, nats = zip(*races.lowest(row), strict=True)
        reached = {"nats per character (lowest, highest)": bound(row) + over(nats, ".4f")}
        after = {"after characters, by seed": ", ".join(f"{n:,}" for n in seen)}
        lines.append({"arm": name} | reached | after)
    title = "Where each was lowest, by the validation part itself:"
    return [title, "", *table(lines), *texts_of_seeds(rows)]


def texts_of_seeds(rows: Rows) -> list[str]:
    """What the models of a race write, as tables, where that was measured."""
    page: list[str] = []
    measured = {name: row["measured"] for name, row in rows.items() if row["measured"]}
    if not measured:
        return page
    for temperature in map(str, quality.TEMPERATURES):
        texts = {name: [seed[temperature] for seed in seeds] for name, seeds in measured.items()}
        lines = (
            {"text of": name} | {key: over([seed[key] for seed in seeds]) for key in seeds[0]}
            for name, seeds in texts.items()
        )
        title = f"Text at temperature {temperature} (means over seeds, lowest and highest seed)"
        page += section(title, lines)
    return page


def of_thinker(rows: Rows) -> list[str]:
    mean = statistics.mean
    measured = rows["thinker"]["measured"]
    page = []
    for rounds, (closed, lead) in races.gap(rows).items():
        page.append(
            f"With {rounds} rounds the thinker closes {mean(closed):.0%} of the gap to a GPT as "
            f"deep ({min(closed):.0%} to {max(closed):.0%} by seed) and is {mean(lead):.4f} nats "
            f"under the GPT of equal parameters ({min(lead):.4f} to {max(lead):.4f})."
        )
    fixed, learned = races.mean_by_rounds(measured)
    by_rounds = ", ".join(f"{r}: {nats:.4f}" for r, nats in fixed.items())
    by_rule = ", ".join(f"{x}: {nats:.4f} with {r:.2f} rounds" for x, (nats, r) in learned.items())
    return [
        *page,
        "",
        f"By rounds: {by_rounds}; trained with {measured[0]['trained']}.",
        "",
        f"By its learned rule, at a threshold of {by_rule}.",
        "",
        *_against_line(measured),
    ]


def _against_line(measured: list[dict]) -> list[str]:
    """What the learned rule pays more than the lottery between fixed rounds, over seeds."""
    by_seed = [stopping.against_line(one["fixed"], one["learned"]) for one in measured]
    reached = [mean for mean in by_seed[0] if all(mean in seed for seed in by_seed)]
    told = [f"{over([seed[mean] for seed in by_seed], '+.4f')} at {mean}" for mean in reached]
    words = "Against the line that mixes fixed rounds, by mean rounds: "
    return [f"{words}{', '.join(told)}."] if told else []


def of_nanogpt(rows: Rows) -> list[str]:
    theirs, short, long = (rows[name] for name in ("nanoGPT's recipe", "ours, short", "ours, long"))
    sooner = [a / b for a, b in zip(theirs["seconds"], short["seconds"], strict=False)]
    longer = [b / a for a, b in zip(theirs["seconds"], long["seconds"], strict=False)]
    nats = [[seed["windows of 64"] for seed in row["measured"]] for row in (theirs, short, long)]
    by_short, by_long = ([a - b for a, b in zip(nats[0], ours, strict=False)] for ours in nats[1:])
    middle = statistics.median
    return [
        f"All in windows of 64: ours, short, takes 1/{middle(sooner):.1f} of its time "
        f"({min(sooner):.1f} to {max(sooner):.1f}) and ends {middle(by_short):.3f} nats lower "
        f"({min(by_short):.3f} to {max(by_short):.3f}); ours, long, takes {middle(longer):.2f} "
        f"times its time and ends {middle(by_long):.3f} nats lower."
    ]


def of_speedrun(rows: Rows) -> list[str]:
    page: list[str] = []
    for name, row in rows.items():
        reached = [seed["windows of 256"] for seed in row["measured"]]
        header = ("s of training", "s by the clock", "nats in windows of 256")
        lines = [
            {"seed": seed} | dict(zip(header, (f"{spent:.0f}", f"{clock:.0f}", nats)))
            for seed, (spent, clock, nats) in enumerate(zip(row["seconds"], row["clock"], reached))
        ]
        mean = statistics.mean(reached)
        verdict = "at or under" if mean <= races.PUBLISHED else "above"
        page += [f"## {name}", "", *table(lines), ""]
        page.append(
            f"The mean, {mean:.4f}, is {verdict} nanoGPT's {races.PUBLISHED}, after "
            f"{statistics.median(row['clock']):.0f} s by the clock (median). The table of arms "
            "above measures in the windows of training."
        )
    return page


ANSWERS = {
    "speedrun": of_speedrun,
    "models": of_models,
    "models-long": of_models_long,
    "thinker": of_thinker,
    "thinker-long": of_thinker,
    "nanogpt": of_nanogpt,
}
