"""Trains on a file system of four megabytes that is full: at the beginning, and then in the middle
of a checkpoint.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from irann import checkpoint
from irann.__main__ import main

disk, excerpt = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
run = disk / "run"
filler = disk / "filler"


def train(steps, *more):
    """-> the exit code of the command line."""
    call = ["train", "gpt", "--recipe", "tiny", "--corpus", excerpt, "--run", run, *more]
    for change in (f"steps={steps}", "save_every=2", "evaluate_every=0"):
        call += ["--set", change]
    try:
        main([str(word) for word in call])
    except SystemExit as end:
        return end.code or 0


def leave(room):
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - room))


assert train(2) == 0
(old,) = checkpoint.listed(run)
loaded = checkpoint.load(old)
longer = {"recipe": loaded.config["recipe"] | {"steps": 9}}
checkpoint.save(old, dataclasses.replace(loaded, config=loaded.config | longer))
weights = (old / "model.safetensors").stat().st_size
for room in (30_000, int(1.4 * weights)):  # not for the weights; for them, but not for a checkpoint
    leave(room)
    print("FULL", file=sys.stderr)
    assert train(9, "--resume") == 1
    assert checkpoint.listed(run) == [old] and checkpoint.newest(run)[2] == []
    assert not list(old.parent.glob(".unfinished*"))
filler.unlink()
print("FREE", file=sys.stderr)
assert train(9, "--resume") == 0
assert checkpoint.newest(run)[1].config["step"] == 9
print("ok")
