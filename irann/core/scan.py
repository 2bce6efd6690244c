"""The selective scan: a hidden state of fixed size that each character decides how to rewrite.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t        y_t = C_t . h_t + D u_t

Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3 and algorithm 2. `delta`, `B` and `C`
come from the text itself: no fixed convolution can stand in for the recurrence, and it needs a
scan.

The same numbers come in several ways, `method`:

| method     | how                                                 | depth in t |
|------------|-----------------------------------------------------|------------|
| sequential | the loop as written, differentiated by autograd     | t          |
| parallel   | the tree of tree.py over all of t                   | 2 log2 t   |
| chunked    | time outermost, all else in one row, chunk by chunk | t          |
| native     | the loop in C, the state in registers               | t          |
| triton     | for CUDA: the loop, in stretches if GPUs need more  | t or less  |
| auto       | on a CPU native, else chunked; on a GPU triton, else chunked, by trees |

A tree composes twice as often as the loop, and has (b t e n) numbers of all positions in memory. On
a CPU the loop wins at every length: b, e and n alone keep the arithmetic busy. All but `sequential`
live in `irann.kernels`, with a backward derived by hand that keeps the inputs and one state per
chunk, and computes the (b t e n) states anew.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .. import kernels
from .tree import tree as tree

SCAN_AXES = dict(u="b t e", delta="b t e", A="e n", B="b t n", C="b t n", D="e", state="b e n")
STEP_AXES = dict(u="b e", delta="b e", A="e n", B="b n", C="b n", D="e", state="b e n")
METHODS = ("auto", "sequential", "parallel", "chunked", "native", "triton")


def discretise(
    u: Float[Tensor, "b t e"],
    delta: Float[Tensor, "b t e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b t n"],
) -> tuple[Float[Tensor, "b t e n"], Float[Tensor, "b t e n"]]:
    """What each position keeps of the state, exp(delta A), and what it adds, delta u B.

    The paper holds the input constant over a step (zero-order hold, eq. 4): keep exp(delta A), add
    (exp(delta A) - 1) / A B u. The published code, and we with it, keep that for A and take the
    Euler step delta B u for what is added; the two agree to first order in delta. Raises ValueError
    when the shapes do not belong together.
    """
    _check(u, delta, A, B)
    keep = torch.exp(einsum(delta, A, "b t e, e n -> b t e n"))
    add = einsum(delta * u, B, "b t e, b t n -> b t e n")
    return keep, add


def step(
    u: Float[Tensor, "b e"],
    delta: Float[Tensor, "b e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    D: Float[Tensor, " e"] | None,
    state: Float[Tensor, "b e n"],
) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e n"]]:
    """One position of the recurrence, for writing -> y in u's dtype and the next state in its own.

    u, delta, A, B and C are of one dtype. Raises ValueError when the shapes do not belong
    together.
    """
    if state is None:
        raise ValueError("a step wants a state (b e n)")
    # By hand, in a quarter of the time that the general check takes: this runs at each character.
    fits = u.ndim == A.ndim == 2
    if fits:
        b, e = u.shape
        n = A.shape[1]
        fits = delta.shape == (b, e) and A.shape == (e, n) and B.shape == C.shape == (b, n)
        fits = fits and state.shape == (b, e, n) and (D is None or D.shape == (e,))
    if not fits:
        raise ValueError(_misfit(STEP_AXES, u, delta, A, B, C, D, state))
    dtype = u.dtype
    if dtype != state.dtype:
        u, delta, A, B, C = (x.to(state.dtype) for x in (u, delta, A, B, C))
    kept = torch.exp(delta.unsqueeze(2) * A) * state
    state = torch.addcmul(kept, (delta * u).unsqueeze(2), B.unsqueeze(1))
    y = torch.bmm(state, C.unsqueeze(2)).squeeze(2)
    return (y if D is None else torch.addcmul(y, D.to(y.dtype), u)).to(dtype), state


def sequential(
    u: Float[Tensor, "b t e"],
    delta: Float[Tensor, "b t e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    state: Float[Tensor, "b e n"],
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e n"]]:
    """The loop as written -> y without D u, and the last state."""
    keep, add = discretise(u, delta, A, B)
    outputs = [torch.zeros_like(u[:, :0])]
    # Backward of an index for every position would be quadratic in t; unbind's is not.
    for keep_t, add_t, C_t in zip(keep.unbind(1), add.unbind(1), C.unbind(1)):
        state = keep_t * state + add_t
        outputs.append(einsum(state, C_t, "b e n, b n -> b e").unsqueeze(1))
    return torch.cat(outputs, 1), state


def selective_scan(
    u: Float[Tensor, "b t e"],
    delta: Float[Tensor, "b t e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " e"] | None = None,
    *,
    state: Float[Tensor, "b e n"] | None = None,
    method: str = "auto",
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e n"]]:
    """-> y, and the state after the last position.

    A scan of one half, and of the other from the state it left, is the scan of the whole.
    Everything is differentiable once, the state too. The table of methods is at the top of this
    file. Half precision in gives half precision out, but keeps its state in float32. Raises
    ValueError when the shapes do not belong together or a method is not to be had.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}")
    _check(u, delta, A, B, C, D, state)
    dtype = u.dtype
    for other in (delta, A, B, C, D):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    # Half precision would lose the state within a hundred positions.
    exact = torch.float32 if dtype.itemsize < 4 else dtype
    u, delta, A, B, C = (x.to(exact) for x in (u, delta, A, B, C))
    state = u.new_zeros(u.shape[0], *A.shape) if state is None else state.to(exact)
    if method == "sequential" or u.numel() == 0 or B.numel() == 0:
        y, state = sequential(u, delta, A, B, C, state)
    else:
        y, state = kernels.scan(method, u, delta, A, B, C, state)
    return (y if D is None else torch.addcmul(y, D.to(exact), u)).to(dtype), state


def _check(u, *others):
    """Raise ValueError unless all have the axes of `SCAN_AXES`, real numbers, and one device."""
    if misfit := _misfit(SCAN_AXES, u, *others):
        raise ValueError(misfit)
    for name, x in zip(SCAN_AXES, (u, *others)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} should hold real numbers; got {x.dtype}")
        if x is not None and x.device != u.device:
            raise ValueError(
                f"{name} is on {x.device} and u on {u.device}; the scan wants one device"
            )


def _misfit(axes, *tensors):
    """-> the first tensor that lacks the axes of its letters, each of one size, in words; or ""."""
    sizes = {}
    for (name, letters), x in zip(axes.items(), tensors):
        if x is None:
            continue
        letters = letters.split()
        fits = x.ndim == len(letters)
        for axis, size in zip(letters, x.shape):
            fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            wanted = ", ".join(f"{axis} {sizes.get(axis, '')}".strip() for axis in letters)
            return f"{name} should be ({wanted}); got {tuple(x.shape)}"
    return ""
