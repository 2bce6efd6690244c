"""The benchmark: `scan` times the selective scan and Mamba against other implementations; `all` adds the trained models,
and a model's name takes that one alone; `models`, `models-long`, `thinker`, `thinker-long` and `nanogpt` train models side by
side (races.py; so the thinker alone has no name here).

Where implementations are compared, times are ratios: every round runs all contestants one after the other in the same process,
on one thread, and a ratio is the median over rounds, given with its smallest and largest value. Memory is the growth of a fresh
process's peak. Of the models: likelihood over the whole validation part, what their text looks like from outside (quality.py),
what they cost (speed.py). What was measured is kept in `out` after each part, and a second start goes on from there.
"""

import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import shakespeare, zoo
from ..checkpoint import CheckpointError
from ..core.scan import selective_scan
from ..lm import evaluating
from ..models.gpt import GPT
from ..models.mamba import Mamba, MambaConfig
from ..settings import InputError
from ..shakespeare import write_atomically
from ..training import evaluate
from . import quality, races, speed
from .speed import in_turn, spread

STATE = 16


def main(
    what: str = "all",
    *,
    quick: bool = False,
    out: Path = Path("bench-report"),
    seeds: int = 3,
    device="cpu",
) -> dict:
    """Run, print the report as Markdown, and write it and the numbers under `out`. `seeds` and `device` are those of a race.

    Raises ValueError for another `what`, for a report in `out` that this one would not go on from, and for a device other
    than the CPU where no race is run; CheckpointError for a model's name where it has no weights.
    """
    known = dict.fromkeys(("all", "scan", *races.RACES, *zoo.MODELS))  # `thinker` is a race
    if what not in known:
        raise InputError(f"bench takes one of {', '.join(known)}; got {what!r}")
    if what not in races.RACES and torch.device(device).type != "cpu":
        raise InputError(
            f"{what} is measured on the CPU: leave --device out, it is for races ({', '.join(races.RACES)})"
        )
    report = (
        races.run(what, seeds=seeds, quick=quick, out=out, device=device)
        if what in races.RACES
        else measure(what, quick, Path(out))
    )
    page = races.markdown(report) if what in races.RACES else markdown(report)
    print(page)
    (Path(out) / f"{what}.md").write_text(page + "\n")
    draw(report, what, Path(out))
    return report


