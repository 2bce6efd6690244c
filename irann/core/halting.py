"""Halting: when to stop thinking, by a chain of coin flips or at the fixed point of a sequence.

Sources: Banino et al. 2021, "PonderNet: Learning to Ponder" (arXiv 2107.05407), section 2, for the
distribution and its prior; Graves 2016, "Adaptive Computation Time" (arXiv 1603.08983), for the
idea; Bai et al. 2019, "Deep Equilibrium Models" (arXiv 1909.01377), for stopping at a fixed point.
Our prior puts the tail on the last round, so both p and the prior sum to one, and the divergence is
PonderNet's KL(p || prior). labml.ai's annotated version, often copied, cuts the prior off at the
last round, leaves it unnormalised, and computes KL(prior || p).

Rounds are counted from 1: entry r of the last axis belongs to round r + 1.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def survival(halt: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
    """The probability that round r takes place: the product of 1 - halt over the rounds before it.

    Raises ValueError for halting probabilities outside [0, 1], on a CPU; NaN passes through, so
    that a diverged run is seen where it began.
    """
    _check_rounds("halting probabilities", halt)
    # Looking would make a GPU wait in every step of training, and a compiler cannot look.
    look = halt.is_cpu and not torch.compiler.is_compiling()
    with suppress(RuntimeError):  # inside vmap nobody can
        if look and ((halt < 0) | (halt > 1)).any():
            known = halt[~halt.isnan()]
            got = f"{known.min().item():g} to {known.max().item():g}"
            raise ValueError(f"halting probabilities lie in [0, 1]; got {got}")
    return torch.cat([torch.ones_like(halt[..., :1]), (1 - halt[..., :-1]).cumprod(-1)], -1)


def halting_distribution(halt: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
    """The probability p that round r is the last one: it takes place, and its coin says stop.

    p_r = halt_r * product of (1 - halt_j) over j < r (PonderNet, section 2.2), except that the last
    round takes all that remains, whatever its own halting probability: then p sums to one. Raises
    ValueError as `survival` does.
    """
    reached = survival(halt)
    return torch.cat([reached[..., :-1] * halt[..., :-1], reached[..., -1:]], -1)


def expected_rounds(p: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """The mean number of rounds, the sum of r p_r; equal to the sum of `survival`.

    Raises ValueError for a p without rounds or of whole numbers; that it sums to one is taken for
    granted.
    """
    _check_rounds("probabilities of rounds", p)
    return (p * torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device)).sum(-1)


def log_geometric(
    prior: float | int,
    rounds: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "{rounds}"]:
    """Log probabilities of a coin that stops with probability `prior` each round, tail on the last.

    g_r = prior (1 - prior)^(r-1), and (1 - prior)^(R-1) for the last. Raises ValueError for a prior
    outside (0, 1).
    """
    if not 0 < prior < 1:
        raise ValueError(f"the prior is a probability above 0 and below 1; got {prior}")
    failed = torch.arange(rounds, dtype=dtype, device=device)  # coins that said "go on" before
    return failed * math.log1p(-prior) + math.log(prior) * (failed < rounds - 1).to(dtype)


def kl_to_geometric(p: Float[Tensor, "*batch r"], prior: float | int) -> Float[Tensor, "*batch"]:
    """KL(p || geometric(prior)) in nats, the sum of p_r log(p_r / g_r).

    This direction averages over where p puts its mass: p may leave rounds out that the prior
    allows, and pays for rounds that the prior finds unlikely. The other direction would force p to
    cover every round. A round with p = 0 costs nothing, and its gradient is finite. Raises
    ValueError for a prior outside (0, 1), and for p as `expected_rounds` does.
    """
    _check_rounds("probabilities of rounds", p)
    log_g = log_geometric(prior, p.shape[-1], dtype=p.dtype, device=p.device)
    tiny = torch.finfo(p.dtype).tiny  # 0 log 0 is 0, and with a clamp its slope is finite
    return (p * (p.clamp_min(tiny).log() - log_g)).sum(-1)


class FixedPoint(NamedTuple):
    """Where an iteration ended; for each row, rounds taken, last change, whether it converged."""

    x: Float[Tensor, "b ..."]
    rounds: Int[Tensor, " b"]
    residual: Float[Tensor, " b"]
    converged: Bool[Tensor, " b"]


def fixed_point(
    step: Callable[[Tensor], Tensor],
    x0: Float[Tensor, "b ..."],
    *,
    tolerance: float | int,
    max_rounds: int,
) -> FixedPoint:
    """x <- step(x) until a row changes by at most `tolerance` (Euclidean norm), or `max_rounds`.

    Each row of the batch decides for itself and is then frozen: a batch ends exactly where its rows
    end one by one, if `step` treats rows alike. If step shrinks distances by rho, the k-th change
    is at most the first times rho^(k-1) (Banach), which predicts the exit round. A cycle or an
    expansion ends at `max_rounds` with `converged` False; a change that is NaN or infinite never
    converges. Raises ValueError for a tolerance or a number of rounds that makes no sense, and for
    a step that changes the shape.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is a finite number, zero or more; got {tolerance}")
    if not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"max_rounds is a whole number from 1 up; got {max_rounds}")
    if x0.ndim < 1 or not x0.is_floating_point():
        got = f"{x0.dtype} of shape {tuple(x0.shape)}"
        raise ValueError(f"x0 has a batch axis and real numbers; got {got}")
    x = x0
    b = len(x0)
    rounds = torch.zeros(b, dtype=torch.long, device=x.device)
    residual = torch.full((b,), torch.inf, dtype=x.dtype, device=x.device)
    converged = torch.zeros(b, dtype=torch.bool, device=x.device)
    for _ in range(max_rounds):
        moving = ~converged
        if not moving.any():
            break
        new = step(x.clone())  # a step may work in place
        if new.shape != x.shape:
            raise ValueError(f"step must keep the shape {tuple(x.shape)}; got {tuple(new.shape)}")
        change = torch.linalg.vector_norm((new - x).reshape(b, -1), dim=-1)
        x = torch.where(moving.view(-1, *[1] * (x.ndim - 1)), new, x)
        residual = torch.where(moving, change, residual)
        rounds = rounds + moving
        converged = converged | (moving & (change <= tolerance))
    return FixedPoint(x, rounds, residual, converged)


def _check_rounds(what, p):
    if p.ndim < 1 or p.shape[-1] < 1 or not p.is_floating_point():
        got = f"{p.dtype} of shape {tuple(p.shape)}"
        raise ValueError(f"{what} are real numbers with the rounds on the last axis; got {got}")
