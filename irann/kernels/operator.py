"""A scan as two operators of torch, `irann::NAME` and `irann::NAME_backward`.

torch.compile, torch.export and torch.func then see one call and need not look inside: they know its
shapes from a rule, and its gradient is another such call. `torch.library.custom_op` says the same
in fewer lines, but costs 60 microseconds a call, 12 % of a small scan, and refuses torch.func.grad;
this costs 15. A scan differentiates once.

All scans have one signature here. Shapes are those of `irann.core.scan`; `entry` holds the state at
the entry of each of k spans, (b k n e), flat, since k may be unknown while exporting; `options` are
whole numbers. What a kernel returns is new memory, contiguous.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

try:  # private parts of torch: what an autograd kernel is to use
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction as Function
except ImportError:  # of another torch: its public part does the same, but refuses torch.func
    from contextlib import nullcontext as enable_single_level_autograd_function

    from torch.autograd import Function

LOG2E = 1 / math.log(2)  # exp(x) = exp2(x log2 e), and exp2 is the cheaper one
LIBRARY = torch.library.Library("irann", "FRAGMENT")
INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C"
ONCE = "this scan can be differentiated once; method='sequential' can be differentiated again"

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def operator(
    name: str,
    forward: Forward,
    backward: Backward,
    spans: Callable[..., int],
    *,
    options: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("CPU", "CUDA"),
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Register two functions -> the operator.

    forward(u, delta, A, B, C, state, *options) -> y, last, entry
    backward(dy, dlast, u, delta, A, B, C, entry, *options) -> du, ddelta, dA, dB, dC, dstate
    spans(u, *options) -> how many states `entry` holds
    """
    numbers = "".join(f", SymInt {option}" for option in options)
    LIBRARY.define(
        f"{name}({INPUTS}, Tensor state{numbers}) -> (Tensor y, Tensor last, Tensor entry)"
    )
    LIBRARY.define(
        f"{name}_backward(Tensor dy, Tensor dlast, {INPUTS}, Tensor entry{numbers})"
        " -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dstate)"
    )
    forward_op = getattr(torch.ops.irann, name).default
    backward_op = getattr(torch.ops.irann, f"{name}_backward").default

    class Scan(Function):  # pyright: ignore[reportGeneralTypeIssues]
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                y, last, entry = forward_op(*inputs)
            ctx.save_for_backward(*inputs[:5], entry)
            ctx.state_shape = inputs[5].shape
            ctx.numbers = inputs[6:]
            ctx.mark_non_differentiable(entry)
            ctx.set_materialize_grads(False)
            return y, last, entry

        @staticmethod
        def backward(ctx, *gradients):
            dy, dlast, _ = gradients
            u, delta, A, B, C, entry = ctx.saved_tensors
            dy = torch.zeros_like(u) if dy is None else dy
            dlast = u.new_zeros(ctx.state_shape) if dlast is None else dlast
            inputs = backward_op(dy, dlast, u, delta, A, B, C, entry, *ctx.numbers)
            return *inputs, *(None for _ in ctx.numbers)

    class Once(Function):  # pyright: ignore[reportGeneralTypeIssues]
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return backward_op(*inputs)

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(ONCE)

    def fake_forward(u, delta, A, B, C, state, *numbers):
        b, e, n = state.shape
        kept = b * spans(u, *numbers) * n * e
        return u.new_empty(u.shape), u.new_empty(b, e, n), u.new_empty(kept)

    for device in devices:
        LIBRARY.impl(name, forward, device)
        LIBRARY.impl(f"{name}_backward", backward, device)
    LIBRARY.impl(name, _differentiable(Scan, forward_op), "Autograd")
    LIBRARY.impl(f"{name}_backward", _differentiable(Once, backward_op), "Autograd")
    torch.library.register_fake(f"irann::{name}", fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"irann::{name}_backward", _fake_backward, lib=LIBRARY)
    return forward_op


def _differentiable(function, operation):
    """-> a call of the function of autograd or, without gradients, of what it wraps."""

    def call(*inputs):
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return operation(*inputs)
        with enable_single_level_autograd_function():
            return function.apply(*inputs)

    return call


def _fake_backward(dy, dlast, u, delta, A, B, C, entry, *numbers):
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C, dlast))
