"""irann.models.thinker_page against enumeration, a refinement by hand, and its own rows."""

import math
from itertools import combinations, islice, pairwise
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses
from helpers import ids, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from test_thinker import close, counting, thinker
from torch.nn import functional as F

from irann.models.thinker_page import PageThinker
from irann.sampling import Sampling


def page_thinker(std=0.3, **options):
    return thinker(PageThinker, std, **options)


def masked_at(where, t):
    masked = torch.zeros(1, t, dtype=torch.bool)
    masked[:, list(where)] = True
    return masked


@torch.no_grad()
def test_every_position_sees_all_others_and_nothing_under_a_mask():
    model, text = page_thinker(), ids(1, 20)
    later = text.clone()
    later[:, 15] = (later[:, 15] + 1) % 65
    seen = [model.every_round(page)[0] for page in (text, later)]
    assert not torch.allclose(seen[0][:, :15], seen[1][:, :15])
    masked = masked_at([15], 20)
    seen = [model.every_round(p.masked_fill(masked, model.mask_token))[0] for p in (text, later)]
    assert torch.equal(*seen) and seen[0].shape[2] == 65


@torch.no_grad()
def test_bound_is_the_mean_over_all_masks():
    """Three characters after the first: 3 + 3 + 1 masks, each number of masked ones equally
    likely.
    """
    model, text, bound = page_thinker(0.2), ids(1, 4), 0.0
    for k in (1, 2, 3):
        for where in combinations((1, 2, 3), k):
            masked = masked_at(where, 4)
            logits = model.every_round(text.masked_fill(masked, model.mask_token))[0][0, ..., -1]
            nats = F.cross_entropy(logits, text[0], reduction="none")
            bound += nats[masked[0]].mean() / 3 / math.comb(3, k)
    drawn = model.nll(text.expand(6000, 4), generator=rng(), draws=1).double().mean(1)
    error = drawn.std() / math.sqrt(6000)
    assert abs(drawn.mean() - bound) < 4 * error and error < 0.05 * drawn.std()

    model.lm_head.weight.zero_()  # guesses that know nothing cost ln 65 each: the bound is tight
    mean = model.nll(ids(3, 25), generator=rng()).mean().item()
    assert mean == pytest.approx(math.log(65), rel=1e-10)
    with refuses("draws is a whole number from 1 up; got 0"):
        model.nll(text, draws=0)


def test_as_many_positions_are_masked_as_should_be():
    model = page_thinker()
    masked = model.draw_mask(torch.ones(800, dtype=torch.long), 9, rng())
    assert not masked[:, 0].any()
    assert torch.bincount(masked.sum(1), minlength=9).tolist() == [0] + [100] * 8
    assert (masked[:, 1:].double().mean(0) - 4.5 / 8).abs().max() < 0.07
    first = torch.arange(800) % 8 + 1
    masked = model.draw_mask(first, 9, rng())
    assert not (masked & (torch.arange(9) < first[:, None])).any()
    assert (masked.sum(1) >= 1).all()


def test_draws_are_of_the_whole_batch():
    model, text = page_thinker(random_rounds=True).train(), ids(9, 25)
    draws = [model.draw(text, generator=rng(seed)) for seed in range(60)]
    assert 15 < sum(d["carried"] for d in draws) < 45
    assert {type(d["carried"]) for d in draws} == {bool} and {type(d["rounds"]) for d in draws} == {
        int
    }
    assert {d["carried_rounds"] for d in draws} == {d["rounds"] for d in draws} == set(range(3, 10))
    for d in draws:
        assert not (d["masked"] & ~d["carried_masked"]).any()
        assert d["bound_weights"].tolist() == pytest.approx([9 / 5, 0] * 4 + [9 / 5])
    ahead = [d["masked"].long().argmax(1) for d in draws]  # the first masked position
    assert (
        torch.stack(ahead)[:, 1::2].double().mean() > 2 * torch.stack(ahead)[:, ::2].double().mean()
    )
    assert not any(model.eval().draw(text)["carried"] for _ in range(20))
    again = model.draw(text, generator=rng())
    assert torch.equal(model.draw(text, generator=rng())["masked"], again["masked"])


