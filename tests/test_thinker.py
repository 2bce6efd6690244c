"""irann.models.thinker against a thinker written one character and one round at a time, enumeration, and counted calls."""

import math
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from conftest import excite, stablelm
from scipy.stats import chisquare
from torch.nn import functional as F

from irann import zoo
from irann.core.halting import expected_rounds, halting_distribution, kl_to_geometric
from irann.models.thinker import PageThinker, Thinker, ThinkerConfig

RULES = {
    "odds": {"threshold": 0.8},
    "sampled": {},
    "state": {"tolerance": 0.3},
    "prediction": {"tolerance": 0.3},
    "fixed": {"rounds": 4},
}


def thinker(kind=Thinker, std=0.3, **options):
    return (
        excite(kind(ThinkerConfig(**{"window": 24, "width": 32, "rounds": 6} | options)), std)
        .double()
        .eval()
    )


def ids(b, t, seed=0):
    return torch.randint(65, (b, t), generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@contextmanager
def counting(model):
    """How many characters pass through each block of the core."""
    counts = [0] * len(model.core)

    def count(i):
        def hook(_, inputs):
            counts[i] += inputs[0].numel() // model.config.width

        return hook

    hooks = [block.mlp.register_forward_pre_hook(count(i)) for i, block in enumerate(model.core)]
    yield counts
    for hook in hooks:
        hook.remove()


def one_by_one(model, text, stop, threshold=0.5, tolerance=0.05, rounds=6, limits=None):
    """(t) -> logits (t v), rounds (t): the definition, with loops, lists and pairs of complex numbers."""
    heads, c = model.config.heads, model.config.width // model.config.heads
    norm = lambda x: (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    pace = torch.tensor([10_000.0 ** (-2 * j / c) for j in range(c // 2)], dtype=torch.float64)

    def turned(x, place):
        x = torch.stack([norm(row) for row in x])
        z = torch.complex(x[:, ::2], x[:, 1::2]) * torch.polar(
            torch.ones(c // 2).double(), place * pace
        )
        return torch.stack([z.real, z.imag], -1).flatten(-2)

    def through(block, x, place, earlier, gains=(1.0, 1.0)):
        q, k, v = (block.attn.c_attn.weight @ (norm(x) * gains[0])).view(3, heads, c)
        q, k = turned(q, place), turned(k, place)
        seen = [*earlier, (k, v)]
        share = torch.stack([(q * k).sum(-1) / math.sqrt(c) for k, _ in seen]).softmax(0)
        x = (
            x
            + block.attn.c_proj.weight
            @ sum(w[:, None] * v for w, (_, v) in zip(share, seen)).flatten()
        )
        return x + block.mlp.c_proj.weight @ (
            block.mlp.c_fc.weight @ (norm(x) * gains[1])
        ).relu().square(), (k, v)

    read, shown, logits, taken = (
        [[] for _ in model.prelude],
        [],
        [],
        [],
    )  # shown[place][round][block]
    for place, character in enumerate(text.tolist()):
        x = model.embed.weight[character]
        for block, earlier in zip(model.prelude, read):
            x, kv = through(block, x, place, earlier)
            earlier.append(kv)
        given, thought, guess, going_on = (
            norm(x),
            torch.zeros(model.config.width).double(),
            None,
            1.0,
        )
        shown.append([])
        for r in range(rounds):
            before, old, x, kvs = thought, guess, thought + given, []
            for i, block in enumerate(model.core):
                gains = (
                    (1.0, 1.0)
                    if model.gains is None
                    else model.gains[min(r, model.config.rounds - 1)][i]
                )
                x, kv = through(
                    block, x, place, [rows[min(r, len(rows) - 1)][i] for rows in shown[:-1]], gains
                )
                kvs.append(kv)
            shown[-1].append(kvs)
            thought = norm(x)
            guess = model.head.weight @ thought
            q = guess.softmax(0)
            features = torch.cat(
                [
                    thought,
                    (thought - before).square().mean().sqrt()[None],
                    -(q * q.log()).sum()[None],
                ]
            )
            bias = model.halt_head.bias[0] + (
                0.0 if model.gains is None else model.halt_bias[min(r, model.config.rounds - 1)]
            )
            going_on = going_on * (1 - (model.halt_head.weight[0] @ features + bias).sigmoid())
            if (
                stop == "odds"
                and 1 - going_on >= threshold
                or stop == "sampled"
                and 1 - going_on >= limits[place]
            ):
                break
            if stop == "state" and (thought - before).square().mean().sqrt() <= tolerance:
                break
            if stop == "prediction" and r and (q - old.softmax(0)).abs().sum() / 2 <= tolerance:
                break
        logits.append(guess)
        taken.append(r + 1)
    return torch.stack(logits), torch.tensor(taken)


# left to right


@pytest.mark.parametrize("stop", RULES)
@pytest.mark.parametrize("prelude, core, gains", [(1, 1, False), (0, 2, True), (2, 3, False)])
@torch.no_grad()
def test_reads_as_defined_one_character_and_one_round_at_a_time(stop, prelude, core, gains):
    model, text = (
        thinker(prelude=prelude, core=core, round_gains=gains, rounds=3 if gains else 6),
        ids(1, 20),
    )
    limits = torch.rand(1, 20, generator=rng(), dtype=torch.float64)[0]
    rule = {"rounds": 6} | RULES[stop]  # with gains, twice as many as were trained
    logits, rounds = one_by_one(model, text[0], stop, **rule, limits=limits)
    assert stop == "fixed" or len(set(rounds.tolist())) > 1, (
        "a test in which all stop at once tests nothing"
    )
    for packed in (False, True):
        ours, state = model.read(text, packed=packed, stop=stop, generator=rng(), **rule)
        assert state.rounds[0].tolist() == rounds.tolist()
        torch.testing.assert_close(ours[0], logits, atol=1e-10 * max(1, logits.abs().max()), rtol=0)


def rounds_by_transformers(model, page, rounds, mask=None):
    """(b t) -> logits (b t v r) of every round, the blocks and the norm after them computed by transformers."""

    def through(blocks, x, gains=None):
        return stablelm(blocks, model.config.width, model.config.heads, gains)(
            inputs_embeds=x, attention_mask=mask
        ).last_hidden_state

    given = through(model.prelude, model.embed(page))
    thought, logits = torch.zeros_like(given), []
    for r in range(rounds):
        thought = through(
            model.core,
            thought + given,
            None if model.gains is None else model.gains[min(r, model.config.rounds - 1)],
        )
        logits.append(thought @ model.head.weight.T)
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
    ours = model.every_round(page, 5)[0]
    torch.testing.assert_close(
        ours, oracle, atol=2e-6 * oracle.abs().max().item(), rtol=0
    )  # their angles are float32


@pytest.mark.parametrize("name", ["thinker", "thinker-page"])
@torch.no_grad()
def test_the_thinkers_that_ship_equal_transformers(name, corpus):
    model = zoo.load(name).double()
    page = corpus.val[None, :100]
    everywhere = None if name == "thinker" else torch.zeros(1, 1, 100, 100).double()
    oracle = rounds_by_transformers(model, page, 2, everywhere)
    torch.testing.assert_close(
        model.every_round(page, 2)[0], oracle, atol=1e-5 * oracle.abs().max().item(), rtol=0
    )


@torch.no_grad()
def test_each_round_has_odds_of_its_own():
    model, text = thinker(core=2, round_gains=True, rounds=3), ids(1, 20)
    before = model.every_round(text, 5)[1]
    shift = torch.tensor(
        [2.0, -1.0, 0.5, 0.5, 0.5]
    ).double()  # beyond the trained rounds: as the last one
    model.halt_bias += shift[:3]
    torch.testing.assert_close(model.every_round(text, 5)[1].logit(), before.logit() + shift)
    for rounds in (1, 2, 5):
        halted = model.read(text, stop="fixed", rounds=rounds)[1].halted
        torch.testing.assert_close(halted, 1 - (1 - model.every_round(text, rounds)[1]).prod(-1))


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(stop):
    model, text = thinker(core=2, round_gains=True), ids(1, 24, seed=1)
    whole, memory = model.read(text, stop=stop, generator=rng(), **RULES[stop])
    for sizes in ([1] * 24, [5, 1, 1, 9, 8], [23, 1], [1, 23]):
        for packed in (False, True):
            state, pieces, rounds, generator = None, [], [], rng()
            for piece in text.split(sizes, 1):
                logits, state = model.read(
                    piece, state, packed=packed, stop=stop, generator=generator, **RULES[stop]
                )
                pieces.append(logits)
                rounds.append(state.rounds)
            torch.testing.assert_close(
                torch.cat(pieces, 1), whole, atol=1e-10 * whole.abs().max(), rtol=0
            )
            assert torch.equal(torch.cat(rounds, 1), memory.rounds)


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(stop):
    model, text, generator = thinker(), ids(3, 17, seed=2), rng()
    whole, memory = model.read(text, packed=True, stop=stop, generator=rng(), **RULES[stop])
    for i in range(3):
        one, state = model.read(
            text[i : i + 1], packed=True, stop=stop, generator=generator, **RULES[stop]
        )
        assert torch.equal(state.rounds[0], memory.rounds[i])
        torch.testing.assert_close(one[0], whole[i], atol=1e-10 * whole.abs().max(), rtol=0)


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_no_bit_of_the_past_depends_on_the_future(stop):
    model, text = thinker(), ids(2, 24)
    changed = torch.cat([text[:, :11], (text[:, 11:] + 1) % 65], 1)
    limits = {"generator": rng()}
    before, a = model.read(text, stop=stop, **RULES[stop], **limits)
    limits["generator"].manual_seed(0)
    after, b = model.read(changed, stop=stop, **RULES[stop], **limits)
    assert torch.equal(before[:, :11], after[:, :11]) and not torch.equal(
        before[:, 11:], after[:, 11:]
    )
    assert torch.equal(a.rounds[:, :11], b.rounds[:, :11])


@pytest.mark.parametrize("stop", RULES)
@torch.no_grad()
def test_who_has_stopped_is_not_computed(stop):
    model = thinker(core=2)
    with counting(model) as calls:
        _, state = model.read(ids(3, 20), packed=True, stop=stop, generator=rng(), **RULES[stop])
    assert calls == [int(state.rounds.sum())] * 2
    assert calls[0] == 3 * 20 * 4 if stop == "fixed" else calls[0] < 3 * 20 * 6
    with counting(model) as calls:
        drafts = list(model.generate(ids(1, 4), 12, generator=rng(), stop=stop, **RULES[stop]))
    prompt = model.read(drafts[0].ids, stop=stop, generator=rng(), **RULES[stop])[1].rounds.sum()
    later = sum(draft.note["rounds"][0] for draft in drafts[2:])
    if stop != "sampled":  # there the prompt drew other numbers
        assert calls == [int(prompt) + later] * 2


@torch.no_grad()
def test_sampled_stops_at_each_round_as_often_as_the_distribution_says():
    model = thinker(std=0.1, rounds=5)
    _, odds, _ = model.every_round(ids(1, 1))
    p = halting_distribution(odds[0, 0])
    _, state = model.read(ids(1, 1).expand(20_000, 1), packed=True, stop="sampled", generator=rng())
    counts = torch.bincount(state.rounds.flatten(), minlength=6)[1:]
    assert p.min() > 0.01 and chisquare(counts.numpy(), (20_000 * p).numpy()).pvalue > 1e-3


@torch.no_grad()
def test_extreme_settings_mean_what_they_say():
    model, text = thinker(std=0.1), ids(1, 10)
    rounds = lambda **how: set(model.read(text, **how)[1].rounds.flatten().tolist())
    assert rounds(threshold=0) == {1} and rounds(threshold=1.0) == {6}
    assert (
        rounds(stop="fixed") == {6}
        and rounds(stop="fixed", rounds=9) == {9}
        and rounds(threshold=1.0, rounds=2) == {2}
    )
    assert rounds(stop="state", tolerance=2.0) == {1} and rounds(stop="state", tolerance=0) == {6}
    assert rounds(stop="prediction", tolerance=1.0) == {2} and rounds(
        stop="prediction", tolerance=0
    ) == {6}


@torch.no_grad()
def test_surprise_is_exact_under_every_rule():
    model, text = thinker(std=0.1), ids(2, 18)
    for stop, settings in RULES.items():
        logits, _ = model.read(text[:, :-1], stop=stop, generator=rng(), **settings)
        nats = -logits.log_softmax(-1).gather(-1, text[:, 1:, None]).squeeze(-1)
        ours = model.nll(text, stop=stop, generator=rng(), **settings)
        torch.testing.assert_close(ours, nats, atol=1e-10 * max(1, nats.max().item()), rtol=0)
    torch.testing.assert_close(model.nll(text), model.nll(text, stop="odds", threshold=0.5))


@torch.no_grad()
def test_drafts_show_how_long_each_character_was_thought_about():
    model = thinker()
    *_, last = model.generate(ids(2, 5), 9, generator=rng(), threshold=0.8)
    _, state = model.read(last.ids[:, :-1], threshold=0.8)
    assert last.note["rounds"] == state.rounds[:, -1].tolist()
    assert last.note["halted"] == pytest.approx(state.halted[:, -1].tolist())
    shown = model.inspect(last.ids[:1])
    assert shown["rounds"].shape == shown["expected_rounds"].shape == (14,) and shown[
        "entropy"
    ].shape == (6, 14)


# training


def test_untrained_odds_are_the_prior():
    model = Thinker(ThinkerConfig(window=24, width=32, prior=0.25, rounds=5))
    _, odds, thought = model.every_round(ids(2, 9))
    torch.testing.assert_close(odds, torch.full_like(odds, 0.25))
    _, parts = model.loss(ids(2, 25))
    assert parts["prior_kl"].abs() < 1e-6 and parts["rounds"] == pytest.approx(
        sum(0.75**r for r in range(5)), abs=1e-5
    )
    torch.testing.assert_close(
        thought.square().mean(-1), torch.ones(2, 9), atol=1e-3, rtol=0
    )  # normalised at every round


@pytest.mark.parametrize("supervision", ["every", "late", "last", "halting"])
def test_loss_is_the_formula(supervision):
    model, text = (
        thinker(std=0.1, supervision=supervision, prior=0.2, prior_weight=0.03),
        ids(3, 25),
    )
    close = lambda ours, theirs: torch.testing.assert_close(
        ours, theirs, atol=1e-10 * max(1, theirs.abs().max().item()), rtol=0
    )
    logits, odds, _ = model.every_round(text[:, :-1])
    assert logits.shape == (3, 24, 65, 6) and odds.shape == (3, 24, 6)
    nats = -logits.log_softmax(2).gather(2, text[:, 1:, None, None].expand(-1, -1, 1, 6))[:, :, 0]
    p = halting_distribution(odds)
    pondering = (p * nats).sum(-1).mean() + 0.03 * kl_to_geometric(p, 0.2).mean()
    loss, parts = model.loss(text)
    late = (nats.mean((0, 1)) * torch.tensor([0, 0, 1, 2, 3, 4]) / 10).sum()  # of six rounds
    value = {
        "every": nats.mean(),
        "late": late,
        "last": nats[..., -1].mean(),
        "halting": pondering,
    }[supervision]
    close(loss, value)
    close(parts["rounds"], expected_rounds(p).mean())
    close(parts["nats_per_char"], nats[..., -1].mean())

    body = list(model.core.parameters()) + list(model.prelude.parameters())
    slopes = torch.autograd.grad(loss, [model.halt_head.weight, *body])
    pull, *bend = torch.autograd.grad(pondering, [model.halt_head.weight, *body], retain_graph=True)
    close(slopes[0], pull)
    if supervision != "halting":  # the odds learn beside the network and do not bend it
        bend = torch.autograd.grad(value, body)
    for ours, theirs in zip(slopes[1:], bend):
        close(ours, theirs)


@pytest.mark.parametrize("kind", [Thinker, PageThinker])
def test_dropout_is_active_in_training(kind):
    losses = []
    for p in (0.0, 0.5):
        model = thinker(kind, dropout=p).train()
        assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {p}
        torch.manual_seed(0)
        losses.append(model.loss(ids(4, 25))[0])
    assert not torch.equal(*losses)


def test_random_rounds_are_drawn_while_training_only():
    model = Thinker(ThinkerConfig(window=8, width=16, rounds=5, random_rounds=True))
    torch.manual_seed(0)
    assert {model.draw_rounds() for _ in range(200)} == {3, 4, 5, 6, 7}
    assert {model.eval().draw_rounds() for _ in range(50)} == {5}
    assert Thinker(ThinkerConfig(window=8, width=16, rounds=5)).draw_rounds() == 5


def test_what_makes_no_sense_is_named():
    model = thinker()
    for settings, word in [
        ({"stop": "never"}, "stop is one of odds"),
        ({"rounds": -1}, "rounds"),
        ({"threshold": 1.1}, "threshold"),
    ]:
        with pytest.raises(ValueError, match=word):
            model.read(ids(1, 3), **settings)
        with pytest.raises(ValueError, match=word):
            model.generate(ids(1, 3), 3, **settings)
    with pytest.raises(ValueError, match="tolerance"):
        model.nll(ids(1, 3), tolerance=math.nan)
    with pytest.raises(ValueError, match="no setting 'steps'"):
        model.generate(ids(1, 3), 3, steps=4)
    _, state = model.read(ids(1, 20))
    with pytest.raises(ValueError, match="window holds 24 characters; got 5 after 20"):
        model.read(ids(1, 5), state)
    for wrong, word in [
        ({"rounds": 0}, "rounds"),
        ({"prior": 1.0}, "prior"),
        ({"supervision": "some"}, "supervision"),
    ]:
        with pytest.raises(ValueError, match=word):
            ThinkerConfig(**wrong)


# all at once


@torch.no_grad()
def test_the_page_looks_both_ways_and_not_under_the_blanks():
    model, text = thinker(PageThinker), ids(1, 20)
    logits = model.every_round(text)[0]
    later = text.clone()
    later[:, 15] = (later[:, 15] + 1) % 65
    assert not torch.allclose(model.every_round(later)[0][:, :15], logits[:, :15])
    hidden = torch.zeros_like(text, dtype=torch.bool)
    hidden[:, 15] = True
    seen = [model.every_round(x.masked_fill(hidden, model.blank))[0] for x in (text, later)]
    assert torch.equal(*seen) and seen[0].shape[2] == 65


@torch.no_grad()
def test_bound_is_the_mean_over_all_ways_to_hide():
    """Three characters after the first: 3 + 3 + 1 ways to hide, each number of hidden ones equally likely."""
    model, text, rows = thinker(PageThinker, std=0.2), ids(1, 4), []
    for k in (1, 2, 3):
        for places in combinations((1, 2, 3), k):
            hidden = torch.zeros(1, 4, dtype=torch.bool)
            hidden[:, list(places)] = True
            nats = F.cross_entropy(
                model.every_round(text.masked_fill(hidden, model.blank))[0][0, ..., -1],
                text[0],
                reduction="none",
            )
            rows.append(nats[hidden[0]].mean() / 3 / math.comb(3, k))
    draws = model.nll(text.expand(6000, 4), generator=rng(), draws=1).double().mean(1)
    error = draws.std() / math.sqrt(6000)
    assert abs(draws.mean() - sum(rows)) < 4 * error and error < 0.05 * draws.std()

    model.head.weight.zero_()  # guesses that know nothing cost ln 65 each, and the bound is tight
    assert model.nll(ids(3, 25), generator=rng()).mean().item() == pytest.approx(
        math.log(65), rel=1e-10
    )


def test_hidden_places_are_as_many_as_they_should_be():
    model = thinker(PageThinker)
    hidden = model.hide(800, 9, generator=rng())
    assert (
        not hidden[:, 0].any()
        and torch.bincount(hidden.sum(1), minlength=9).tolist() == [0] + [100] * 8
    )
    assert (hidden[:, 1:].double().mean(0) - 4.5 / 8).abs().max() < 0.07
    first = torch.arange(800) % 8 + 1
    hidden = model.hide(800, 9, first, generator=rng())
    assert not (hidden & (torch.arange(9) < first[:, None])).any() and (hidden.sum(1) >= 1).all()


def test_page_loss_is_a_bound_by_name_and_carries_thoughts_in_training():
    model = thinker(PageThinker, std=0.1, rounds=2)
    model.head.weight.data.zero_()
    torch.manual_seed(0)
    loss, parts = model.loss(ids(4, 25))
    assert (
        loss.item() == pytest.approx(math.log(65), rel=1e-10) == parts["bound_nats_per_char"].item()
    )
    starts, inner = [], model.every_round

    def every_round(page, rounds=None, thought=None):
        starts.append(thought is not None)
        return inner(page, rounds, thought)

    model.train().every_round = every_round
    for _ in range(30):
        model.loss(ids(4, 25))
    carried = starts.count(True)
    assert 5 < carried < 25 and len(starts) == 30 + carried


def test_the_bound_is_counted_in_rows_without_a_beginning():
    model, text = thinker(PageThinker, rounds=2), ids(4, 25)
    logits = torch.zeros(4, 25, 65, 2, dtype=torch.float64)
    logits[1::2] = (
        99.0 * F.one_hot(text[1::2], 65)[..., None]
    )  # rows with a beginning are known, the others not at all
    model.every_round = lambda *_: (logits, torch.full((4, 25, 2), 0.5, dtype=torch.float64), None)
    assert model.loss(text)[1]["bound_nats_per_char"].item() == pytest.approx(
        math.log(65), rel=1e-10
    )


@torch.no_grad()
def test_refinements_keep_the_surest_and_carry_the_thought_on():
    model, text = thinker(PageThinker, std=0.15), ids(1, 12)
    page, thought, hidden = text.clone(), None, torch.arange(12)[None] >= 4
    drafts = model.refine(
        text, 4, {"temperature": 0}, None, model.rule({"stop": "fixed", "rounds": 3, "steps": 4})
    )
    for step, (shown, still, rounds) in enumerate(drafts):
        logits, _, thought = model.every_round(page.masked_fill(hidden, model.blank), 3, thought)
        sure, guess = logits[..., -1].softmax(-1).max(-1)
        surest = sure.masked_fill(~hidden, -1).topk(2).indices
        page = torch.where(hidden, guess, page)
        hidden = hidden.scatter(1, surest, False)
        assert torch.equal(shown, page) and torch.equal(still, hidden) and rounds == 3 * (step + 1)
    assert step == 3 and not hidden.any()


@torch.no_grad()
def test_orders_steps_and_sureness_of_a_page():
    model, prompt = thinker(PageThinker, std=0.1), ids(2, 5)
    write = lambda **how: list(model.generate(prompt, 12, generator=rng(), **how))
    assert [d.settled for d in write(order="left", steps=4)] == [5, 8, 11, 14, 17]
    assert [d.settled for d in write(order="left")] == [5, 7, 9, 11, 13, 15, 17]
    assert len(write(keep=0.0)) == 2 and len(write(steps=12)) == 13
    assert (
        len(
            {
                tuple(d.settled for d in write(order=order, steps=12))
                for order in ("surest", "random", "left")
            }
        )
        == 3
    )
    assert not torch.equal(
        write(order="random")[1].ids, write(order="random", temperature=0)[1].ids
    )
    for draft in write(order="random"):
        assert draft.settled <= draft.ids.shape[1] and 0 <= draft.ids.min() and draft.ids.max() < 65


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"stop": "odds", "threshold": 0.9},
        {"stop": "state", "tolerance": 0.02},
        {"stop": "prediction", "tolerance": 0.01},
    ],
)
def test_pages_in_a_batch_are_as_one_by_one(how):
    model, page = thinker(PageThinker, std=0.1, rounds=9), ids(6, 12)
    page[:, 4:], hidden, rule = model.blank, torch.arange(12).expand(6, 12) >= 4, model.rule(how)
    thought, logits, taken = model.think(page, hidden, None, None, rule)
    alone = [model.think(page[i : i + 1], hidden[i : i + 1], None, None, rule) for i in range(6)]
    torch.testing.assert_close(thought, torch.cat([one[0] for one in alone]), atol=1e-12, rtol=0)
    torch.testing.assert_close(logits, torch.cat([one[1] for one in alone]), atol=1e-12, rtol=0)
    rounds = [one[2] for one in alone]
    assert taken == max(rounds) > min(rounds), rounds  # or there was nothing to wait for


def test_no_pages_are_no_trouble():
    *_, last = thinker(PageThinker).generate(torch.zeros(0, 3, dtype=torch.long), 4)
    assert last.ids.shape == (0, 7)


def test_mixed_precision_reaches_reading_and_looking_inside():
    model = thinker(std=0.1).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.nll(ids(2, 9)).isfinite().all()
    assert not any(v.requires_grad for v in model.inspect(ids(1, 9)).values())


def test_a_page_stops_thinking_when_all_its_places_rest():
    model, prompt = thinker(PageThinker, std=0.1, rounds=5), ids(1, 5)

    def rounds(**how):
        with counting(model) as calls:
            *_, last = model.generate(prompt, 8, generator=rng(), steps=3, **how)
        assert calls == [13 * last.note["rounds"]]
        return last.note["rounds"]

    assert rounds(stop="fixed") == 15 and rounds(stop="fixed", rounds=2) == 6
    assert (
        rounds(threshold=0.0) == 3
        and rounds(stop="state", tolerance=2.0) == 3
        and rounds(stop="prediction", tolerance=1.0) == 6
    )
    assert 3 < rounds(stop="state", tolerance=0.1) < 15
    assert 3 <= rounds(stop="sampled") <= 15
