"""selective_scan in torch.compile, torch.export and torch.func: prints differences as JSON.

A program of its own: the checker of types that the tests install would be traced, too.
"""

import json

import torch

from irann.core.scan import selective_scan, step

SHAPES = (3, 40, 19), (3, 40, 19), (19, 5), (3, 40, 5), (3, 40, 5), (19,), (3, 19, 5)
generator = torch.Generator().manual_seed(0)
inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
inputs[1].sigmoid_()
inputs[2] = -0.5 - inputs[2].sigmoid()
u, delta, A, B, C, D, state = inputs


class Layer(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method
        self.A = torch.nn.Parameter(A)

    def forward(self, u, delta, B, C):
        return selective_scan(u, delta, self.A, B, C, D, method=self.method)


def gap(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def gradients(function):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def differences(method):
    def loss(u, delta, A, B, C, D, state):
        y, last = selective_scan(u, delta, A, B, C, D, state=state, method=method)
        return y.sin().sum() + last.cos().sum()

    def one_text(u, delta, B, C, state):
        return loss(u[None], delta[None], A, B[None], C[None], D, state[None])

    torch._dynamo.reset()
    one = u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state
    explained = torch._dynamo.explain(loss)(*inputs), torch._dynamo.explain(step)(*one)
    expected = gradients(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    layer, length = Layer(method), {1: torch.export.Dim("t", min=2, max=4096)}
    program = torch.export.export(layer, (u, delta, B, C), dynamic_shapes=(length,) * 4)
    shorter = [x[:, :23] for x in (u, delta, B, C)]
    per_text = torch.func.vmap(torch.func.grad(one_text))(u, delta, B, C, state)
    return {
        "graph breaks": sum(found.graph_break_count for found in explained),
        "compile": gap(gradients(compiled), expected),
        "export": gap(program.module()(*shorter), layer(*shorter)),
        "func.grad": gap(torch.func.grad(loss, tuple(range(7)))(*inputs), expected),
        "vmap of func.grad": gap([per_text], expected[:1]),
    }


print(json.dumps({method: differences(method) for method in ("auto", "chunked", "parallel")}))
