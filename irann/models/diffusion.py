"""Diffusion-LM: text out of noise. Every character is a point on a sphere; noise drowns the points; a network guesses them back.

Papers: Li et al. 2022, "Diffusion-LM" (arXiv 2205.14217) for diffusion on learned embeddings, rounding, clamping and
control; Dieleman et al. 2022, "Continuous diffusion for categorical data" (arXiv 2211.15089) for embeddings of one length,
cross-entropy as the loss and noise levels spent where it changes; Chen et al. 2022, "Analog Bits" (arXiv 2208.04202) for
self-conditioning. The mathematics is `core.noise`; this file adds what makes it work for characters:

| part                          | why                                                                                           |
|-------------------------------|-----------------------------------------------------------------------------------------------|
| embeddings on a sphere        | the noise cannot be outgrown (that no two share a point is the loss's work)                |
| the guess is a mean of points | softmax over characters, times their embeddings: never a point that means nothing             |
| Bayes at each place           | p(c | x) = p(x_here | c) p(c | x_elsewhere): the first factor is known exactly, so it is given |
| neighbours at the input       | spelling is local; attention need not learn it                                                |
| self-conditioning             | the last guess is shown again, so that the next one builds on it                              |
| clean places                  | a prompt is kept; text is continued, or filled in anywhere                                    |
| levels by learned quantiles   | most noise levels teach nothing: too clean or too dark                                        |

No causal mask: every place sees both sides. The training loss is a surrogate; `nll` is a bound of the likelihood.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import noise
from ..core.noise import Bound, Schedule
from ..layers import Block, init_fan_in, make_norm, rotary_table
from ..lm import LENGTH, SEED, Draft, LanguageModel, check_settings, evaluating, vocabulary_of
from ..sampling import filter_logits
from ..settings import Checked, InputError, Setting, check_heads, field

BINS = 50  # noise levels are told apart this finely when their loss is remembered


@dataclass(frozen=True)
class DiffusionConfig(Checked):
    """Sizes and options. `page` characters are written at once; longer texts are written page after page."""

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


class Diffusion(LanguageModel):
    """Guess every character of a window from a noisy picture of it, seeing both sides and the noise level."""

    exact = False
    no_decay = ("word_embedding",)
    settings = {
        "steps": Setting(64, "denoising steps for each page of text", low=1, high=1000),
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
        self.schedule = Schedule(c.schedule, c.levels)
        self.word_embedding = nn.Parameter(torch.empty(c.vocabulary, c.channels))
        seen = c.channels + c.vocabulary * (c.bayes + c.self_condition)
        self.input_proj = nn.Linear((2 * c.neighbours + 1) * seen, c.width, bias=False)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * 16, c.width), nn.SiLU(), nn.Linear(c.width, c.width)
        )
        self.clean_embed = nn.Parameter(torch.zeros(c.width))
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(
            Block(
                c.width,
                c.heads,
                causal=False,
                norm="plain",
                qk_norm=True,
                activation="squared_relu",
                bias=False,
                dropout=c.dropout,
            )
            for _ in range(c.layers)
        )
        self.ln_f = make_norm("plain", c.width)
        self.lm_head = nn.Linear(c.width, c.vocabulary)
        init_fan_in(self)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.normal_(self.word_embedding)
        self.register_buffer(
            "level_loss", torch.linspace(0, 1, BINS)
        )  # running mean of the cross-entropy in each bin of levels
        self.register_buffer("level_count", torch.zeros(BINS))

    # --- the points ---------------------------------------------------------------------------------------------------

    @property
    def embeddings(self) -> Tensor:
        """-> (v c): the characters' points, all at distance sqrt(c), so that a channel has variance one, like the noise."""
        return F.normalize(self.word_embedding, dim=-1) * math.sqrt(self.config.channels)

    def alone(self, x: Tensor, tau: Tensor) -> Tensor:
        """(b t c), (b) -> (b t v): log p(x_here | character) up to a constant: all that a place says about itself.

        The points have one length, so of the Gaussian's exponent only sqrt(alpha_bar) x . e / (1 - alpha_bar) is left.
        """
        ab = self.schedule.alpha_bar
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the factor grows beyond all bounds, and errors with it
            return self.schedule.at(ab.sqrt() / (1 - ab), tau, x) * (x @ self.embeddings.T)

    # --- the network --------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, tau: Tensor, ids: Tensor, mask: Tensor, hint: Tensor | None = None
    ) -> Tensor:
        """(b t c), (b), (b t), (b t), (b t v) -> (b t v): logits of every character given all the noisy ones.

        `mask` is True where text is to be written; elsewhere `ids` are known and replace the noise. `hint` is an earlier guess,
        as probabilities; None means none yet, all zeros.
        """
        c, known = self.config, F.one_hot(ids, self.config.vocabulary).to(x.dtype)
        here = mask[..., None]
        x = torch.where(here, x, self.embeddings[ids])
        alone = self.alone(x, tau)
        seen = [x]
        if c.bayes:
            seen.append(torch.where(here, alone.softmax(-1), known) * math.sqrt(c.vocabulary))
        if c.self_condition:
            seen.append(
                torch.where(here, known.new_zeros(()) if hint is None else hint, known)
                * math.sqrt(c.vocabulary)
            )
        h = self.input_proj(neighbourhood(torch.cat(seen, -1), c.neighbours))
        h = h + torch.where(
            here,
            self.time_embed(waves(self.schedule.at(self.schedule.snr.log(), tau, x))),
            self.clean_embed,
        )
        h = self.drop(h)
        turn = rotary_table(0, h.shape[1], c.width // c.heads, like=h)
        for block in self.h:
            h, _ = block(h, None, turn)
        logits = self.lm_head(self.ln_f(h))
        return logits + alone if c.bayes else logits

    def guess(self, x: Tensor, tau: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(b t c), (b), (b t), (b t) -> (b t v): `forward`, and once more with its own first answer as the hint."""
        logits = self(x, tau, ids, mask)
        return self(x, tau, ids, mask, logits.softmax(-1)) if self.config.self_condition else logits

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, ids: Tensor, draws=None) -> tuple[Tensor, dict[str, Tensor]]:
        """(b window+1) -> cross-entropy of the hidden characters at adaptive noise levels, plus rounding, in nats per character.

        A surrogate, not a likelihood. `bound_nats_per_char` among the parts is an unbiased one-draw estimate of the bound.
        """
        ids = self.check_ids(ids)
        rows = len(ids)
        mask = cover(*ids.shape, ids.device)
        tau, odds = self.draw_levels(rows)
        x0 = self.embeddings[ids]
        x = self.schedule.noise(x0, tau, torch.randn_like(x0))
        hint = None
        if self.config.self_condition:
            hint = x0.new_zeros(*ids.shape, self.config.vocabulary)
            half = (torch.rand(rows) < 0.5).nonzero()[:, 0]
            if len(half):
                with torch.no_grad():
                    hint[half] = self(x[half], tau[half], ids[half], mask[half]).softmax(-1)
        logits = self(x, tau, ids, mask, hint)
        nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        cross_entropy = nats[mask].mean()
        rounding = self.rounding(x0, ids, torch.randn_like(x0)).mean()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.training:
                self.remember(tau, (nats * mask).sum(1) / mask.sum(1))
            guess = logits.softmax(-1) @ self.embeddings
            step = noise.step_kl(self.schedule, x0, guess, tau).sum(-1) / odds[:, None]
            bound = (step + noise.prior_kl(self.schedule, x0).sum(-1))[mask].mean() + rounding
            mse = ((guess - x0)[mask] ** 2).mean()
        parts = {
            "cross_entropy": cross_entropy.detach(),
            "rounding": rounding.detach(),
            "mse": mse,
            "bound_nats_per_char": bound,
        }
        return cross_entropy + rounding, parts

    def rounding(self, x0: Tensor, ids: Tensor, eps: Tensor) -> Tensor:
        """(b t c), (b t) -> (b t): -log p(character | its point with the least noise), by Bayes and nothing else."""
        tau = torch.zeros(len(ids), dtype=torch.long)
        return F.cross_entropy(
            self.alone(self.schedule.noise(x0, tau, eps), tau).transpose(1, 2),
            ids,
            reduction="none",
        )

    # --- which noise levels -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def remember(self, tau: Tensor, nats: Tensor) -> None:
        """(b), (b): take note of the loss at these levels."""
        bins = (tau * BINS // self.config.levels).to(nats.device)
        nats = nats.detach().to(self.level_loss.dtype)
        count = torch.zeros_like(self.level_count).index_add_(0, bins, torch.ones_like(nats))
        total = torch.zeros_like(self.level_loss).index_add_(0, bins, nats)
        self.level_count += count
        rate = (count / self.level_count.clamp(min=1)).clamp(min=0.02) * (count > 0)
        self.level_loss += rate * (total / count.clamp(min=1) - self.level_loss)

    def level_odds(self) -> Tensor:
        """-> (T) of float64: how often each noise level is visited; level 0 never, for its step is the rounding.

        Nine tenths follow the rise of the remembered cross-entropy, smoothed and made to rise (Dieleman et al., section 4.2);
        one tenth is spread evenly, so that no level is forgotten.
        """
        even = torch.ones(BINS, dtype=torch.float64) / BINS
        if self.config.adaptive:
            curve = (
                F.pad(self.level_loss.cpu().double()[None], (2, 2), mode="replicate")
                .unfold(1, 5, 1)
                .mean(-1)[0]
                .cummax(0)
                .values
            )
            rise = curve.diff(prepend=curve[:1] * 0).clamp(min=0)
            even = 0.9 * rise / rise.sum().clamp(min=1e-9) + 0.1 * even
        width = self.config.levels / BINS
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), even.cumsum(0)])
        at = torch.arange(self.config.levels + 1, dtype=torch.float64) / width
        low = at.floor().long().clamp(max=BINS - 1)
        odds = (edges[low] + (at - low) * (edges[low + 1] - edges[low])).diff()
        odds[0] = 0
        return odds / odds.sum()

    def draw_levels(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> (b) noise levels, on the CPU like the schedule, and (b) their odds: one from each of `count` equal slices of
        probability, in random order."""
        odds = self.level_odds()
        drawn = {"generator": generator, "device": generator.device if generator else None}
        u = (
            torch.randperm(count, **drawn).cpu() + torch.rand(count, **drawn).cpu().double()
        ) / count  # MPS has no doubles
        tau = torch.searchsorted(odds.cumsum(0), u.clamp(max=1 - 1e-12), right=True).clamp(
            1, self.config.levels - 1
        )
        return tau, odds[tau].to(self.word_embedding)

    def timesteps(self, steps: int) -> list[int]:
        """-> `steps` decreasing noise levels, from the darkest down, equally likely apart: small strides where text takes shape."""
        top = self.config.levels - 1
        reached = self.level_odds().cumsum(0)
        taus = torch.searchsorted(
            reached, (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        ).tolist()
        taus[-1] = top
        for i in range(1, steps):
            taus[i] = max(taus[i], taus[i - 1] + 1)
        return [min(tau, top - (steps - 1 - i)) for i, tau in enumerate(taus)][::-1]

    # --- the bound ----------------------------------------------------------------------------------------------------

    def bound(
        self, ids: Tensor, *, generator: torch.Generator | None = None, draws: int = 4
    ) -> Bound:
        """(b t+1) -> Bound: the terms of an upper bound of -log p, in nats, for each character of `ids[:, 1:]`.

        `prior`, `reconstruction` and `total` are (b t); `steps` is (1 b t), the estimate of all noise levels' sum.

        Text is scored as it is written: page by page, each given the clean characters before it, so that the pages' bounds add
        up to one of the whole (chain rule). The sum over noise levels is estimated without bias from `draws` of them per page.
        """
        ids = self.check_ids(ids)
        if ids.shape[1] < 2:
            nothing = self.word_embedding.new_zeros(len(ids), 0)
            return Bound(nothing, nothing[None], nothing)
        parts = [
            self._page_bound(ids[:, : end + 1], start, generator, draws)
            for start, end in self.pages(1, ids.shape[1] - 1)
        ]
        return Bound(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))

    def pages(self, start: int, n: int) -> list[tuple[int, int]]:
        """-> first and last place of each page of the `n` places from `start`."""
        return [
            (a, min(a + self.config.page, start + n) - 1)
            for a in range(start, start + n, self.config.page)
        ]

    @torch.no_grad()
    def _page_bound(self, ids, start, generator, draws):
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, start:] = True
        x0, normal = self.embeddings[ids], noise.normal(generator)
        steps = 0
        tau, odds = (d.view(draws, -1) for d in self.draw_levels(draws * len(ids), generator))
        for level, odd in zip(tau, odds, strict=True):
            x = self.schedule.noise(x0, level, normal(x0))
            guess = self.guess(x, level, ids, mask).softmax(-1) @ self.embeddings
            steps = (
                steps
                + noise.step_kl(self.schedule, x0, guess, level).sum(-1) / odd[:, None] / draws
            )
        prior = noise.prior_kl(self.schedule, x0).sum(-1)
        return Bound(
            prior[:, start:], steps[None, :, start:], self.rounding(x0, ids, normal(x0))[:, start:]
        )

    def nll(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(b t+1) -> (b t): an upper bound, on average over the noise, of the nats of each character of `ids[:, 1:]`."""
        return self.bound(ids, generator=generator).total

    # --- writing ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Tensor,
        n: int,
        *,
        temperature=1.0,
        top_k=None,
        top_p=None,
        generator=None,
        steps=64,
        eta=1.0,
        clamp="off",
        guide: Callable[[Tensor, Tensor], Tensor] | None = None,
        strength: float = 1.0,
    ) -> Iterator[Draft]:
        """(b t) -> drafts: the prompt and a page of text that comes out of noise, then the next page.

        A character counts as settled once it and all before it are so sure that they are taken as known from then on. The
        note says how many characters of the prompt are `forgotten`, page by page: the window has no room for them.
        `guide(x_tau, tau) -> (b)` is the log probability of something wished for, given a noisy page (b t c): its gradient
        steers the page, `strength` times (see `noise.guided`).
        """
        n = LENGTH.check("length", n)
        dials = self._dials(temperature, top_k, top_p, steps, eta, clamp, guide, strength)
        prompt = self.check_ids(prompt)
        if prompt.shape[1] == 0:
            prompt = prompt.new_zeros(len(prompt), 1)
        page = torch.cat([prompt, prompt.new_zeros(len(prompt), n)], 1).to(self.device)
        return self._generate(page, prompt.shape[1], n, dials, generator)

    def _generate(self, page, start, n, dials, generator):
        room = self.config.window + 1
        forgotten = max(0, start + min(self.config.page, n) - room) if n else 0
        yield Draft(page[:, :start].clone(), start, forgotten=forgotten)
        for first, last in self.pages(start, n):
            left = max(0, last + 1 - room)  # what the window can no longer hold
            mask = torch.zeros(page.shape[0], last + 1 - left, dtype=torch.bool, device=page.device)
            mask[:, first - left :] = True
            for draft in self._denoise(page[:, left : last + 1], mask, dials, generator):
                page[:, left : last + 1] = draft.ids
                yield Draft(
                    page[:, : last + 1].clone(), left + draft.settled, draft.note, min(left, start)
                )

    def infill(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        temperature=1.0,
        top_k=None,
        top_p=None,
        generator=None,
        steps=64,
        eta=1.0,
        clamp="off",
        guide: Callable[[Tensor, Tensor], Tensor] | None = None,
        strength: float = 1.0,
    ) -> Iterator[Draft]:
        """(b t), (t) of bool -> drafts of the whole text: places where `mask` is True are written, all others are kept.

        What stands after a gap is seen as well as what stands before. A text beyond the window is filled in page after page,
        each with the text around it. Raises ValueError for a mask that does not fit.
        """
        dials = self._dials(temperature, top_k, top_p, steps, eta, clamp, guide, strength)
        ids = self.check_ids(ids)
        if mask.dtype != torch.bool or mask.shape != ids.shape[1:]:
            raise InputError(
                f"mask is bool of shape ({ids.shape[1]},), one for each place; got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        return self._infill(
            ids.to(self.device).clone(), mask.to(self.device).clone(), dials, generator
        )

    def _infill(self, page, mask, dials, generator):
        size, room = page.shape[1], self.config.window + 1
        yield Draft(page.clone(), size if not mask.any() else int(mask.nonzero()[0]), {})
        while mask.any():
            first = int(mask.nonzero()[0])
            left = max(0, min(first - (room - self.config.page) // 2, size - room))
            now = mask[left : left + room].clone()
            now[first - left + self.config.page :] = (
                False  # a later page's gaps are not this page's
            )
            later = mask[left : left + room] & ~now
            cut = left + (
                int(later.nonzero()[0]) if later.any() else len(now)
            )  # unwritten text must not be read
            now = now[: cut - left].expand(len(page), -1)
            for draft in self._denoise(page[:, left:cut], now, dials, generator):
                page[:, left:cut] = draft.ids
                done = draft.settled == cut - left
                settled = (
                    left + draft.settled
                    if not done
                    else size
                    if not later.any() and not mask[cut:].any()
                    else cut
                )
                yield Draft(page.clone(), settled, draft.note)
            mask[left:cut] = False

    def fill(
        self, text: str, *, gap: str = "_", seed: int | None = None, **settings
    ) -> Iterator[Draft]:
        """Text with gaps in, drafts out: every `gap` sign is a place to write, as in "To be, or ___ to be".

        Raises ValueError for a text without gaps, a gap sign that is itself a character of the vocabulary, and as `infill` does.
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
        generator = (
            None
            if seed is None
            else torch.Generator(self.device).manual_seed(SEED.check("seed", seed))
        )
        return self.infill(ids, mask, generator=generator, **check_settings(self, settings))

    def _dials(self, temperature, top_k, top_p, steps, eta, clamp, guide, strength):
        given = {"steps": steps, "eta": eta, "clamp": clamp}
        given = {name: self.settings[name].check(name, value) for name, value in given.items()}
        if given["steps"] > self.config.levels:
            raise InputError(
                f"steps is a whole number from 1 to {self.config.levels}, this model's noise levels; got {steps!r}"
            )
        if not math.isfinite(strength):
            raise InputError(f"strength is a finite number; got {strength!r}")
        odds = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        filter_logits(torch.zeros(1), **odds)
        return given | {"odds": odds, "guide": guide, "strength": strength}

    @torch.no_grad()
    def _denoise(self, ids, mask, dials, generator):
        """One window: from noise to text where `mask` is True, as drafts of the window."""
        ids, mask, normal = ids.clone(), mask.clone(), noise.normal(generator)
        logits, hint, sure = None, None, None

        def denoiser(x, tau):
            nonlocal logits, hint, sure
            with evaluating(self):
                believed = self(x, tau, ids, mask, hint)
            logits = filter_logits(believed, **dials["odds"])
            sure = (
                (believed / max(dials["odds"]["temperature"], COLDEST)).softmax(-1).amax(-1)
            )  # a filter makes no guess surer
            hint = logits.softmax(-1)
            if dials["clamp"] == "on":
                return self.embeddings[logits.argmax(-1)]
            return hint @ self.embeddings

        def guide(x, tau):  # is shown the known places where they would stand without noise
            still = self.schedule.noise(self.embeddings[ids], tau, torch.zeros_like(x))
            return dials["guide"](torch.where(mask[..., None], x, still), tau)

        walker = (
            denoiser
            if dials["guide"] is None
            else noise.guided(denoiser, guide, self.schedule, dials["strength"])
        )
        taus = self.timesteps(dials["steps"])
        x = normal(self.embeddings.new_empty(*ids.shape, self.config.channels))
        for tau, x in zip(
            taus,
            noise.sample(walker, x, self.schedule, timesteps=taus, eta=dials["eta"], noise=normal),
            strict=True,
        ):  # noqa: B020
            likeliest = logits.argmax(-1)
            last = tau == taus[-1]
            ids = torch.where(mask, likeliest, ids)
            settled = (
                ids.shape[1]
                if last
                else int((~mask | (sure > SURE)).all(0).long().cumprod(0).sum())
            )
            mask[:, :settled] = False  # from here on it is known
            shown = ids if last else torch.where(mask, (x @ self.embeddings.T).argmax(-1), ids)
            yield Draft(shown, settled, {"level": tau, "sure": round(sure.mean().item(), 3)})


SURE = 0.9999  # a place this sure is taken as known
COLDEST = 0.5  # the least temperature at which that is judged: colder, any guess looks sure, even the first


def neighbourhood(x: Tensor, reach: int) -> Tensor:
    """(b t seen) -> (b t (2 reach + 1) seen): every place beside its neighbours, zeros beyond the ends."""
    t = x.shape[1]
    x = F.pad(x, (0, 0, reach, reach))
    return torch.cat([x[:, i : i + t] for i in range(2 * reach + 1)], -1)


def waves(level: Tensor) -> Tensor:
    """(b 1 1) -> (b 1 32): a noise level (log signal-to-noise) as sines and cosines from slow to fast."""
    angle = level * torch.logspace(-1.5, 0.5, 16, dtype=level.dtype).to(level.device)
    return torch.cat([angle.sin(), angle.cos()], -1)


def cover(rows: int, places: int, device=None) -> Tensor:
    """-> (b t) of bool, True where text is hidden: half the rows after a random place, a quarter between two, a quarter all but the first.

    The first place is never hidden: something must come before the text, if only a newline.
    """
    a, b = (
        (1 + torch.rand(2, rows, 1, device=device) * (places - 1)).long().clamp(max=places - 1)
    )  # a float just below 1 rounds up
    place = torch.arange(places, device=device)
    kind = torch.rand(rows, 1, device=device)
    after = place >= a
    between = (place >= torch.minimum(a, b)) & (place <= torch.maximum(a, b))
    return torch.where(kind < 0.5, after, torch.where(kind < 0.75, between, place >= 1))
