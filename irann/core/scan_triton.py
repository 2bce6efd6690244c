"""The selective scan of scan.py on a GPU, in Triton: the same equations, the same names, the states in registers.

    h_t = 2^(delta_t A2) h_{t-1} + (delta_t u_t) B_t,    y_t = sum_n C_t h_t,    A2 = A log2(e)

One program is one text and CHANNELS channels; it walks through time, for there are texts and channels enough to fill a GPU.
B_t and C_t are read once for all its channels. Only the state at the entry of every SPAN places is kept; backward computes
the states of one such span anew, notes them in `notes`, and walks the span from the right. What all channels add to dB and
dC is written apart by each program and summed afterwards, so that the same input gives the same bits.

Layouts as in scan.c, last axis fastest: u, delta, y (b t e); A2 (n e); B, C (b t n); entry (b k n e), k entries and the end.
This file is imported where there is a GPU; with TRITON_INTERPRET=1 it runs without one, slowly, to be tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, SPAN = 32, 16


@triton.jit
def _forward(u, delta, A2, B, C, y, entry, t, e, n, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr):
    text, spans = tl.program_id(1).to(tl.int64), tl.cdiv(t, S)
    channel, state = tl.program_id(0) * E + tl.arange(0, E), tl.arange(0, N)
    real, mine = state < n, channel < e
    grid, here = state[:, None] * e + channel[None, :], real[:, None] & mine[None, :]
    a2 = tl.load(A2 + grid, mask=here, other=0.0)
    u, delta, y, B, C = u + text * t * e, delta + text * t * e, y + text * t * e, B + text * t * n, C + text * t * n
    entry += text * (spans + 1) * n * e
    h = tl.load(entry + grid, mask=here, other=0.0)
    for k in range(spans):
        tl.store(entry + k * n * e + grid, h, mask=here)
        for i in range(k * S, min(t, k * S + S)):
            pace, x = tl.load(delta + i * e + channel, mask=mine, other=0.0), tl.load(u + i * e + channel, mask=mine, other=0.0)
            b, c = tl.load(B + i * n + state, mask=real, other=0.0), tl.load(C + i * n + state, mask=real, other=0.0)
            h = tl.exp2(pace[None, :] * a2) * h + (pace * x)[None, :] * b[:, None]
            tl.store(y + i * e + channel, tl.sum(h * c[:, None], 0), mask=mine)
    tl.store(entry + spans * n * e + grid, h, mask=here)


@triton.jit
def _backward(
    dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC, notes, t, e, n, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    part, text, spans = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cdiv(t, S)
    channel, state = part * E + tl.arange(0, E), tl.arange(0, N)
    real, mine = state < n, channel < e
    grid, here = state[:, None] * e + channel[None, :], real[:, None] & mine[None, :]
    a2 = tl.load(A2 + grid, mask=here, other=0.0)
    dy, u, delta = dy + text * t * e, u + text * t * e, delta + text * t * e
    du, ddelta, B, C = du + text * t * e, ddelta + text * t * e, B + text * t * n, C + text * t * n
    share = text * tl.num_programs(0) + part
    dB, dC, notes = dB + share * t * n, dC + share * t * n, notes + share * S * N * E
    entry += text * (spans + 1) * n * e
    page = state[:, None] * E + tl.arange(0, E)[None, :]
    g_next = tl.load(carry + text * n * e + grid, mask=here, other=0.0)  # a_{t+1} g_{t+1}
    da = tl.zeros_like(a2)
    for back in range(spans):
        k = spans - 1 - back
        end = min(t, k * S + S)
        h = tl.load(entry + k * n * e + grid, mask=here, other=0.0)
        for i in range(k * S, end):
            tl.store(notes + (i - k * S) * N * E + page, h)
            pace, x = tl.load(delta + i * e + channel, mask=mine, other=0.0), tl.load(u + i * e + channel, mask=mine, other=0.0)
            b, slope = tl.load(B + i * n + state, mask=real, other=0.0), tl.load(dy + i * e + channel, mask=mine, other=0.0)
            h = tl.exp2(pace[None, :] * a2) * h + (pace * x)[None, :] * b[:, None]
            tl.store(dC + i * n + state, tl.sum(h * slope[None, :], 1), mask=real)
        tl.debug_barrier()
        for j in range(end - k * S):
            i = end - 1 - j
            pace, x = tl.load(delta + i * e + channel, mask=mine, other=0.0), tl.load(u + i * e + channel, mask=mine, other=0.0)
            b, c = tl.load(B + i * n + state, mask=real, other=0.0), tl.load(C + i * n + state, mask=real, other=0.0)
            slope = tl.load(dy + i * e + channel, mask=mine, other=0.0)
            g = slope[None, :] * c[:, None] + g_next
            tl.store(dB + i * n + state, tl.sum(g * (pace * x)[None, :], 1), mask=real)
            dx = tl.sum(g * b[:, None], 0)
            g_next = tl.exp2(pace[None, :] * a2) * g
            decay = g_next * tl.load(notes + (i - k * S) * N * E + page)  # the gradient of delta A
            da += decay * pace[None, :]
            tl.store(du + i * e + channel, dx * pace, mask=mine)
            tl.store(ddelta + i * e + channel, dx * x + tl.sum(decay * a2, 0) * 0.6931471805599453, mask=mine)  # ln 2: A2 is A log2(e)
        tl.debug_barrier()
    tl.store(carry + text * n * e + grid, g_next, mask=here)
    tl.store(dA + text * n * e + grid, da, mask=here)


def forward(u: Tensor, delta: Tensor, A2: Tensor, B: Tensor, C: Tensor, y: Tensor, entry: Tensor) -> None:
    """(b t e), (b t e), (n e), (b t n), (b t n): fill y (b t e), and entry (b k n e) from its first state on."""
    (b, t, e), n = u.shape, len(A2)
    sizes = triton.next_power_of_2(n), CHANNELS, SPAN
    with _on(u):
        _forward[(parts(e), b)](u, delta, A2, B, C, y, entry, t, e, n, *sizes, num_warps=1)


def backward(dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC) -> None:
    """Of dy (b t e) and what `forward` had: fill du, ddelta (b t e), dA (b n e) and dB, dC (b parts t n); carry (b n e) is
    the end state's gradient, then the first's."""
    (b, t, e), n = u.shape, len(A2)
    sizes = triton.next_power_of_2(n), CHANNELS, SPAN
    notes = u.new_empty(b * parts(e) * SPAN * sizes[0] * CHANNELS)
    with _on(u):
        _backward[(parts(e), b)](dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC, notes, t, e, n, *sizes, num_warps=1)


def parts(e: int) -> int:
    """-> how many programs share the channels of one text."""
    return -(-e // CHANNELS)


def _on(u: Tensor):
    return torch.cuda.device(u.device if u.device.type == "cuda" else -1)