def draw(report: dict, what: str, out: Path) -> None:
    """The report's figures, beside it: WHAT-NAME.png. Without matplotlib there are none, and that is said."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures without matplotlib: pip install 'irann[book]'", file=sys.stderr)
        return
    from .. import figures

    figures.use()
    plots: dict[str, Callable] = {}
    if what in races.RACES:
        plots = {
            "curves": lambda ax: figures.race(report, ax=ax),
            "seconds": lambda ax: figures.race(report, against="seconds", ax=ax),
        }
    if "windows" in report:
        plots = {
            name: lambda ax, name=name: getattr(figures, name)(report[name], ax=ax)
            for name in ("windows", "lengths", "parallel")
        }
    if any("curve" in row for row in report.get("models", {}).values()):
        plots |= {
            name: lambda ax, name=name: getattr(figures, name)(report["models"], ax=ax)
            for name in ("learning", "places")
        }
    for name, plot in plots.items():
        figure, ax = plt.subplots()
        plot(ax)
        figure.savefig(out / f"{what}-{name}.png")
        plt.close(figure)


def measure(what: str, quick: bool, out: Path) -> dict:
    """Part after part, each kept in `out` when it is done -> the report. One thread."""
    parts = {
        "scan": scan_times,
        "growth": scan_growth,
        "memory": scan_memory,
        "step": training_step,
        "writing": writing,
    }
    if what == "all":
        parts |= {
            "cache": cache_gain,
            "steps": speed.steps_of_all,
            "step_memory": step_memory,
            "gpt": speed.gpt_beside_transformers,
        }
        parts |= {"windows": speed.cost_against_window, "lengths": speed.writing_by_length}
        parts |= {"parallel": parallel_writing, "models": trained_models}
    if what in zoo.MODELS:
        parts = {"models": lambda quick: trained_models(quick, what)}
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / f"{what}.json"
    report = {"torch": torch.__version__, "threads": 1, "quick": quick}
    before = races.stored(numbers, quick)
    missing = set(parts) - set(before)
    if before and missing and before.get("torch") != torch.__version__:
        raise InputError(
            f"{numbers} was measured with torch {before.get('torch')}, this is {torch.__version__}: delete it, or choose another --out"
        )
    if before and not missing:
        print(f"all of it is measured already; to measure again, delete {numbers}", file=sys.stderr)
    report |= before
    measured = {
        name: row["weights"] for name, row in report.get("models", {}).items() if "weights" in row
    }
    if retrained := [
        name for name, weights in measured.items() if weights_of(name) not in (None, weights)
    ]:
        print(
            f"{numbers} was measured with other weights of {', '.join(retrained)}; to measure again, delete it",
            file=sys.stderr,
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, part in parts.items():
            if name not in report:
                print(f"measuring: {name}", file=sys.stderr)
                report[name] = part(quick)
                write_atomically(numbers, (json.dumps(report, indent=2) + "\n").encode())
    finally:
        torch.set_num_threads(threads)
    return report


def scan_inputs(b: int, t: int, e: int, n: int = STATE) -> list[torch.Tensor]:
    """-> u, delta (b t e), A (e n), B, C (b t n), D (e), as a Mamba block would have them, all asking for gradients."""
    dice = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(b, t, w, generator=dice) for w in (e, n, n))
    delta = torch.rand(b, t, e, generator=dice) * 0.1 + 0.001
    A = -torch.arange(1.0, n + 1).expand(e, n).contiguous()
    return [x.requires_grad_() for x in (u, delta, A, B, C, torch.ones(e))]


def contestants() -> dict[str, Callable]:
    """-> by name, a function of (u, delta, A, B, C, D) -> y (b t e)."""
    ours = {
        "irann, C kernel where there is one (auto)": lambda *x: selective_scan(*x)[0],
        "irann, plain torch (chunked)": lambda *x: selective_scan(*x, method="chunked")[0],
        "plain loop (sequential)": lambda *x: selective_scan(*x, method="sequential")[0],
    }
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return ours

    def parallel(u, delta, A, B, C, D):  # discretised and read out as mambapy's own block does
        decay = torch.exp(delta[..., None] * A)
        h = pscan(decay, (delta * u)[..., None] * B[:, :, None, :])
        return (h @ C[..., None]).squeeze(-1) + D * u

    return ours | {"mambapy, parallel scan": parallel}


def forward_backward(scan: Callable, inputs: list[torch.Tensor]) -> float:
    """-> seconds of one forward and backward pass."""
    for x in inputs:
        x.grad = None
    began = time.perf_counter()
    scan(*inputs).sum().backward()
    return time.perf_counter() - began


def scan_times(quick: bool) -> dict:
    """Forward and backward at b 16, t 256, e 256 (quick: b 2, t 64, e 64), everyone in turn, after one round that does not count."""
    b, t, e, rounds = (2, 64, 64, 3) if quick else (16, 256, 256, 7)
    inputs = scan_inputs(b, t, e)
    runners = {
        name: functools.partial(forward_backward, scan, inputs)
        for name, scan in contestants().items()
    }
    return {"b": b, "t": t, "e": e, "n": STATE, **in_turn(runners, rounds)}


def scan_growth(quick: bool) -> dict:
    """-> by method, the exponent with which time grows with length: the slope of log time over log t, least squares."""
    lengths, e, rounds = (
        ((64, 128, 256), 32, 3) if quick else ((256, 512, 1024, 2048, 4096), 256, 3)
    )
    exponents = {}
    for method in ("auto", "chunked"):
        scan = lambda *x, method=method: selective_scan(*x, method=method)[0]
        medians = []
        for t in lengths:
            inputs = scan_inputs(1, t, e)
            forward_backward(scan, inputs)
            medians.append(statistics.median(forward_backward(scan, inputs) for _ in range(rounds)))
        exponents[method] = exponent(lengths, medians)
    return {"b": 1, "e": e, "lengths": lengths, "exponents": exponents}


MEMORY = """
import re, resource, sys, torch
from irann.bench import suite

def peak():
    try:
        return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
    except OSError:  # not Linux: the peak since the process began, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
run = suite.prepared(sys.argv[1], *map(int, sys.argv[2:]))
try:
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
except OSError:
    pass
