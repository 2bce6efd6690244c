"""A training step of every model, compiled: few graph breaks, and the numbers of the step that is
not.

GPT goes all the way to C++; of the others, whose C++ takes minutes to build, the traced graphs are
run as they are.
"""

import copy
import warnings

import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters

from irann import zoo
from irann.lm import Reader

warnings.filterwarnings("ignore")
torch._inductor.config.cpp.vec_isa_ok = False  # to ask what vectors there are takes g++ long
for name in zoo.MODELS:
    sizes = zoo.MODELS[name].recipes["tiny"][0].settings()
    less = {"rounds": 2} if "rounds" in sizes else {"layers": 1} if "layers" in sizes else {}
    config, _ = zoo.recipe(name, "tiny", window=16, **less)
    model = zoo.build(name, config).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    batch = torch.randint(65, (4, 17), generator=generator)
    draws = model.draw(batch, generator=generator)

    torch._dynamo.reset()
    counters.clear()
    twin = copy.deepcopy(model)
    backend = "inductor" if name == "gpt" else "aot_eager"
    loss, _ = torch.compile(twin.loss, backend=backend)(batch, draws)
    breaks = counters["graph_break"]
    straight = isinstance(model, Reader) and not model.settings
    assert breaks.total() <= (0 if straight else 2), (name, breaks)
    loss.backward()
    wanted, _ = model.loss(batch, draws)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=2e-5, rtol=1e-5)
    for (n, p), ours in zip(model.named_parameters(), twin.parameters(), strict=True):
        largest = max(1.0, p.grad.abs().max().item())
        torch.testing.assert_close(ours.grad, p.grad, atol=1e-4 * largest, rtol=0, msg=n)
    print(name, breaks.total(), loss.item())