def test_loss_is_the_formula():
    model, text = page_thinker(0.1, rounds=2).train(), ids(4, 25)
    draws = model.draw(text, generator=rng())
    for carried in (False, True):
        draws |= {"carried": carried, "carried_rounds": 3, "rounds": 2}
        hidden = None
        if carried:
            more = text.masked_fill(draws["carried_masked"], model.mask_token)
            hidden = model.every_round(more, 3)[2].detach()
        page = text.masked_fill(draws["masked"], model.mask_token)
        log_p = model.every_round(page, 2, hidden)[0].log_softmax(2)
        rows = []  # of each row: the mean of all rounds, and of the last, over its masked positions
        for i, mask in enumerate(draws["masked"]):
            nats = -log_p[i, mask].gather(1, text[i, mask, None, None].expand(-1, 1, 2))[:, 0]
            rows.append(torch.stack([nats.mean(), nats[:, 1].mean()]))
        rows = torch.stack(rows)
        loss, parts = model.loss(text, draws)
        close(loss, rows[:, 0].mean())
        close(parts["bound_nats_per_char"], rows[::2, 1].mean())  # from rows without a prompt


# ------------------------------------------------------------------------------------- writing


@torch.no_grad()
def test_refinements_keep_the_surest_and_carry_the_hidden_state_on():
    model, page = page_thinker(0.15), ids(1, 12)
    hidden, masked = None, torch.arange(12)[None] >= 4
    rule = model.rule({"stop": "fixed", "rounds": 3, "steps": 4})
    drafts = model.refine(page.clone(), masked, Sampling(temperature=0), None, rule)
    for step, draft in enumerate(drafts):
        now = page.masked_fill(masked, model.mask_token)
        logits, _, hidden = model.every_round(now, 3, hidden)
        sure, guess = logits[..., -1].softmax(-1).max(-1)
        surest = sure.masked_fill(~masked, -1).topk(2).indices
        page = torch.where(masked, guess, page)
        masked = masked.scatter(1, surest, False)
        assert torch.equal(draft.ids, page)
        assert draft.note == {"rounds": 3 * (step + 1), "masked": int(masked.sum())}
        assert draft.settled == (~masked[0]).long().cumprod(0).sum()
    assert step == 3 and not masked.any()


def test_without_a_number_of_steps_two_characters_a_refinement_are_kept():
    model = page_thinker(0.15)
    for gap, steps in ((1, 1), (2, 1), (3, 2), (8, 4)):
        masked, rule = torch.arange(12)[None] >= 12 - gap, model.rule({})
        assert len(list(model.refine(ids(1, 12), masked, Sampling(), rng(), rule))) == steps


@torch.no_grad()
def test_orders_steps_and_sureness_of_a_page():
    model, prompt = page_thinker(0.1), ids(2, 5)

    def write(**how):
        return list(model.generate(prompt, 12, generator=rng(), **how))

    assert [d.settled for d in write(order="left", steps=4)] == [5, 8, 11, 14, 17]
    assert [d.settled for d in write(order="left")] == [5, 7, 9, 11, 13, 15, 17]
    assert len(write(keep=0.0)) == 2 and len(write(steps=12)) == 13
    orders = ("surest", "random", "left")
    assert len({tuple(d.settled for d in write(order=o, steps=12)) for o in orders}) == 3
    greedy = write(order="random", temperature=0)[1].ids
    assert not torch.equal(write(order="random")[1].ids, greedy)


MODEL = page_thinker(0.1, window=11)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prompt=st.integers(0, 30),
    n=st.integers(0, 30),
    how=st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 9),
            "order": st.sampled_from(["surest", "random", "left"]),
            "keep": st.sampled_from([0.0, 0.5, 1.0]),
            "stop": st.sampled_from(["halting", "sampled", "state", "prediction", "fixed"]),
        },
    ),
)
@torch.no_grad()
def test_any_prompt_is_continued_page_by_page(prompt, n, how):
    start = ids(2, prompt)
    settled, last = 0, None
    for draft in MODEL.generate(start, n, generator=rng(), **how):
        assert settled <= draft.settled <= draft.ids.shape[1]
        assert last is None or torch.equal(draft.ids[:, :settled], last[:, :settled])
        assert 0 <= draft.ids.min() and draft.ids.max() < 65
        settled, last = draft.settled, draft.ids.clone()
        draft.ids.zero_()  # it is ours
    room = max(1, prompt)  # an empty prompt is read as a newline
    assert settled == last.shape[1] == room + n
    assert torch.equal(last[:, :prompt], start)
    assert draft.forgotten <= room


def test_a_likelihood_is_of_one_window():
    assert MODEL.nll(ids(1, 12)).shape == (1, 11)
    with refuses("window holds 12 characters; got 13"):
        MODEL.nll(ids(1, 13))


@torch.no_grad()
def test_rows_of_a_batch_write_as_if_alone():
    model, prompt = page_thinker(0.15), ids(4, 5)
    how = {"temperature": 0, "stop": "state", "tolerance": 0.1, "keep": 0.1}
    *_, together = model.generate(prompt, 20, **how)
    rounds = []
    for i in range(4):
        *_, alone = model.generate(prompt[i : i + 1], 20, **how)
        assert torch.equal(alone.ids[0], together.ids[i])
        rounds.append(alone.note["rounds"])
    assert len(set(rounds)) > 1, "or there was nothing to wait for"