before = peak()
run()
print(peak() - before)
"""


def scan_memory(quick: bool) -> dict:
    """Peak memory above the inputs of one forward and backward pass, in MB, each in a process of its own; by length too."""
    b, t, e = (4, 256, 128) if quick else (8, 256, 256)
    peak = {name: memory_of(name, b, t, e) for name in contestants()}
    lengths = (t, 2 * t, 4 * t)
    ours = next(iter(peak))
    return {
        "b": b,
        "t": t,
        "e": e,
        "MB": peak,
        "lengths": lengths,
        "grown": [memory_of(ours, b, length, e) for length in lengths],
    }


def step_memory(quick: bool) -> dict:
    """Peak memory above weights and gradients of one training step of each model, in MB, each in a process of its own."""
    which, b = ("tiny", 4) if quick else ("gpu", 4)
    sizes = {name: zoo.recipe(name, which)[0].window for name in zoo.MODELS}
    return {
        "b": b,
        "recipe": which,
        "MB": {name: memory_of(f"{name} {which}", b, t, 0) for name, t in sizes.items()},
    }


def memory_of(subject: str, b: int, t: int, e: int) -> float:
    """-> MB."""
    command = [sys.executable, "-c", MEMORY, subject, *map(str, (b, t, e))]
    return float(subprocess.run(command, check=True, capture_output=True).stdout) / 1e6


def prepared(subject: str, b: int, t: int, e: int) -> Callable:
    """-> one pass forward and backward, of a contestant or of "MODEL RECIPE", with all that it starts from already in memory."""
    if subject in (runners := contestants()):
        forward_backward(runners[subject], scan_inputs(1, 8, 8))
        inputs = scan_inputs(b, t, e)
        for x in inputs:
            x.grad = torch.ones_like(x)
        return lambda: runners[subject](*inputs).sum().backward()
    name, which = subject.split()
    config = zoo.recipe(name, which)[0]
    model, ids = zoo.build(name, config).train(), torch.zeros(b, t + 1, dtype=torch.long)
    model.loss(ids[:1, :9])[0].backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return lambda: model.loss(ids)[0].backward()


def training_step(quick: bool) -> dict:
    """Loss and gradients of a Mamba of 4 layers, width 128 (quick: 2 of 32), b 16, t 256: ours twice, and mambapy's."""
    import os

    layers, width, b, t, rounds = (2, 32, 2, 64, 2) if quick else (4, 128, 16, 256, 3)
    ours = Mamba(MambaConfig(layers=layers, width=width, window=t))
    ids = torch.randint(65, (b, t + 1), generator=torch.Generator().manual_seed(0))

    def with_kernel(switch: str) -> Callable:
        def run():
            before = os.environ.get("IRANN_KERNEL")
            os.environ["IRANN_KERNEL"] = switch
            try:
                ours.loss(ids)[0].backward()
            finally:
                os.environ.pop("IRANN_KERNEL") if before is None else os.environ.update(
                    IRANN_KERNEL=before
                )

        return run

    runners = {
        "irann, kernel where there is one": with_kernel("1"),
        "irann, plain torch": with_kernel("0"),
    }
    try:
        from mambapy.mamba import Mamba as Theirs
        from mambapy.mamba import MambaConfig as TheirConfig

        theirs, embed = (
            Theirs(TheirConfig(d_model=width, n_layers=layers)),
            torch.nn.Embedding(65, width),
        )

        def peer():
            logits = theirs(embed(ids[:, :-1])) @ embed.weight.T
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

        runners["mambapy"] = peer
    except ImportError:
        pass
    return {"layers": layers, "width": width, "b": b, "t": t, **in_turn(runners, rounds)}


def write_on(model, prompt: torch.Tensor, n: int) -> float:
    """-> characters per second of the n characters after the first one that follows the prompt."""
    drafts = model.generate(prompt, n + 1, generator=torch.Generator().manual_seed(0))
    seen = 0
    for draft in drafts:
        if not seen and draft.settled > prompt.shape[1]:
            began, seen = time.perf_counter(), draft.settled
    return (draft.settled - seen) / (time.perf_counter() - began)


