"""The selective scan in Triton, on a GPU: parallel in texts, channels, time; states in registers.

    h_t = 2^(delta_t A2) h_{t-1} + (delta_t u_t) B_t,    y_t = sum_n C_t h_t,    A2 = A log2(e)

One program is one stretch of one text and CHANNELS channels; it walks through its stretch. Where
texts and channels do not fill a GPU, a text is cut into several stretches: `_ends` walks all of
them at once, each from a state of zero; `_join` hands the states on from stretch to stretch, for
which the sum of delta over a stretch is enough, 2^(A2 sum delta) being the product of its decays;
then all stretches are walked at once again, from their true states. Backward does the same from the
right.

B_t and C_t are read once for all channels of a program. Only the state at the entry of every SPAN
positions is kept; backward computes the states of one such span anew, stores them in `notes`, and
walks the span from the right. What all channels add to dB and dC is written apart by each program
and summed afterwards, so that the same input gives the same bits.

Layouts as in scan.c, last axis fastest: u, delta, y (b t e); A2 (n e); B, C (b t n); last (b n e);
state and carry (b s n e), s stretches; entry (b k n e), k spans. This file is imported where there
is a GPU; with TRITON_INTERPRET=1 it runs without one, slowly, to be tested.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (what stands under triton.jit is read by Triton)

import torch
import triton
import triton.language as tl

from .operator import LOG2E, operator

CHANNELS = 32
SPAN = 16
FILL = 2048  # programs that keep a GPU busy
SHORTEST = 4  # spans of a stretch: below, walking twice costs more than it gains


@triton.jit
def _tile(A2, e, n, N: tl.constexpr, E: tl.constexpr):
    """Which states are this program's: channels and lanes, which of them exist, where, and A2."""
    channel = tl.program_id(0) * E + tl.arange(0, E)
    lane = tl.arange(0, N)
    in_e = channel < e
    in_n = lane < n
    grid = lane[:, None] * e + channel[None, :]
    inside = in_n[:, None] & in_e[None, :]
    a2 = tl.load(A2 + grid, mask=inside, other=0.0)
    return channel, lane, in_e, in_n, grid, inside, a2


@triton.jit
def _ends(
    x, delta, A2, v, end, total, t, e, n, K,
    N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, REVERSED: tl.constexpr
):  # fmt: skip
    """Where each stretch of K spans arrives from zero: forward from x = u and v = B, reversed from
    x = dy and v = C. `total` is the sum of its delta.
    """
    text = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    row = text * tl.num_programs(2) + part
    channel, lane, in_e, in_n, grid, inside, a2 = _tile(A2, e, n, N, E)
    x += text * t * e
    delta += text * t * e
    v += text * t * n
    first = part * K * S
    beyond = min(t, first + K * S)
    h = tl.zeros_like(a2)
    elapsed = tl.sum(h, 0)
    for j in range(first, beyond):
        i = first + beyond - 1 - j if REVERSED else j
        step = tl.load(delta + i * e + channel, mask=in_e, other=0.0)
        weight = tl.load(x + i * e + channel, mask=in_e, other=0.0)
        vector = tl.load(v + i * n + lane, mask=in_n, other=0.0)
        a = tl.exp2(step[None, :] * a2)
        if REVERSED:
            h = a * (h + weight[None, :] * vector[:, None])
        else:
            h = a * h + (step * weight)[None, :] * vector[:, None]
        elapsed += step
    tl.store(end + row * n * e + grid, h, mask=inside)
    tl.store(total + row * e + channel, elapsed, mask=in_e)


@triton.jit
def _join(
    A2, start, end, total, stretches, e, n,
    N: tl.constexpr, E: tl.constexpr, REVERSED: tl.constexpr
):  # fmt: skip
    """From the state that enters the first stretch (the last one, if reversed), and where each
    arrives from zero: the state that truly enters each, written over `end`.
    """
    text = tl.program_id(1).to(tl.int64)
    channel, _, in_e, _, grid, inside, a2 = _tile(A2, e, n, N, E)
    h = tl.load(start + text * n * e + grid, mask=inside, other=0.0)
    for j in range(stretches):
        row = text * stretches + (stretches - 1 - j if REVERSED else j)
        gained = tl.load(end + row * n * e + grid, mask=inside, other=0.0)
        elapsed = tl.load(total + row * e + channel, mask=in_e, other=0.0)
        tl.store(end + row * n * e + grid, h, mask=inside)
        h = tl.exp2(elapsed[None, :] * a2) * h + gained


