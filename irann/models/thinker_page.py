"""Iterative thinking, a page at once."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..lm import Draft, cross_entropy, evaluating, leading, page_by_page
from ..sampling import check_sampling, filter_logits, sample
from ..settings import Setting
from .thinker import STOPPING, Body, ThinkerConfig, at_rest


class PageThinker(Body):
    """All at once: some characters are hidden, every place looks both ways, and the surest guesses are kept.

    Trained to guess hidden characters from the rest. To guess a text in random order gives a bound on its likelihood
    (Hoogeboom et al. 2021, eq. 4): -log p(text) <= t E[mean nll over k hidden places], k uniform from 1 to t.
    While writing, the thought is carried over from one refinement to the next.
    """

    exact = False
    settings: ClassVar = STOPPING | {
        "steps": Setting(
            0,
            "refinements in which a page is written; 0: one for every two characters",
            low=0,
            high=4096,
        ),
        "order": Setting(
            "surest", "which guesses are kept first", choices=("surest", "random", "left")
        ),
        "keep": Setting(
            1.0,
            "guesses surer than this are kept at once; 1: only as many as the steps ask for",
            low=0.0,
            high=1.0,
        ),
    }

    def __init__(self, config: ThinkerConfig):
        super().__init__(config, causal=False, symbols=config.vocabulary + 1)
        self.blank = config.vocabulary  # the id of a hidden character

    def hide(self, b: int, t: int, first: Tensor | int = 1, generator=None) -> Tensor:
        """-> (b t) of bool, True where hidden: k places from `first` on, k uniform from 1 to all of them, spread over the batch."""
        device = self.device
        first = torch.as_tensor(first, device=device).expand(b)
        u = (
            torch.rand((), generator=generator, device=device) + torch.arange(b, device=device) / b
        ) % 1
        k = 1 + (u * (t - first)).long().clamp(max=t - first - 1)
        lots = torch.rand(b, t, generator=generator, device=device).masked_fill(
            torch.arange(t, device=device) < first[:, None], 2.0
        )
        return lots.argsort(1).argsort(1) < k[:, None]

    def loss(self, ids: Tensor, draws=None) -> tuple[Tensor, dict[str, Tensor]]:
        """(b window+1) -> a scalar, parts: `thinking_loss` of the hidden characters' nats, as shares of the bound.

        Every other row keeps a clean beginning, like a prompt; half of the batches carry on a thought about a page with more
        hidden. `bound_nats_per_char` is a one-draw estimate by the last round, from the rows without a beginning.
        """
        ids = self.check_ids(ids)
        b, t = ids.shape
        first = torch.where(
            torch.arange(b, device=ids.device) % 2 == 1,
            torch.randint(1, t, (b,), device=ids.device),
            1,
        )
        hidden, thought = self.hide(b, t, first), None
        if self.training and torch.rand(()) < 0.5:
            with torch.no_grad():
                thought = self.every_round(
                    ids.masked_fill(hidden | self.hide(b, t, first), self.blank), self.draw_rounds()
                )[2]
        logits, odds, _ = self.every_round(
            ids.masked_fill(hidden, self.blank), self.draw_rounds(), thought
        )
        nats = F.cross_entropy(
            rearrange(logits, "b t v r -> b v t r"),
            ids[..., None].expand_as(odds),
            reduction="none",
        )
        weight = (hidden * t).to(nats) / hidden.sum(
            1, keepdim=True
        )  # the mean over each row's hidden places
        loss, parts = self.thinking_loss(nats * weight[..., None], odds)
        return loss, {"bound_nats_per_char": (nats[..., -1] * weight)[::2].mean().detach()} | parts

    def nll(self, ids: Tensor, *, generator=None, draws: int = 4) -> Tensor:
        """(b t+1) -> (b t): an unbiased estimate of each character's share of the bound, the mean over `draws` ways to hide."""
        ids = self.check_ids(ids)
        (b, size), total = ids.shape, 0.0
        for _ in range(draws):
            hidden = self.hide(b, size, generator=generator)
            logits = self.every_round(ids.masked_fill(hidden, self.blank))[0][..., -1]
            nats = cross_entropy(logits, ids)
            total = total + (nats * hidden * (size - 1) / hidden.sum(1, keepdim=True))[:, 1:]
        return total / draws

    def generate(
        self, prompt, n, *, temperature=1.0, top_k=None, top_p=None, generator=None, **settings
    ) -> Iterator[Draft]:
        """(b t) -> drafts: blanks that are guessed all at once, the guesses to be kept first by `order`; then the next page.

        Guesses that are not kept are shown, unsettled, and hidden again. In each refinement a page thinks until all its
        hidden places would stop by the rule `stop`. Pages are half a window long. The note says how many characters of the
        prompt are `forgotten`, page by page: the window has no room for them.
        """
        rule = self.rule(settings)
        filters = check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        page = max(1, (self.config.window + 1) // 2)

        def write(ids, mask):
            start = int((~mask).sum(1).min())
            for guess, hidden, rounds in self.refine(ids.clone(), start, filters, generator, rule):
                note = {"rounds": rounds, "masked": int(hidden.sum())}
                yield Draft(guess, int(leading(~hidden).min()), note)

        return page_by_page(self, prompt, n, page, write)

    @torch.no_grad()
    def refine(self, ids: Tensor, start: int, filters: dict, generator, rule: dict):
        """(b t) -> per refinement: all guesses (b t), what is still hidden (b t), rounds so far; places from `start` on are written."""
        hidden = (torch.arange(ids.shape[1], device=ids.device) >= start).expand_as(ids)
        steps, thought, rounds = rule["steps"] or -(-(ids.shape[1] - start) // 2), None, 0
        for step in range(steps):
            with evaluating(self):
                thought, logits, taken = self.think(
                    ids.masked_fill(hidden, self.blank), hidden, thought, generator, rule
                )
            rounds += taken
            guess = sample(filter_logits(logits, **filters).flatten(0, 1), generator).view_as(ids)
            sure = logits.softmax(-1).gather(-1, guess[..., None]).squeeze(-1)
            if rule["order"] == "random":
                rank = torch.rand(ids.shape, generator=generator, device=ids.device)
            else:
                rank = (
                    sure
                    if rule["order"] == "surest"
                    else -torch.arange(ids.shape[1], device=ids.device).to(sure).expand_as(sure)
                )
            due = -(
                -hidden.sum(1, keepdim=True) // (steps - step)
            )  # of what is left, an equal share for each step that is left
            kept = (
                rank.masked_fill(~hidden, -torch.inf).argsort(1, descending=True).argsort(1) < due
            )
            ids, hidden = torch.where(hidden, guess, ids), hidden & ~(kept | (sure > rule["keep"]))
            yield ids, hidden, rounds
            if not hidden.any():
                return

    def think(self, ids: Tensor, hidden: Tensor, thought: Tensor | None, generator, rule: dict):
        """(b t), (b t) of bool, (b t d) -> thought, logits (b t v), rounds taken: each page until all of its hidden places are at rest."""
        left, old = torch.ones(ids.shape, dtype=self.lm_head.weight.dtype, device=ids.device), None
        limit = torch.full_like(left, rule["threshold"])
        if rule["stop"] == "sampled":
            limit = torch.rand(
                left.shape, generator=generator, dtype=left.dtype, device=left.device
            )
        before = left.new_zeros(*ids.shape, self.config.width) if thought is None else thought
        rounds = self.ponder(ids, thought)
        logits, taken, done = (
            None,
            0,
            torch.zeros(len(ids), 1, 1, dtype=torch.bool, device=ids.device),
        )
        while not taken or (taken < rule["rounds"] and not done.all()):
            new, guess, odds = next(rounds)
            thought, logits = (
                (new, guess)
                if not taken
                else (torch.where(done, thought, new), torch.where(done, logits, guess))
            )
            left, taken = left * (1 - odds), taken + 1
            rest = at_rest(rule, new, before, guess, old, left, limit)
            done = done | (rest | ~hidden).all(1)[:, None, None]
            before, old = new, guess
        return thought, logits, taken