def writing(quick: bool) -> dict:
    """Mamba of 4 layers, width 128, batch 1: characters per second after 100 and after 10,000 read, and transformers' beside it.

    One round that does not count comes first, and the time to the first character is left out, for both.
    """
    n, long, rounds = (20, 1000, 2) if quick else (400, 10_000, 7)
    model = Mamba(MambaConfig(layers=4, width=128)).eval()
    text = torch.randint(65, (1, long), generator=torch.Generator().manual_seed(0))
    speeds: dict[str, list[float]] = {"irann, after 100": [], f"irann, after {long:,}": []}
    try:
        from transformers import MambaConfig as TheirConfig
        from transformers import MambaForCausalLM

        size = {"vocab_size": 65, "hidden_size": 128, "num_hidden_layers": 4, "state_size": 16}
        theirs = MambaForCausalLM(
            TheirConfig(**size, bos_token_id=0, eos_token_id=None, pad_token_id=0)
        ).eval()
        speeds["transformers, cached, after 100"] = []
    except ImportError:
        theirs = None
    for _ in range(rounds + 1):
        speeds["irann, after 100"].append(write_on(model, text[:, :100], n))
        speeds[f"irann, after {long:,}"].append(write_on(model, text, n))
        if theirs is not None:
            began = time.perf_counter()
            theirs.generate(text[:, :100], max_new_tokens=1, do_sample=True, top_k=0)
            middle = time.perf_counter()
            theirs.generate(text[:, :100], max_new_tokens=n + 1, do_sample=True, top_k=0)
            speeds["transformers, cached, after 100"].append(
                n / (time.perf_counter() - middle - (middle - began))
            )
    return {name: spread(values[1:]) for name, values in speeds.items()}


def cache_gain(quick: bool) -> dict:
    """GPT of the recipe `full`: 500 characters with the KV cache, and with the whole window computed for each -> times as fast."""
    n, rounds = (40, 1) if quick else (500, 3)
    model = GPT(zoo.recipe("gpt", "full")[0]).eval()

    @torch.no_grad()
    def anew():
        ids, dice = torch.zeros(1, 1, dtype=torch.long), torch.Generator().manual_seed(0)
        for _ in range(n):
            odds = model(ids[:, -model.config.window :])[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=dice)], 1)

    def cached():
        for _ in model.generate(
            torch.zeros(1, 1, dtype=torch.long), n, generator=torch.Generator().manual_seed(0)
        ):
            pass

    return {
        "n": n,
        "window": model.config.window,
        **in_turn({"with the cache": cached, "without": anew}, rounds),
    }


def parallel_writing(quick: bool) -> dict:
    text = shakespeare.load()
    return speed.speed_against_quality(
        quick, quality.counted(text.vocabulary.decode(text.train)), text.vocabulary
    )


def trained_models(quick: bool, only: str | None = None) -> dict:
    """-> by name, each model with weights or a run: parameters, likelihood, text quality, characters written per second.

    And `validation text`, pieces of the real thing measured like a model's: what the measures say of Shakespeare.
    """
    text = shakespeare.load()
    count, n, rounds = (2, 100, 1) if quick else (quality.SAMPLES, quality.LENGTH, 3)
    real = quality.real(text, count, n)
    rows: dict[str, dict] = {
        "validation text": {
            "quality": {str(temperature): real for temperature in quality.TEMPERATURES}
        }
    }
    for name in [only] if only else zoo.MODELS:
        try:
            model = zoo.load(name)
        except CheckpointError as error:
            if only:
                raise
            rows[name] = {"missing": str(error)}
            continue
        row: dict = {"parameters": sum(p.numel() for p in model.parameters()), "exact": model.exact}
        card = model.card or {}
        row |= {key: card[key] for key in ("characters", "curve") if key in card} | {
            "weights": weights_of(name)
        }
        if quick:
            row |= {
                "nats_per_char": card.get("validation"),
                "standard_error": card.get("standard_error"),
                "measured": False,
            }
        else:
            said = evaluate(model, text)
            row |= {"nats_per_char": said.nats_per_char, "standard_error": said.standard_error}
        row["by_place"] = by_place(model, text, pages=2 if quick else 60)
        row["quality"], row["samples"] = quality.written(model, text, count, n)
        for key, batch in (("chars_per_second", 1), ("chars_per_second_of_a_batch", count)):
            row[key] = spread(
                [_rate(model, text.vocabulary, batch, 200, seed) for seed in range(rounds)]
            )
        rows[name] = row
    return rows


def weights_of(name: str) -> str | None:
    """-> which weights `load(name)` would give, in short, or None where there are none: by hash, or by the run's step and loss."""
    try:
        card = zoo.load(name).card
    except CheckpointError:
        return None
    return card["sha256"][:12] if "sha256" in card else f"step {card['step']}, {card['validation']}"


