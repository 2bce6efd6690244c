"""The selective scan and Mamba beside others: a scan, a training step, writing."""

import functools
import os
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.scan import selective_scan
from ..models.mamba import Mamba, MambaConfig
from .speed import Arrivals, alternate, in_turn, random_ids, seeded, summary, write_on

STATE = 16  # n of every scan here
PEER = "mambapy, parallel scan"


def inputs_of(b: int, t: int, e: int) -> list[Tensor]:
    """-> a Mamba block's u, delta (b t e), A (e n), B, C (b t n), D (e), requiring gradients."""
    generator = seeded()
    u, B, C = (torch.randn(b, t, size, generator=generator) for size in (e, STATE, STATE))
    delta = torch.rand(b, t, e, generator=generator) * 0.1 + 0.001
    A = -torch.arange(1.0, STATE + 1).expand(e, STATE).contiguous()
    return [x.requires_grad_() for x in (u, delta, A, B, C, torch.ones(e))]


def contestants() -> dict[str, Callable]:
    """-> by name, a function of (u, delta, A, B, C, D) -> y (b t e)."""
    scans = {
        "irann, C kernel where there is one (auto)": ours("auto"),
        "irann, plain torch (chunked)": ours("chunked"),
        "plain loop (sequential)": ours("sequential"),
    }
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return scans

    def parallel(u, delta, A, B, C, D):  # discretised and read out as mambapy's own block does
        decay = torch.exp(delta[..., None] * A)
        h = pscan(decay, (delta * u)[..., None] * B[:, :, None, :])
        return (h @ C[..., None]).squeeze(-1) + D * u

    return scans | {PEER: parallel}


def ours(method: str) -> Callable:
    return lambda *inputs: selective_scan(*inputs, method=method)[0]


def forward_backward(scan: Callable, inputs: list[Tensor]) -> None:
    for x in inputs:
        x.grad = None
    scan(*inputs).sum().backward()


def times(quick: bool) -> dict:
    """Forward and backward at b 16, t 256, e 256 (quick: b 2, t 64, e 64), all in turn."""
    b, t, e, rounds = (2, 64, 64, 3) if quick else (16, 256, 256, 7)
    inputs = inputs_of(b, t, e)
    runners = {
        name: functools.partial(forward_backward, scan, inputs)
        for name, scan in contestants().items()
    }
    return {"b": b, "t": t, "e": e, "n": STATE, **in_turn(runners, rounds)}


def training_step(quick: bool) -> dict:
    """Loss and gradients of a Mamba of 4 layers, width 128 (quick: 2 of 32), b 16, t 256: ours
    twice, and mambapy's.
    """
    layers, width, b, t, rounds = (2, 32, 2, 64, 2) if quick else (4, 128, 16, 256, 3)
    model = Mamba(MambaConfig(layers=layers, width=width, window=t))
    ids = random_ids(b, t + 1)

    def with_kernel(switch: str) -> None:
        with patch.dict(os.environ, IRANN_KERNEL=switch):
            model.loss(ids)[0].backward()

    runners: dict[str, Callable] = {
        "irann, kernel where there is one": functools.partial(with_kernel, "1"),
        "irann, plain torch": functools.partial(with_kernel, "0"),
    }
    try:
        from mambapy.mamba import Mamba as Theirs
        from mambapy.mamba import MambaConfig as TheirConfig
    except ImportError:
        pass
    else:
        theirs = Theirs(TheirConfig(d_model=width, n_layers=layers))
        embed = torch.nn.Embedding(65, width)

        def peer() -> None:
            logits = theirs(embed(ids[:, :-1])) @ embed.weight.T
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

        runners["mambapy"] = peer
    return {"layers": layers, "width": width, "b": b, "t": t, **in_turn(runners, rounds)}


def writing(quick: bool) -> dict:
    """Mamba of 4 layers, width 128, batch 1: characters per second after 100 and after 10,000 read,
    and transformers' beside it.

    The time to the first character is left out, for both.
    """
    n, long, rounds = (20, 1000, 2) if quick else (400, 10_000, 7)
    model = Mamba(MambaConfig(layers=4, width=128)).eval()
    text = random_ids(1, long)
    runners = {
        "irann, after 100": lambda: write_on(model, text[:, :100], n),
        f"irann, after {long:,}": lambda: write_on(model, text, n),
    }
    try:
        theirs = model.to_transformers().eval()
    except ImportError:
        pass
    else:

        def peer() -> float:
            came = Arrivals()
            how = {"max_new_tokens": n + 1, "do_sample": True, "top_k": 0}
            theirs.generate(text[:, :100], **how, streamer=came)
            _, first, *_, last = came.times  # the prompt comes first
            return n / (last - first)

        runners["transformers, cached, after 100"] = peer
    return {name: summary(rates) for name, rates in alternate(runners, rounds).items()}