@triton.jit
def _forward(
    u, delta, A2, B, C, state, y, last, entry, t, e, n, K,
    N: tl.constexpr, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    text = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    row = text * tl.num_programs(2) + part
    spans = tl.cdiv(t, S)
    channel, lane, in_e, in_n, grid, inside, a2 = _tile(A2, e, n, N, E)
    u += text * t * e
    delta += text * t * e
    y += text * t * e
    B += text * t * n
    C += text * t * n
    entry += text * spans * n * e
    h = tl.load(state + row * n * e + grid, mask=inside, other=0.0)
    for k in range(part * K, min(spans, part * K + K)):
        tl.store(entry + k * n * e + grid, h, mask=inside)
        for i in range(k * S, min(t, k * S + S)):
            step = tl.load(delta + i * e + channel, mask=in_e, other=0.0)
            x = tl.load(u + i * e + channel, mask=in_e, other=0.0)
            b = tl.load(B + i * n + lane, mask=in_n, other=0.0)
            c = tl.load(C + i * n + lane, mask=in_n, other=0.0)
            h = tl.exp2(step[None, :] * a2) * h + (step * x)[None, :] * b[:, None]
            tl.store(y + i * e + channel, tl.sum(h * c[:, None], 0), mask=in_e)
    if part == tl.num_programs(2) - 1:
        tl.store(last + text * n * e + grid, h, mask=inside)


@triton.jit
def _backward(
    dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC, notes, t, e, n, K,
    N: tl.constexpr, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    text = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    row = text * tl.num_programs(2) + part
    spans = tl.cdiv(t, S)
    channel, lane, in_e, in_n, grid, inside, a2 = _tile(A2, e, n, N, E)
    dy += text * t * e
    u += text * t * e
    delta += text * t * e
    du += text * t * e
    ddelta += text * t * e
    B += text * t * n
    C += text * t * n
    group = text * tl.num_programs(0) + tl.program_id(0)
    dB += group * t * n
    dC += group * t * n
    notes += (row * tl.num_programs(0) + tl.program_id(0)) * S * N * E
    entry += text * spans * n * e
    page = lane[:, None] * E + tl.arange(0, E)[None, :]
    g_next = tl.load(carry + row * n * e + grid, mask=inside, other=0.0)  # a_{t+1} g_{t+1}
    da = tl.zeros_like(a2)
    beyond = min(spans, part * K + K)
    for back in range(beyond - part * K):
        k = beyond - 1 - back
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
    tl.store(carry + row * n * e + grid, g_next, mask=inside)
    tl.store(dA + row * n * e + grid, da, mask=inside)


def scan(u, delta, A, B, C, state):
    """y without D u, and the last state."""
    inputs = (x.contiguous() for x in (u, delta, A, B, C, state))
    y, last, _ = SCAN(*inputs)
    return y, last


def _spans(u):
    return -(-u.shape[1] // SPAN)


def _scan(u, delta, A, B, C, state):
    b, e, n = state.shape
    u, delta, A2, B, C, state = (x.contiguous() for x in (u, delta, A.T * LOG2E, B, C, state.mT))
    y = u.new_empty(u.shape)
    last = u.new_empty(b, n, e)
    entry = u.new_empty(b * _spans(u) * n * e)
    K, stretches = _stretches(u)
    with _on(u):
        state = _entries(u, delta, A2, B, state, K, stretches, reversed=False)
        _forward[(_parts(e), b, stretches)](
            u, delta, A2, B, C, state, y, last, entry, u.shape[1], e, n, K, *_sizes(n), num_warps=1
        )
    return y, last.mT.contiguous(), entry


def _scan_backward(dy, dlast, u, delta, A, B, C, entry):
    b, t, e = u.shape
    n = A.shape[1]
    dy, u, delta, B, C, entry = (x.contiguous() for x in (dy, u, delta, B, C, entry))
    A2 = (A.T * LOG2E).contiguous()
    K, stretches = _stretches(u)
    du = u.new_empty(u.shape)
    ddelta = u.new_empty(u.shape)
    dA = u.new_empty(b * stretches, n, e)
    dB = u.new_empty(b, _parts(e), t, n)
    dC = u.new_empty(b, _parts(e), t, n)
    programs = b * stretches * _parts(e)
    notes = u.new_empty(programs * SPAN * triton.next_power_of_2(n) * CHANNELS)
    with _on(u):
        dlast = dlast.mT.clone(memory_format=torch.contiguous_format)
        carry = _entries(dy, delta, A2, C, dlast, K, stretches, reversed=True)
        gradients = carry, du, ddelta, dA, dB, dC
        _backward[(_parts(e), b, stretches)](
            dy, u, delta, A2, B, C, entry, *gradients, notes, t, e, n, K, *_sizes(n), num_warps=1
        )
    dstate = carry.view(b, stretches, n, e)[:, 0]
    return du, ddelta, dA.sum(0).T.contiguous(), dB.sum(1), dC.sum(1), dstate.mT.contiguous()


def _entries(x, delta, A2, v, start, K, stretches, *, reversed):
    """-> the state, or going backward the gradient, that enters each stretch."""
    if stretches == 1:
        return start
    b, t, e = x.shape
    n = len(A2)
    N, E, S = _sizes(n)
    ends = x.new_empty(b, stretches, n, e)
    total = x.new_empty(b, stretches, e)
    _ends[(_parts(e), b, stretches)](
        x, delta, A2, v, ends, total, t, e, n, K, N, E, S, REVERSED=reversed, num_warps=1
    )
    _join[(_parts(e), b)](
        A2, start, ends, total, stretches, e, n, N, E, REVERSED=reversed, num_warps=1
    )
    return ends


def _stretches(u):
    """-> how many spans a stretch has, and how many stretches a text: as many as fill the GPU."""
    b, _, e = u.shape
    spans = _spans(u)
    wanted = max(1, min(FILL // (b * _parts(e)), spans // SHORTEST))
    K = -(-spans // wanted)
    return K, -(-spans // K)


def _sizes(n):
    return triton.next_power_of_2(n), CHANNELS, SPAN


def _parts(e):
    """-> how many programs share the channels of one text."""
    return -(-e // CHANNELS)


def _on(u):
    return torch.cuda.device(u.device if u.device.type == "cuda" else -1)


SCAN = operator("triton", _scan, _scan_backward, _spans)
