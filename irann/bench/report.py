"""A report's numbers as a page of Markdown."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import quality, races, speed, stopping
from .races import Rows
from .regressions import WIDE

TIMES = ("implementation", "ms, median (lowest, highest)", "times as long as the first")


def markdown(report: dict) -> str:
    """A race, one model alone, or all that is measured, as a page."""
    if "race" in report:
        return "\n".join(_race(report))
    alone = dict(waiting=_waiting, regressions=_regressions, engine=_engine, stopping=_stopping)
    for name, lines in alone.items():
        if name in report:
            return "\n".join(lines(report[name]))
    if "scan" not in report:
        return "\n".join(_models(report["models"])[1:])
    page = _scan(report)
    if "steps" in report:
        page += _speed(report)
    if "models" in report:
        page += _models(report["models"])
    return "\n".join(page[1:])


def _waiting(measured: dict) -> list[str]:
    title = (
        f"Seconds of {measured['steps']} training steps of the tiny GPT, {measured['cores']} cores"
    )
    ways = next(iter(measured["seconds"].values()))
    rows = (
        [beside, *(ranged(summary, 1) for summary in map(speed.summary, seconds.values()))]
        for beside, seconds in measured["seconds"].items()
    )
    return section(f"{title} (median, lowest, highest)", ["beside", *ways], rows)[1:]


def _regressions(measured: dict) -> list[str]:
    rows = []
    for name, row in measured["rows"].items():
        change = row["now"] / row["then"]
        verdict = " **slower**" if change > WIDE else ""
        rows.append([name, f"{row['then']:.3f}", f"{row['now']:.3f}", f"{change:.2f}{verdict}"])
    header = ["time over its peer's", "stored report", "now", f"change; slower: over {WIDE}"]
    return section("What has become slower since the stored report", header, rows)[1:]


def _engine(measured: dict) -> list[str]:
    title = (
        f"Greedy text, {measured['n']} characters, batch 1, one thread "
        f"({measured['rounds']} rounds: median, lowest, highest)"
    )
    lines = [
        [name, way, *ranges(one, chars_per_second=0, times=1)]
        for name, row in measured["rows"].items()
        for way, one in row.items()
    ]
    header = ("model", "by", "characters/s", "times as fast as the first")
    page = section(title, header, lines)[1:]
    return page + [line for why in measured["missing"] for line in ("", why)]


def _stopping(measured: dict) -> list[str]:
    """Each rule against the line of fixed rounds, and where its points lie."""
    fixed = ", ".join(f"{r}: {nats:.4f}" for r, nats in measured["fixed"].items())
    means = [f"{mean} rounds" for mean in stopping.MEANS]
    lines = [
        [rule, *(f"{against[x]:+.4f}" if x in against else "" for x in map(str, stopping.MEANS))]
        for rule, against in measured["against"].items()
    ]
    page = section("Nats per character against the line of fixed rounds", ["rule", *means], lines)
    page += ["", f"Fixed rounds: {fixed}."]
    for rule, points in measured["rules"].items():
        shown = ", ".join(f"{x}: {nats:.4f} with {n:.2f}" for x, (nats, n) in points.items())
        page += ["", f"{rule}, by limit, with mean rounds: {shown}."]
    page += timed(f"Writing {measured['writing']['n']} characters, batch 1", measured["writing"])
    return page[1:]


def table(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def section(title: str, header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    return ["", f"## {title}", "", *table(header, rows)]


def timed(title: str, measured: dict) -> list[str]:
    """What `speed.in_turn` gave."""
    rows = measured["rows"].items()
    return section(title, TIMES, ([name, *ranges(row, ms=1, times=2)] for name, row in rows))


def ranged(summary: dict, digits: int = 0) -> str:
    """-> median (lowest, highest), or mean and its interval."""
    middle = "median" if "median" in summary else "mean"
    numbers = [f"{summary[key]:.{digits}f}" for key in (middle, "low", "high")]
    return "{} ({}, {})".format(*numbers)


def ranges(row: dict, **digits: int) -> list[str]:
    """-> what the row has under these names, each with so many digits."""
    return [ranged(row[key], n) for key, n in digits.items()]


def over(values: Sequence[float], form: str = ".3f") -> str:
    """-> mean (lowest, highest), whole numbers without a point."""
    ends = (f"{x}" if isinstance(x, int) else f"{x:{form}}" for x in (min(values), max(values)))
    return f"{statistics.mean(values):{form}} ({', '.join(ends)})"


def bound(row: dict) -> str:
    return "" if row["exact"] else "at most "


# ----------------------------------------------------------------------------- all that is measured


def _scan(report: dict) -> list[str]:
    scan, step = report["scan"], report["step"]
    sizes = f"b {scan['b']}, t {scan['t']}, e {scan['e']}, n {scan['n']}"
    setting = f"{sizes}; one thread, {scan['rounds']} rounds, torch {report['torch']}"
    page = timed(f"Selective scan, forward and backward ({setting})", scan)
    if not any("mambapy" in name for name in scan["rows"]):
        page += ["", "mambapy is not installed, so it is not compared: pip install 'irann[test]'"]
    sizes = f"{step['layers']} layers, width {step['width']}, b {step['b']}, t {step['t']}"
    page += timed(f"A training step of Mamba ({sizes})", step)
    title = "Mamba writes, batch 1 (characters per second, median, lowest, highest)"
    rows = ([name, ranged(rate)] for name, rate in report["writing"].items())
    return page + section(title, ("who", "characters/s"), rows)


def _speed(report: dict) -> list[str]:
    cache, steps, gpt, windows = (report[key] for key in ("cache", "steps", "gpt", "windows"))
    page = timed(f"GPT writes {cache['n']} characters, window {cache['window']}", cache)
    sizes = f"b {steps['b']}, t {steps['t']}"
    page += timed(f"A training step of every model, at its size ({sizes})", steps)
    sizes = f"b {gpt['b']}, t {gpt['t']}"
    page += timed(f"GPT-2 of the same shape: a training step ({sizes})", gpt["step"])
    writing = f"{gpt['n']} characters, batch 1, with the cache"
    page += timed(f"GPT-2 of the same shape: {writing}", gpt["write"])
    page += section(
        "One layer, width 192, forward and backward, by window (ms, median, lowest, highest)",
        ["t", *windows["lengths"]],
        ([name, *(ranged(ms, 1) for ms in row)] for name, row in windows["rows"].items()),
    )
    header = ("model", "prompt", "reply", "s to the first character", "characters/s")
    lines = [
        [name, f"{one['prompt']:,}", one["reply"], *ranges(one, first=3, chars_per_second=0)]
        for name, row in report["lengths"].items()
        for one in row
    ]
    page += section("Writing, batch 1 (medians, lowest, highest)", header, lines)
    header = ("model", "steps", "words that exist", "judge", "characters/s")
    lines = [
        [
            name,
            one.get("steps", "one a character"),
            *ranges(one, words=2, judge=2, chars_per_second=0),
        ]
        for name, row in report["parallel"].items()
        for one in row
    ]
    title = "Speed against quality (temperature 0.8, medians, lowest, highest)"
    return page + section(title, header, lines)


def _models(rows: Rows) -> list[str]:
    header = ["parameters", "nats per character", "bits", "characters/s, batch 1", "of a batch"]
    lines = [
        [name, row["missing"], "", "", "", ""] if "missing" in row else [name, *_model(row)]
        for name, row in rows.items()
        if "missing" in row or "parameters" in row
    ]
    page = section("Models", ["model", *header], lines)
    for temperature in map(str, quality.TEMPERATURES):
        title = f"Text at temperature {temperature} (means, and bootstrap intervals over the texts)"
        texts = {k: row["quality"][temperature] for k, row in rows.items() if "quality" in row}
        page += _texts(title, texts, _measure)
    return page


def _model(row: dict) -> list[str]:
    """One model's parameters, likelihood and speeds."""
    nll = row["nats_per_char"]
    rates = ranges(row, chars_per_second=0, chars_per_second_of_a_batch=0)
    if nll is None:
        return [f"{row['parameters']:,}", "not measured", "", *rates]
    nats = f"{bound(row)}{nll:.4f}"
    if row.get("standard_error"):
        nats += f" ± {row['standard_error']:.4f}"
    if not row.get("measured", True):
        nats += " (from its card)"
    return [f"{row['parameters']:,}", nats, f"{bound(row)}{nll / math.log(2):.3f}", *rates]


