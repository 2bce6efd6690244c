"""Attention: each query is compared with each key, and values are averaged by how well they fit.

Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2. The causal
mask counts from the end, so that a few new queries can look back over a longer run of cached keys.
"""

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def scores(q: Float[Tensor, "b h t c"], k: Float[Tensor, "b h s c"]) -> Float[Tensor, "b h t s"]:
    """How well each query fits each key: q . k / sqrt(c).

    The division keeps the variance of a score at one when the components of q and k are
    independent, with mean zero and variance one (footnote 4 of the paper).
    """
    return einsum(q, k, "b h t c, b h s c -> b h t s") / math.sqrt(q.shape[-1])


def causal_mask(
    t: int, s: int, device: torch.device | str | None = None
) -> Bool[Tensor, "{t} {s}"]:
    """True where query i may see key j: of s positions, the t queries belong to the last t."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


def attention_weights(
    q: Float[Tensor, "b h t c"], k: Float[Tensor, "b h s c"], *, causal: bool = True
) -> Float[Tensor, "b h t s"]:
    """The softmax of the scores over s: each row sums to one.

    With `causal` that holds for t up to s: a query before the first key sees none, and its row is
    NaN.
    """
    fit = scores(q, k)
    if causal:
        mask = causal_mask(*fit.shape[-2:], device=fit.device)
        fit = fit.masked_fill(~mask, -torch.inf)
    return fit.softmax(-1)


def attention(
    q: Float[Tensor, "b h t c"],
    k: Float[Tensor, "b h s c"],
    v: Float[Tensor, "b h s c"],
    *,
    causal: bool = True,
) -> Float[Tensor, "b h t c"]:
    """The values, averaged with the attention weights (eq. 1 of the paper).

    With `causal`, s may exceed t: the t queries then belong to the last t positions.
    Raises ValueError when the shapes do not belong together.
    """
    _check(q, k, v, causal)
    return einsum(attention_weights(q, k, causal=causal), v, "b h t s, b h s c -> b h t c")


def merge_heads(x: Float[Tensor, "b h t c"]) -> Float[Tensor, "b t d"]:
    """Lay the heads side by side again: d = h c."""
    return rearrange(x, "b h t c -> b t (h c)")


def _check(q, k, v, causal):
    if (
        q.ndim != 4
        or k.shape != v.shape
        or (*k.shape[:2], k.shape[-1]) != (*q.shape[:2], q.shape[-1])
    ):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention wants q (b h t c) and k, v (b h s c); got {got}")
    if causal and q.shape[2] > k.shape[2]:
        t, s = q.shape[2], k.shape[2]
        raise ValueError(f"{t} causal queries cannot belong to the last of only {s} positions")