def _rate(model, vocabulary, count: int, n: int, seed: int) -> float:
    """-> characters per second of `count` texts written at once."""
    began = time.perf_counter()
    quality.samples(model, vocabulary, count, n, 1.0, seed)
    return count * n / (time.perf_counter() - began)


def by_place(model, text, pages: int = 60) -> list[list[float]]:
    """-> pairs of a place in the window and the mean nats of the characters from there to the next, over some windows."""
    window = model.config.window
    ids = text.val[: pages * window + 1].unfold(0, window + 1, window)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad(), evaluating(model):
        nats = torch.cat([model.nll(part, generator=dice) for part in ids.split(20)]).mean(0)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    return [
        [a, nats[a:b].mean().item()]
        for a, b in zip(edges, edges[1:], strict=False)
        if a < len(nats)
    ]


def exponent(lengths, seconds) -> float:
    """Lengths, seconds -> p of the best fit seconds = constant * length^p."""
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in seconds]
    return statistics.linear_regression(x, y).slope


def markdown(report: dict) -> str:
    """The report as a page."""
    if "scan" not in report:  # of one model alone
        return "\n".join(_models(report["models"])[1:])
    s, g = report["scan"], report["growth"]
    size = f"b {s['b']}, t {s['t']}, e {s['e']}, n {s['n']}"
    page = _table(
        f"Selective scan, forward and backward ({size}; one thread, {s['rounds']} rounds, torch {report['torch']})",
        s,
    )[1:]
    if not any("mambapy" in name for name in s["rows"]):
        page += ["", "mambapy is not installed, so it is not compared: pip install 'irann[test]'"]
    grown = ", ".join(f"{name} {value:.2f}" for name, value in g["exponents"].items())
    told = f"t {g['lengths'][0]} to {g['lengths'][-1]}, b 1, e {g['e']}, medians of three"
    page += ["", f"Time grows with length to the power of: {grown} ({told})."]
    m, step = report["memory"], report["step"]
    page += [
        "",
        f"## Memory above the inputs (b {m['b']}, t {m['t']}, e {m['e']}; MB, one process each)",
        "",
    ]
    page += ["| implementation | MB |", "|---|---|"]
    page += [f"| {name} | {mb:.0f} |" for name, mb in m["MB"].items()]
    page += [
        "",
        "Of the first, by length: "
        + ", ".join(f"t {t}: {mb:.0f}" for t, mb in zip(m["lengths"], m["grown"], strict=True))
        + ".",
    ]
    page += _table(
        f"A training step of Mamba ({step['layers']} layers, width {step['width']}, b {step['b']}, t {step['t']})",
        step,
    )
    page += [
        "",
        "## Mamba writes, batch 1 (characters per second, median, lowest, highest)",
        "",
        "| who | characters/s |",
        "|---|---|",
    ]
    page += [f"| {name} | {_told(speed)} |" for name, speed in report["writing"].items()]
    if "cache" in report:
        cache = report["cache"]
        page += _table(f"GPT writes {cache['n']} characters, window {cache['window']}", cache)
    if "steps" in report:
        page += _speed(report)
    if "models" in report:
        page += _models(report["models"])
    return "\n".join(page)


def _told(values: dict, digits: int = 0) -> str:
    """-> median (lowest, highest)."""
    return (
        f"{values['median']:.{digits}f} ({values['low']:.{digits}f}, {values['high']:.{digits}f})"
    )


def _table(title: str, measured: dict) -> list[str]:
    page = [
        "",
        f"## {title}",
        "",
        "| implementation | ms, median (lowest, highest) | times as long as the first |",
        "|---|---|---|",
    ]
    return page + [
        f"| {name} | {_told(row['ms'], 1)} | {_told(row['times'], 2)} |"
        for name, row in measured["rows"].items()
    ]


