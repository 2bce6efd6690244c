"""What is slower now? Times over an unchanged peer's in one run, beside the stored report's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..settings import InputError
from . import scan, speed

STORED = Path(__file__).parents[2] / "book" / "report" / "all.json"
PARTS: dict[str, Callable[[bool], dict]] = {
    "scan": scan.times,
    "step": scan.training_step,
    "gpt": speed.gpt_beside_transformers,
    "cache": speed.cache_gain,
    "steps": speed.training_steps,
}
PEERS = (scan.PEER, "mambapy", "transformers", "without", "gpt")
WIDE = 1.5  # two runs on a busy machine differ by less, and so does what the page models draw


def regressions(quick: bool) -> dict:
    """-> by what is timed: its time over its peer's, then and now, and what is slower. The small
    sizes of `quick` are not those that were stored, so nothing is said of them.

    Raises InputError where there is no stored report.
    """
    try:
        stored = json.loads(STORED.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {STORED} to compare with: run this in a clone of the repository"
        ) from error
    rows, alone = {}, []
    for name, part in PARTS.items():
        then, now = dict(ratios(name, stored[name])), dict(ratios(name, part(quick)))
        alone += [key for key in then if key not in now]
        for key in (key for key in now if key in then):
            rows[key] = {"stored report": then[key], "now": now[key]}
            if not quick:
                change = now[key] / then[key]
                verdict = "**slower**" if change > WIDE else ""
                rows[key] |= {"change": change, f"over {WIDE}": verdict}
    notes = [f"Not timed, for want of a peer: {'; '.join(alone)}."] if alone else []
    if quick:
        notes.append("The stored report is of other sizes: --quick cannot say what became slower.")
    return {"rows": rows, "notes": notes}


def ratios(name: str, part: dict) -> Iterator[tuple[str, float]]:
    """-> for each row of a part, and of the parts in it, its median time over its peer's."""
    rows = part.get("rows", {})
    peer = next((peer for peer in PEERS if peer in rows), None)
    if peer:
        for row in [row for row in rows if row != peer]:
            ratio = rows[row]["times"]["median"] / rows[peer]["times"]["median"]
            yield f"{name}: {row}, over {peer}", ratio
    for inner, more in part.items():
        if inner != "rows" and isinstance(more, dict):
            yield from ratios(f"{name}, {inner}", more)
