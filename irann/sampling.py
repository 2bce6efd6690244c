"""From logits to a character: temperature, top-k, top-p, and the draw."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .settings import Checked, field


@dataclass(frozen=True)
class Sampling(Checked):
    """How to draw a character."""

    temperature: float = field(
        1.0, "how bold: 0 always takes the likeliest character", low=0.0, high=100.0
    )
    top_k: int = field(0, "only the k likeliest characters; 0: all", low=0)
    top_p: float = field(
        1.0, "only the likeliest characters that together have this probability", low=0.0, high=1.0
    )


SAMPLING = Sampling.settings()


def filter_logits(
    logits: Float[Tensor, "*batch v"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*batch v"]:
    """Logits to sample from, with -inf for characters that are out.

    First temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2019, arXiv
    1904.09751). Temperature 0 is greedy; ties at the k-th logit are all kept; top-p keeps the
    character with which the probability first reaches p. `top_k` 0 or None and `top_p` None keep
    everything. Raises InputError that names a parameter outside its range.
    """
    chosen = Sampling(temperature, 0 if top_k is None else top_k, 1.0 if top_p is None else top_p)
    if chosen.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, likeliest, 0.0)
    tiniest = torch.finfo(logits.dtype).tiny  # half precision would round a smaller one to 0
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0: no temperature overflows
    logits = logits / max(chosen.temperature, tiniest)
    if 0 < chosen.top_k < logits.shape[-1]:
        kth = logits.topk(chosen.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if chosen.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        # half precision cannot add up what the rare characters have
        p = ordered.softmax(-1, dtype=torch.promote_types(ordered.dtype, torch.float32))
        out = p.cumsum(-1) - p >= chosen.top_p  # the likelier characters already have that much
        out[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    return logits


def sample(
    logits: Float[Tensor, "b v"], generator: torch.Generator | None = None
) -> Int[Tensor, " b"]:
    """One character per row, drawn from the softmax of the logits."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)
