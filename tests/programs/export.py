"""torch.export of models that read from left to right: it works, and leaves the models of this
process as they were.
"""

import torch

import irann
from irann import zoo
from irann.lm import Reader
from irann.settings import InputError


class Fixed(torch.nn.Module):
    """A thinker with as many rounds for every text."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.read(ids, stop="fixed")[0]


ids = torch.zeros(1, 12, dtype=torch.long)
for name, entry in zoo.MODELS.items():
    model = zoo.build(name, zoo.recipe(name, "tiny")[0]).eval()
    if name == "thinker":  # whose rounds depend on the text
        try:
            torch.export.export(model, (ids,))
        except InputError as error:
            assert "export cannot follow it" in str(error)
        model = Fixed(model)
    if not issubclass(entry.model, Reader):
        continue
    exported = torch.export.export(model, (ids,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(ids), model(ids), atol=1e-5, rtol=1e-5)
        other = zoo.build(name, zoo.recipe(name, "tiny")[0]).eval()
        other = Fixed(other) if name == "thinker" else other
        assert torch.equal(other(ids), model(ids))

model = zoo.build("mamba", zoo.recipe("mamba", "tiny")[0])
weights = {n: p.detach() for n, p in model.named_parameters()}
batch = torch.randint(65, (2, 33), generator=torch.Generator().manual_seed(0))


def loss(parameters):
    logits = torch.func.functional_call(model, parameters, (batch[:, :-1],))
    return irann.lm.cross_entropy(logits, batch[:, 1:]).mean()


slopes = torch.func.grad(loss)(weights)
model.loss(batch)[0].backward()
for name, p in model.named_parameters():
    torch.testing.assert_close(slopes[name], p.grad, atol=1e-5, rtol=1e-4)
