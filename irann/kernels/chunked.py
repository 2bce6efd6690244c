"""The selective scan in plain PyTorch: chunk after chunk, time outermost, e innermost: long rows.

Launched one by one on a GPU, single positions are too little work: there a tree runs inside each
chunk, and chunks bound its memory. Backward, with g_t the gradient of h_t and dy_t of y_t, runs the
same scan from the right:

    g_t = C_t dy_t + a_{t+1} g_{t+1},           dC_t = h_t dy_t,
    d(delta u B)_t = g_t,                       d(delta A)_t = a_t g_t h_{t-1}
"""

import math

import torch

from ..core.tree import tree
from .operator import LOG2E, operator

ON_CPU = 1 << 19  # numbers in one (span b n e) buffer: about a cache
ELSEWHERE = 1 << 24  # about 64 MB


def scan(u, delta, A, B, C, state, *, span, trees=False):
    """y without D u, and the last state; `span` positions a chunk, each by a loop or a tree."""
    u, delta, B, C = (x.transpose(0, 1).contiguous() for x in (u, delta, B, C))
    y, last, _ = SCAN(u, delta, A, B, C, state, span, int(trees))
    return y.transpose(0, 1), last


def span(lanes: int, numbers: int) -> int:
    """-> the positions of a chunk whose buffers hold about so many numbers: 8, 16, 32, ..."""
    return 1 << max(3, round(math.log2(max(1, numbers / max(1, lanes)))))


def _spans(u, span, trees):
    return -(-u.shape[0] // span)


def _forward(u, delta, A, B, C, state, span, trees):
    t, b, e = u.shape
    n = A.shape[1]
    A2 = (A.T * LOG2E).contiguous()
    x = delta * u
    y = u.new_empty(u.shape)
    span = min(span, t)
    a = u.new_empty(span, b, n, e)
    h = u.new_empty(span + 1, b, n, e)
    entry = u.new_empty(b, _spans(u, span, trees), n, e)
    h[0] = state.mT
    for k, chunk in enumerate(u.split(span)):
        s = len(chunk)
        now = slice(k * span, k * span + s)
        entry[:, k] = h[0]
        _states(delta[now], x[now], A2, B[now], a[:s], h[: s + 1], trees)
        torch.bmm(C[now].view(-1, 1, n), h[1 : s + 1].view(-1, n, e), out=y[now].view(-1, 1, e))
        h[0] = h[s]
    return y, h[0].mT.contiguous(), entry.flatten()


def _backward(dy, dlast, u, delta, A, B, C, entry, span, trees):
    t, b, e = u.shape
    n = A.shape[1]
    dy = dy.contiguous()
    A = A.T.contiguous()
    A2 = A * LOG2E
    x = delta * u
    dx, ddelta, dB, dC = (v.new_empty(v.shape) for v in (u, delta, B, C))
    dA = torch.zeros_like(A)
    span = min(span, t)
    a = u.new_empty(span, b, n, e)
    g = u.new_empty(span, b, n, e)
    h = u.new_empty(span + 1, b, n, e)
    entry = entry.view(b, -1, n, e)
    # a_{t+1} g_{t+1} from the next chunk
    carry = dlast.mT.clone(memory_format=torch.contiguous_format)
    for k in reversed(range(entry.shape[1])):
        now = slice(k * span, min(t, k * span + span))
        s = now.stop - now.start
        a_t, g_t, h_t = a[:s], g[:s], h[: s + 1]
        h_t[0] = entry[:, k]
        _states(delta[now], x[now], A2, B[now], a_t, h_t, trees)
        torch.mul(C[now][..., None], dy[now][:, :, None], out=g_t)
        g_t[-1] += carry
        _from_the_right(a_t, g_t, trees)
        torch.bmm(_row(dy[now]), h_t[1:].view(-1, n, e).mT, out=_row(dC[now]))
        torch.bmm(_row(x[now]), g_t.view(-1, n, e).mT, out=_row(dB[now]))
        torch.bmm(_row(B[now]), g_t.view(-1, n, e), out=_row(dx[now]))
        a_t *= g_t
        carry.copy_(a_t[0])
        d_delta_A = a_t.mul_(h_t[:-1])
        torch.sum(torch.mul(d_delta_A, A, out=g_t), 2, out=ddelta[now])
        dA += d_delta_A.mul_(delta[now][:, :, None]).sum((0, 1))
    ddelta.addcmul_(dx, u)
    return dx.mul_(delta), ddelta, dA.T.contiguous(), dB, dC, carry.mT.contiguous()


def _row(x):
    return x.view(-1, 1, x.shape[-1])


def _states(delta, x, A2, B, a, h, trees):
    """Fill a (t b n e) with what is kept, and h[1:] with the states, from h[0]."""
    torch.mul(delta[:, :, None], A2, out=a).exp2_()
    torch.mul(B[..., None], x[:, :, None], out=h[1:])
    h[1].addcmul_(a[0], h[0])
    if trees:
        tree(a, h[1:])
        return
    positions = h[1:].unbind()
    for previous, now, keep in zip(positions, positions[1:], a.unbind()[1:]):
        torch.addcmul(now, keep, previous, out=now)


def _from_the_right(a, g, trees):
    """g_t += a_{t+1} g_{t+1}, in place, from the last position to the first."""
    if trees:
        reversed_g = g.flip(0)
        tree(a.roll(-1, 0).flip(0), reversed_g)  # the first factor is never read
        g.copy_(reversed_g.flip(0))
        return
    positions = g.unbind()
    keep = a.unbind()
    for i in range(len(g) - 2, -1, -1):
        torch.addcmul(positions[i], keep[i + 1], positions[i + 1], out=positions[i])


DEVICES = ("CPU", "CUDA", "MPS")
SCAN = operator("chunked", _forward, _backward, _spans, options=("span", "trees"), devices=DEVICES)