def _speed(report: dict) -> list[str]:
    steps, memory, gpt, windows = (
        report["steps"],
        report["step_memory"]["MB"],
        report["gpt"],
        report["windows"],
    )
    page = _table(
        f"A training step of every model, at its size (b {steps['b']}, t {steps['t']})", steps
    )
    page += [
        "",
        "Memory above weights and gradients, MB: "
        + ", ".join(f"{name} {mb:.0f}" for name, mb in memory.items())
        + ".",
    ]
    page += _table(
        f"GPT-2 of the same shape: a training step (b {gpt['b']}, t {gpt['t']})", gpt["step"]
    )
    page += _table(
        f"GPT-2 of the same shape: {gpt['n']} characters, batch 1, with the cache", gpt["write"]
    )
    page += [
        "",
        "## One layer, width 192, forward and backward, by window (ms, median, lowest, highest)",
        "",
    ]
    page += [
        "| t | " + " | ".join(map(str, windows["lengths"])) + " |",
        "|---" * (len(windows["lengths"]) + 1) + "|",
    ]
    page += [
        f"| {name} | " + " | ".join(_told(ms, 1) for ms in row) + " |"
        for name, row in windows["rows"].items()
    ]
    page += [
        "",
        "## Writing, batch 1 (medians, lowest, highest)",
        "",
        "| model | prompt | reply | s to the first character | characters/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["lengths"].items():
        for one in row:
            first, rate = _told(one["first"], 3), _told(one["chars_per_second"])
            page.append(f"| {name} | {one['prompt']:,} | {one['reply']} | {first} | {rate} |")
    page += [
        "",
        "## Speed against quality (temperature 0.8, medians, lowest, highest)",
        "",
        "| model | steps | words that exist | judge | characters/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["parallel"].items():
        for one in row:
            words, judge, rate = (
                _told(one["words"], 2),
                _told(one["judge"], 2),
                _told(one["chars_per_second"]),
            )
            page.append(
                f"| {name} | {one.get('steps', 'one a character')} | {words} | {judge} | {rate} |"
            )
    return page


def _models(rows: dict) -> list[str]:
    page = [
        "",
        "## Models",
        "",
        "| model | parameters | nats per character | bits | characters/s, batch 1 | of a batch |",
    ]
    page.append("|---|---|---|---|---|---|")
    trained = {name: row for name, row in rows.items() if "parameters" in row}
    for name, row in rows.items():
        if "missing" in row:
            page.append(f"| {name} | {row['missing']} | | | | |")
        elif name in trained:
            said, bound = row["nats_per_char"], "" if row["exact"] else "at most "
            nats = "not measured" if said is None else f"{bound}{said:.4f}"
            bits = "" if said is None else f"{bound}{said / math.log(2):.3f}"
            if row.get("standard_error"):
                nats += f" ± {row['standard_error']:.4f}"
            if said is not None and not row.get("measured", True):
                nats += " (from its card)"
            speed, many = _told(row["chars_per_second"]), _told(row["chars_per_second_of_a_batch"])
            page.append(f"| {name} | {row['parameters']:,} | {nats} | {bits} | {speed} | {many} |")
    page += _by_place({name: row["by_place"] for name, row in trained.items()}) + _curves(trained)
    for temperature in map(str, quality.TEMPERATURES):
        told = {
            name: row["quality"][temperature]
            for name, row in rows.items()
            if temperature in row.get("quality", {})
        }
        page += [
            "",
            f"## Text at temperature {temperature} (means, and bootstrap intervals over the texts)",
            "",
        ]
        measures = list(next(iter(told.values()), {}))
        page += ["| text of | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for name, row in told.items():
            page.append(
                f"| {name} | " + " | ".join(_cell(row[measure]) for measure in measures) + " |"
            )
    return page


def _by_place(rows: dict[str, list]) -> list[str]:
    """How much a longer past is worth: mean nats by the place in the window, from there to the next."""
    places = sorted({place for row in rows.values() for place, _ in row})
    page = ["", "## Nats per character, by place in the window", ""]
    page += [
        "| model | from place " + " | ".join(f"{p + 1}" for p in places) + " |",
        "|---" * (len(places) + 1) + "|",
    ]
    for name, row in rows.items():
        there = {place: f"{nats:.3f}" for place, nats in row}
        page.append(f"| {name} | " + " | ".join(there.get(place, "") for place in places) + " |")
    return page if rows else []


def _curves(rows: dict[str, dict]) -> list[str]:
    """What was met on the way while what ships was trained, where its card says so."""
    told = {name: row["curve"] for name, row in rows.items() if "curve" in row}
    page = (
        ["", "## Validation while training: nats per character after millions of characters", ""]
        if told
        else []
    )
    return page + [
        f"- {name}: " + ", ".join(f"{nats:.3f} after {seen / 1e6:.1f}" for seen, nats in curve)
        for name, curve in told.items()
    ]


def _cell(value) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ({value['low']:.3f}, {value['high']:.3f})"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
