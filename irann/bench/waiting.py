"""Training on a machine that is not idle: with irann's passively waiting threads, and with one.

python -m irann.bench.waiting STEPS trains the tiny GPT in a process of its own, and prints the
seconds of its steps.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from .. import machine, shakespeare, zoo
from ..training import train
from .speed import summary

WAYS = {
    "as it is": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# Busy as long as its parent is there, however that ends (Windows does not tell).
BUSY = [sys.executable, "-c", "import os; p = os.getppid()\nwhile os.getppid() == p: pass"]


def waiting(quick: bool) -> dict:
    """Seconds of training, by what else runs and by way of waiting; the ways take turns."""
    shakespeare.load()  # or it is said here, and not in each of the processes
    steps, rounds = (40, 1) if quick else (400, 5)
    conditions: dict[str, Callable[[dict], float]] = {
        "quiet": lambda way: seconds([way], steps),
        "one busy process": lambda way: beside_a_busy_one(way, steps),
        "another training": lambda way: seconds([way, way], steps),
    }
    rows: dict[str, dict[str, dict]] = {}
    for condition, run in conditions.items():
        taken = [[run(way) for way in WAYS.values()] for _ in range(rounds)]
        rows[condition] = dict(zip(WAYS, map(summary, zip(*taken))))
    return {"steps": steps, "rounds": rounds, "cores": machine.cores(), "rows": rows}


def seconds(ways: list[dict], steps: int) -> float:
    """-> of trainings that run side by side, each with its environment: the longest one's."""
    command = [sys.executable, "-m", "irann.bench.waiting", str(steps)]
    free = {k: v for k, v in os.environ.items() if k not in (*machine.CHOSEN, "OMP_NUM_THREADS")}
    running = [
        subprocess.Popen(command, env=free | way, stdout=subprocess.PIPE, text=True) for way in ways
    ]
    said = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return max(float(one.split()[-1]) for one in said)


def beside_a_busy_one(way: dict, steps: int) -> float:
    """-> of a training beside a process that computes without end."""
    busy = subprocess.Popen(BUSY)
    try:
        return seconds([way], steps)
    finally:
        busy.kill()
        busy.wait()


def main(steps: int) -> None:
    config, recipe = zoo.recipe("gpt", "tiny", steps=steps + 6, evaluate_every=0)
    ticks = train(zoo.build("gpt", config), shakespeare.load(), recipe)
    for _ in range(5):  # what happens once
        next(ticks)
    began = time.perf_counter()
    for _ in range(steps):
        next(ticks)
    print(time.perf_counter() - began)
    ticks.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
