"""Iterative Thinking: one small network applied again and again, a thought that is carried along, and a rule for stopping.

    given = settle(prelude(characters))             once
    thought <- settle(core(thought + given))        up to R rounds of the same weights, from a thought of zeros
    logits = head(thought)                          after any round

Papers: Dehghani et al. 2018, "Universal Transformers" (arXiv 1807.03819), for depth by repetition; Geiping et al. 2025,
"Scaling up Test-Time Compute with Latent Reasoning" (arXiv 2502.05171), for the prelude and the input injected at every
round; Banino et al. 2021, "PonderNet" (arXiv 2107.05407), for the learned odds of halting; for the page, Austin et al.
2021 (arXiv 2107.03006), absorbing diffusion, and Hoogeboom et al. 2021 (arXiv 2110.02037), which shows that its bound is
that of guessing in random order.

What we do differently: the state is normalised at every round (`settle`), so that it comes to rest and more rounds do no
harm; every round's prediction is trained, or every late one's; with `round_gains` a block may see each round differently, as
Bae et al. 2024 (arXiv 2410.20672) relax their shared layers, but by a gain per channel; the odds of halting also see how
unsure the prediction is and how far the state has moved, and learn beside the network without bending it. A character that
has stopped is frozen: its state, its prediction, and the keys and values that later characters look back at.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.halting import expected_rounds, halting_distribution, kl_to_geometric
from ..layers import Block, init_fan_in, make_norm, rotary_table, scale
from ..lm import Draft, LanguageModel, Reader, check_settings, cross_entropy, left_to_right
from ..settings import Checked, InputError, Setting, check_heads, field


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
    round_gains: bool = field(
        False, "each round has gains by block and channel, and a halting bias, of its own"
    )
    supervision: str = field(
        "every",
        "whose predictions are trained: every round's, the late ones', the last one's, or as `halting` weighs them",
        choices=("every", "late", "last", "halting"),
    )
    random_rounds: bool = field(
        False,
        "train with a number of rounds drawn for each batch, from half to one and a half times",
    )
    prior: float = field(
        0.3,
        "halting probability of the geometric prior (PonderNet's lambda_p)",
        above=0.0,
        below=1.0,
    )
    prior_weight: float = field(
        0.01, "of the KL term (PonderNet's beta), in nats per character", low=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads, rotary=True)


STOPPING = {
    "stop": Setting(
        "halting",
        "when thinking stops",
        choices=("halting", "sampled", "state", "prediction", "fixed"),
    ),
    "rounds": Setting(0, "rounds of thinking at most; 0: as many as in training", low=0, high=256),
    "threshold": Setting(
        0.5, "stop=halting: how likely it must be to have stopped by now", low=0.0, high=1.0
    ),
    "tolerance": Setting(
        0.05, "stop=state or prediction: the largest change that counts as rest", low=0.0, high=2.0
    ),
}


class Body(LanguageModel):
    """What both ways of reading share: embedding, prelude, core, head, and the odds of halting."""

    def __init__(self, config: ThinkerConfig, *, causal: bool, symbols: int):
        super().__init__(config)
        c = config
        style = {
            "causal": causal,
            "norm": "plain",
            "qk_norm": True,
            "activation": "squared_relu",
            "bias": False,
            "dropout": c.dropout,
        }
        self.wte = nn.Embedding(symbols, c.width)
        self.prelude = nn.ModuleList(Block(c.width, c.heads, **style) for _ in range(c.prelude))
        self.core = nn.ModuleList(Block(c.width, c.heads, **style) for _ in range(c.core))
        self.gains = self.halt_bias = None
        if c.round_gains:
            self.gains = nn.Parameter(torch.ones(c.rounds, c.core, 2, c.width))
            self.halt_bias = nn.Parameter(torch.zeros(c.rounds))
        self.ln_f = make_norm("plain", c.width)
        self.lm_head = nn.Linear(c.width, c.vocabulary, bias=False)
        self.halt_head = nn.Linear(c.width + 2, 1)
        init_fan_in(self)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(
            self.halt_head.bias, math.log(c.prior / (1 - c.prior))
        )  # untrained, the odds are the prior's

    def turn(self, start: int, end: int) -> Tensor:
        """-> (t c/2): the rotary table of places start to end."""
        c = self.config
        return rotary_table(start, end, c.width // c.heads, like=self.lm_head.weight)

    def gain(self, r: int, i: int) -> Tensor | None:
        """-> (2 d), or None: of round r (from 0) and the core's i-th block. Rounds beyond the trained ones take the last one's."""
        return None if self.gains is None else self.gains[min(r, len(self.gains) - 1), i]

    def odds(self, r: int, thought: Tensor, before: Tensor, logits: Tensor) -> Tensor:
        """(... d) twice, (... v) -> (...): the odds of halting at round r, from the thought, how far it moved, how unsure its guess is."""
        if self.config.supervision != "halting":
            thought, before = thought.detach(), before.detach()
        moved, unsure = distance(thought, before), entropy(logits.detach())
        logit = self.halt_head(
            torch.cat([thought, moved[..., None], unsure[..., None]], -1)
        ).squeeze(-1)
        logit = logit.to(
            self.halt_head.weight
        )  # mixed precision ends here: odds are multiplied, and their logs taken
        return (
            logit
            if self.halt_bias is None
            else logit + self.halt_bias[min(r, len(self.halt_bias) - 1)]
        ).sigmoid()

    def ponder(
        self, ids: Tensor, thought: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(b t) -> round after round without end: thought (b t d), logits (b t v), odds (b t). Every place thinks, nobody stops.

        `thought` is where to start from, if one is carried over.
        """
        turn, x = self.turn(0, ids.shape[1]), self.wte(ids)
        for block in self.prelude:
            x, _ = block(x, None, turn)
        given = self.ln_f(x)
        thought = torch.zeros_like(given) if thought is None else thought
        for r in count():
            before, x = thought, thought + given
            for i, block in enumerate(self.core):
                x, _ = block(x, None, turn, self.gain(r, i))
            thought = self.ln_f(x)
            logits = self.lm_head(thought)
            yield thought, logits, self.odds(r, thought, before, logits)

    def every_round(self, ids: Tensor, rounds: int | None = None, thought: Tensor | None = None):
        """(b t) -> logits (b t v r), odds (b t r), thought (b t d): the first `rounds` rounds, by default as many as in training."""
        thoughts, logits, odds = zip(
            *islice(self.ponder(ids, thought), rounds or self.config.rounds), strict=True
        )
        return torch.stack(logits, -1), torch.stack(odds, -1), thoughts[-1]

    def rule(self, settings: dict) -> dict:
        """-> all of this model's settings, the given ones checked. Raises ValueError that names a wrong one."""
        given = {
            name: value
            for name, value in check_settings(self, settings).items()
            if value is not None
        }
        rule = {name: knob.default for name, knob in self.settings.items()} | given
        return rule | {"rounds": rule["rounds"] or self.config.rounds}

    def thinking_loss(self, nats: Tensor, odds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(... r), (... r) -> a scalar, parts: the rounds' predictions, and the halting odds that choose among them.

        The odds minimise the expected nll at the round where they stop, plus beta times KL(p || prior) (PonderNet,
        section 2.3). Unless `supervision` is `halting` they take the nll as given, so that no thought is bent to end sooner.
        """
        c, p = self.config, halting_distribution(odds)
        kl = kl_to_geometric(p, c.prior).mean()
        if c.supervision == "halting":
            loss = (p * nats).sum(-1).mean() + c.prior_weight * kl
        else:
            halt = (p * nats.detach()).sum(-1).mean() + c.prior_weight * kl
            loss = (
                (nats * supervised(c.supervision, nats)).sum(-1).mean() + halt - halt.detach()
            )  # its gradient, not its value
        return loss, {"rounds": expected_rounds(p).mean().detach(), "prior_kl": kl.detach()}

    def draw_rounds(self) -> int:
        """-> how many rounds to train this batch with; from torch's global generator, which the trainer keeps."""
        r = self.config.rounds
        return (
            int(torch.randint((r + 1) // 2, r + r // 2 + 1, ()))
            if self.config.random_rounds and self.training
            else r
        )


@dataclass
class Memory:
    """What `Thinker.read` remembers: keys and values of the prelude's blocks, and of the core's blocks at every round.

    `rounds` and `halted` (b t) tell of the last call's places: rounds taken, and the chance of having stopped by then.
    """

    length: int
    prelude: list
    core: list
    rounds: Tensor
    halted: Tensor


class Thinker(Body, Reader):
    """Left to right: an exact likelihood, and every character thinks as long as it needs.

    At round r a place looks back at what earlier places were at round r, or at their last round if they stopped before.
    So it depends on earlier places only, and reading in pieces is the same as reading at once.
    """

    settings: ClassVar = STOPPING

    def __init__(self, config: ThinkerConfig):
        super().__init__(config, causal=True, symbols=config.vocabulary)

    def loss(self, ids: Tensor, draws=None) -> tuple[Tensor, dict[str, Tensor]]:
        """(b window+1) -> a scalar, parts: `thinking_loss` of every round's nats; `nats_per_char` is what the last round pays."""
        ids = self.check_ids(ids)
        logits, odds, _ = self.every_round(ids[:, :-1], self.draw_rounds())
        nats = F.cross_entropy(
            rearrange(logits, "b t v r -> b v t r"),
            ids[:, 1:, None].expand_as(odds),
            reduction="none",
        )
        loss, parts = self.thinking_loss(nats, odds)
        return loss, {"nats_per_char": nats[..., -1].mean().detach()} | parts

    def nll(self, ids: Tensor, *, generator=None, **settings) -> Tensor:
        """(b t+1) -> (b t): exact, whatever the rule of stopping; see `read` for the settings."""
        ids = self.check_ids(ids)
        logits, _ = self.read(ids[:, :-1], packed=True, generator=generator, **settings)
        return cross_entropy(logits, ids[:, 1:])

    def read(
        self, ids: Tensor, state: Memory | None = None, *, packed=False, generator=None, **settings
    ):
        """(b t), state -> (b t v), state: each place's prediction at the round where it stopped, by the rule named `stop`.

        | stop       | a place stops after the round at which                                                      |
        |------------|---------------------------------------------------------------------------------------------|
        | odds       | the chance of having stopped, 1 - product of (1 - odds), reaches `threshold`                |
        | sampled    | that chance reaches a number drawn for the place: it stops at round r with probability p_r  |
        | state      | its thought has moved by at most `tolerance` (root mean square)                             |
        | prediction | its prediction has moved by at most `tolerance` since the round before (total variation)    |
        | fixed      | `rounds` are done, as with every rule at last                                               |

        With `packed`, places that have stopped are left out of the computation; without, they are computed and dropped,
        so that every bit of a place's logits is independent of when later places stop.
        Raises ValueError for settings out of range and when state and ids outgrow the window.
        """
        rule = self.rule(settings)
        start = state.length if state else 0
        end = start + ids.shape[1]
        if end > self.config.window:
            raise InputError(
                f"the window holds {self.config.window} characters; got {ids.shape[1]} after {start}: read the last ones only"
            )
        x, turn, prelude = self.wte(ids), self.turn(start, end), []
        for block, kv in zip(
            self.prelude, state.prelude if state else [None] * len(self.prelude), strict=True
        ):
            x, kv = block(x, kv, turn)
            prelude.append(kv)
        if rule["stop"] == "sampled":
            limit = torch.rand(ids.shape, generator=generator, dtype=x.dtype, device=x.device)
        else:
            limit = x.new_full(ids.shape, rule["threshold"])
        logits, core, rounds, halted = self.think(
            self.ln_f(x), turn, state.core if state else [], limit, rule, packed
        )
        return logits, Memory(end, prelude, core, rounds, halted)

    def think(
        self, given: Tensor, turn: Tensor, past: list, limit: Tensor, rule: dict, packed: bool
    ):
        """(b t d), past keys and values by round and block, limit (b t) -> logits (b t v), and what is to be remembered."""
        b, t, _ = given.shape
        thought, logits = torch.zeros_like(given), given.new_zeros(b, t, self.config.vocabulary)
        rounds, going = (
            torch.zeros(b, t, dtype=torch.long, device=given.device),
            torch.ones(b, t, dtype=torch.bool, device=given.device),
        )
        left, core = given.new_ones(b, t), []  # the chance of still thinking
        for r in range(rule["rounds"]):
            remembered = past[min(r, len(past) - 1)] if past else [None] * len(self.core)
            some = r > 0 and rule["stop"] != "fixed" and not (packed and going.all())
            asks = going if packed else torch.ones_like(going)
            x, kvs = (thought + given)[asks] if some else thought + given, []
            for i, (block, kv) in enumerate(zip(self.core, remembered, strict=True)):
                gain = self.gain(r, i)
                x, kv = (
                    some_places(block, x, asks, going, frozen(kv, core[-1][i], t), turn, gain)
                    if some
                    else block(x, kv, turn, gain)
                )
                kvs.append(kv)
            core.append(kvs)

            new, active = (
                self.ln_f(x).reshape(-1, given.shape[-1]),
                going[asks] if some else going.flatten(),
            )
            guess = self.lm_head(
                new
            )  # of all that were computed: how many rows a product has may change its last bits
            odds = self.odds(r, new, thought[asks], guess)[active]
            new, guess, before, old = new[active], guess[active], thought[going], logits[going]
            left = left.masked_scatter(going, left[going] * (1 - odds))
            thought, logits = scatter(thought, going, new), scatter(logits, going, guess)
            rounds = rounds + going
            rest = at_rest(rule, new, before, guess, old if r else None, left[going], limit[going])
            going = going.masked_scatter(going, ~rest)
            if not going.any():
                break
        for later in past[len(core) :]:  # rounds that only earlier places ever took
            core.append([frozen(kv, last, t) for kv, last in zip(later, core[-1], strict=True)])
        return logits, core, rounds, 1 - left

    def notes(self, state: Memory) -> dict:
        return {"rounds": state.rounds[:, -1].tolist(), "halted": state.halted[:, -1].tolist()}

    @torch.no_grad()
    def inspect(self, ids: Tensor, *, generator=None, **settings) -> dict[str, Tensor]:
        """(1 t) -> how many rounds each character took, and how its prediction's entropy fell from round to round (r t).

        See `read` for the settings.
        """
        ids = self.check_ids(ids)
        logits, odds, _ = self.every_round(ids, self.rule(settings)["rounds"])
        return {
            "rounds": self.read(ids, generator=generator, **settings)[1].rounds[0].float(),
            "expected_rounds": expected_rounds(halting_distribution(odds))[0],
            "entropy": entropy(logits.movedim(-1, 1))[0],
        }

    def generate(
        self, prompt, n, *, temperature=1.0, top_k=None, top_p=None, generator=None, **settings
    ) -> Iterator[Draft]:
        read = partial(self.read, packed=True, generator=generator, **self.rule(settings))
        return left_to_right(
            self,
            prompt,
            n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            read=read,
        )


def some_places(
    block: Block,
    x: Tensor,
    asks: Tensor,
    going: Tensor,
    kv: tuple[Tensor, Tensor],
    turn: Tensor,
    gains: Tensor | None,
):
    """(asking d), (b t) of bool twice, k and v (b h s c) -> (asking d), k and v: `block` at the places that ask, among the last t.

    New keys and values replace the old ones of the places that are `going`; all others are seen as they were.
    """
    attention, (row, place) = block.attn, asks.nonzero(as_tuple=True)
    q, k_new, v_new = (
        z[0].transpose(0, 1)
        for z in attention.project(scale(block.ln_1(x), gains, 0)[None], turn[place])
    )
    k, v = (old.clone() for old in kv)
    at, fresh = place + k.shape[2] - asks.shape[1], going[asks]
    k[row[fresh], :, at[fresh]], v[row[fresh], :, at[fresh]] = k_new[fresh], v_new[fresh]

    asking = asks.sum(1)
    used = (
        torch.arange(int(asking.max()), device=x.device) < asking[:, None]
    )  # rows in which fewer places ask end in blanks
    asked, last = q.new_zeros(*used.shape, *q.shape[1:]), torch.zeros_like(used, dtype=torch.long)
    asked[used], last[used] = q, at
    mask = torch.arange(k.shape[2], device=x.device) <= last[:, None, :, None]
    y = F.scaled_dot_product_attention(asked.transpose(1, 2), k, v, mask)
    x = x + attention.c_proj(rearrange(y.transpose(1, 2)[used], "asking h c -> asking (h c)"))
    return x + block.mlp(scale(block.ln_2(x), gains, 1)), (k, v)


def frozen(past, last, t: int):
    """Keys and values of before (or None) and of the last round, (b h s c) each -> those of before, and the last t places as they were."""
    return (
        last
        if past is None
        else tuple(
            torch.cat([a, z[:, :, z.shape[2] - t :]], 2) for a, z in zip(past, last, strict=True)
        )
    )


def scatter(x: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """(b t d), (b t) of bool, (new d) -> (b t d): x with new rows where it is True."""
    return x.masked_scatter(where[..., None], new.to(x))


def at_rest(
    rule: dict,
    thought: Tensor,
    before: Tensor,
    logits: Tensor,
    old: Tensor | None,
    left: Tensor,
    limit: Tensor,
) -> Tensor:
    """(... d) twice, (... v) twice, (...) twice -> (...) of bool: who stops after this round, by the rule named `stop`."""
    if rule["stop"] == "state":
        return distance(thought, before) <= rule["tolerance"]
    if rule["stop"] == "prediction" and old is not None:
        return (logits.softmax(-1) - old.softmax(-1)).abs().sum(-1) / 2 <= rule["tolerance"]
    return (
        1 - left >= limit
        if rule["stop"] in ("halting", "sampled")
        else torch.zeros_like(left, dtype=torch.bool)
    )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(... d), (... d) -> (...): root mean square of the difference."""
    return (a - b).square().mean(-1).sqrt()


def entropy(logits: Tensor) -> Tensor:
    """(... v) -> (...): of the prediction, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def supervised(name: str, nats: Tensor) -> Tensor:
    """(... r) -> (r), of sum one: how much each round's prediction counts in training.

    `late`: nothing before the middle round, then 1 : 2 : 3 and so on, so that the last one counts most.
    """
    r = torch.arange(1, nats.shape[-1] + 1, device=nats.device)
    weight = {
        "every": torch.ones_like(r),
        "late": (r + 1 - (len(r) + 1) // 2).clamp(min=0),
        "last": r == len(r),
    }[name].to(nats)
    return weight / weight.sum()
