"""Under torchrun: one of two processes wants to stop; both do, and go on later as if they never
had, although a newer checkpoint is damaged.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from irann import shakespeare, zoo
from irann.text import Text
from irann.training import evaluate, loop, train
from irann.training.state import State

run = Path(sys.argv[1])
states: list[State] = []


class Kept(State):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        states.append(self)


loop.State = Kept
dist.init_process_group("gloo")
rank = dist.get_rank()
corpus = shakespeare.load()
text = Text(corpus.train[:6000], corpus.val[:1500], corpus.vocabulary)
changes = {"batch": 8, "accumulate": 2, "steps": 5, "evaluate_every": 0, "dropout": 0.3}
config, recipe = zoo.recipe("gpt", "tiny", **changes)
straight = zoo.build("gpt", config)
wanted = list(train(straight, text, recipe))

answers = iter([0, rank])  # only the second process asks for an end
ticks = list(train(zoo.build("gpt", config), text, recipe, run=run, stop=answers.__next__))
assert ticks[-1].step == 2 and ticks[-1].interrupted == 1
assert (ticks[-1].saved is not None) == (rank == 0)
if rank == 0:
    newer = run / "checkpoints" / "step-00000003"
    newer.mkdir()
    (newer / "manifest.json").write_text("{")
dist.barrier()
again = zoo.build("gpt", config, seed=7)
ticks += train(again, text, recipe, run=run, resume=True)
assert [t.loss for t in ticks] == [t.loss for t in wanted]
assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters()))

own = [None, None]
dist.all_gather_object(own, (states[-1].dropout.states["cpu"], [t.loss for t in ticks]))
assert not torch.equal(own[0][0], own[1][0]) and own[0][1] == own[1][1]
alone = evaluate(again, text).nats_per_char  # no other process is needed
assert abs(alone - ticks[-1].validation) < 1e-6
assert (run / "checkpoints" / "skipped-step-00000003").is_dir()
print("as one", flush=True)
dist.destroy_process_group()
