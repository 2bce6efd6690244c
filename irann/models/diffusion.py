"""Diffusion-LM: text out of noise. Every character is a point on a sphere; noise drowns the points;
a network guesses them back.

Papers: Li et al. 2022, "Diffusion-LM" (arXiv 2205.14217) for diffusion on learned embeddings,
rounding, clamping and control; Dieleman et al. 2022, "Continuous diffusion for categorical data"
(arXiv 2211.15089) for embeddings of one length, cross-entropy as the loss and noise levels spent
where it changes; Chen et al. 2022, "Analog Bits" (arXiv 2208.04202) for self-conditioning. The
mathematics is `core.noise`, with levels tau = 1 .. T and clean data x_0; this file adds what makes
it work for characters:

| part                    | why                                                        |
|-------------------------|------------------------------------------------------------|
| embeddings on a sphere  | noise cannot be outgrown; the loss keeps points apart      |
| the guess is a mean     | softmax times embeddings: never a point that means nothing |
| Bayes at each position  | what a position says of itself is known exactly: so given  |
| neighbours at the input | spelling is local; attention need not learn it             |
| self-conditioning       | the last guess is shown again: the next builds on it       |
| clean positions         | a prompt is kept; text is continued, or filled in          |
| levels by quantiles     | most noise levels teach nothing: too little or too much    |

No causal mask: every position sees both sides. The training loss is a surrogate; `nll` is a bound
of the likelihood.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ..core import noise
from ..core.noise import Bound
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
    seeded,
    split_settings,
    vocabulary_of,
)
from ..sampling import Sampling, filter_logits
from ..settings import InputError, Setting
from .denoiser import Denoiser, DiffusionConfig, draw_mask, first_gap

SURE = 0.9999  # a character of this probability is taken as known
# the least temperature at which that is judged: colder, any guess looks sure, even the first
COLDEST = 0.5
STRENGTH = Setting(1.0, "how strongly a guide steers")
STEPS = Setting(64, "denoising steps for each page of text", low=1, high=1000)
Mask = Bool[Tensor, "b t"]
Noisy = Float[Tensor, "b t c"]
Guide = Callable[[Tensor, Tensor], Tensor]  # x_tau (b t c), tau (b) -> a log probability (b)


@dataclass(frozen=True)
class Denoising:
    """How a page is written; made from keyword arguments, and checked, by `Diffusion.denoising`."""

    levels: list[int]  # noise levels, decreasing
    eta: float
    clamp: bool
    sampling: Sampling
    guide: Guide | None
    strength: float


class Diffusion(Denoiser):
    """Guess every character of a window from noisy ones on both sides and the noise level."""

    exact = False
    settings = {
        "steps": STEPS,
        "eta": Setting(1.0, "fresh noise per step: 1 ancestral, 0 none (DDIM)", low=0.0, high=1.0),
        "clamp": Setting(
            "off",
            "round every guess to the nearest character (Diffusion-LM's clamping trick)",
            choices=("off", "on"),
        ),
    }

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        steps = replace(STEPS, default=min(64, config.levels), high=config.levels)
        self.settings = type(self).settings | {"steps": steps}

    # --- training -------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, ids: Ids, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mask, noise level and its probability, noise, and the rows that are self-conditioned.

        `weight` turns a mean over positions into one over the masked ones of the whole batch.
        """
        self.absorb()  # for loops that never call it; after the trainer's call it does nothing
        device = ids.device
        normal = noise.normal(generator)
        like = self.word_embedding.new_empty(*ids.shape, self.config.channels, device=device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        mask = draw_mask(*ids.shape, device=device, generator=generator)
        tau, p = self.draw_levels(len(ids), generator)
        return {
            "mask": mask,
            "weight": mask.to(dtype) / mask.to(dtype).mean(),
            "tau": tau.to(device),
            "p": p.to(device),
            "eps": normal(like),
            "self_conditioned": torch.rand(len(ids), generator=generator, device=device) < 0.5,
            "eps_rounding": normal(like),
        }

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """Masked characters' cross-entropy at adaptive levels, plus rounding; nats per character.

        A surrogate, not a likelihood. `bound_nats_per_char` among the parts is a one-draw estimate
        of the bound for these masks, half of it without self-conditioning; `nll` scores by page.
        """
        ids = check_pairs(self.check_ids(ids, look=draws is None))
        draws = self.draw(ids) if draws is None else draws
        mask = draws["mask"]
        tau = draws["tau"]
        weight = draws["weight"]
        x0 = self.embeddings[ids]
        x = self.schedule.noise(x0, tau, draws["eps"])
        previous = self.previous_guess(x, tau, ids, mask, draws["self_conditioned"])
        logits = self(x, tau, ids, mask, previous)
        nll = cross_entropy(logits, ids)
        rounding = self.rounding(x0, ids, draws["eps_rounding"]).mean()
        loss = (nll * weight).mean() + rounding
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.training:
                self._observe(tau, (nll * mask).sum(1) / mask.sum(1))
            guess = logits.softmax(-1).to(x0.dtype) @ self.embeddings
            step = noise.step_kl(self.schedule, x0, guess, tau).sum(-1) / draws["p"][:, None]
            bound = step + noise.prior_kl(self.schedule, x0).sum(-1)
            parts = {
                "cross_entropy": (nll * weight).mean(),
                "rounding": rounding.detach(),
                "mse": ((guess - x0).square().mean(-1) * weight).mean(),
                "bound_nats_per_char": (bound * weight).mean() + rounding,
            }
        return loss, parts

    # --- the bound ------------------------------------------------------------------------------

    @torch.no_grad()
    def bound(self, ids: Ids, *, generator: Generator | None = None, draws: int = 4) -> Bound:
        """The terms of an upper bound of -log p, in nats, for each character of `ids[:, 1:]`.

        `prior`, `reconstruction` and `total` are (b t); `steps` is (1 b t), the estimate of the sum
        over noise levels. Text is scored as it is written: page by page, each given the clean
        characters before it, so that the pages' bounds add up to one of the whole (chain rule). The
        sum over noise levels is estimated without bias from `draws` of them per page.
        """
        ids = self.check_ids(ids)
        draws = DRAWS.check("draws", draws)
        nothing = self.word_embedding.new_zeros(len(ids), 0)
        parts = [Bound(nothing, nothing[None], nothing)]
        for start in range(1, ids.shape[1], self.config.page):
            end = min(start + self.config.page, ids.shape[1])
            begin = max(0, end - self.config.window - 1)  # as `page_by_page` has it
            page = ids[:, begin:end]
            parts.append(self._page_bound(page, start - begin, generator, draws))
        return Bound(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))

    def _page_bound(self, ids: Ids, start: int, generator: Generator | None, draws: int) -> Bound:
        mask = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= start
        x0 = self.embeddings[ids]
        normal = noise.normal(generator)
        taus, ps = self.draw_levels(draws * len(ids), generator)
        steps = x0.new_zeros(ids.shape)
        for tau, p in zip(taus.view(draws, -1), ps.view(draws, -1).to(ids.device), strict=True):
            x = self.schedule.noise(x0, tau, normal(x0))
            guess = self.guess(x, tau, ids, mask).softmax(-1) @ self.embeddings
            kl = noise.step_kl(self.schedule, x0, guess, tau).sum(-1)
            steps = steps + kl / p[:, None] / draws
        prior = noise.prior_kl(self.schedule, x0).sum(-1)
        rounding = self.rounding(x0, ids, normal(x0))
        return Bound(prior[:, start:], steps[None, :, start:], rounding[:, start:])

    def nll(self, ids: Ids, *, generator: Generator | None = None) -> Nats:
        """An upper bound, on average over noise, of the nats of each character of `ids[:, 1:]`."""
        return self.bound(ids, generator=generator).total

    # --- writing --------------------------------------------------------------------------------

    def denoising(
        self, *, guide: Guide | None = None, strength: float = 1.0, **given: Any
    ) -> Denoising:
        """The arguments of `generate` and `infill`, checked: sampling's, `settings`, and a guide.

        `guide(x_tau, tau) -> (b)` is the log probability of something wished for, given noisy
        embeddings (b t c): its gradient steers the page, `strength` times (see `noise.guided`).
        Raises InputError that names one out of range.
        """
        sampling, own = split_settings(self, given)
        return Denoising(
            levels=self.timesteps(own["steps"]),
            eta=own["eta"],
            clamp=own["clamp"] == "on",
            sampling=sampling,
            guide=guide,
            strength=STRENGTH.check("strength", strength),
        )

    def generate(
        self, prompt: Ids, n: int, *, generator: Generator | None = None, **how: Any
    ) -> Iterator[Draft]:
        """The prompt, and a page of text that comes out of noise, then the next page; `how` is what
        `denoising` takes.

        In each row a character is settled once it and all before it are so sure that they are taken
        as known from then on.
        """
        chosen = self.denoising(**how)

        def write(ids: Tensor, mask: Tensor) -> Iterator[Draft]:
            return self._denoise(ids, mask, chosen, generator)

        return page_by_page(self, prompt, n, self.config.page, write)

    def infill(
        self,
        ids: Ids,
        mask: Bool[Tensor, "positions"],
        *,
        generator: Generator | None = None,
        **how: Any,
    ) -> Iterator[Draft]:
        """Drafts of the whole text: positions where `mask` is True are written, others are kept.

        What stands after a gap is seen as well as what stands before. A text beyond the window is
        filled page after page, each with the text around it. Raises InputError for an unfit mask.
        """
        chosen = self.denoising(**how)
        ids = self.check_ids(ids)
        is_tensor = isinstance(mask, Tensor)
        if not is_tensor or mask.dtype != torch.bool or mask.shape != ids.shape[1:]:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if is_tensor else type(mask).__name__
            wanted = f"bool of shape ({ids.shape[1]},), a tensor with one for each position"
            raise InputError(f"mask is {wanted}; got {got}")
        text = ids.to(self.device).clone()
        return self._infill(text, mask.to(self.device).clone(), chosen, generator)

    def _infill(
        self, text: Ids, mask: Bool[Tensor, "t"], how: Denoising, generator: Generator | None
    ) -> Iterator[Draft]:
        room = self.config.window + 1
        page = self.config.page
        yield Draft(text.clone(), first_gap(mask))
        while mask.any():
            start = first_gap(mask)
            span = int(mask[start : start + page].nonzero().max()) + 1
            before = max(1, (room - span) // 2)  # as much is seen on either side
            begin = max(0, min(start - before, len(mask) - room))
            # Gaps beyond this page are for later ones: the window ends before the first of them.
            later = start + page + first_gap(mask[start + page :])
            end = min(later, begin + room, len(mask))
            now = mask[begin:end].clone().expand(len(text), -1)
            mask[begin:end] = False
            for draft in self._denoise(text[:, begin:end], now, how, generator):
                text[:, begin:end] = draft.ids
                settled = begin + draft.settled
                settled = first_gap(mask) if settled == end else settled
                yield Draft(text.clone(), settled, draft.note)

    def fill(
        self, text: str, *, gap: str = "_", seed: int | None = None, **settings: Any
    ) -> Iterator[Draft]:
        """Text with gaps in, drafts out: each `gap` sign is to be written: "To be, or ___ to be".

        Raises InputError for a text without gaps, a gap sign that is itself a character of the
        vocabulary, and as `infill` does.
        """
        vocabulary = vocabulary_of(self)
        if len(gap) != 1 or gap in vocabulary.characters:
            raise InputError(
                f"a gap is one sign that is not among the characters of the vocabulary; got {gap!r}"
            )
        if gap not in text:
            raise InputError(
                f"the text has no gap to fill: write {gap!r} for each character that is missing"
            )
        mask = torch.tensor([character == gap for character in text], device="cpu")
        ids = vocabulary.encode(text.replace(gap, vocabulary.characters[0]))[None]
        return self.infill(ids, mask, generator=seeded(self, seed), **settings)

    @torch.no_grad()
    def _denoise(
        self, ids: Ids, mask: Mask, how: Denoising, generator: Generator | None
    ) -> Iterator[Draft]:
        """One window: from noise to text where `mask` is True, a draft after each level."""
        normal = noise.normal(generator)
        alpha_bar = [1.0, *self.schedule.alpha_bar.tolist()]
        position = torch.arange(ids.shape[1], device=ids.device)
        x = normal(self.embeddings.new_empty(*ids.shape, self.config.channels))
        guess = None
        written = mask
        for tau, tau_next in pairwise([*how.levels, 0]):
            with evaluating(self, ids.numel()):
                level = torch.full((len(x),), tau, device=x.device)
                logits = self(x, level, ids, mask, guess)
                filtered = filter_logits(logits, **vars(how.sampling))
                guess = filtered.softmax(-1)  # p(character | x)
                likeliest = filtered.argmax(-1)
                x0 = self.embeddings[likeliest] if how.clamp else guess @ self.embeddings
                if how.guide is not None:
                    x0 = self._guided(x0, x, level, ids, mask, how)
                x = noise.step(
                    x0, x, alpha_bar[tau], alpha_bar[tau_next], eta=how.eta, noise=normal
                )
                nearest = (x @ self.embeddings.T).argmax(-1)
            ids = torch.where(mask, likeliest, ids)
            temperature = max(how.sampling.temperature, COLDEST)
            sure = (logits / temperature).softmax(-1).amax(-1)  # a filter makes no guess surer
            settled = leading(~mask | (sure > SURE))  # in each row
            mask = mask & (position >= settled[:, None])  # what has settled is known from here on
            note = {"level": tau, "sure": round(sure[written].mean().item(), 3)}
            if tau_next:
                first = min(settled.tolist(), default=ids.shape[1])
                yield Draft(torch.where(mask, nearest, ids), first, note)
            else:
                yield Draft(ids, ids.shape[1], note)

    def _guided(
        self, x0: Noisy, x: Noisy, level: Int[Tensor, "b"], ids: Ids, mask: Mask, how: Denoising
    ) -> Noisy:
        """The guess x0, moved by the guide, which sees known positions without their noise."""
        known = self.schedule.noise(self.embeddings[ids], level, torch.zeros_like(x))
        with torch.inference_mode(False):  # autograd cannot save tensors made in inference mode
            mask = mask.clone()
            known = known.clone()

        def guess(x: Tensor, level: Tensor) -> Tensor:
            return x0  # it has been made already

        def seen(x: Tensor, level: Tensor) -> Tensor:
            return how.guide(torch.where(mask[..., None], x, known), level)  # pyright: ignore

        return noise.guided(guess, seen, self.schedule, how.strength)(x, level)
