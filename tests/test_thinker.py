"""irann.models.thinker against a thinker written one character and one round at a time,
transformers, counted calls.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import excite, refuses, stablelm
from helpers import book_module, ids, objective, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import chisquare

import irann
from irann import lm, zoo
from irann.core.halting import expected_rounds, halting_distribution, kl_to_geometric
from irann.models.recurrent import round_weights
from irann.models.thinker import Thinker, ThinkerConfig
from irann.models.thinker_page import PageThinker

RULES = {
    "halting": {"threshold": 0.8},
    "sampled": {},
    "state": {"tolerance": 0.3},
    "prediction": {"tolerance": 0.3},
    "fixed": {"rounds": 4},
}


def thinker(kind=Thinker, std=0.3, **options):
    config = ThinkerConfig(**{"window": 24, "width": 32, "rounds": 6} | options)
    return excite(kind(config), std).double().eval()


def close(ours, theirs, atol=1e-10):
    atol *= max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@contextmanager
def counting(model):
    """How many characters pass through each block of the core, by call."""
    counts = [[] for _ in model.core]
    hooks = []
    for i, block in enumerate(model.core):

        def hook(_, inputs, i=i):
            counts[i].append(inputs[0].numel() // model.config.width)

        hooks.append(block.mlp.register_forward_pre_hook(hook))
    yield counts
    for hook in hooks:
        hook.remove()


class OneByOne:
    """The definition, one position and one round at a time, with lists and pairs of complex
    numbers.
    """

    def __init__(self, model):
        self.model = model
        self.heads = model.config.heads
        self.c = model.config.width // self.heads
        self.frequency = 10_000.0 ** (-2 * torch.arange(self.c // 2).double() / self.c)

    def norm(self, x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    def rotated(self, x, position):
        x = torch.stack([self.norm(row) for row in x])
        turn = torch.polar(torch.ones(self.c // 2).double(), position * self.frequency)
        z = torch.complex(x[:, ::2], x[:, 1::2]) * turn
        return torch.stack([z.real, z.imag], -1).flatten(-2)

    def through(self, block, x, position, earlier, gains=(1.0, 1.0)):
        """-> x, (k, v): one block at one position that sees the (k, v) of `earlier` ones."""
        qkv = block.attn.c_attn.weight @ (self.norm(x) * gains[0])
        q, k, v = qkv.view(3, self.heads, self.c)
        q, k = self.rotated(q, position), self.rotated(k, position)
        seen = [*earlier, (k, v)]
        scores = torch.stack([(q * k).sum(-1) for k, _ in seen]) / math.sqrt(self.c)
        y = sum(w[:, None] * v for w, (_, v) in zip(scores.softmax(0), seen))
        x = x + block.attn.c_proj.weight @ y.flatten()
        inner = block.mlp.c_fc.weight @ (self.norm(x) * gains[1])
        return x + block.mlp.c_proj.weight @ inner.relu().square(), (k, v)

    def score(self, features):
        """-> what the halting head makes of them, before its bias by round."""
        *hidden, weight, bias = self.model.halt_head.parameters()
        if hidden:
            features = (hidden[0] @ features + hidden[1]).relu()
        return weight[0] @ features + bias[0]

    def read(self, text, stop, threshold=0.5, tolerance=0.05, rounds=6, limits=None):
        """(t) -> logits (t v), rounds (t)."""
        model, trained = self.model, self.model.config.rounds
        read, shown = [[] for _ in model.prelude], []  # shown[position][round][block]
        logits, taken = [], []
        for position, character in enumerate(text.tolist()):
            x = model.wte.weight[character]
            for block, earlier in zip(model.prelude, read):
                x, kv = self.through(block, x, position, earlier)
                earlier.append(kv)
            injected, hidden, guess = self.norm(x), torch.zeros(model.config.width).double(), None
            survival = 1.0
            shown.append([])
            answer = None  # of the round at which it stopped; it goes on for those after it
            for r in range(rounds):
                before, old, x, kvs = hidden, guess, hidden + injected, []
                last = min(r, trained - 1)  # beyond the trained rounds: as the last one
                for i, block in enumerate(model.core):
                    gains = (1.0, 1.0) if model.gains is None else model.gains[last][i]
                    earlier = [rows[r][i] for rows in shown[:-1]]
                    x, kv = self.through(block, x, position, earlier, gains)
                    kvs.append(kv)
                shown[-1].append(kvs)
                hidden = self.norm(x)
                guess = model.lm_head.weight @ hidden
                p = guess.softmax(0)
                moved = (hidden - before).square().mean().sqrt()
                features = torch.cat([hidden, moved[None], -(p * p.log()).sum()[None]])
                halt = self.score(features)
                if model.gains is not None:
                    halt = halt + model.halt_bias[last]
                survival = survival * (1 - halt.sigmoid())
                stopped = {
                    "halting": 1 - survival >= threshold,
                    "sampled": limits is not None and 1 - survival >= limits[position],
                    "state": moved <= tolerance,
                    "prediction": r and (p - old.softmax(0)).abs().sum() / 2 <= tolerance,
                    "fixed": False,
                }
                if answer is None and (stopped[stop] or r == rounds - 1):
                    answer = guess, r + 1
            logits.append(answer[0])
            taken.append(answer[1])
        return torch.stack(logits), taken


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("stop", RULES)
@pytest.mark.parametrize("prelude, core, gains", [(1, 1, False), (0, 2, True), (2, 3, False)])
@torch.no_grad()
def test_reads_as_defined_one_character_and_one_round_at_a_time(stop, prelude, core, gains):
    options = {"prelude": prelude, "core": core, "round_gains": gains}
    options["halt_width"] = 5 if gains else 0
    model = thinker(**options, rounds=3 if gains else 6)  # with gains, twice as many as trained
    text = ids(1, 20)
    limits = torch.rand(1, 20, generator=rng(), dtype=torch.float64)[0]
    rule = {"rounds": 6} | RULES[stop]
    logits, rounds = OneByOne(model).read(text[0], stop, **rule, limits=limits)
    assert stop == "fixed" or len(set(rounds)) > 1, "positions that all stop at once test nothing"
    ours, state = model.read(text, stop=stop, generator=rng(), **rule)
    assert state.rounds[0].tolist() == rounds
    close(ours[0], logits)


def rounds_by_transformers(model, page, rounds, mask=None):
    """(b t) -> logits (b t v r), the blocks and the norm after them computed by transformers."""

    def through(blocks, x, gains=None):
        theirs = stablelm(blocks, model.config.width, model.config.heads, gains)
        return theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state

    injected = through(model.prelude, model.wte(page))
    hidden, logits = torch.zeros_like(injected), []
    for r in range(rounds):
        gains = None if model.gains is None else model.gains[min(r, model.config.rounds - 1)]
        hidden = through(model.core, hidden + injected, gains)
        logits.append(hidden @ model.lm_head.weight.T)
    return torch.stack(logits, -1)


@pytest.mark.parametrize(
    "options", [dict(prelude=1, core=1), dict(prelude=0, core=2, round_gains=True, rounds=3)]
)
@pytest.mark.parametrize("kind", [Thinker, PageThinker])
@torch.no_grad()
def test_rounds_equal_transformers(kind, options):
    model, page = thinker(kind, **options), ids(2, 20)
    everywhere = torch.zeros(2, 1, 20, 20).double() if kind is PageThinker else None
    oracle = rounds_by_transformers(model, page, 5, everywhere)
    close(model.every_round(page, 5)[0], oracle, atol=2e-6)  # their angles are float32


@pytest.mark.parametrize("name", ["thinker", "thinker-page"])
@torch.no_grad()
def test_the_thinkers_that_ship_equal_transformers(name, corpus):
    model, page = zoo.load(name).double(), corpus.val[None, :100]
    everywhere = None if name == "thinker" else torch.zeros(1, 1, 100, 100).double()
    oracle = rounds_by_transformers(model, page, 2, everywhere)
    close(model.every_round(page, 2)[0], oracle, atol=1e-5)


@torch.no_grad()
def test_each_round_has_a_halting_bias_of_its_own():
    model, text = thinker(core=2, round_gains=True, rounds=3), ids(1, 20)
    before = model.every_round(text, 5)[1]
    shift = torch.tensor([2.0, -1.0, 0.5, 0.5, 0.5]).double()  # beyond the trained: as the last one
    model.halt_bias += shift[:3]
    torch.testing.assert_close(model.every_round(text, 5)[1].logit(), before.logit() + shift)
    for rounds in (1, 2, 5):
        halted = model.read(text, stop="fixed", rounds=rounds)[1].halted
        torch.testing.assert_close(halted, 1 - (1 - model.every_round(text, rounds)[1]).prod(-1))


@pytest.mark.parametrize("stop", RULES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=24))
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(stop, sizes):
    model, text = thinker(core=2, round_gains=True), ids(1, min(24, sum(sizes)), seed=1)
    rule = {"stop": stop} | RULES[stop]
    whole, cache = model.read(text, generator=rng(), **rule)
    state, pieces, rounds, generator, start = None, [], [], rng(), 0
    while start < text.shape[1]:
        piece = text[:, start : start + sizes.pop()]
        start += piece.shape[1]
        logits, state = model.read(piece, state, generator=generator, **rule)
        pieces.append(logits)
        rounds.append(state.rounds)
    close(torch.cat(pieces, 1), whole)
    assert torch.equal(torch.cat(rounds, 1), cache.rounds) and state.length == cache.length


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(stop):
    model, text, generator = thinker(), ids(3, 17, seed=2), rng()
    rule = {"stop": stop} | RULES[stop]
    whole, cache = model.read(text, generator=rng(), **rule)
    for i in range(3):
        one, state = model.read(text[i : i + 1], generator=generator, **rule)
        assert torch.equal(state.rounds[0], cache.rounds[i])
        torch.testing.assert_close(one[0], whole[i], atol=1e-10 * whole.abs().max(), rtol=0)


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_no_bit_of_the_past_depends_on_the_future(stop):
    model, text = thinker(), ids(2, 24)
    changed = torch.cat([text[:, :11], (text[:, 11:] + 1) % 65], 1)
    before, a = model.read(text, stop=stop, **RULES[stop], generator=rng())
    after, b = model.read(changed, stop=stop, **RULES[stop], generator=rng())
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])
    assert torch.equal(a.rounds[:, :11], b.rounds[:, :11])


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_each_character_waits_for_its_own_rounds_and_nothing_is_computed_twice(stop):
    """One call of a block for each round of the character that is written; who had stopped before
    such a round takes it in the same call.
    """
    model, rule = thinker(prelude=0), {"stop": stop} | RULES[stop]
    with counting(model) as calls:
        *_, draft = model.generate(ids(1, 4), 12, generator=rng(), **rule)
    state, taken, generator = None, [], rng()
    for piece in draft.ids[:, :-1].split([4, *[1] * 11], 1):
        with counting(model) as one:
            _, state = model.read(piece, state, generator=generator, **rule)
        taken.append(int(state.rounds.max()))
        assert [len(sizes) for sizes in one] == [taken[-1]]
    if stop != "sampled":  # there other numbers were drawn
        reached = [max(i for i, n in enumerate(taken) if n > r) for r in range(max(taken))]
        assert sum(calls[0]) == sum(4 + last for last in reached)
        assert stop == "fixed" or len(set(taken)) > 1


@torch.no_grad()
def test_rules_may_change_in_the_middle_of_a_text():
    model, text = thinker(round_gains=True), ids(2, 20)
    rules = [{"threshold": 0.3}, {"stop": "fixed", "rounds": 2}, {"threshold": 0.9}]
    rules += [{"stop": "fixed", "rounds": 9}, {"threshold": 0.2, "rounds": 3}]
    every = model.every_round(text, 9)[0]
    state, start = None, 0
    for rule in rules * 2:
        logits, state = model.read(text[:, start : start + 2], state, **rule)
        chosen = (state.rounds - 1)[..., None, None].expand(-1, -1, 65, 1)
        close(logits, every[:, start : start + 2].gather(-1, chosen)[..., 0])
        start += 2
    assert start == 20 and state.rounds.max() <= 3


@torch.no_grad()
def test_sampled_stops_at_each_round_as_often_as_the_distribution_says():
    model = thinker(std=0.1, rounds=5)
    p = halting_distribution(model.every_round(ids(1, 1))[1][0, 0])
    _, state = model.read(ids(1, 1).expand(20_000, 1), stop="sampled", generator=rng())
    counts = torch.bincount(state.rounds.flatten(), minlength=6)[1:]
    assert p.min() > 0.01 and chisquare(counts.numpy(), (20_000 * p).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "how, rounds",
    [
        ({"threshold": 0}, 1),
        ({"threshold": 1.0}, 6),
        ({"threshold": 1.0, "rounds": 2}, 2),
        ({"stop": "fixed"}, 6),
        ({"stop": "fixed", "rounds": 9}, 9),
        ({"stop": "state", "tolerance": 2.0}, 1),
        ({"stop": "state", "tolerance": 0}, 6),
        ({"stop": "prediction", "tolerance": 1.0}, 2),
        ({"stop": "prediction", "tolerance": 0}, 6),
    ],
)
@torch.no_grad()
def test_extreme_settings_mean_what_they_say(how, rounds):
    assert thinker(std=0.1).read(ids(1, 10), **how)[1].rounds.tolist() == [[rounds] * 10]


@torch.no_grad()
def test_nll_is_exact_under_every_rule():
    model, text = thinker(std=0.1), ids(2, 18)
    for stop, rule in RULES.items():
        logits, _ = model.read(text[:, :-1], stop=stop, generator=rng(), **rule)
        nats = -logits.log_softmax(-1).gather(-1, text[:, 1:, None]).squeeze(-1)
        close(model.nll(text, stop=stop, generator=rng(), **rule), nats)
    torch.testing.assert_close(model.nll(text), model.nll(text, stop="halting", threshold=0.5))


@torch.no_grad()
def test_drafts_show_how_long_each_character_was_thought_about():
    model = thinker()
    *_, draft = model.generate(ids(2, 5), 9, generator=rng(), threshold=0.8)
    _, state = model.read(draft.ids[:, :-1], threshold=0.8)
    assert draft.note["rounds"] == state.rounds[:, -1].tolist()
    assert list(draft.note["halted"]) == pytest.approx(state.halted[:, -1].tolist())
    json.dumps(draft.note)  # lists of numbers, for whoever shows them
    shown = model.inspect(draft.ids[:1])
    assert shown["rounds"].shape == shown["expected_rounds"].shape == (14,)


def test_mixed_precision_reaches_reading_and_inspecting():
    model = thinker(std=0.1).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.nll(ids(2, 9)).isfinite().all()
    assert not any(v.requires_grad for v in model.inspect(ids(1, 9)).values())


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("halt_width", [0, 8])
def test_the_untrained_halting_probability_is_the_prior(halt_width):
    config = ThinkerConfig(window=24, width=32, prior=0.25, rounds=5, halt_width=halt_width)
    model = Thinker(config)
    _, halt, hidden = model.every_round(ids(2, 9))
    torch.testing.assert_close(halt, torch.full_like(halt, 0.25))
    _, parts = model.loss(ids(2, 25))
    assert parts["prior_kl"].abs() < 1e-6
    assert parts["rounds"] == pytest.approx(sum(0.75**r for r in range(5)), abs=1e-5)
    normalised = torch.ones(2, 9)  # at every round
    torch.testing.assert_close(hidden.square().mean(-1), normalised, atol=1e-3, rtol=0)


@pytest.mark.parametrize("halt_width", [0, 8])
@pytest.mark.parametrize("supervision", ["every", "late", "last", "halting"])
def test_loss_is_the_formula(supervision, halt_width):
    options = {"supervision": supervision, "halt_width": halt_width}
    model = thinker(std=0.1, prior=0.2, prior_weight=0.03, **options)
    text = ids(3, 25)
    logits, halt, _ = model.every_round(text[:, :-1])
    assert logits.shape == (3, 24, 65, 6) and halt.shape == (3, 24, 6)
    nats = -logits.log_softmax(2).gather(2, text[:, 1:, None, None].expand(-1, -1, 1, 6))[:, :, 0]
    p = halting_distribution(halt)
    pondering = (p * nats).sum(-1).mean() + 0.03 * kl_to_geometric(p, 0.2).mean()
    loss, parts = model.loss(text)
    value = {
        "every": nats.mean(),
        "late": (nats.mean((0, 1)) * torch.tensor([0, 0, 1, 2, 3, 4]) / 10).sum(),  # of six rounds
        "last": nats[..., -1].mean(),
        "halting": pondering,
    }[supervision]
    close(loss, value)
    close(parts["rounds"], expected_rounds(p).mean())
    close(parts["nats_per_char"], nats[..., -1].mean())

    body = list(model.core.parameters()) + list(model.prelude.parameters())
    head = list(model.halt_head.parameters())
    slopes = torch.autograd.grad(loss, [*head, *body])
    wanted = torch.autograd.grad(pondering, [*head, *body], retain_graph=True)
    if supervision != "halting":  # the halting head learns beside the network and does not bend it
        wanted = [*wanted[: len(head)], *torch.autograd.grad(value, body)]
    for ours, theirs in zip(slopes, wanted, strict=True):
        close(ours, theirs)


def test_gradients_pass_through_all_rounds():
    model, text, step = thinker(std=0.1, supervision="last", round_gains=True), ids(2, 25), 1e-6
    weights = [*model.core.parameters(), *model.prelude.parameters(), model.gains]
    slopes = torch.autograd.grad(model.loss(text)[0], weights)
    for w, slope in zip(weights, slopes):
        direction = torch.randn(w.shape, generator=rng(), dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            w.data.add_(direction, alpha=sign * step)
            losses.append(model.loss(text)[0].detach())
            w.data.sub_(direction, alpha=sign * step)
        close((losses[0] - losses[1]) / (2 * step), (slope * direction).sum(), atol=1e-6)


@pytest.mark.parametrize("kind", [Thinker, PageThinker])
def test_what_has_come_to_rest_has_finite_slopes(kind):
    """Untrained, a block adds nothing: in half precision round 6 changes no bit any more."""
    torch.manual_seed(0)
    model = kind(ThinkerConfig(window=24, width=32, supervision="halting")).bfloat16()
    model.loss(ids(2, 25))[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("supervision", ["late", "halting"])
@pytest.mark.parametrize("kind", [Thinker, PageThinker])
def test_the_objective_depends_neither_on_pieces_nor_on_the_order_of_rows(kind, supervision):
    model = thinker(kind, 0.1, supervision=supervision, random_rounds=True, round_gains=True)
    model.train()
    text, order = ids(8, 25), torch.randperm(8, generator=rng())
    carried = set()
    for seed in range(4):
        draws = model.draw(text, generator=rng(seed))
        carried.add(draws.get("carried"))
        whole = objective(model, text, draws, [torch.arange(8)])
        for rows in (torch.arange(8).chunk(2), torch.arange(8).chunk(8), order.chunk(2)):
            other = objective(model, text, draws, rows)
            for name, value in whole.items():
                close(other[name], value)
    assert carried == ({True, False} if kind is PageThinker else {None})


def test_random_rounds_are_drawn_while_training_only():
    model = Thinker(ThinkerConfig(window=8, width=16, rounds=5, random_rounds=True))
    text, generator = ids(1, 9), rng()
    series = [[model.draw(text, generator=g)["rounds"] for _ in range(20)] for g in (rng(), rng())]
    assert series[0] == series[1]
    drawn = {model.draw(text, generator=generator)["rounds"] for _ in range(200)}
    assert drawn == {3, 4, 5, 6, 7}
    assert {model.draw(text)["rounds"] for _ in range(200)} == drawn  # torch's own generator
    assert {model.eval().draw(text)["rounds"] for _ in range(50)} == {5}
    with counting(model) as calls:
        model.loss(text, {"rounds": 7})
    assert calls == [[8] * 7]
    assert Thinker(ThinkerConfig(window=8, width=16, rounds=5)).draw(text)["rounds"] == 5


def test_what_makes_no_sense_is_named():
    model = thinker()
    for how, word in [
        ({"stop": "never"}, "stop is one of halting"),
        ({"rounds": -1}, "rounds"),
        ({"threshold": 1.1}, "threshold"),
    ]:
        with refuses(word):
            model.read(ids(1, 3), **how)
        with refuses(word):
            model.generate(ids(1, 3), 3, **how)
    with refuses("tolerance"):
        model.nll(ids(1, 3), tolerance=math.nan)
    with refuses("no setting 'steps'"):
        model.generate(ids(1, 3), 3, steps=4)
    _, state = model.read(ids(1, 20))
    with refuses("window holds 24 characters; got 5 after 20"):
        model.read(ids(1, 5), state)


def test_the_halting_head_bends_no_prediction():
    model, text = thinker(std=0.1, supervision="last"), ids(3, 25)
    logits = model.every_round(text[:, :-1])[0][..., -1]
    value = lm.cross_entropy(logits, text[:, 1:]).mean()
    slopes = [torch.autograd.grad(x, model.lm_head.weight)[0] for x in (model.loss(text)[0], value)]
    close(*slopes)


@torch.no_grad()
def test_the_inside_is_that_of_the_rule_that_is_asked_for():
    model, text = thinker(std=0.3), ids(1, 12)
    for rounds in (1, 2):
        found = model.inspect(text, stop="fixed", rounds=rounds)
        assert set(found["rounds"].tolist()) == {rounds}
        go_on = 1 - model.every_round(text, 1)[1][0, :, 0]
        close(found["expected_rounds"], 1 + (rounds - 1) * go_on)
    drawn = model.read(text, stop="sampled", generator=rng())[1].rounds[0]
    assert len(drawn.unique()) > 1
    assert torch.equal(
        model.inspect(text, stop="sampled", generator=rng())["rounds"], drawn.float()
    )


@torch.no_grad()
def test_the_first_note_is_that_of_the_prompt_s_last_character():
    model, text = thinker(), ids(2, 9)
    _, draft = model.generate(text, 1, generator=rng(), threshold=0.8)
    _, state = model.read(text, threshold=0.8)
    assert (state.rounds[:, 0] != state.rounds[:, -1]).any()
    assert draft.note["rounds"] == state.rounds[:, -1].tolist()
    assert draft.note["halted"] == pytest.approx(state.halted[:, -1].tolist())


@torch.no_grad()
def test_how_likely_it_has_halted_does_not_depend_on_who_thinks_on():
    model, text = thinker(), ids(2, 20)
    _, state = model.read(text, threshold=0.8)
    assert len(state.rounds.unique()) > 1
    for t in (1, 7, 20):
        alone = model.read(text[:1, :t], threshold=0.8)[1]
        close(alone.halted, state.halted[:1, :t])


def test_late_rounds_count_from_the_middle_one_on():
    for weights in ([1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 0, 1, 2, 3]):
        wanted = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(round_weights("late", torch.zeros(2, 3, len(weights))), wanted)


def test_the_script_fits_the_halting_head_alone_and_ships_it(tmp_path, monkeypatch):
    script = book_module("halting.py")
    text = irann.Text.of("to be or not to be, that is the question\n" * 12)
    sizes = {"window": 16, "width": 16, "heads": 2, "rounds": 3, "dropout": 0.5}
    sizes["round_gains"] = True
    trained = irann.build("thinker", ThinkerConfig(vocabulary=len(text.vocabulary), **sizes))
    excite(trained, 0.1)
    trained.vocabulary = text.vocabulary
    trained.card = dict.fromkeys(script.KEPT, "as it was")
    before = {k: v.half().float() for k, v in trained.state_dict().items()}
    trained.load_state_dict(before)
    recipe = replace(script.RECIPE, steps=40, batch=4, evaluate_every=20, precision="float32")
    load, learn = irann.load, irann.train

    def noted(model, *given, **how):
        learns = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learns == {name for name in model.state_dict() if name.startswith("halt_")}
        assert model.config.dropout == 0 and len(learns) == 5
        network = {k: v for k, v in model.state_dict().items() if k not in learns}
        assert all(torch.equal(weight, before[name]) for name, weight in network.items())
        return learn(model, *given, **how)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(irann, "train", noted)
    monkeypatch.setattr(irann, "load", lambda name: trained if name == "thinker" else load(name))
    monkeypatch.setattr(irann.shakespeare, "load", lambda: text)
    monkeypatch.setattr(irann.zoo, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(script, "RECIPE", recipe)
    script.main()
    card = json.loads((tmp_path / "weights" / "thinker.json").read_text())
    assert card["hours"] == card["command"] == "as it was"
    assert irann.zoo.Recipe(**card["halting"]["recipe"]) == recipe
    model = irann.build("thinker", ThinkerConfig(**card["config"]))
    assert model.config == replace(trained.config, **zoo.HALTING)
    after = load_file(tmp_path / "weights" / "thinker.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in after.items()})
    for name, weight in before.items():
        assert name.startswith("halt") or torch.equal(model.state_dict()[name], weight)
    assert model.halt_head[2].weight.abs().max() > 1e-3
    assert card["validation"] == pytest.approx(irann.evaluate(model, text).nats_per_char, abs=1e-6)
