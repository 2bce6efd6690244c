"""Saves one checkpoint after the other, and says so, until it is killed."""

import sys
from pathlib import Path

import torch

from irann import checkpoint

run = Path(sys.argv[1])
step = 0
while True:
    step += 1
    tensors = {"w": torch.full((200, 1000), float(step))}
    saved = checkpoint.Snapshot(tensors, {}, {}, {"step": step, "validation": None}, "ab")
    checkpoint.save(run / "checkpoints" / f"step-{step:08d}", saved)
    checkpoint.tidy(run)
    print(step, flush=True)
