"""Iterative thinking from left to right: every position thinks as long as it needs.

A position that stops early is taken along later: when a position after it goes on to a round that
it has not taken, it takes that round in the same call (Bae et al. 2023, arXiv 2310.05424,
"synchronized parallel decoding"). So every position sees of earlier ones what it would see had none
of them stopped, and stopping saves waiting: rounds one after the other, not arithmetic. The other
papers stand in recurrent.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ..core.halting import expected_rounds, halting_distribution
from ..layers import KeyValue, check_window
from ..lm import Ids, Loss, Reader, check_pairs, evaluating
from ..settings import InputError, Setting
from .recurrent import STOPPING, Hidden, RecurrentDepth, Round, ThinkerConfig, round_nats, stops

Waiting = list[Float[Tensor, "b _ d"]]  # by round


@dataclass
class ThinkerCache:
    """What `Thinker.read` keeps of all positions, and of the last call's.

    The core's KV cache of a round holds the first positions, those that have taken it. `waiting` at
    r are the hidden states after r rounds of the next ones, which have not taken round r (from 0)
    yet; `injected` is what each position adds to its hidden state at every round. Of the last
    call's positions: the `rounds` taken, and the probability of having `halted`.
    """

    length: int
    prelude: list[KeyValue]  # by block
    core: list[list[KeyValue]]  # by round and block
    waiting: Waiting
    injected: Float[Tensor, "b s d"]
    rounds: Int[Tensor, "b t"]
    halted: Float[Tensor, "b t"]


@dataclass
class Thought:
    """What the new positions of one read have found so far, each until it stopped."""

    logits: Float[Tensor, "b t v"] | None  # None before the first round
    survival: Float[Tensor, "b t"]  # the probability of still thinking
    rounds: Int[Tensor, "b t"]  # taken so far
    thinking: Bool[Tensor, "b t"]

    def after(
        self, now: Round, before: Hidden, rule: dict[str, Any], limit: Float[Tensor, "b t"]
    ) -> "Thought":
        """After one more round, which led from `before` to `now`; whoever had stopped keeps what it
        found.
        """
        survival = torch.where(self.thinking, self.survival * (1 - now.halt), self.survival)
        stop = stops(rule, now, (before, self.logits), survival, limit)
        logits = now.logits
        if self.logits is not None:
            logits = torch.where(self.thinking[..., None], logits, self.logits)
        return Thought(logits, survival, self.rounds + self.thinking, self.thinking & ~stop)


class Thinker(RecurrentDepth, Reader):
    """Left to right: an exact likelihood, and every position thinks as long as it needs.

    At round r a position looks back at what earlier positions are at round r, whether they stopped
    before or not. So it depends on earlier characters only, and reading in pieces is the same as
    reading at once. With stop=sampled the likelihood is that of the rounds drawn, on average a
    bound of the whole.
    """

    settings: dict[str, Setting] = STOPPING

    def __init__(self, config: ThinkerConfig):
        super().__init__(config, causal=True, symbols=config.vocabulary)

    def draw(self, ids: Ids, *, generator: Generator | None = None) -> dict[str, Any]:
        """`rounds`: how many, the same for the whole batch."""
        return {"rounds": self.draw_rounds(generator)}

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """`rounds_loss` of every round's nats; `nats_per_char` is what the last round pays.

        With `targets` (b t v) among the draws, every round learns those probabilities.
        """
        ids = check_pairs(self.check_ids(ids, look=draws is None))
        draws = self.draw(ids) if draws is None else draws
        logits, halt, _ = self.every_round(ids[:, :-1], draws["rounds"])
        nats = round_nats(logits, ids[:, 1:])
        targets = draws.get("targets")
        learnt = nats if targets is None else round_nats(logits, targets[:, 1:])
        loss, parts = self.rounds_loss(learnt, halt)
        return loss, {"nats_per_char": nats[..., -1].mean().detach()} | parts

    def read(
        self,
        ids: Ids,
        state: ThinkerCache | None = None,
        *,
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

        A call ends when all of its positions have stopped: one that reads a text takes as many
        rounds as the slowest of its characters, one that writes a character as many as that takes.
        `rule`, in the place of settings, is what `self.rule` made of them once for many calls.
        Raises InputError for settings out of range, and when state and ids outgrow the window.
        """
        rule = self.rule(settings) if rule is None else rule
        if torch.compiler.is_exporting() and rule["stop"] != "fixed":
            raise InputError(
                "how long a thinker thinks depends on the text: export cannot follow it; "
                "read with stop='fixed'"
            )
        start = state.length if state else 0
        end = check_window(self.config.window, start, ids.shape[1])
        injected, prelude = self.inject(
            ids, self.rotary(start, end), state.prelude if state else None
        )
        core, waiting = [], [injected[:, :0]]
        if state:
            core, waiting = list(state.core), list(state.waiting)
            injected = torch.cat([state.injected, injected], 1)
        limit = self.limits(ids, rule, generator)
        thought = self.think(injected, core, waiting, limit, rule)
        assert thought.logits is not None  # there is a first round
        cache = ThinkerCache(
            end, prelude, core, waiting, injected, thought.rounds, 1 - thought.survival
        )
        return thought.logits, cache

    def think(
        self,
        injected: Float[Tensor, "b s d"],
        core: list[list[KeyValue]],
        waiting: Waiting,
        limit: Float[Tensor, "b t"],
        rule: dict[str, Any],
    ) -> Thought:
        """All rounds of the last t positions; earlier ones take with them what they have not taken.

        `core` and `waiting`, as in the cache, are brought up to date in place.
        """
        end, t = injected.shape[1], limit.shape[1]
        one = injected.new_ones(limit.shape)
        thought = Thought(None, one, torch.zeros_like(one, dtype=torch.long), one.bool())
        hidden = torch.zeros_like(injected[:, end - t :])
        for r in range(rule["rounds"]):
            before = torch.cat([waiting[r], hidden], 1)
            first = end - before.shape[1]
            earlier = core[r] if r < len(core) else None
            x = before + injected[:, first:]
            hidden, caches = self.think_once(r, x, self.rotary(first, end), earlier)
            core[r : r + 1] = [caches]
            waiting[r] = before[:, :0]
            if r + 1 == len(waiting):
                waiting.append(hidden[:, :0])
            now = self.predict(r, hidden[:, -t:], before[:, -t:])
            thought = thought.after(now, before[:, -t:], rule, limit)
            if rule["stop"] != "fixed" and not thought.thinking.any():
                break
        waiting[r + 1] = torch.cat([waiting[r + 1], hidden], 1)
        return thought

    def reading(self, own: dict[str, Any], generator: Generator | None) -> Callable:
        return partial(self.read, generator=generator, rule=self.rule(own))

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
