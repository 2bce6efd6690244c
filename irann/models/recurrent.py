"""A network of recurrent depth: one small core applied again and again, and a rule for stopping.

    injected = norm(prelude(characters))         once
    hidden <- norm(core(hidden + injected))      up to R rounds of the same weights, from zeros
    logits = lm_head(hidden)                     after any round

Papers: Dehghani et al. 2018, "Universal Transformers" (arXiv 1807.03819), for depth by repetition;
Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning" (arXiv 2502.05171), for
the prelude and the input injected at every round; Banino et al. 2021, "PonderNet" (arXiv
2107.05407), for the learned halting probability.

What we do differently: the hidden state is normalised at every round, so that it comes to rest and
more rounds do no harm; every round's prediction is trained, or every late one's; with `round_gains`
a block may see each round differently, as Bae et al. 2024 (arXiv 2410.20672) relax their shared
layers, but by a gain per channel; the halting probability also sees how uncertain the prediction is
and how far the hidden state has moved, and learns beside the network without bending it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Generator, Tensor, nn

from ..core.halting import expected_rounds, halting_distribution, kl_to_geometric
from ..layers import (
    FAST,
    Block,
    KeyValue,
    check_heads,
    check_window,
    init_fan_in,
    make_norm,
    rotary_table,
)
from ..lm import Ids, LanguageModel, Loss, check_settings, cross_entropy
from ..settings import Checked, Setting, field

Hidden = Float[Tensor, "b t d"]
Rotary = Complex[Tensor, "t pairs"]
STOPS = ("halting", "sampled", "state", "prediction", "fixed")
STOPPING = {
    "stop": Setting("halting", "when thinking stops", choices=STOPS),
    "rounds": Setting(0, "rounds of thinking at most; 0: as many as in training", low=0, high=256),
    "threshold": Setting(
        0.5, "stop=halting: how likely it must be to have stopped by now", low=0.0, high=1.0
    ),
    "tolerance": Setting(
        0.05, "stop=state or prediction: the largest change that counts as rest", low=0.0, high=2.0
    ),
}


@dataclass(frozen=True)
class ThinkerConfig(Checked):
    """Sizes, and how the rounds are trained."""

    vocabulary: int = field(65, "different characters", low=1)
    window: int = field(128, "characters seen at once", low=1)
    width: int = field(128, "of the hidden state", low=1)
    heads: int = field(2, "attention heads of a block", low=1)
    prelude: int = field(1, "blocks that read the characters once", low=0)
    core: int = field(1, "blocks of the core, which all rounds share", low=1)
    rounds: int = field(6, "thinking rounds in training", low=1)
    dropout: float = field(0.0, "of the residual stream's updates", low=0.0, high=1.0)
    round_gains: bool = field(False, "gains by block and channel, and a halting bias, by round")
    supervision: str = field(
        "every",
        "predictions that are trained: of every round, the late ones, the last; or by halting",
        choices=("every", "late", "last", "halting"),
    )
    random_rounds: bool = field(False, "draw the rounds of a batch: from half to 1.5 times as many")
    prior: float = field(0.3, "halting probability, PonderNet's lambda_p", above=0.0, below=1.0)
    prior_weight: float = field(0.01, "of the KL term in nats, PonderNet's beta", low=0.0)
    halt_width: int = field(0, "hidden units of the halting head; 0: it is linear", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads, rotary=True)


class Round(NamedTuple):
    """What a round of thinking leaves at each position."""

    hidden: Hidden
    logits: Float[Tensor, "b t v"]
    halt: Float[Tensor, "b t"]


class RecurrentDepth(LanguageModel):
    """What `Thinker` and `PageThinker` share: embedding, prelude, core, and two heads."""

    def __init__(self, config: ThinkerConfig, *, causal: bool, symbols: int):
        super().__init__(config)
        # a page model also sees the character before its window
        self.room = config.window if causal else config.window + 1
        self.wte = nn.Embedding(symbols, config.width)
        block = partial(
            Block, config.width, config.heads, causal=causal, dropout=config.dropout, **FAST
        )
        self.prelude = nn.ModuleList(block() for _ in range(config.prelude))
        self.core = nn.ModuleList(block() for _ in range(config.core))
        self.gains = self.halt_bias = None
        if config.round_gains:
            # of more than one axis, so weight decay pulls at them, unlike the gains of a norm
            self.gains = nn.Parameter(torch.ones(config.rounds, config.core, 2, config.width))
            self.halt_bias = nn.Parameter(torch.zeros(config.rounds))
        self.ln_f = make_norm("plain", config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        sees, units = config.width + 2, config.halt_width
        last = nn.Linear(units or sees, 1)
        self.halt_head = nn.Sequential(nn.Linear(sees, units), nn.ReLU(), last) if units else last
        init_fan_in(self)
        nn.init.zeros_(last.weight)  # untrained, the halting probability is the prior's
        nn.init.constant_(last.bias, math.log(config.prior / (1 - config.prior)))

    def rotary(self, start: int, end: int) -> Rotary:
        channels = self.config.width // self.config.heads
        return rotary_table(start, end, channels, like=self.lm_head.weight)

    def inject(
        self, ids: Ids, rotary: Rotary, caches: list[KeyValue] | None = None
    ) -> tuple[Hidden, list[KeyValue]]:
        """What every round sees of the characters, and the KV cache of the prelude."""
        x = self.wte(ids)
        new_caches = []
        for i, block in enumerate(self.prelude):
            x, cache = block(x, None if caches is None else caches[i], rotary)
            new_caches.append(cache)
        return self.ln_f(x), new_caches

    def think_once(
        self, r: int, x: Hidden, rotary: Rotary, caches: list[KeyValue] | None = None
    ) -> tuple[Hidden, list[KeyValue]]:
        """Round r (from 0): from hidden + injected to hidden, and the KV cache of the core.

        Rounds beyond the trained ones take the last one's gains.
        """
        new_caches = []
        for i, block in enumerate(self.core):
            gains = None if self.gains is None else self.gains[min(r, len(self.gains) - 1), i]
            x, cache = block(x, None if caches is None else caches[i], rotary, gains)
            new_caches.append(cache)
        return self.ln_f(x), new_caches

    def predict(self, r: int, hidden: Hidden, before: Hidden) -> Round:
        """What the heads say after round r, which moved the hidden state from `before` to `hidden`.

        The halting probability sees the hidden state, how far it moved, and how uncertain it is.
        """
        logits = self.lm_head(hidden)
        seen = hidden
        if self.config.supervision != "halting":
            seen = hidden.detach()
            before = before.detach()
        moved = mean_square(seen, before)
        if self.config.supervision == "halting":  # at rest the slope of its root is infinite
            moved = moved.clamp_min(torch.finfo(moved.dtype).tiny)
        uncertain = entropy(logits.detach())
        features = torch.cat([seen, moved.sqrt()[..., None], uncertain[..., None]], -1)
        halt = self.halt_head(features).squeeze(-1)
        halt = halt.to(self.lm_head.weight)  # mixed precision ends here: products and logs follow
        if self.halt_bias is not None:
            halt = halt + self.halt_bias[min(r, len(self.halt_bias) - 1)]
        return Round(hidden, logits, halt.sigmoid())

    def ponder(self, ids: Ids, hidden: Hidden | None = None) -> Iterator[Round]:
        """Round after round without end, from zeros or from a hidden state that is carried over."""
        rotary = self.rotary(0, check_window(self.room, 0, ids.shape[1]))
        injected, _ = self.inject(ids, rotary)
        before = torch.zeros_like(injected) if hidden is None else hidden
        for r in count():
            hidden, _ = self.think_once(r, before + injected, rotary)
            yield self.predict(r, hidden, before)
            before = hidden

    def every_round(
        self, ids: Ids, rounds: int | None = None, hidden: Hidden | None = None
    ) -> tuple[Float[Tensor, "b t v r"], Float[Tensor, "b t r"], Hidden]:
        """Logits and halting probabilities of `rounds` (default: as trained); last hidden state."""
        taken = list(islice(self.ponder(ids, hidden), rounds or self.config.rounds))
        logits = torch.stack([now.logits for now in taken], -1)
        return logits, torch.stack([now.halt for now in taken], -1), taken[-1].hidden

    def rounds_loss(self, nats: Float[Tensor, "b t r"], halt: Float[Tensor, "b t r"]) -> Loss:
        """The loss of the rounds' predictions and of the probabilities that choose among them.

        The halting probabilities minimise the expected negative log-likelihood of the round at
        which they stop, plus beta times KL(p || prior) (PonderNet, section 2.3). Unless
        `supervision` is `halting` they take the former as given, so that no hidden state is bent to
        end sooner.
        """
        config = self.config
        p = halting_distribution(halt)
        kl = kl_to_geometric(p, config.prior).mean()
        if config.supervision == "halting":
            loss = (p * nats).sum(-1).mean() + config.prior_weight * kl
        else:
            halting = (p * nats.detach()).sum(-1).mean() + config.prior_weight * kl
            loss = (nats * round_weights(config.supervision, nats)).sum(-1).mean()
            loss = loss + halting - halting.detach()  # the gradient of `halting`, not its value
        return loss, {"rounds": expected_rounds(p).mean().detach(), "prior_kl": kl.detach()}

    def draw_rounds(self, generator: Generator | None) -> int:
        """How many rounds to train a batch with."""
        rounds = self.config.rounds
        if not (self.config.random_rounds and self.training):
            return rounds
        low = (rounds + 1) // 2
        end = rounds + rounds // 2 + 1
        return int(torch.randint(low, end, (), generator=generator, device=self.device))

    def rule(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All of this model's settings, the given ones checked. Raises InputError."""
        rule = {name: setting.default for name, setting in self.settings.items()}
        rule |= check_settings(self, settings, sampling=False)
        return rule | {"rounds": rule["rounds"] or self.config.rounds}

    def limits(
        self, ids: Ids, rule: dict[str, Any], generator: Generator | None
    ) -> Float[Tensor, "b t"]:
        """The probability of having stopped at which one does, by stop=halting or sampled."""
        like: dict[str, Any] = {"dtype": self.lm_head.weight.dtype, "device": ids.device}
        if rule["stop"] == "sampled":
            return torch.rand(ids.shape, generator=generator, **like)
        return torch.full(ids.shape, rule["threshold"], **like)


