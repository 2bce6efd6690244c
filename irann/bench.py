"""The benchmark: `scan` times the selective scan against other implementations; `all` adds the trained models.

Times are ratios: every round runs all contestants one after the other in the same process, on one thread, and a ratio is
the median over rounds, given with its smallest and largest value.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import shakespeare, zoo
from .checkpoint import CheckpointError
from .core.scan import selective_scan
from .lm import stream
from .train import evaluate

STATE = 16


def main(what: str = "all", *, quick: bool = False, out: Path = Path("bench-report")) -> dict:
    """Run, print the report as Markdown, and write it and the numbers under `out`. Raises ValueError for another `what`."""
    if what not in ("all", "scan"):
        raise ValueError(f"bench takes all or scan; got {what!r}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = {"torch": torch.__version__, "threads": 1, "quick": quick, "scan": scan_times(quick), "growth": scan_growth(quick)}
        if what == "all":
            report["models"] = trained_models(quick)
    finally:
        torch.set_num_threads(threads)
    page = markdown(report)
    print(page)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{what}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{what}.md").write_text(page + "\n")
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
    inputs, runners = scan_inputs(b, t, e), contestants()
    seconds = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, scan in runners.items():
            seconds[name].append(forward_backward(scan, inputs))
    ours = next(iter(runners))
    rows = {}
    for name, taken in seconds.items():
        rows[name] = {"ms": spread([1000 * s for s in taken[1:]]), "times": spread(ratios(taken[1:], seconds[ours][1:]))}
    return {"b": b, "t": t, "e": e, "n": STATE, "rounds": rounds, "rows": rows}


def scan_growth(quick: bool) -> dict:
    """-> by method, the exponent with which time grows with length: the slope of log time over log t, least squares."""
    lengths, e, rounds = ((64, 128, 256), 32, 3) if quick else ((256, 512, 1024, 2048, 4096), 256, 3)
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


def trained_models(quick: bool) -> dict:
    """-> by name, for each model with weights or a run: parameters, nats per character, characters written per second."""
    text, rows = shakespeare.load(), {}
    for name in zoo.MODELS:
        try:
            model = zoo.load(name)
        except CheckpointError as error:
            rows[name] = {"missing": str(error)}
            continue
        n, speeds = 100 if quick else 400, []
        for seed in range(3):
            began = time.perf_counter()
            for _ in stream(model, "\n", n, seed=seed):
                pass
            speeds.append(n / (time.perf_counter() - began))
        said = None if quick else evaluate(model, text).nats_per_char
        rows[name] = {"parameters": sum(p.numel() for p in model.parameters()), "exact": model.exact, "chars_per_second": spread(speeds)}
        rows[name]["nats_per_char"] = said if said is not None else (model.card or {}).get("validation")
    return rows


def ratios(a: list[float], b: list[float]) -> list[float]:
    """How many times as long a took as b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """-> median, smallest, largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def exponent(lengths, seconds) -> float:
    """Lengths, seconds -> p of the best fit seconds = constant * length^p."""
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in seconds]
    return statistics.linear_regression(x, y).slope


def markdown(report: dict) -> str:
    """The report as a page."""
    s, g = report["scan"], report["growth"]
    size = f"b {s['b']}, t {s['t']}, e {s['e']}, n {s['n']}"
    page = [
        f"## Selective scan, forward and backward ({size}; one thread, {s['rounds']} rounds, torch {report['torch']})",
        "",
        "| implementation | ms, median | times as long as the first (lowest, highest) |",
        "|---|---|---|",
    ]
    for name, row in s["rows"].items():
        times = row["times"]
        page.append(f"| {name} | {row['ms']['median']:.1f} | {times['median']:.2f} ({times['low']:.2f}, {times['high']:.2f}) |")
    if not any("mambapy" in name for name in s["rows"]):
        page += ["", "mambapy is not installed, so it is not compared: pip install 'irann[test]'"]
    grown = ", ".join(f"{name} {value:.2f}" for name, value in g["exponents"].items())
    page += ["", f"Time grows with length to the power of: {grown} (t {g['lengths'][0]} to {g['lengths'][-1]}, b 1, e {g['e']})."]
    if "models" in report:
        page += ["", "## Models", "", "| model | parameters | nats per character | characters per second |", "|---|---|---|---|"]
        for name, row in report["models"].items():
            if "missing" in row:
                page.append(f"| {name} | {row['missing']} | | |")
                continue
            nats = "not measured" if row["nats_per_char"] is None else f"{'' if row['exact'] else 'at most '}{row['nats_per_char']:.4f}"
            page.append(f"| {name} | {row['parameters']:,} | {nats} | {row['chars_per_second']['median']:.0f} |")
    return "\n".join(page)
