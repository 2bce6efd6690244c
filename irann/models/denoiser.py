"""The network of Diffusion-LM: it guesses a window's characters from noisy embeddings of them all.

What it consists of, why, and from which papers, stands at the top of `diffusion.py`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..core.noise import Schedule
from ..layers import FAST, Block, check_heads, check_window, init_fan_in, make_norm, rotary_table
from ..lm import Ids, LanguageModel, cross_entropy, leading
from ..settings import Checked, InputError, field

BINS = 50  # noise levels are told apart this finely when their loss is remembered


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


class Denoiser(LanguageModel):
    """Embeddings on a sphere; characters' logits given noisy ones, both sides, the noise level."""

    no_decay = ("word_embedding",)  # only its direction is used

    # For each bin of levels: running mean cross-entropy, rows seen; this step's counts and sums.
    level_loss: Float[Tensor, " bins"]
    level_count: Float[Tensor, " bins"]
    observations: Float[Tensor, "2 bins"]

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.schedule = Schedule(config.schedule, config.levels)
        self.word_embedding = nn.Parameter(torch.empty(config.vocabulary, config.channels))
        seen = config.channels + config.vocabulary * (config.bayes + config.self_condition)
        self.input_proj = nn.Linear((2 * config.neighbours + 1) * seen, config.width, bias=False)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * 16, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.clean_embed = nn.Parameter(torch.zeros(config.width))
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(config.width, config.heads, causal=False, dropout=config.dropout, **FAST)
            for _ in range(config.layers)
        )
        self.ln_f = make_norm("plain", config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary)
        init_fan_in(self)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.normal_(self.word_embedding)
        # at first as if the loss rose evenly: all levels alike
        self.register_buffer("level_loss", torch.linspace(0, 1, BINS))
        self.register_buffer("level_count", torch.zeros(BINS))
        self.register_buffer("observations", torch.zeros(2, BINS), persistent=False)

    @property
    def embeddings(self) -> Float[Tensor, "v c"]:
        """The characters' points, at distance sqrt(c): a channel has variance one, like noise."""
        return F.normalize(self.word_embedding, dim=-1) * math.sqrt(self.config.channels)

    def log_likelihood(
        self, x: Float[Tensor, "b t c"], tau: Int[Tensor, "#b"] | int
    ) -> Float[Tensor, "b t v"]:
        """log p(x_tau | character) up to a constant: what a position says about itself, alone.

        The embeddings have one length, so of the Gaussian's exponent only sqrt(alpha_bar) x . e /
        (1 - alpha_bar) is left.
        """
        alpha_bar = self.schedule.alpha_bar
        # Not in half precision: the factor, and errors with it, grow beyond all bounds.
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            factor = self.schedule.at(alpha_bar.sqrt() / (1 - alpha_bar), tau, wide)
            log_p = factor * (wide @ self.embeddings.to(wide).T)
            if wide.dtype == x.dtype:
                return log_p
            log_p = log_p - log_p.amax(-1, keepdim=True)  # what half precision has room for
            return log_p.clamp(min=torch.finfo(x.dtype).min).to(x.dtype)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        tau: Int[Tensor, "#b"],
        ids: Ids,
        mask: Bool[Tensor, "b t"],
        previous_guess: Float[Tensor, "b t v"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of every character given all the noisy ones.

        `mask` is True where text is to be written; elsewhere `ids` are known and replace the noise.
        `previous_guess` are probabilities; None means none yet, all zeros.
        """
        config = self.config
        check_window(config.window + 1, 0, ids.shape[1])
        masked = mask[..., None]
        known = F.one_hot(ids, config.vocabulary).to(x.dtype)
        x = torch.where(masked, x, self.embeddings[ids])
        log_likelihood = self.log_likelihood(x, tau)
        seen = [x]
        if config.bayes:
            posterior = torch.where(masked, log_likelihood.softmax(-1), known)
            # a one-hot row then has mean square one, as the embeddings have
            seen.append(posterior * math.sqrt(config.vocabulary))
        if config.self_condition:
            none = known.new_zeros(())
            guess = torch.where(masked, none if previous_guess is None else previous_guess, known)
            seen.append(guess * math.sqrt(config.vocabulary))
        residual = self.input_proj(neighbourhood(torch.cat(seen, -1), config.neighbours))
        log_snr = self.schedule.at(self.schedule.snr.log(), tau, x)
        time = torch.where(masked, self.time_embed(sinusoids(log_snr)), self.clean_embed)
        residual = self.drop(residual + time)
        rotary = rotary_table(0, residual.shape[1], config.width // config.heads, like=residual)
        for block in self.h:
            residual, _ = block(residual, None, rotary)
        logits = self.lm_head(self.ln_f(residual))
        return logits + log_likelihood if config.bayes else logits

    def guess(
        self, x: Float[Tensor, "b t c"], tau: Int[Tensor, "#b"], ids: Ids, mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t v"]:
        """`forward`, and once more with its own first answer as the previous guess."""
        logits = self(x, tau, ids, mask)
        return self(x, tau, ids, mask, logits.softmax(-1)) if self.config.self_condition else logits

    def rounding(
        self, x0: Float[Tensor, "b t c"], ids: Ids, eps: Float[Tensor, "b t c"]
    ) -> Float[Tensor, "b t"]:
        """-log p(character | x_1), by Bayes and nothing else."""
        return cross_entropy(self.log_likelihood(self.schedule.noise(x0, 1, eps), 1), ids)

    # --- which noise levels ---------------------------------------------------------------------

    def _observe(self, tau: Int[Tensor, "b"], nll: Float[Tensor, "b"]) -> None:
        bins = (tau - 1) * BINS // self.config.levels
        seen = torch.stack([torch.ones_like(nll), nll]).to(self.observations.dtype)
        self.observations.index_add_(1, bins, seen)

    @torch.no_grad()
    def previous_guess(
        self,
        x: Float[Tensor, "b t c"],
        tau: Int[Tensor, "b"],
        ids: Ids,
        mask: Bool[Tensor, "b t"],
        self_conditioned: Bool[Tensor, "b"],
    ) -> Float[Tensor, "b t v"] | None:
        """First guess of the self-conditioned rows, computed for those alone; zeros for others."""
        if not self.config.self_condition:
            return None
        rows = self_conditioned.nonzero()[:, 0]
        guess = x.new_zeros(*ids.shape, self.config.vocabulary)
        first = self(x[rows], tau[rows], ids[rows], mask[rows]).softmax(-1)
        torch.clear_autocast_cache()  # torch 2.10 would keep weights without gradient
        return guess.index_copy(0, rows, first.to(guess.dtype))

    def observed(self) -> list[Tensor]:
        return [self.observations]

    @torch.no_grad()
    def absorb(self) -> None:
        """Move the remembered loss of each bin of levels towards what the last step has seen."""
        if self.observations.is_meta:  # no state_dict has them
            self.observations = self.level_loss.new_zeros(2, BINS)
        count, total = self.observations
        count = count * total.isfinite()  # a step that failed leaves no trace
        total = total.nan_to_num(0, 0, 0)
        self.level_count += count
        rate = (count / self.level_count.clamp(min=1)).clamp(min=0.02) * (count > 0)
        self.level_loss += rate * (total / count.clamp(min=1) - self.level_loss)
        self.observations.zero_()

    def level_probabilities(self) -> Float[Tensor, "T"]:
        """float64: how often each noise level is visited; never level 1: its step is the rounding.

        Nine tenths follow the rise of the remembered cross-entropy, smoothed and made monotone
        (the time warping of Dieleman et al.); one tenth is uniform, so that no level is forgotten.
        """
        p = torch.full((BINS,), 1 / BINS, dtype=torch.float64, device="cpu")
        if self.config.adaptive:
            curve = F.pad(self.level_loss.cpu().double()[None], (2, 2), mode="replicate")[0]
            curve = curve.unfold(0, 5, 1).mean(-1).cummax(0).values
            rise = curve.diff(prepend=curve.new_zeros(1)).clamp(min=0)
            p = 0.9 * rise / rise.sum().clamp(min=1e-9) + 0.1 * p
        # The distribution function at the bins' edges, and linearly between them at every level.
        edges = F.pad(p.cumsum(0), (1, 0))
        at = torch.arange(self.config.levels + 1, dtype=torch.float64, device="cpu")
        at = at / (self.config.levels / BINS)
        low = at.long().clamp(max=BINS - 1)
        p = (edges[low] + (at - low) * (edges[low + 1] - edges[low])).diff()
        p[0] = 0
        return p / p.sum()

    def draw_levels(
        self, count: int, generator: Generator | None = None
    ) -> tuple[Int[Tensor, "{count}"], Float[Tensor, "{count}"]]:
        """`count` stratified noise levels, in random order, and their probabilities, on the CPU."""
        p = self.level_probabilities()
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(count, generator=generator, device=device).cpu()
        offset = torch.rand(count, generator=generator, device=device).cpu().double()
        u = (order + offset) / count
        index = torch.searchsorted(p.cumsum(0), u, right=True).clamp(1, self.config.levels - 1)
        return index + 1, p[index].to(self.word_embedding.dtype)

    def timesteps(self, steps: int) -> list[int]:
        """-> `steps` different noise levels from T down, spaced by equal probability: dense where
        text takes shape.
        """
        u = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) / steps
        levels = (torch.searchsorted(self.level_probabilities().cumsum(0), u) + 1).tolist()
        levels[-1] = self.config.levels
        # Whole levels may coincide: each is at least one above the one before it, and fits below T.
        for i in range(1, steps):
            levels[i] = max(levels[i], levels[i - 1] + 1)
        return [min(tau, self.config.levels - i) for i, tau in enumerate(reversed(levels))]


def neighbourhood(x: Float[Tensor, "b t channels"], reach: int) -> Float[Tensor, "b t neighbours"]:
    """Every position beside its neighbours, (2 reach + 1) times the channels; zeros outside."""
    t = x.shape[1]
    x = F.pad(x, (0, 0, reach, reach))
    return torch.cat([x[:, i : i + t] for i in range(2 * reach + 1)], -1)


def sinusoids(level: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 32"]:
    """A noise level (log signal-to-noise ratio) as sines and cosines from slow to fast."""
    frequencies = torch.logspace(-1.5, 0.5, 16, dtype=level.dtype, device="cpu")
    angle = level * frequencies.to(level.device)
    return torch.cat([angle.sin(), angle.cos()], -1)


def draw_mask(
    rows: int, length: int, *, device: Any = None, generator: Generator | None = None
) -> Bool[Tensor, "{rows} {length}"]:
    """True where text is masked: in half of the rows after a random position, in a quarter between
    two, in a quarter all but the first. The first is never masked: something must come before the
    text, if only a newline.
    """
    uniform = partial(torch.rand, generator=generator, device=device)
    ends = (1 + uniform(2, rows, 1) * (length - 1)).long()
    a, b = ends.clamp(max=length - 1)  # a float just below 1 rounds up
    kind = uniform(rows, 1)
    position = torch.arange(length, device=device)
    between = (position >= torch.minimum(a, b)) & (position <= torch.maximum(a, b))
    return torch.where(kind < 0.5, position >= a, torch.where(kind < 0.75, between, position >= 1))


def first_gap(mask: Bool[Tensor, "t"]) -> int:
    """The first position that is to be written; the length where there is none."""
    return int(leading(~mask[None]))