@torch.no_grad()
@pytest.mark.parametrize(
    "std, how",
    [
        (0.1, {"stop": "halting", "threshold": 0.9}),
        (0.1, {"stop": "state", "tolerance": 0.02}),
        (0.1, {"stop": "prediction", "tolerance": 0.01}),
        (0.3, {"stop": "prediction", "tolerance": 0.1}),  # one that has stopped would move again
    ],
)
def test_pages_in_a_batch_think_as_one_by_one(std, how):
    model, page = page_thinker(std, rounds=9), ids(6, 12)
    page[:, 4:] = model.mask_token
    masked, rule = torch.arange(12).expand(6, 12) >= 4, model.rule(how)
    hidden, logits, taken = model.think(page, masked, None, None, rule)
    alone = [model.think(page[i : i + 1], masked[i : i + 1], None, None, rule) for i in range(6)]
    close(hidden, torch.cat([one[0] for one in alone]), atol=1e-12)
    close(logits, torch.cat([one[1] for one in alone]), atol=1e-12)
    rounds = [one[2] for one in alone]
    assert taken == max(rounds) > min(rounds), rounds  # or there was nothing to wait for


def test_no_rows_are_no_trouble():
    *_, last = page_thinker().generate(torch.zeros(0, 3, dtype=torch.long), 4)
    assert last.ids.shape == (0, 7)


def test_a_page_stops_thinking_when_all_its_positions_rest():
    model, prompt = page_thinker(0.1, rounds=5), ids(1, 5)

    def rounds(**how):
        with counting(model) as calls:
            *_, last = model.generate(prompt, 8, generator=rng(), steps=3, **how)
        assert calls == [[13] * last.note["rounds"]]
        return last.note["rounds"]

    assert rounds(stop="fixed") == 15 and rounds(stop="fixed", rounds=2) == 6
    assert rounds(threshold=0.0) == 3
    assert rounds(stop="state", tolerance=2.0) == 3
    assert rounds(stop="prediction", tolerance=1.0) == 6
    assert 3 < rounds(stop="state", tolerance=0.1) < 15
    assert 3 <= rounds(stop="sampled") <= 15


def test_every_draw_of_a_bound_has_masks_of_its_own(monkeypatch):
    model, seen = page_thinker(), []
    every = model.every_round
    look = lambda page: seen.append(page == model.mask_token) or every(page)  # noqa: E731
    monkeypatch.setattr(model, "every_round", look)
    model.nll(ids(3, 25), generator=rng(), draws=4)
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 4


def test_the_hidden_state_that_is_carried_has_no_gradient(monkeypatch):
    model, text, given = page_thinker(0.1).train(), ids(4, 25), []
    every = model.every_round

    def look(page, rounds, hidden=None):
        given.append(hidden)
        return every(page, rounds, hidden)

    monkeypatch.setattr(model, "every_round", look)
    model.loss(text, model.draw(text, generator=rng()) | {"carried": True})
    assert given[0] is None and given[1].any() and not given[1].requires_grad


@torch.no_grad()
def test_only_what_is_to_be_guessed_has_to_rest():
    model, page = page_thinker(0.1, rounds=9), ids(1, 12)
    states = [torch.zeros(1, 12, 32).double(), *(r.hidden for r in islice(model.ponder(page), 9))]
    moved = torch.stack([(b - a).square().mean(-1)[0].sqrt() for a, b in pairwise(states)])
    rule, taken = model.rule({"stop": "state", "tolerance": 0.05}), []
    for i in range(12):
        taken.append(model.think(page, masked_at([i], 12), None, None, rule)[2])
        assert taken[-1] == 1 + (moved[:, i] <= 0.05).tolist().index(True)
    assert len(set(taken)) > 1, taken


@torch.no_grad()
def test_not_even_a_certain_guess_is_kept_at_once_unless_it_is_asked_for(monkeypatch):
    model = page_thinker(0.1)
    model.lm_head.weight *= 1e4  # a softmax of exactly one
    prompt = ids(1, 5)
    monkeypatch.setattr(torch, "randint", Mock(wraps=torch.randint))
    for keep, drafts in ((1.0, 5), (0.999, 2)):
        assert len(list(model.generate(prompt, 8, steps=4, keep=keep))) == drafts
    assert torch.randint.call_args.args[0] <= 2**31  # MPS draws no more than 32 bits
