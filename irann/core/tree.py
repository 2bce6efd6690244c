"""A parallel prefix (associative) scan: a recurrence as a tree, 2 log2 t steps deep instead of t.

Source: Brent and Kung 1982, "A Regular Layout for Parallel Adders" (Blelloch 1990, "Prefix Sums and
Their Applications", has it exclusive); for the selective scan, Gu and Dao 2023 (arXiv 2312.00752),
section 3.3.
"""

from jaxtyping import Float
from torch import Tensor


def tree(a: Float[Tensor, "t ..."], x: Float[Tensor, "t ..."]) -> None:
    """h_t = a_t h_{t-1} + x_t along the first axis, in place: x becomes h.

    The work-efficient tree. A position is the map h -> a h + x, and maps compose:
    (a1, x1) then (a2, x2) is (a1 a2, a2 x1 + x2). Composition is associative, so any bracketing
    will do. Only products of a enter, never quotients or logarithms: nothing overflows.
    """
    a = a.clone()
    t = len(a)
    stride = 1
    while stride < t:  # up: pairs, fours, ...; the end of a pair takes in its first half
        first = slice(stride - 1, t - stride, 2 * stride)
        second = slice(2 * stride - 1, t, 2 * stride)
        x[second].addcmul_(a[second], x[first])
        a[second] *= a[first]
        stride *= 2
    while stride > 1:  # down: a position takes in the finished one before it
        stride //= 2
        finished = slice(2 * stride - 1, t - stride, 2 * stride)
        between = slice(3 * stride - 1, t, 2 * stride)
        x[between].addcmul_(a[between], x[finished])
