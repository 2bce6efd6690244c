"""Under torchrun: two processes train as one, with the same losses, parts and weights for every
model. If one of them wants to stop both do, and go on later as if they never had, although a newer
checkpoint is damaged; and each draws its own dropout.
"""

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from irann import shakespeare, zoo
from irann.text import Text
from irann.training import evaluate, loop, train
from irann.training.state import State

SPEECH = Text.of("To be, or not to be, that is the question. " * 60)
rank = int(os.environ["RANK"])
warnings.filterwarnings("ignore")


def ticks_of(name):
    changes = {"steps": 3, "batch": 8, "evaluate_every": 0, "window": 16, "dropout": 0.0}
    config, recipe = zoo.recipe(name, "tiny", vocabulary=len(SPEECH.vocabulary), **changes)
    model = zoo.build(name, config).double()
    ticks = list(train(model, SPEECH, recipe))
    losses = {(t.step, part): value for t in ticks for part, value in t.parts.items()}
    losses |= {(t.step, "loss"): t.loss for t in ticks}
    losses |= {(t.step, "norm of the gradient"): t.grad_norm for t in ticks}
    return losses | {"validation": ticks[-1].validation} | model.state_dict()


def gathered(own):
    told = [None, None]
    dist.all_gather_object(told, own)
    return told


def close(ours, alone, what):
    ours, alone = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, alone))
    torch.testing.assert_close(ours, alone, atol=1e-6, rtol=1e-6, msg=lambda text: what + text)


half = {name: ticks_of(name) for name in list(zoo.MODELS)[rank::2]}  # as one process each
dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # one that waits alone ends
first, second = gathered(half)
for name, alone in (first | second).items():
    ours = ticks_of(name)
    assert ours.keys() == alone.keys()
    for what, value in alone.items():
        close(ours[what], value, f"{name}, {what}: ")

states: list[State] = []


class Kept(State):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        states.append(self)


loop.State = Kept
run = Path(sys.argv[1])
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

(first, losses), (second, same) = gathered(
    (states[-1].dropout.states["cpu"], [t.loss for t in ticks])
)
assert not torch.equal(first, second) and losses == same
by_itself = evaluate(again, text).nats_per_char  # no other process is needed
assert abs(by_itself - ticks[-1].validation) < 1e-6
assert (run / "checkpoints" / "skipped-step-00000003").is_dir()
print("as one", flush=True)
dist.destroy_process_group()
