"""Measures of text, by hand."""

import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

from irann.bench import quality
from irann.lm import Draft
from irann.text import Vocabulary

TEXT = "the cat sat on the mat.\nthe dog sat on the log.\n" * 3
CORPUS = quality.Corpus(TEXT)


def test_words_by_hand():
    # the first and the last do not count
    assert CORPUS.existing("xx the zebra SAT on yy") == pytest.approx(3 / 4)
    assert CORPUS.existing("one two") is None  # both may be cut: there is nothing to count
    assert quality.words("'Tis the king's, I'll say't--so") == [
        "Tis",
        "the",
        "king's",
        "I'll",
        "say't",
        "so",
    ]
    assert quality.Corpus("The Cat's").existing("xx THE cat's yy") == 1


def test_copies_by_hand():
    text = "the cat sat on the mat"
    assert CORPUS.copied(text) == 1.0 and CORPUS.copied("Q" * 30) == 0.0
    assert CORPUS.copied(text[:20] + "Q") == 0.5


def test_the_judge_is_a_distribution():
    """Its probabilities after any context sum to one, and a seen text is likelier than its
    reverse.
    """
    alphabet = sorted(set(TEXT))
    for context in ("the c", "zz", "", "sat on the "):
        total = sum(math.exp(-CORPUS.judge(context + c, len(context))) for c in alphabet)
        assert total == pytest.approx(1)
    assert CORPUS.judge("the cat sat") < CORPUS.judge("tas tac eht")


def test_the_judge_by_hand():
    """Corpus aab: p(a) by Witten and Bell from uniform 1/2: (2 + 2/2) / (3 + 2); then after a: (1 +
    2 p) / (2 + 2).
    """
    corpus = quality.Corpus("aab")
    p = (2 + 2 * 0.5) / (3 + 2)
    assert corpus.judge("a") == pytest.approx(-math.log(p))
    assert corpus.judge("qa", 1) == pytest.approx(-math.log(p))
    assert corpus.judge("ba", 1) == pytest.approx(-math.log(p))  # nothing was ever seen after b
    b = (1 + 2 * (1 + 2 * 0.5) / (3 + 2)) / (2 + 2)  # after a; after aa only b was ever seen
    assert corpus.judge("aab", 2) == pytest.approx(-math.log((1 + b) / (1 + 1)))


def test_a_corpus_is_counted_once_and_another_is_another():
    assert quality.counted("the cat") is quality.counted("the cat")
    assert quality.counted("a dog").words == {"a", "dog"}


def test_the_judge_sees_six_characters_and_no_more():
    corpus = quality.Corpus("px12345a qx12345b z12345b")

    def after(context, c):
        return corpus.judge(context + c, len(context))

    right = pytest.approx(after("px12345", "a"))
    assert after("x12345", "a") == right == after("qx12345", "a")
    assert after("x12345", "a") != pytest.approx(after("?12345", "a"))


def test_the_interval_holds_the_mean():
    given = quality.interval([0.0, 1.0] * 50)
    assert given["mean"] == 0.5 and 0.38 < given["low"] < 0.43 and 0.57 < given["high"] < 0.62
    assert quality.interval([None, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_the_interval_is_the_normal_one_for_many_values():
    generator = random.Random(0)
    values = [generator.gauss(5, 2) for _ in range(200)]
    given, side = quality.interval(values), 1.96 * statistics.stdev(values) / math.sqrt(200)
    side = pytest.approx(side, rel=0.08)
    assert given["mean"] - given["low"] == side == given["high"] - given["mean"]


def test_a_report_by_hand():
    rows = quality.report(["xx the cat yy", "The zebra yy the yy"], CORPUS)
    assert rows["words that exist"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert rows["different words"] == pytest.approx(5 / 9)


def test_an_interval_is_as_wide_as_what_is_known_makes_it():
    known = [0.0, 1.0, 0.5]
    assert quality.interval([*known, *[None] * 50]) == quality.interval(known)


def test_what_cannot_be_counted_is_no_zero():
    rows = quality.report(["?", "xx the cat yy"], CORPUS)
    assert rows["words that exist"]["mean"] == 1  # of the text that has whole words
    rows = quality.report(["?"], CORPUS)
    nothing = [name for name, value in rows.items() if value is None]
    assert nothing == ["words that exist", "copied runs of 20", "different words"]


def test_a_report_of_the_corpus_itself_is_perfect():
    rows = quality.report([TEXT], CORPUS)
    assert rows["words that exist"]["mean"] == rows["copied runs of 20"]["mean"] == 1


def test_samples_are_without_the_newline_they_begin_from(monkeypatch):
    asked = []

    def generate(start, n, *, temperature, generator):
        asked.append((start.tolist(), temperature, generator.initial_seed()))
        yield Draft(start, 1)
        yield Draft(torch.cat([start, torch.ones_like(start).expand(-1, n)], 1), 1 + n)

    made, real = [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": made.append(device) or real())
    model = SimpleNamespace(generate=generate, device="cuda", vocabulary=Vocabulary("\nab"))
    assert quality.samples(model, 2, 3, 0.8, seed=4) == ["aaa", "aaa"]
    assert asked == [([[0], [0]], 0.8, 4)] and made == ["cuda"]


def test_what_is_written_is_measured_at_both_temperatures(small):
    def generate(start, n, *, temperature, generator):
        generator = torch.Generator().manual_seed(round(10 * temperature))
        places = torch.randint(3000, (len(start), 1), generator=generator) + torch.arange(n)
        yield SimpleNamespace(ids=torch.cat([start, small.train[places]], 1))

    model = SimpleNamespace(generate=generate, device="cpu", vocabulary=small.vocabulary)
    rows, first = quality.written(model, small, 3, 60)
    corpus = quality.Corpus(small.vocabulary.decode(small.train))
    for temperature in (0.8, 1.0):
        texts = quality.samples(model, 3, 60, temperature)
        assert rows[str(temperature)] == quality.report(texts, corpus)
        assert first[str(temperature)] == texts[0]
        assert rows[str(temperature)]["copied runs of 20"]["mean"] == 1
    assert rows["0.8"] != rows["1.0"]


def test_the_real_thing_is_cut_out_of_the_validation_part(small):
    val = small.vocabulary.decode(small.val)
    corpus = quality.Corpus(small.vocabulary.decode(small.train))
    pieces = [val[70 * i :][:40] for i in range(5)]
    assert quality.real(small, 5, 40) == quality.report(pieces, corpus)
