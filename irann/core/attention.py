"""Attention: each place asks, every earlier place answers, and the answers are averaged by how well they fit.

Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2. The causal mask counts from
the end, so that a short run of new queries can look back over a longer run of remembered keys.
"""

import math

import torch
from einops import einsum, rearrange
from torch import Tensor


def scores(q: Tensor, k: Tensor) -> Tensor:
    """(b h t c), (b h s c) -> (b h t s): how well each question fits each key.

    The division by sqrt(c) keeps the variance of a score at one when q and k have unit variance (eq. 1 of the paper).
    """
    return einsum(q, k, "b h t c, b h s c -> b h t s") / math.sqrt(q.shape[-1])


def causal_mask(t: int, s: int, device=None) -> Tensor:
    """-> (t s) of bool: True where new place i of t may look at place j of s; the last new place is the last place."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


def weights(q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """(b h t c), (b h s c) -> (b h t s): the scores as shares, each row sums to one."""
    fit = scores(q, k)
    if causal:
        fit = fit.masked_fill(~causal_mask(*fit.shape[-2:], device=fit.device), -torch.inf)
    return fit.softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """(b h t c), (b h s c), (b h s c) -> (b h t c): the weighted mean of the values.

    With `causal`, s may exceed t: the t questions then belong to the last t places (eq. 1 of the paper).
    Raises ValueError when the shapes do not belong together.
    """
    _check(q, k, v, causal)
    return einsum(weights(q, k, causal=causal), v, "b h t s, b h s c -> b h t c")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b t (h c)) -> (b h t c): cut the width into heads. Raises ValueError for a width that they cannot share equally."""
    if x.shape[-1] % heads:
        raise ValueError(f"a width of {x.shape[-1]} cannot be cut into {heads} equal heads")
    return rearrange(x, "b t (h c) -> b h t c", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(b h t c) -> (b t (h c)): lay the heads side by side again."""
    return rearrange(x, "b h t c -> b t (h c)")


def _check(q, k, v, causal):
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention wants q (b h t c) and k, v (b h s c); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} causal questions cannot belong to the last of only {k.shape[2]} places")
