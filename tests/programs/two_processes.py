"""Two processes train as one: the same losses, parts and weights for every model, without
dropout.
"""

import os
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from irann import zoo
from irann.text import Text
from irann.training import train

LETTERS = "To be, or not to be, that is the question. " * 60


def ticks_of(name):
    text = Text.of(LETTERS)
    changes = {"steps": 3, "batch": 8, "evaluate_every": 0, "window": 16, "dropout": 0.0}
    config, recipe = zoo.recipe(name, "tiny", vocabulary=len(text.vocabulary), **changes)
    model = zoo.build(name, config).double()
    ticks = list(train(model, text, recipe))
    return [(t.loss, t.parts, t.grad_norm) for t in ticks], ticks[-1].validation, model.state_dict()


def process(rank, world, store, out):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save([ticks_of(name) for name in zoo.MODELS], f"{out}-{rank}")
    dist.destroy_process_group()


def close(a, b, what):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=lambda text: f"{what}: {text}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        mp.spawn(process, (2, os.path.join(folder, "store"), out), nprocs=2)
        both = [torch.load(f"{out}-{rank}", weights_only=True) for rank in (0, 1)]
    for name, first, second in zip(zoo.MODELS, *both, strict=True):
        alone = ticks_of(name)
        for other in (first, second):
            for (loss, parts, norm), (loss_2, parts_2, norm_2) in zip(
                alone[0], other[0], strict=True
            ):
                close(loss, loss_2, f"{name}: loss")
                close(norm, norm_2, f"{name}: norm of the gradient")
                assert parts.keys() == parts_2.keys()
                for part in parts:
                    close(parts[part], parts_2[part], f"{name}: {part}")
            close(alone[1], other[1], f"{name}: validation")
            for key, weight in alone[2].items():
                close(weight, other[2][key], f"{name}: {key}")
    sys.exit(0)
