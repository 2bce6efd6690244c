"""Training is killed at random moments, twenty times, and goes on each time; then compared with one
never killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  an optimizer would import it, in every child anew

from irann import checkpoint, shakespeare, zoo
from irann.text import Text
from irann.training import train

torch.set_num_threads(1)
corpus = shakespeare.load()
text = Text(corpus.train[:6000], corpus.val[:100], corpus.vocabulary, "an excerpt", "0" * 64)
runs = Path(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
names = sys.argv[3:]


def go(name, run, steps, save_every=2, **options):
    config, recipe = zoo.recipe(
        name, "tiny", steps=100_000, save_every=save_every, evaluate_every=0
    )
    for tick in train(zoo.build(name, config), text, recipe, run=run, **options):
        if tick.step >= steps:
            break


for attempt in range(20):
    name = names[attempt % len(names)]
    run, before = runs / name, -1
    if checkpoint.listed(run):
        before = checkpoint.newest(run)[1].config["step"]
    child = os.fork()
    if not child:
        try:
            go(name, run, 10**9, resume=True)
        finally:
            os._exit(1)
    until = time.monotonic() + 100
    while not any(int(folder.name[5:]) > before for folder in checkpoint.listed(run)):
        assert time.monotonic() < until and not os.waitpid(child, os.WNOHANG)[0]
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    seen = int(checkpoint.listed(run)[0].name[5:])
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder, saved, skipped = checkpoint.newest(run)
    assert not skipped and saved.config["step"] >= seen > before
    steps = sum(line.endswith("}") for line in (run / "metrics.jsonl").read_text().splitlines())
    assert steps - saved.config["step"] <= 2, (steps, saved.config["step"])
    print("survived", name, saved.config["step"], flush=True)

for name in names:
    run, straight = runs / name, runs / f"{name}-straight"
    steps = checkpoint.newest(run)[1].config["step"] + 3
    go(name, run, steps, resume=True)
    go(name, straight, steps, save_every=0)
    (a, one, _), (b, other, _) = checkpoint.newest(run), checkpoint.newest(straight)
    assert a.name == b.name and not list((run / "checkpoints").glob(".unfinished*"))
    for part in checkpoint.TENSORS:
        assert all(
            torch.equal(t, getattr(other, part)[n]) for n, t in getattr(one, part).items()
        ), (name, part)
    print("same bits", name)
