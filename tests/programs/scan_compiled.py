"""selective_scan in torch.compile, torch.export and torch.func: prints one line of JSON.

A program of its own: the checker of types that the tests install would be traced, too.
"""

import json
import sys

import torch

from irann.core.scan import selective_scan, step

method = sys.argv[1]


def draw(b, t, e, n):
    """-> u, delta, A, B, C, D and a state, of float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (b, t, e), (b, t, e), (e, n), (b, t, n), (b, t, n), (e,), (b, e, n)
    u, delta, A, *others = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return [u, delta.sigmoid(), -0.5 - A.sigmoid(), *others]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(A)
        self.D = torch.nn.Parameter(D)

    def forward(self, u, delta, B, C):
        return selective_scan(u, delta, self.A, B, C, self.D, method=method)


def loss(u, delta, A, B, C, D, state):
    y, last = selective_scan(u, delta, A, B, C, D, state=state, method=method)
    return y.sin().sum() + last.cos().sum()


def gradients(function):
    inputs = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(function(*inputs), inputs)


def gap(ours, theirs):
    """-> the largest difference of two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs))


u, delta, A, B, C, D, state = given = draw(3, 40, 19, 5)
reference = gradients(loss)
everything = tuple(range(7))
compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
layer = Layer()
length = torch.export.Dim("t", min=2, max=4096)
shapes = {"u": {1: length}, "delta": {1: length}, "B": {1: length}, "C": {1: length}}
exported = torch.export.export(layer, (u, delta, B, C), dynamic_shapes=shapes).module()
shorter = [x[:, :23] for x in (u, delta, B, C)]
per_text = torch.func.vmap(
    torch.func.grad(lambda *v: loss(*(x[None] for x in v[:2]), A, *(x[None] for x in v[2:4]), D, v[4][None]))
)
print(
    json.dumps(
        {
            "breaks": torch._dynamo.explain(loss)(*given).graph_break_count,
            "breaks of a step": torch._dynamo.explain(step)(
                u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state
            ).graph_break_count,
            "compiled": gap(gradients(compiled), reference),
            "exported": gap(exported(*shorter), layer(*shorter)),
            "func": gap(torch.func.grad(loss, everything)(*given), reference),
            "vmap": gap([per_text(u, delta, B, C, state)], reference[:1]),
        }
    )
)
