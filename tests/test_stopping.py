"""The numbers that say what a rule of stopping is worth, by hand and by definition."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import excite

from irann import shakespeare, zoo
from irann.bench import races, stopping, suite
from irann.models.recurrent import round_nats
from irann.text import Text

FIXED = {"1": 2.0, "2": 1.5, "3": 1.4, "4": 1.4, "8": 1.6}


def test_the_line_mixes_neighbouring_rounds():
    mixed = [stopping.line(FIXED, rounds) for rounds in (1.0, 1.2, 2.0, 2.5, 4.0)]
    assert mixed == pytest.approx([2.0, 1.9, 1.5, 1.45, 1.4])


def test_a_rule_between_two_limits_is_their_lottery():
    points = [[1.38, 4.0], [1.5, 1.5], [1.42, 2.5]]  # in no order
    assert [stopping.at(points, rounds) for rounds in (1.5, 2.0, 2.5, 3.0, 4.0)] == pytest.approx(
        [1.5, 1.46, 1.42, 1.42 - 0.04 / 3, 1.38]
    )
    assert math.isnan(stopping.at(points, 1.4)) and math.isnan(stopping.at(points, 4.1))


def test_against_the_line_a_lottery_gains_nothing():
    lottery = {str(x): [stopping.line(FIXED, x), x] for x in (1.5, 2.0, 3.0, 4.0)}
    assert list(stopping.against_line(FIXED, lottery).values()) == pytest.approx([0, 0, 0, 0])
    better = {"a": [1.4, 2.0], "b": [1.35, 3.0]}
    gain = stopping.against_line(FIXED, better)
    assert gain == pytest.approx({"2.0": -0.1, "2.5": -0.075, "3.0": -0.05})  # 4 is not reached


@pytest.fixture
def few():
    """A thinker that stops at all of its rounds, and a text of a few windows."""
    text = shakespeare.load()
    text = Text(text.train, text.val[:96], text.vocabulary, text.source, text.sha256)
    model = excite(zoo.build("thinker", zoo.recipe("thinker", "tiny", rounds=4)[0]).eval(), 0.1)
    return model, text


@torch.no_grad()
def test_a_rule_is_counted_position_by_position(few):
    model, text = few
    ids = torch.cat([text.train[-1:], text.val]).unfold(0, 33, 32)
    rules = stopping.Rules(model)
    rules(ids)
    logits, halt, _ = model.every_round(ids[:, :-1])
    nats, q = round_nats(logits, ids[:, 1:]), logits.softmax(2)
    assert (rules.fixed / 96).tolist() == pytest.approx(nats.mean((0, 1)).tolist(), abs=1e-5)
    for rule, limits in (("learned", stopping.THRESHOLDS), ("informed", stopping.KLS)):
        points = rules.points(rule)
        for limit in limits:
            paid, rounds = 0.0, 0
            for b in range(3):
                for t in range(32):
                    going = 1.0
                    for r in range(4):
                        going *= 1 - halt[b, t, r].item()
                        last, now = q[b, t, :, -1], q[b, t, :, r]
                        kl = (last * (last / now).log()).sum().item()
                        stop = 1 - going >= limit if rule == "learned" else kl <= limit
                        if stop or r == 3:
                            break
                    paid, rounds = paid + nats[b, t, r].item(), rounds + r + 1
            assert points[str(limit)] == pytest.approx([paid / 96, rounds / 96], abs=1e-4), limit
        assert len({rounds for _, rounds in points.values()}) > 3


def test_the_benchmark_tells_what_it_measured(few, tmp_path, monkeypatch, capsys):
    model, text = few
    monkeypatch.setattr(shakespeare, "load", lambda: text)
    monkeypatch.setattr(zoo, "load", lambda name: model)
    measured = suite.main("stopping", quick=True, out=tmp_path)["stopping"]
    assert list(measured["rules"]) == ["learned", "informed"]
    nats = model.nll(torch.cat([text.train[-1:], text.val]).unfold(0, 33, 32), threshold=0.5)
    assert measured["rules"]["learned"]["0.5"][0] == pytest.approx(nats.mean().item(), abs=1e-4)
    nats, rounds = measured["rules"]["learned"]["0.5"]
    assert rounds == races.nats_and_rounds(model, text, threshold=0.5)[1]
    told = stopping.against_line(measured["fixed"], measured["rules"]["learned"])
    assert measured["against"]["learned"] == told != {}
    page = capsys.readouterr().out
    for rule, against in measured["against"].items():
        assert f"| {rule} | " in page and all(
            f"| {nats:.4f} |" in page for nats in against.values()
        )
    assert "| threshold 0.5 |" in page and f"| learned | 0.5 | {nats:.4f} | {rounds:.4f} |" in page


def test_only_a_quick_benchmark_measures_no_more_than_four_windows(few, monkeypatch):
    model, _ = few
    text = shakespeare.load()
    monkeypatch.setattr(zoo, "load", lambda name: model)
    monkeypatch.setattr(stopping, "writing", lambda model, quick: {})
    monkeypatch.setattr(shakespeare, "load", lambda: replace(text, val=text.val[:160]))
    for quick, part in ((True, 128), (False, 160)):
        same = replace(text, val=text.val[:part])
        nats, _ = races.nats_and_rounds(model, same, stop="fixed", rounds=2)
        fixed = stopping.stopping(quick)["fixed"]
        assert list(fixed) == [*"1234"] and fixed["2"] == pytest.approx(nats, abs=1e-5)


def test_writing_is_timed_by_the_rules_that_it_names(few, monkeypatch):
    model, _ = few
    asked = []
    monkeypatch.setattr(type(model), "generate", lambda *_, **how: asked.append(how) or ())
    rows = stopping.writing(model, quick=True)["rows"]
    for name, how in zip(rows, asked):  # the round that does not count
        del how["generator"]
        rule, number = name.split() if name.startswith("threshold") else ("rounds", name[0])
        told = how.get(rule, 4 if rule == "rounds" else None)
        assert str(told) == number and (how.get("stop") == "fixed") == (rule == "rounds"), name
    assert len(rows) == 5 and len(asked) == 10
