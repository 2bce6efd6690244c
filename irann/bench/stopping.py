"""What a rule of stopping is worth: nats against the line that mixes fixed rounds at the same mean.

Whoever may choose between two whole numbers of rounds can also let a coin choose, window by window,
and so pays what lies on the line between them. A rule that knows where thinking helps pays less.
Two rules, each with a limit that says how long it thinks:

| rule     | a position stops                                                                |
|----------|---------------------------------------------------------------------------------|
| learned  | by its halting probability: what `read` does and what ships                     |
| informed | where the KL of the last round's prediction from its own is small. It thinks to |
|          | the end in order to know when to stop: a yardstick, no saving                   |
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import shakespeare, zoo
from ..core.halting import survival
from ..models.recurrent import round_nats
from ..training import evaluate
from . import speed
from .races import between

MEANS = (2.0, 2.5, 3.0, 4.0)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
KLS = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
Fixed = dict[str, float]  # by rounds: nats per character, the same rounds for every character
Points = dict[str, list[float]]  # by limit: nats per character, mean rounds


def line(fixed: Fixed, rounds: float) -> float:
    """-> nats of a lottery between the two whole numbers around `rounds`, its mean."""
    return between([(int(whole), nats) for whole, nats in fixed.items()], rounds)


def at(points: Iterable[Sequence[float]], rounds: float) -> float:
    """-> nats of a rule at this mean, by lottery between the limits around it; NaN without them."""
    return between(sorted((mean, nats) for nats, mean in points), rounds)


def against_line(fixed: Fixed, points: Points) -> dict[str, float]:
    """-> by those of MEANS that a rule reaches, its nats above the line; below zero it gains."""
    paid = {mean: at(points.values(), mean) for mean in MEANS}
    return {str(x): nats - line(fixed, x) for x, nats in paid.items() if not math.isnan(nats)}


class Rules:
    """A likelihood for `evaluate`, of the last round; it adds up what every round pays, and what
    every rule at every limit.
    """

    def __init__(self, model: Any):
        self.model = model
        self.fixed = torch.zeros(model.config.rounds, dtype=torch.float64)
        self.rules: dict[str, dict[str, Tensor]] = {"learned": {}, "informed": {}}
        self.count = 0

    def __call__(self, ids: Int[Tensor, "b t+1"], **_: Any) -> Float[Tensor, "b t"]:
        logits, halt, _ = self.model.every_round(ids[:, :-1])
        nats = round_nats(logits, ids[:, 1:])
        self.fixed += nats.sum((0, 1)).double().cpu()
        self.count += nats[..., 0].numel()
        log_q = logits.log_softmax(2)
        last = log_q[..., -1:]
        kl = (last.exp() * (last - log_q)).sum(2)
        stopped = 1 - survival(halt) * (1 - halt)
        for limit in THRESHOLDS:
            self.add("learned", limit, nats, stopped >= limit)
        for limit in KLS:
            self.add("informed", limit, nats, kl <= limit)
        return nats[..., -1]

    def add(self, rule: str, limit: float, nats: Float[Tensor, "b t r"], stop: Tensor) -> None:
        """Stop each position at the first round at which the rule says so, else at the last."""
        stop[..., -1] = True
        first = stop.int().argmax(-1, keepdim=True)
        paid = torch.stack([nats.gather(-1, first).sum(), (first + 1).sum()]).double().cpu()
        sums = self.rules[rule]
        sums[str(limit)] = sums.get(str(limit), 0) + paid

    def points(self, rule: str) -> Points:
        return {limit: (paid / self.count).tolist() for limit, paid in self.rules[rule].items()}


def stopping(quick: bool) -> dict:
    """Of the thinker that ships -> `fixed` nats by rounds, and by rule its points and where they
    lie against the line; and what writing alone costs.
    """
    model: Any = zoo.load("thinker")
    text = shakespeare.load()
    if quick:
        text = replace(text, val=text.val[: 4 * model.config.window])
    found = Rules(model)
    evaluate(model, text, nll=found)
    rules = {rule: found.points(rule) for rule in found.rules}
    by_round = (found.fixed / found.count).tolist()
    fixed = {str(rounds): nats for rounds, nats in enumerate(by_round, 1)}
    against = {rule: against_line(fixed, points) for rule, points in rules.items()}
    return {"fixed": fixed, "rules": rules, "against": against, "writing": writing(model, quick)}


def writing(model: Any, quick: bool) -> dict:
    """One text at a time, in turn: all rounds for every character, three, and the learned rule."""
    n, rounds = (20, 1) if quick else (200, 5)
    ways: dict[str, dict] = {
        f"{model.config.rounds} rounds": {"stop": "fixed"},
        "3 rounds": {"stop": "fixed", "rounds": 3},
    }
    ways |= {f"threshold {threshold}": {"threshold": threshold} for threshold in (0.5, 0.3, 0.2)}
    newline = torch.zeros(1, 1, dtype=torch.long)

    def write(settings: dict) -> None:
        speed.finish(model.generate(newline, n, generator=speed.seeded(), **settings))

    runners = {name: partial(write, settings) for name, settings in ways.items()}
    return {"n": n, **speed.in_turn(runners, rounds)}