def stops(
    rule: dict[str, Any],
    now: Round,
    before: tuple[Hidden, Float[Tensor, "b t v"] | None],
    survival: Float[Tensor, "b t"],
    limit: Float[Tensor, "b t"],
) -> Bool[Tensor, "b t"]:
    """Where thinking stops, by the rule named `stop`: see `Thinker.read`.

    `before` are the hidden state and the logits (none before the first round) of a round ago.
    """
    hidden, logits = before
    if rule["stop"] in ("halting", "sampled"):
        return 1 - survival >= limit
    if rule["stop"] == "state":
        return distance(now.hidden, hidden) <= rule["tolerance"]
    if rule["stop"] == "prediction" and logits is not None:
        change = now.logits.softmax(-1) - logits.softmax(-1)
        return change.abs().sum(-1) / 2 <= rule["tolerance"]
    return torch.zeros_like(survival, dtype=torch.bool)


def distance(a: Hidden, b: Hidden) -> Float[Tensor, "b t"]:
    """Root mean square of the difference."""
    return mean_square(a, b).sqrt()


def mean_square(a: Hidden, b: Hidden) -> Float[Tensor, "b t"]:
    """The mean over channels of (a - b)^2."""
    return (a - b).square().mean(-1)


def entropy(logits: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch"]:
    """The entropy of each prediction, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def round_nats(
    logits: Float[Tensor, "b t v r"], targets: Ids | Float[Tensor, "b t v"]
) -> Float[Tensor, "b t r"]:
    """What the prediction of every round pays for the characters, or by their probabilities."""
    return cross_entropy(logits, targets[..., None].expand(*targets.shape, logits.shape[-1]))


def round_weights(supervision: str, nats: Float[Tensor, "b t r"]) -> Float[Tensor, " r"]:
    """How much each round's prediction counts in training, in sum one.

    `late`: nothing before the middle round, then 1 : 2 : 3 and so on, so that the last counts most.
    """
    rounds = nats.shape[-1]
    r = torch.arange(1, rounds + 1, device=nats.device)
    weights = {
        "every": torch.ones_like(r),
        "late": (r + 1 - (rounds + 1) // 2).clamp(min=0),
        "last": r == rounds,
    }[supervision].to(nats)
    return weights / weights.sum()