def _texts(title: str, rows: dict[str, dict], cell: Callable[[Any], str]) -> list[str]:
    measures = list(next(iter(rows.values()), {}))
    lines = ([name, *(cell(row[measure]) for measure in measures)] for name, row in rows.items())
    return section(title, ["text of", *measures], lines)


def _measure(value: dict | float) -> str:
    if isinstance(value, dict):
        return ranged(value, 3)
    return str(value) if isinstance(value, int) else f"{value:.3f}"


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
    nats = "nats per character (lowest, highest)"
    header = ("arm", "parameters", "characters", nats, "seconds of training, by seed")
    lines = []
    for name, row in rows.items():
        seconds = ", ".join(f"{spent:.0f}" for spent in row["seconds"])
        reached = bound(row) + over(row["nats"], ".4f")
        lines.append([name, f"{row['parameters']:,}", f"{row['characters']:,}", reached, seconds])
    return [*page, *table(header, lines), "", *ANSWERS[report["race"]](rows)]


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
        lines.append([name, bound(row) + over(nats, ".4f"), ", ".join(f"{n:,}" for n in seen)])
    header = ("arm", "nats per character (lowest, highest)", "after characters, by seed")
    title = "Where each was lowest, by the validation part itself:"
    return [title, "", *table(header, lines), *texts_of_seeds(rows)]


def texts_of_seeds(rows: Rows) -> list[str]:
    """What the models of a race write, as tables, where that was measured."""
    page: list[str] = []
    measured = {name: row["measured"] for name, row in rows.items() if row["measured"]}
    for temperature in map(str, quality.TEMPERATURES if measured else ()):
        by_measure = {
            name: {key: [seed[temperature][key] for seed in seeds] for key in seeds[0][temperature]}
            for name, seeds in measured.items()
        }
        title = f"Text at temperature {temperature} (means over seeds, lowest and highest seed)"
        page += _texts(title, by_measure, over)
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
        seeds = zip(row["seconds"], row["clock"], reached, strict=False)
        lines = [
            [seed, f"{spent:.0f}", f"{clock:.0f}", f"{nats:.4f}"]
            for seed, (spent, clock, nats) in enumerate(seeds)
        ]
        mean = statistics.mean(reached)
        verdict = "at or under" if mean <= races.PUBLISHED else "above"
        header = ("seed", "s of training", "s by the clock", "nats in windows of 256")
        page += [f"## {name}", "", *table(header, lines), ""]
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
