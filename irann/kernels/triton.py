"""The selective scan on a GPU, in Triton: one loop over time, the states in registers.

    h_t = 2^(delta_t A2) h_{t-1} + (delta_t u_t) B_t,    y_t = sum_n C_t h_t,    A2 = A log2(e)

One program is one text and CHANNELS channels; it walks through time, for there are texts and
channels enough to fill a GPU. B_t and C_t are read once for all its channels. Only the state at the
entry of every SPAN positions is kept; backward computes the states of one such span anew, stores
them in `notes`, and walks the span from the right. What all channels add to dB and dC is written
apart by each program and summed afterwards, so that the same input gives the same bits.

Layouts as in scan.c, last axis fastest: u, delta, y (b t e); A2 (n e); B, C (b t n); state, last
(b n e); entry (b k n e). This file is imported where there is a GPU; with TRITON_INTERPRET=1 it
runs without one, slowly, to be tested.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (what stands under triton.jit is read by Triton)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .operator import operator

CHANNELS = 32
SPAN = 16
LOG2E = 1 / math.log(2)


@triton.jit
def _forward(
    u, delta, A2, B, C, state, y, last, entry, t, e, n,
    N: tl.constexpr, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    text = tl.program_id(1).to(tl.int64)
    spans = tl.cdiv(t, S)
    channel = tl.program_id(0) * E + tl.arange(0, E)
    lane = tl.arange(0, N)
    in_n = lane < n
    in_e = channel < e
    grid = lane[:, None] * e + channel[None, :]
    inside = in_n[:, None] & in_e[None, :]
    a2 = tl.load(A2 + grid, mask=inside, other=0.0)
    u += text * t * e
    delta += text * t * e
    y += text * t * e
    B += text * t * n
    C += text * t * n
    entry += text * spans * n * e
    h = tl.load(state + text * n * e + grid, mask=inside, other=0.0)
    for k in range(spans):
        tl.store(entry + k * n * e + grid, h, mask=inside)
        for i in range(k * S, min(t, k * S + S)):
            step = tl.load(delta + i * e + channel, mask=in_e, other=0.0)
            x = tl.load(u + i * e + channel, mask=in_e, other=0.0)
            b = tl.load(B + i * n + lane, mask=in_n, other=0.0)
            c = tl.load(C + i * n + lane, mask=in_n, other=0.0)
            h = tl.exp2(step[None, :] * a2) * h + (step * x)[None, :] * b[:, None]
            tl.store(y + i * e + channel, tl.sum(h * c[:, None], 0), mask=in_e)
    tl.store(last + text * n * e + grid, h, mask=inside)


@triton.jit
def _backward(
    dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC, notes, t, e, n,
    N: tl.constexpr, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0)
    text = tl.program_id(1).to(tl.int64)
    spans = tl.cdiv(t, S)
    channel = part * E + tl.arange(0, E)
    lane = tl.arange(0, N)
    in_n = lane < n
    in_e = channel < e
    grid = lane[:, None] * e + channel[None, :]
    inside = in_n[:, None] & in_e[None, :]
    a2 = tl.load(A2 + grid, mask=inside, other=0.0)
    dy += text * t * e
    u += text * t * e
    delta += text * t * e
    du += text * t * e
    ddelta += text * t * e
    B += text * t * n
    C += text * t * n
    program = text * tl.num_programs(0) + part
    dB += program * t * n
    dC += program * t * n
    notes += program * S * N * E
    entry += text * spans * n * e
    page = lane[:, None] * E + tl.arange(0, E)[None, :]
    g_next = tl.load(carry + text * n * e + grid, mask=inside, other=0.0)  # a_{t+1} g_{t+1}
    da = tl.zeros_like(a2)
    for back in range(spans):
        k = spans - 1 - back
        end = min(t, k * S + S)
        h = tl.load(entry + k * n * e + grid, mask=inside, other=0.0)
        for i in range(k * S, end):
            tl.store(notes + (i - k * S) * N * E + page, h)
            step = tl.load(delta + i * e + channel, mask=in_e, other=0.0)
            x = tl.load(u + i * e + channel, mask=in_e, other=0.0)
            b = tl.load(B + i * n + lane, mask=in_n, other=0.0)
            slope = tl.load(dy + i * e + channel, mask=in_e, other=0.0)
            h = tl.exp2(step[None, :] * a2) * h + (step * x)[None, :] * b[:, None]
            tl.store(dC + i * n + lane, tl.sum(h * slope[None, :], 1), mask=in_n)
        tl.debug_barrier()
        for j in range(end - k * S):
            i = end - 1 - j
            step = tl.load(delta + i * e + channel, mask=in_e, other=0.0)
            x = tl.load(u + i * e + channel, mask=in_e, other=0.0)
            b = tl.load(B + i * n + lane, mask=in_n, other=0.0)
            c = tl.load(C + i * n + lane, mask=in_n, other=0.0)
            slope = tl.load(dy + i * e + channel, mask=in_e, other=0.0)
            g = slope[None, :] * c[:, None] + g_next
            tl.store(dB + i * n + lane, tl.sum(g * (step * x)[None, :], 1), mask=in_n)
            dx = tl.sum(g * b[:, None], 0)
            g_next = tl.exp2(step[None, :] * a2) * g
            decay = g_next * tl.load(notes + (i - k * S) * N * E + page)  # the gradient of delta A
            da += decay * step[None, :]
            tl.store(du + i * e + channel, dx * step, mask=in_e)
            slope = dx * x + tl.sum(decay * a2, 0) * 0.6931471805599453  # ln 2: A2 is A log2(e)
            tl.store(ddelta + i * e + channel, slope, mask=in_e)
        tl.debug_barrier()
    tl.store(carry + text * n * e + grid, g_next, mask=inside)
    tl.store(dA + text * n * e + grid, da, mask=inside)


def scan(
    u: Float[Tensor, "b t e"],
    delta: Float[Tensor, "b t e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    state: Float[Tensor, "b e n"],
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e n"]]:
    """y without D u, and the last state."""
    inputs = (x.contiguous() for x in (u, delta, A, B, C, state))
    y, last, _ = SCAN(*inputs)
    return y, last


def _spans(u):
    return -(-u.shape[1] // SPAN)


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    b, e, n = state.shape
    u, delta, A2, B, C, state = (x.contiguous() for x in (u, delta, A.T * LOG2E, B, C, state.mT))
    y = u.new_empty(u.shape)
    last = u.new_empty(b, n, e)
    entry = u.new_empty(b * _spans(u) * n * e)
    with _on(u):
        _forward[(_parts(e), b)](
            u, delta, A2, B, C, state, y, last, entry, u.shape[1], e, n, *_sizes(n), num_warps=1
        )
    return y, last.mT.contiguous(), entry


def _scan_backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entry: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, t, e = u.shape
    n = A.shape[1]
    dy, u, delta, B, C, entry = (x.contiguous() for x in (dy, u, delta, B, C, entry))
    A2 = (A.T * LOG2E).contiguous()
    carry = dlast.mT.clone(memory_format=torch.contiguous_format)
    du = u.new_empty(u.shape)
    ddelta = u.new_empty(u.shape)
    dA = u.new_empty(b, n, e)
    dB = u.new_empty(b, _parts(e), t, n)
    dC = u.new_empty(b, _parts(e), t, n)
    notes = u.new_empty(b * _parts(e) * SPAN * triton.next_power_of_2(n) * CHANNELS)
    gradients = carry, du, ddelta, dA, dB, dC
    with _on(u):
        _backward[(_parts(e), b)](
            dy, u, delta, A2, B, C, entry, *gradients, notes, t, e, n, *_sizes(n), num_warps=1
        )
    return du, ddelta, dA.sum(0).T.contiguous(), dB.sum(1), dC.sum(1), carry.mT.contiguous()


def _sizes(n):
    return triton.next_power_of_2(n), CHANNELS, SPAN


def _parts(e):
    """-> how many programs share the channels of one text."""
    return -(-e // CHANNELS)


def _on(u):
    return torch.cuda.device(u.device if u.device.type == "cuda" else -1)


SCAN = operator("triton", _scan, _scan_backward, _spans)
