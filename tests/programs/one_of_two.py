"""Under torchrun: what two processes train, and measure, and where they go on; each rank writes what it saw."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from irann import shakespeare, zoo
from irann.text import Text
from irann.training import train

folder, names = Path(sys.argv[1]), sys.argv[2:]
dist.init_process_group("gloo")
corpus = shakespeare.load()
text = Text(corpus.train[:6000], corpus.val[:700], corpus.vocabulary)
seen = {}
for name in names:
    config, recipe = zoo.recipe(name, "tiny", batch=8, accumulate=2, steps=3, evaluate_every=0)
    run = folder / name
    model = zoo.build(name, config)
    answers = iter([0, dist.get_rank(), 0])  # only the second process asks for an end
    ticks = list(train(model, text, recipe, run=run, stop=answers.__next__))
    tick = ticks[-1]
    assert tick.step == 2 and tick.interrupted == 1
    again = zoo.build(name, config, seed=1)
    ticks += train(again, text, recipe, run=run, resume=True)
    total = sum(p.detach().double().abs().sum().item() for p in again.parameters())
    seen[name] = {
        "ticks": [[t.loss, t.gradient, t.parts] for t in ticks],
        "validation": ticks[-1].validation,
        "weights": total,
    }
(folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))
dist.destroy_process_group()
