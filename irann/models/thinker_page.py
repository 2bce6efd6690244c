"""Iterative thinking, a page at once: masked positions look both ways, the surest guesses stay.

Papers: Austin et al. 2021 (arXiv 2107.03006) for absorbing diffusion, which replaces characters by
a mask token; Hoogeboom et al. 2021 (arXiv 2110.02037), who show that its bound is that of guessing
in random order; those of the network stand in recurrent.py.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ..lm import (
    DRAWS,
    Draft,
    Ids,
    Loss,
    Nats,
    check_pairs,
    cross_entropy,
    evaluating,
    leading,
    page_by_page,
    split_settings,
)
from ..sampling import Sampling, filter_logits, sample
from ..settings import Setting
from .recurrent import STOPPING, Hidden, RecurrentDepth, ThinkerConfig, round_nats, stops

Mask = Bool[Tensor, "b t"]
ORDERS = ("surest", "random", "left")


class PageThinker(RecurrentDepth):
    """Trained to guess masked characters from the rest; every position sees all others.

    To guess a text in random order gives a bound on its likelihood (Hoogeboom et al. 2021, eq. 4):
    -log p(text) <= t E[mean nll over k masked positions], k uniform from 1 to t. While writing, the
    hidden state is carried over from one refinement to the next.
    """

    exact = False
    settings: dict[str, Setting] = STOPPING | {
        "steps": Setting(
            0, "refinements of a page; 0: one for every two characters", low=0, high=4096
        ),
        "order": Setting("surest", "which guesses are kept first", choices=ORDERS),
        "keep": Setting(
            1.0, "keep surer guesses at once; 1: as many as the steps ask for", low=0.0, high=1.0
        ),
    }

    def __init__(self, config: ThinkerConfig):
        super().__init__(config, causal=False, symbols=config.vocabulary + 1)
        self.mask_token = config.vocabulary

    # --------------------------------------------------------------------------------- training

    def draw_mask(
        self, first: Int[Tensor, " b"], t: int, generator: Generator | None = None
    ) -> Mask:
        """k positions from `first` on, k uniform from 1 to all of them, spread over the batch."""
        b = len(first)
        options: dict[str, Any] = {"generator": generator, "device": first.device}
        u = (torch.rand((), **options) + torch.arange(b, device=first.device) / b) % 1
        k = 1 + (u * (t - first)).long().clamp(max=t - first - 1)
        clean = torch.arange(t, device=first.device) < first[:, None]
        drawn = torch.rand(b, t, **options).masked_fill(clean, 2.0)  # clean positions come last
        rank = drawn.argsort(1).argsort(1)  # argsort of argsort: each one's place in the order
        return rank < k[:, None]

    def draw(self, ids: Ids, *, generator: Generator | None = None) -> dict[str, Any]:
        """What is masked, and whether a hidden state is carried over from a page with more masked.

        Every other row keeps a clean beginning, like a prompt; `bound_weights` count the rows
        without one. In training, half of the batches carry a hidden state.
        """
        b, t = ids.shape
        device = self.device
        cut = torch.randint(1, t, (b,), generator=generator, device=device)
        prompted = torch.arange(b, device=device) % 2 == 1
        first = torch.where(prompted, cut, 1)
        masked = self.draw_mask(first, t, generator)
        unprompted = (~prompted).to(self.lm_head.weight.dtype)
        carried = self.training and bool(torch.rand((), generator=generator, device=device) < 0.5)
        return {
            "masked": masked,
            "bound_weights": unprompted / unprompted.mean(),
            "carried": carried,
            "carried_masked": masked | self.draw_mask(first, t, generator),
            "carried_rounds": self.draw_rounds(generator),
            "rounds": self.draw_rounds(generator),
        }

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """`rounds_loss` of the masked characters' nats, each row's mean over them times t.

        `bound_nats_per_char` is a one-draw estimate by the last round, from rows without a prompt.
        """
        ids = check_pairs(self.check_ids(ids, look=draws is None))
        draws = self.draw(ids) if draws is None else draws
        hidden = None
        if draws["carried"]:
            with torch.no_grad():
                more = ids.masked_fill(draws["carried_masked"], self.mask_token)
                hidden = self.every_round(more, draws["carried_rounds"])[2]
                torch.clear_autocast_cache()  # torch 2.10 would keep weights without gradient
        masked = draws["masked"]
        page = ids.masked_fill(masked, self.mask_token)
        logits, halt, _ = self.every_round(page, draws["rounds"], hidden)
        nats = round_nats(logits, ids)
        nats = nats * masked_weights(masked, ids.shape[1], nats)[..., None]
        loss, parts = self.rounds_loss(nats, halt)
        bound = (nats[..., -1].mean(1) * draws["bound_weights"]).mean()
        return loss, {"bound_nats_per_char": bound.detach()} | parts

    def nll(self, ids: Ids, *, generator: Generator | None = None, draws: int = 4) -> Nats:
        """An unbiased estimate of each character's part of the bound: the mean over masks drawn."""
        ids = self.check_ids(ids)
        draws = DRAWS.check("draws", draws)
        b, t = ids.shape
        first = torch.ones(b, dtype=torch.long, device=ids.device)
        total = torch.zeros(b, t, device=ids.device)
        for _ in range(draws):
            masked = self.draw_mask(first, t, generator)
            logits, _, _ = self.every_round(ids.masked_fill(masked, self.mask_token))
            nats = cross_entropy(logits[..., -1], ids)
            total = total + nats * masked_weights(masked, t - 1, nats)
        return total[:, 1:] / draws

    # ---------------------------------------------------------------------------------- writing

    def generate(
        self, prompt: Ids, n: int, *, generator: Generator | None = None, **settings: Any
    ) -> Iterator[Draft]:
        """A page of mask tokens is guessed at once, and the first guesses by `order` are kept; then
        the next page. `settings` are temperature, top_k, top_p, and the model's.

        Guesses that are not kept are shown, unsettled, and masked again. In each refinement a page
        thinks until all of its masked positions would stop by the rule `stop`. Pages are half a
        window long.
        """
        sampling, own = split_settings(self, settings)
        rule = self.rule(own)
        page = max(1, (self.config.window + 1) // 2)

        def write(ids: Ids, masked: Mask) -> Iterator[Draft]:
            return self.refine(ids, masked, sampling, generator, rule)

        return page_by_page(self, prompt, n, page, write)

    @torch.no_grad()
    def refine(
        self,
        ids: Ids,
        masked: Mask,
        sampling: Sampling,
        generator: Generator | None,
        rule: dict[str, Any],
    ) -> Iterator[Draft]:
        """A draft per refinement, until nothing is masked: all guesses, and how many are kept."""
        if rule["keep"] < 1:  # a page takes as many draws as its slowest row: they are its own
            seed = torch.randint(2**31, (), generator=generator, device=ids.device)  # MPS: 32 bits
            generator = torch.Generator(ids.device).manual_seed(int(seed))
        steps = rule["steps"] or max(1, math.ceil(int(masked.any(0).sum()) / 2))
        hidden = None
        rounds = 0
        for step in range(steps):
            with evaluating(self, ids.numel()):
                page = ids.masked_fill(masked, self.mask_token)
                hidden, logits, taken = self.think(page, masked, hidden, generator, rule)
            rounds += taken
            filtered = filter_logits(logits, **vars(sampling))
            guess = sample(filtered.flatten(0, 1), generator).view_as(ids)
            sure = logits.softmax(-1).gather(-1, guess[..., None]).squeeze(-1)
            rank = self.rank(sure, rule["order"], generator).masked_fill(~masked, -torch.inf)
            left = steps - step
            due = (masked.sum(1, keepdim=True) + left - 1) // left  # an equal part, rounded up
            kept = rank.argsort(1, descending=True).argsort(1) < due
            ids = torch.where(masked, guess, ids)
            masked = masked & ~(kept | (sure > rule["keep"]))
            note = {"rounds": rounds, "masked": int(masked.sum())}
            settled = int(leading(~masked.any(0, keepdim=True)))  # in every row
            yield Draft(ids, settled, note)
            if not masked.any():
                return

    def rank(
        self, sure: Float[Tensor, "b t"], order: str, generator: Generator | None
    ) -> Float[Tensor, "b t"]:
        """What is kept first has the highest number."""
        if order == "surest":
            return sure
        if order == "random":
            return torch.rand(sure.shape, generator=generator, device=sure.device)
        return -torch.arange(sure.shape[1], device=sure.device).to(sure).expand_as(sure)

    def think(
        self,
        ids: Ids,
        masked: Mask,
        hidden: Hidden | None,
        generator: Generator | None,
        rule: dict[str, Any],
    ) -> tuple[Hidden, Float[Tensor, "b t v"], int]:
        """Each row until all its masked positions stop: hidden state, logits, rounds taken."""
        limit = self.limits(ids, rule, generator)
        survival = torch.ones_like(limit)
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        logits = limit.new_zeros(*ids.shape, self.config.vocabulary)
        if hidden is None:
            hidden = limit.new_zeros(*ids.shape, self.config.width)
        before = (hidden, None)
        rounds = 0
        for now in islice(self.ponder(ids, hidden), rule["rounds"]):
            rounds += 1
            hidden = torch.where(done[..., None], hidden, now.hidden)
            logits = torch.where(done[..., None], logits, now.logits)
            survival = survival * (1 - now.halt)
            stop = stops(rule, now, before, survival, limit)
            done = done | (stop | ~masked).all(1, keepdim=True)
            before = (now.hidden, now.logits)
            if done.all():
                break
        return hidden, logits, rounds


def masked_weights(masked: Mask, total: int, like: Float[Tensor, "..."]) -> Float[Tensor, "b t"]:
    """Weights of masked positions, zero elsewhere: a row's weighted sum is `total` times the mean
    over them.
    """
    return masked.to(like) * total / masked.sum(1, keepdim=True)
