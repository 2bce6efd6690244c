"""Diffusion-LM: text out of noise. Every character is a point on a sphere; noise drowns the points; a network guesses them back.

Papers: Li et al. 2022, "Diffusion-LM" (arXiv 2205.14217) for diffusion on learned embeddings, rounding, clamping
and control; Dieleman et al. 2022, "Continuous diffusion for categorical data" (arXiv 2211.15089) for embeddings of
one length, cross-entropy as the loss and noise levels spent where it changes; Chen et al. 2022, "Analog Bits"
(arXiv 2208.04202) for self-conditioning. The mathematics is `core.noise`, with levels tau = 1 .. T and clean data
x_0; this file adds what makes it work for characters:

| part                      | why                                                                                   |
|---------------------------|---------------------------------------------------------------------------------------|
| embeddings on a sphere    | noise cannot be outgrown (that no two share a point is the work of the loss)          |
| the guess is a mean       | softmax over characters, times their embeddings: never a point that means nothing     |
| Bayes at each position    | p(c | x) = p(x_t | c) p(c | x elsewhere): the first factor is known exactly, so given |
| neighbours at the input   | spelling is local; attention need not learn it                                        |
| self-conditioning         | the last guess is shown again, so that the next one builds on it                      |
| clean positions           | a prompt is kept; text is continued, or filled in anywhere                            |
| levels by learned quantiles | most noise levels teach nothing: too little noise or too much                       |

No causal mask: every position sees both sides. The training loss is a surrogate; `nll` is a bound of the likelihood.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import noise
from ..core.noise import Bound, Schedule
from ..layers import Block, init_fan_in, make_norm, rotary_table
from ..lm import (
    Draft,
    LanguageModel,
    check_settings,
    cross_entropy,
    evaluating,
    leading,
    page_by_page,
    seeded,
    vocabulary_of,
)
from ..sampling import check_sampling, filter_logits
from ..settings import Checked, InputError, Setting, check_heads, field

BINS = 50  # noise levels are told apart this finely when their loss is remembered
SURE = 0.9999  # a character of this probability is taken as known
COLDEST = 0.5  # the least temperature at which that is judged: colder, any guess looks sure, even the first
STEPS = Setting(64, "denoising steps for each page of text", low=1, high=1000)
Guide = Callable[[Tensor, Tensor], Tensor]  # x_tau (b t c), tau (b) -> a log probability (b)


@dataclass(frozen=True)
class DiffusionConfig(Checked):
    """Sizes and options. `page` characters are written at once; longer texts page after page."""

    vocabulary: int = field(65, "different characters", low=2)
    window: int = field(128, "characters seen at once", low=1)
    page: int = field(64, "characters written at once", low=1)
    layers: int = field(4, "Transformer blocks", low=1)
    heads: int = field(2, "attention heads of a block", low=1)
    width: int = field(128, "of the residual stream", low=1)
    dropout: float = field(0.0, "of the residual stream's updates", low=0.0, high=1.0)
    channels: int = field(
        16, "of a character's embedding, whose squared length is the same number", low=2
    )
    neighbours: int = field(2, "positions on each side that a position sees at the input", low=0)
    schedule: str = field("cosine", "how fast the signal drowns", choices=Schedule.names)
    levels: int = field(1000, "noise levels, T", low=BINS)
    bayes: bool = field(True, "give the exact posterior of each position")
    self_condition: bool = field(True, "show the last guess to the next one")
    adaptive: bool = field(True, "spend noise levels where the loss changes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page > self.window:
            raise InputError(
                f"a page fits into the window of {self.window} characters; got {self.page}"
            )
        check_heads(self.width, self.heads, rotary=True)


@dataclass(frozen=True)
class Denoising:
    """How a page is written; made from keyword arguments, and checked, by `Diffusion.denoising`."""

    levels: list[int]  # noise levels, decreasing
    eta: float
    clamp: bool
    sampling: dict  # temperature, top_k, top_p
    guide: Guide | None
    strength: float


class Diffusion(LanguageModel):
    """Guess every character of a window from noisy embeddings, seeing both sides and the noise level."""

    exact = False
    no_decay = ("word_embedding",)  # only its direction is used
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
        c = config
        steps = replace(STEPS, default=min(STEPS.default, c.levels), high=c.levels)
        self.settings = type(self).settings | {"steps": steps}
        self.schedule = Schedule(c.schedule, c.levels)
        self.word_embedding = nn.Parameter(torch.empty(c.vocabulary, c.channels))
        seen = c.channels + c.vocabulary * (c.bayes + c.self_condition)
        self.input_proj = nn.Linear((2 * c.neighbours + 1) * seen, c.width, bias=False)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * 16, c.width), nn.SiLU(), nn.Linear(c.width, c.width)
        )
        self.clean_embed = nn.Parameter(torch.zeros(c.width))
        self.drop = nn.Dropout(c.dropout)
        options = dict(norm="plain", qk_norm=True, activation="squared_relu", bias=False)
        self.h = nn.ModuleList(
            Block(c.width, c.heads, causal=False, dropout=c.dropout, **options)
            for _ in range(c.layers)
        )
        self.ln_f = make_norm("plain", c.width)
        self.lm_head = nn.Linear(c.width, c.vocabulary)
        init_fan_in(self)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.normal_(self.word_embedding)
        # The running mean of the cross-entropy in each bin of levels, and how many rows it has seen.
        self.register_buffer("level_loss", torch.linspace(0, 1, BINS))
        self.register_buffer("level_count", torch.zeros(BINS))
        self.register_buffer("observations", torch.zeros(2, BINS), persistent=False)

    # --- the embeddings -------------------------------------------------------------------------

    @property
    def embeddings(self) -> Float[Tensor, "v c"]:
        """The characters' points, all at distance sqrt(c): a channel has variance one, like the noise."""
        return F.normalize(self.word_embedding, dim=-1) * math.sqrt(self.config.channels)

    def log_likelihood(
        self, x: Float[Tensor, "b t c"], tau: Int[Tensor, "#b"] | int
    ) -> Float[Tensor, "b t v"]:
        """log p(x_t | character) up to a constant: what a position says about itself, alone.

        The embeddings have one length, so of the Gaussian's exponent only sqrt(alpha_bar) x . e / (1 - alpha_bar) is left.
        """
        alpha_bar = self.schedule.alpha_bar
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the factor and its errors grow beyond all bounds
            factor = self.schedule.at(alpha_bar.sqrt() / (1 - alpha_bar), tau, x)
            return factor * (x @ self.embeddings.T)

    # --- the network ----------------------------------------------------------------------------

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        tau: Int[Tensor, "#b"],
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        previous_guess: Float[Tensor, "b t v"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of every character given all the noisy ones.

        `mask` is True where text is to be written; elsewhere `ids` are known and replace the noise. `previous_guess`
        are probabilities; None means none yet, all zeros.
        """
        c = self.config
        masked = mask[..., None]
        known = F.one_hot(ids, c.vocabulary).to(x.dtype)
        x = torch.where(masked, x, self.embeddings[ids])
        log_likelihood = self.log_likelihood(x, tau)
        seen = [x]
        if c.bayes:
            posterior = torch.where(masked, log_likelihood.softmax(-1), known)
            seen.append(posterior * math.sqrt(c.vocabulary))
        if c.self_condition:
            none = known.new_zeros(())
            guess = torch.where(masked, none if previous_guess is None else previous_guess, known)
            seen.append(guess * math.sqrt(c.vocabulary))
        h = self.input_proj(neighbourhood(torch.cat(seen, -1), c.neighbours))
        log_snr = self.schedule.at(self.schedule.snr.log(), tau, x)
        h = h + torch.where(masked, self.time_embed(sinusoids(log_snr)), self.clean_embed)
        h = self.drop(h)
        rotary = rotary_table(0, h.shape[1], c.width // c.heads, like=h)
        for block in self.h:
            h, _ = block(h, None, rotary)
        logits = self.lm_head(self.ln_f(h))
        return logits + log_likelihood if c.bayes else logits

    def guess(
        self,
        x: Float[Tensor, "b t c"],
        tau: Int[Tensor, "#b"],
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t v"]:
        """`forward`, and once more with its own first answer as the previous guess."""
        logits = self(x, tau, ids, mask)
        return self(x, tau, ids, mask, logits.softmax(-1)) if self.config.self_condition else logits

    # --- training -------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(
        self, ids: Int[Tensor, "b t"], *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Mask, noise level and its probability, noise, and who is self-conditioned. `weight` makes the mean over all
        positions of all rows one over the masked positions."""
        self.absorb()
        device = ids.device
        mask = draw_mask(*ids.shape, device=device, generator=generator)
        tau, p = self.draw_levels(len(ids), generator)
        x0 = self.word_embedding.new_empty(*ids.shape, self.config.channels, device=device)
        normal = noise.normal(generator)
        eps = normal(x0)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        self_conditioned = (
            torch.rand(len(ids), generator=generator, device=_device(generator)) < 0.5
        )
        return {
            "mask": mask,
            "weight": mask.to(dtype) / mask.to(dtype).mean(),
            "tau": tau.to(device),
            "p": p.to(device),
            "eps": eps,
            "self_conditioned": self_conditioned.to(device),
            "eps_rounding": normal(x0),
        }

    def loss(
        self, ids: Int[Tensor, "b t"], draws: dict[str, Any] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of the masked characters at adaptive noise levels, plus rounding, in nats per character.

        A surrogate, not a likelihood. `bound_nats_per_char` among the parts is an unbiased one-draw estimate of the bound.
        """
        ids = self.check_ids(ids)
        draws = self.draw(ids) if draws is None else draws
        mask, tau, weight = draws["mask"], draws["tau"], draws["weight"]
        x0 = self.embeddings[ids]
        x = self.schedule.noise(x0, tau, draws["eps"])
        previous = self._previous_guess(x, tau, ids, mask, draws["self_conditioned"])
        logits = self(x, tau, ids, mask, previous)
        nll = cross_entropy(logits, ids)
        rounding = self.rounding(x0, ids, draws["eps_rounding"]).mean()
        loss = (nll * weight).mean() + rounding
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.training:
                self._observe(tau, (nll * mask).sum(1) / mask.sum(1))
            guess = logits.softmax(-1) @ self.embeddings
            step = noise.step_kl(self.schedule, x0, guess, tau).sum(-1) / draws["p"][:, None]
            bound = step + noise.prior_kl(self.schedule, x0).sum(-1)
            parts = {
                "cross_entropy": (nll * weight).mean(),
                "rounding": rounding.detach(),
                "mse": ((guess - x0).square().mean(-1) * weight).mean(),
                "bound_nats_per_char": (bound * weight).mean() + rounding,
            }
        return loss, parts

    @torch.no_grad()
    def _previous_guess(self, x, tau, ids, mask, self_conditioned):
        """The first guess of the rows that are self-conditioned, zeros for the others; computed for those rows alone."""
        if not self.config.self_condition:
            return None
        rows = self_conditioned.nonzero()[:, 0]
        guess = x.new_zeros(*ids.shape, self.config.vocabulary)
        first = self(x[rows], tau[rows], ids[rows], mask[rows]).softmax(-1)
        return guess.index_copy(0, rows, first.to(guess.dtype))

    def rounding(
        self, x0: Float[Tensor, "b t c"], ids: Int[Tensor, "b t"], eps: Float[Tensor, "b t c"]
    ) -> Float[Tensor, "b t"]:
        """-log p(character | x_1), by Bayes and nothing else."""
        return cross_entropy(self.log_likelihood(self.schedule.noise(x0, 1, eps), 1), ids)

    # --- which noise levels ---------------------------------------------------------------------

    def _observe(self, tau, nll):
        bins = (tau - 1) * BINS // self.config.levels
        seen = torch.stack([torch.ones_like(nll), nll]).to(self.observations.dtype)
        self.observations.index_add_(1, bins, seen)

    def observed(self) -> list[Tensor]:
        return [self.observations]

    @torch.no_grad()
    def absorb(self) -> None:
        """Move the remembered loss of each bin of levels towards what the last step has seen."""
        count, total = self.observations
        self.level_count += count
        rate = (count / self.level_count.clamp(min=1)).clamp(min=0.02) * (count > 0)
        self.level_loss += rate * (total / count.clamp(min=1) - self.level_loss)
        self.observations.zero_()

    def level_probabilities(self) -> Float[Tensor, "T"]:
        """float64: how often each noise level is visited; level 1 never, for its step is the rounding.

        Nine tenths follow the rise of the remembered cross-entropy, smoothed and made monotone (Dieleman et al., section
        4.2); one tenth is uniform, so that no level is forgotten.
        """
        p = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
        if self.config.adaptive:
            curve = F.pad(self.level_loss.cpu().double()[None], (2, 2), mode="replicate")[0]
            curve = curve.unfold(0, 5, 1).mean(-1).cummax(0).values
            rise = curve.diff(prepend=curve.new_zeros(1)).clamp(min=0)
            p = 0.9 * rise / rise.sum().clamp(min=1e-9) + 0.1 * p
        edges = F.pad(
            p.cumsum(0), (1, 0)
        )  # the distribution function at the bins' edges, linear between them
        at = torch.arange(self.config.levels + 1, dtype=torch.float64) / (self.config.levels / BINS)
        low = at.floor().long().clamp(max=BINS - 1)
        p = (edges[low] + (at - low) * (edges[low + 1] - edges[low])).diff()
        p[0] = 0
        return p / p.sum()

    def draw_levels(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "{count}"], Float[Tensor, "{count}"]]:
        """Noise levels and their probabilities, on the CPU: one from each of `count` equal slices of probability, in
        random order."""
        p = self.level_probabilities()
        device = _device(generator)
        order = torch.randperm(count, generator=generator, device=device).cpu()
        offset = torch.rand(count, generator=generator, device=device).cpu().double()
        u = ((order + offset) / count).clamp(max=1 - 1e-12)
        index = torch.searchsorted(p.cumsum(0), u, right=True).clamp(1, self.config.levels - 1)
        return index + 1, p[index].to(self.word_embedding.dtype)

    def timesteps(self, steps: int) -> list[int]:
        """`steps` decreasing noise levels from T down, equally likely apart: small strides where text takes shape."""
        u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        levels = (torch.searchsorted(self.level_probabilities().cumsum(0), u) + 1).tolist()
        levels[-1] = self.config.levels
        for i in range(1, steps):
            levels[i] = max(levels[i], levels[i - 1] + 1)
        return [min(tau, self.config.levels - i) for i, tau in enumerate(reversed(levels))]

    # --- the bound ------------------------------------------------------------------------------

    @torch.no_grad()
    def bound(
        self, ids: Int[Tensor, "b t+1"], *, generator: torch.Generator | None = None, draws: int = 4
    ) -> Bound:
        """The terms of an upper bound of -log p, in nats, for each character of `ids[:, 1:]`.

        `prior`, `reconstruction` and `total` are (b t); `steps` is (1 b t), the estimate of the sum over noise levels.
        Text is scored as it is written: page by page, each given the clean characters before it, so that the pages'
        bounds add up to one of the whole (chain rule). The sum over noise levels is estimated without bias from `draws`
        of them per page.
        """
        ids = self.check_ids(ids)
        nothing = self.word_embedding.new_zeros(len(ids), 0)
        parts = [(nothing, nothing[None], nothing)]
        for start in range(1, ids.shape[1], self.config.page):
            page = ids[:, : start + self.config.page]
            parts.append(self._page_bound(page, start, generator, draws))
        return Bound(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))

    def _page_bound(self, ids, start, generator, draws):
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, start:] = True
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
        return prior[:, start:], steps[None, :, start:], rounding[:, start:]

    def nll(
        self, ids: Int[Tensor, "b t+1"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b t"]:
        """An upper bound, on average over the noise, of the nats of each character of `ids[:, 1:]`."""
        bound = self.bound(ids, generator=generator)
        return bound.prior + bound.steps[0] + bound.reconstruction

    # --- writing --------------------------------------------------------------------------------

    def denoising(
        self, *, guide: Guide | None = None, strength: float = 1.0, **given: Any
    ) -> Denoising:
        """The arguments of `generate` and `infill`, checked: temperature, top_k, top_p, those of `settings`, and a guide.

        `guide(x_tau, tau) -> (b)` is the log probability of something wished for, given noisy embeddings (b t c): its
        gradient steers the page, `strength` times (see `noise.guided`). Raises InputError that names one out of range.
        """
        own = {name: given.pop(name, s.default) for name, s in self.settings.items()}
        own = {name: self.settings[name].check(name, value) for name, value in own.items()}
        if not math.isfinite(strength):
            raise InputError(f"strength is a finite number; got {strength!r}")
        return Denoising(
            levels=self.timesteps(own["steps"]),
            eta=own["eta"],
            clamp=own["clamp"] == "on",
            sampling=check_sampling(**given),
            guide=guide,
            strength=strength,
        )

    def generate(
        self,
        prompt: Int[Tensor, "b t"],
        n: int,
        *,
        generator: torch.Generator | None = None,
        **how: Any,
    ) -> Iterator[Draft]:
        """The prompt, and a page of text that comes out of noise, then the next page; `how` is what `denoising` takes.

        In each row a character is settled once it and all before it are so sure that they are taken as known from then on.
        """
        chosen = self.denoising(**how)

        def write(ids: Tensor, mask: Tensor) -> Iterator[Draft]:
            return self._denoise(ids, mask, chosen, generator)

        return page_by_page(self, prompt, n, self.config.page, write)

    def infill(
        self,
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "positions"],
        *,
        generator: torch.Generator | None = None,
        **how: Any,
    ) -> Iterator[Draft]:
        """Drafts of the whole text: positions where `mask` is True are written, all others are kept.

        What stands after a gap is seen as well as what stands before. A text beyond the window is filled in page after
        page, each with the text around it. Raises InputError for a mask that does not fit.
        """
        chosen = self.denoising(**how)
        ids = self.check_ids(ids)
        if mask.dtype != torch.bool or mask.shape != ids.shape[1:]:
            raise InputError(
                f"mask is bool of shape ({ids.shape[1]},), one for each position; got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        text, mask = ids.to(self.device).clone(), mask.to(self.device).clone()
        return self._infill(text, mask, chosen, generator)

    def _infill(self, text, mask, how, generator):
        room = self.config.window + 1
        page = self.config.page
        yield Draft(text.clone(), first_gap(mask))
        while mask.any():
            start = first_gap(mask)
            begin = max(0, min(start - (room - page) // 2, len(mask) - room))
            now = mask[begin : begin + room].clone()
            now[start - begin + page :] = False  # what a later page is to write
            end = begin + first_gap(mask[begin : begin + room] & ~now)  # it must not be read before
            mask[begin:end] = False
            now = now[: end - begin].expand(len(text), -1)
            for draft in self._denoise(text[:, begin:end], now, how, generator):
                text[:, begin:end] = draft.ids
                settled = begin + draft.settled
                settled = first_gap(mask) if settled == end else settled
                yield Draft(text.clone(), settled, draft.note)

    def fill(
        self, text: str, *, gap: str = "_", seed: int | None = None, **settings: Any
    ) -> Iterator[Draft]:
        """Text with gaps in, drafts out: every `gap` sign is a position to write, as in "To be, or ___ to be".

        Raises InputError for a text without gaps, a gap sign that is itself a character of the vocabulary, and as
        `infill` does.
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
        mask = torch.tensor([character == gap for character in text])
        ids = vocabulary.encode(text.replace(gap, vocabulary.characters[0]))[None]
        settings = check_settings(self, settings)
        return self.infill(ids, mask, generator=seeded(self, seed), **settings)

    @torch.no_grad()
    def _denoise(self, ids, mask, how, generator):
        """One window: from noise to text where `mask` is True, a draft of it after each noise level."""
        normal = noise.normal(generator)
        alpha_bar = [1.0, *self.schedule.alpha_bar.tolist()]
        position = torch.arange(ids.shape[1], device=ids.device)
        x = normal(self.embeddings.new_empty(*ids.shape, self.config.channels))
        guess = None
        for tau, tau_next in pairwise([*how.levels, 0]):
            with evaluating(self):
                level = torch.full((len(x),), tau, device=x.device)
                logits = self(x, level, ids, mask, guess)
                filtered = filter_logits(logits, **how.sampling)
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
            temperature = max(how.sampling["temperature"], COLDEST)
            sure = (logits / temperature).softmax(-1).amax(-1)  # a filter makes no guess surer
            settled = leading(~mask | (sure > SURE))  # in each row
            mask = mask & (position >= settled[:, None])  # what has settled is known from here on
            note = {"level": tau, "sure": round(sure.mean().item(), 3)}
            if tau_next:
                yield Draft(torch.where(mask, nearest, ids), int(settled.min()), note)
            else:
                yield Draft(ids, ids.shape[1], note)

    def _guided(self, x0, x, level, ids, mask, how):
        """The guess x0, moved by the guide, to which known positions are shown where they would be without noise."""
        known = self.schedule.noise(self.embeddings[ids], level, torch.zeros_like(x))

        def seen(x: Tensor, level: Tensor) -> Tensor:
            return how.guide(torch.where(mask[..., None], x, known), level)

        return noise.guided(lambda x, level: x0, seen, self.schedule, how.strength)(x, level)


def first_gap(mask: Bool[Tensor, "t"]) -> int:
    """The first position that is to be written; the length where there is none."""
    return int(leading(~mask[None]))


def neighbourhood(x: Float[Tensor, "b t channels"], reach: int) -> Float[Tensor, "b t neighbours"]:
    """Every position beside its neighbours, (2 reach + 1) times the channels; zeros beyond the ends."""
    t = x.shape[1]
    x = F.pad(x, (0, 0, reach, reach))
    return torch.cat([x[:, i : i + t] for i in range(2 * reach + 1)], -1)


def sinusoids(level: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 32"]:
    """A noise level (log signal-to-noise ratio) as sines and cosines from slow to fast."""
    angle = level * torch.logspace(-1.5, 0.5, 16, dtype=level.dtype).to(level.device)
    return torch.cat([angle.sin(), angle.cos()], -1)


def draw_mask(
    rows: int, length: int, *, device: Any = None, generator: torch.Generator | None = None
) -> Bool[Tensor, "{rows} {length}"]:
    """True where text is masked: in half of the rows after a random position, in a quarter between two, in a quarter all
    but the first. The first is never masked: something must come before the text, if only a newline.
    """
    uniform = partial(torch.rand, generator=generator, device=device)
    ends = (1 + uniform(2, rows, 1) * (length - 1)).long()
    a, b = ends.clamp(max=length - 1)  # a float just below 1 rounds up
    kind = uniform(rows, 1)
    position = torch.arange(length, device=device)
    between = (position >= torch.minimum(a, b)) & (position <= torch.maximum(a, b))
    return torch.where(kind < 0.5, position >= a, torch.where(kind < 0.75, between, position >= 1))


def _device(generator):
    return None if generator is None else generator.device
