"""Iterative thinking from left to right: every position thinks as long as it needs.

A position that has stopped is frozen: its hidden state, its prediction, and the keys and values
that later positions look back at. The papers stand in recurrent.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from ..core.attention import merge_heads
from ..core.halting import expected_rounds, halting_distribution
from ..layers import Block, KeyValue, check_window, scale
from ..lm import Ids, Loss, Reader, check_pairs, evaluating
from ..settings import InputError, Setting
from .recurrent import (
    STOPPING,
    Hidden,
    RecurrentDepth,
    Rotary,
    Round,
    ThinkerConfig,
    round_nats,
    stops,
)


@dataclass
class ThinkerCache:
    """What `Thinker.read` keeps: KV caches of the prelude by block, of the core by round and block.

    And of the last call's positions: the `rounds` taken, and the probability of having `halted`.
    """

    length: int
    prelude: list[KeyValue]
    core: list[list[KeyValue]]
    rounds: Int[Tensor, "b t"]
    halted: Float[Tensor, "b t"]


@dataclass
class Thought:
    """Where the positions of one read stand between two rounds; what has stopped is frozen."""

    hidden: Hidden
    logits: Float[Tensor, "b t v"] | None  # None before the first round
    survival: Float[Tensor, "b t"]  # the probability of still thinking
    rounds: Int[Tensor, "b t"]  # taken so far
    thinking: Bool[Tensor, "b t"]

    def after(self, now: Round, rule: dict[str, Any], limit: Float[Tensor, "b t"]) -> "Thought":
        """After one more round, which left `now`: where thinking had stopped, that is as before."""
        survival = torch.where(self.thinking, self.survival * (1 - now.halt), self.survival)
        stop = stops(rule, now, (self.hidden, self.logits), survival, limit)
        rounds = self.rounds + self.thinking
        return Thought(now.hidden, now.logits, survival, rounds, self.thinking & ~stop)


class Thinker(RecurrentDepth, Reader):
    """Left to right: an exact likelihood, and every position thinks as long as it needs.

    At round r a position looks back at what earlier positions were at round r, or at their last
    round if they stopped before. So it depends on earlier positions only, and reading in pieces is
    the same as reading at once. With stop=sampled the likelihood is that of the rounds drawn, on
    average a bound of the whole.
    """

    settings: dict[str, Setting] = STOPPING

    def __init__(self, config: ThinkerConfig):
        super().__init__(config, causal=True, symbols=config.vocabulary)

    def draw(self, ids: Ids, *, generator: Generator | None = None) -> dict[str, Any]:
        """`rounds`: how many, the same for the whole batch.

        In training with `freeze`, `limits` (b) too: the probability of having stopped at which a
        row's positions stop; 2, which none reaches, in rows whose positions take all rounds.
        """
        draws: dict[str, Any] = {"rounds": self.draw_rounds(generator)}
        if self.training and self.config.freeze:
            chosen, u = torch.rand(2, len(ids), generator=generator, device=self.device)
            draws["limits"] = torch.where(chosen < self.config.freeze, 0.3 + 0.65 * u, 2.0)
        return draws

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """`rounds_loss` of every round's nats; `nats_per_char` is what the last round pays.

        With `targets` (b t v) among the draws, every round learns those probabilities.
        """
        ids = check_pairs(self.check_ids(ids, look=draws is None))
        draws = self.draw(ids) if draws is None else draws
        if "limits" in draws:
            logits, halt = self.frozen_rounds(ids[:, :-1], draws["rounds"], draws["limits"])
        else:
            logits, halt, _ = self.every_round(ids[:, :-1], draws["rounds"])
        nats = round_nats(logits, ids[:, 1:])
        targets = draws.get("targets")
        learnt = nats if targets is None else round_nats(logits, targets[:, 1:])
        loss, parts = self.rounds_loss(learnt, halt)
        return loss, {"nats_per_char": nats[..., -1].mean().detach()} | parts

    def frozen_rounds(
        self, ids: Ids, rounds: int, limits: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b t v r"], Float[Tensor, "b t r"]]:
        """As `every_round`, but positions stop and are frozen as in `read`, at their row's limit.

        From then on the prediction of the round in which one stopped stands for every later one.
        """
        rotary = self.rotary(0, check_window(self.config.window, 0, ids.shape[1]))
        injected, _ = self.inject(ids, rotary)
        hidden, caches = torch.zeros_like(injected), None
        thinking = torch.ones_like(ids, dtype=torch.bool)
        survival = torch.ones_like(injected[..., 0])
        logits, halt = [], []
        for r in range(rounds):
            through = partial(where_thinking, thinking)
            x, caches = self.think_once(r, hidden + injected, rotary, caches, through)
            now = self.predict(r, torch.where(thinking[..., None], x, hidden), hidden)
            logits.append(now.logits)
            last = halt[-1].detach() if halt else now.halt  # whoever has stopped learns no more
            halt.append(torch.where(thinking, now.halt, last))
            survival = survival * (1 - now.halt.detach())
            thinking = thinking & (1 - survival < limits[:, None])
            hidden = now.hidden
        return torch.stack(logits, -1), torch.stack(halt, -1)

    def read(
        self,
        ids: Ids,
        state: ThinkerCache | None = None,
        *,
        packed: bool = False,
        generator: Generator | None = None,
        rule: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Float[Tensor, "b t v"], ThinkerCache]:
        """Each position's prediction at the round where it stopped, by the rule named `stop`.

        | stop       | a position stops after the round at which                            |
        |------------|----------------------------------------------------------------------|
        | halting    | the probability of having stopped reaches `threshold`                |
        | sampled    | it reaches a number drawn for it: at round r with p_r                |
        | state      | the hidden state has moved by at most `tolerance` (root mean square) |
        | prediction | the prediction has moved by at most `tolerance` (total variation)    |
        | fixed      | `rounds` are done, as with every rule at last                        |

        With `packed`, positions that have stopped are left out of the computation. Without, they
        are computed and dropped, so that every bit of a position's logits is independent of when
        later positions stop. `rule`, in the place of settings, is what `self.rule` made of them
        once for many calls. Raises InputError for settings out of range, and when state and ids
        outgrow the window.
        """
        rule = self.rule(settings) if rule is None else rule
        if torch.compiler.is_exporting() and rule["stop"] != "fixed":
            raise InputError(
                "how long a thinker thinks depends on the text: export cannot follow it; "
                "read with stop='fixed'"
            )
        start = state.length if state else 0
        end = check_window(self.config.window, start, ids.shape[1])
        rotary = self.rotary(start, end)
        injected, prelude = self.inject(ids, rotary, state.prelude if state else None)
        limit = self.limits(ids, rule, generator)
        past = state.core if state else []
        thought, core = self.think(injected, rotary, past, limit, rule, packed)
        assert thought.logits is not None  # there is a first round
        halted = 1 - thought.survival
        return thought.logits, ThinkerCache(end, prelude, core, thought.rounds, halted)

    def think(
        self,
        injected: Hidden,
        rotary: Rotary,
        past: list[list[KeyValue]],
        limit: Float[Tensor, "b t"],
        rule: dict[str, Any],
        packed: bool,
    ) -> tuple[Thought, list[list[KeyValue]]]:
        """All rounds of new positions, given the core's KV cache of earlier ones."""
        t = injected.shape[1]
        one = injected.new_ones(injected.shape[:2])
        rounds = torch.zeros_like(one, dtype=torch.long)
        thought = Thought(torch.zeros_like(injected), None, one, rounds, one.bool())
        core: list[list[KeyValue]] = []
        for r in range(rule["rounds"]):
            earlier = past[min(r, len(past) - 1)] if past else None
            x = thought.hidden + injected
            none_stopped = r == 0 or rule["stop"] == "fixed"
            if none_stopped or (packed and bool(thought.thinking.all())):
                hidden, caches = self.think_once(r, x, rotary, earlier)
            else:
                packing = pack(thought.thinking if packed else one.bool(), thought.thinking)
                caches = frozen(earlier, core[-1], t)
                x, caches = self.think_once(r, packing.pick(x), rotary, caches, packing.through)
                hidden = packing.update(thought.hidden, x)
            core.append(caches)
            thought = thought.after(self.predict(r, hidden, thought.hidden), rule, limit)
            if rule["stop"] != "fixed" and not thought.thinking.any():
                break
        for earlier in past[len(core) :]:  # rounds that only earlier positions took
            core.append(frozen(earlier, core[-1], t))
        return thought, core

    def reading(self, own: dict[str, Any], generator: Generator | None) -> Callable:
        return partial(self.read, packed=True, generator=generator, rule=self.rule(own))

    def notes(self, state: ThinkerCache) -> dict:
        return {"rounds": state.rounds[:, -1].tolist(), "halted": state.halted[:, -1].tolist()}

    @torch.no_grad()
    def inspect(
        self, ids: Ids, *, generator: Generator | None = None, **settings: Any
    ) -> dict[str, Tensor]:
        """`rounds` taken (t) and `expected_rounds` (t); see `read` for the settings."""
        ids = self.check_ids(ids)
        with evaluating(self, ids.numel()):
            _, halt, _ = self.every_round(ids, self.rule(settings)["rounds"])
            _, state = self.read(ids, generator=generator, **settings)
        return {
            "rounds": state.rounds[0].float(),
            "expected_rounds": expected_rounds(halting_distribution(halt))[0],
        }


