"""Ten children, one after the other, save one checkpoint after the other, say so, and are killed at a
random moment; what they said is there.
"""

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from irann import checkpoint

torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and are waited for
rng = random.Random(0)


def save(run, out):
    for step in count(1):
        tensors = {"w": torch.full((200, 1000), float(step))}
        saved = checkpoint.Snapshot(tensors, {}, {}, {"step": step, "validation": None}, "ab")
        checkpoint.save(run / "checkpoints" / f"step-{step:08d}", saved)
        checkpoint.tidy(run)
        os.write(out, b"%d\n" % step)


for attempt in range(10):
    run = Path(sys.argv[1], str(attempt))
    heard, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            save(run, out)
        finally:
            os._exit(1)
    os.close(out)
    with open(heard) as lines:
        first = int(lines.readline())
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        done = [first, *map(int, lines)]
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    _, loaded, skipped = checkpoint.newest(run)
    assert not skipped and loaded.config["step"] >= done[-1]
    assert (loaded.model["w"] == loaded.config["step"]).all()
    print("survived", loaded.config["step"])