def where_thinking(
    thinking: Bool[Tensor, "b t"],
    block: Block,
    x: Hidden,
    cache: KeyValue | None,
    rotary: Rotary,
    gains: Float[Tensor, "2 d"] | None,
) -> tuple[Hidden, KeyValue]:
    """`block` applied to all positions; what has stopped shows its keys and values of before."""
    q, k, v = block.attn.project(scale(block.ln_1(x), gains, 0), rotary)
    if cache is not None:
        new = thinking[:, None, :, None]
        k, v = torch.where(new, k, cache[0]), torch.where(new, v, cache[1])
    y = merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return after_attention(block, x, y, gains), (k, v)


def after_attention(
    block: Block,
    x: Float[Tensor, "*batch d"],
    y: Float[Tensor, "*batch d"],
    gains: Float[Tensor, "2 d"] | None,
) -> Float[Tensor, "*batch d"]:
    """The rest of `block`, whose heads have gathered y for the residual stream x."""
    x = x + block.dropout(block.attn.c_proj(y))
    return x + block.dropout(block.mlp(scale(block.ln_2(x), gains, 1)))


# ------------------------------------------------------------ positions that still think, packed


@dataclass
class Packing:
    """The positions that a round computes, packed from their batch into one list of n.

        computed (b t)       the list (n)           queries of attention (b m), padded
        [ x  .  x  x ]       row     0  0  0  1     [ 0  2  3 ]
        [ .  x  .  . ]       column  0  2  3  1     [ 1  -  - ]
                             rank    0  1  2  0

    A position may be computed although it has stopped: only `thinking` ones change in `update`.
    """

    row: Int[Tensor, " n"]
    column: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]  # among the computed positions of its row
    thinking: Bool[Tensor, " n"]
    shape: tuple[int, int, int]  # b, t, m

    def pick(self, x: Hidden) -> Float[Tensor, "n d"]:
        return x[self.row, self.column]

    def update(
        self, old: Float[Tensor, "b s *rest"], new: Float[Tensor, "n *rest"]
    ) -> Float[Tensor, "b s *rest"]:
        """`old`, with new values where one is thinking; the batch's t positions are its last."""
        column = self.column + old.shape[1] - self.shape[1]
        updated = old.clone()
        updated[self.row[self.thinking], column[self.thinking]] = new[self.thinking]
        return updated

    def through(
        self,
        block: Block,
        x: Float[Tensor, "n d"],
        cache: KeyValue,
        rotary: Rotary,
        gains: Float[Tensor, "2 d"] | None,
    ) -> tuple[Float[Tensor, "n d"], KeyValue]:
        """`block` applied to these positions alone. In the KV cache, those that still think are
        replaced.
        """
        qkv = block.attn.project(scale(block.ln_1(x), gains, 0)[None], rotary[self.column])
        q, k, v = (z[0].transpose(0, 1) for z in qkv)
        keys = self.update(cache[0].transpose(1, 2), k).transpose(1, 2)
        values = self.update(cache[1].transpose(1, 2), v).transpose(1, 2)
        return after_attention(block, x, self.attend(q, keys, values), gains), (keys, values)

    def attend(
        self, q: Float[Tensor, "n h c"], k: Float[Tensor, "b h s c"], v: Float[Tensor, "b h s c"]
    ) -> Float[Tensor, "n d"]:
        """Causal attention: each of these positions looks at all positions up to its own."""
        b, t, m = self.shape
        s = k.shape[2]
        queries = q.new_zeros(b, m, *q.shape[1:])
        queries[self.row, self.rank] = q
        own = self.rank.new_zeros(b, m)  # where each query stands; padding stands at the first
        own[self.row, self.rank] = self.column + s - t
        mask = torch.arange(s, device=q.device) <= own[:, None, :, None]
        y = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, mask)
        return y.transpose(1, 2)[self.row, self.rank].flatten(1)


def pack(computed: Bool[Tensor, "b t"], thinking: Bool[Tensor, "b t"]) -> Packing:
    """Those positions that are `computed`, some of which may no longer be `thinking`."""
    row, column = computed.nonzero(as_tuple=True)
    rank = (computed.cumsum(1) - 1)[row, column]
    b, t = computed.shape
    return Packing(row, column, rank, thinking[row, column], (b, t, int(computed.sum(1).max())))


def frozen(earlier: list[KeyValue] | None, last: list[KeyValue], t: int) -> list[KeyValue]:
    """Each block's KV cache for this round: that of earlier positions; of the last t, that of a
    round ago.
    """
    if earlier is None:
        return last
    joined = []
    for (k, v), (last_k, last_v) in zip(earlier, last, strict=True):
        first = last_k.shape[2] - t
        k = torch.cat([k, last_k[:, :, first:]], 2)
        v = torch.cat([v, last_v[:, :, first:]], 2)
        joined.append((k, v))
    return joined
