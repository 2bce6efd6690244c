"""irann.lm against transformers' warpers, against counting, and against a model small enough to
compute by hand.
"""

import copy
import pickle
import threading
import time
import warnings
from dataclasses import dataclass
from inspect import unwrap
from itertools import islice
from typing import ClassVar

import pytest
import torch
from conftest import refuses
from helpers import model_of, rng
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from irann import lm, zoo
from irann.lm import Draft, Reader, filter_logits
from irann.sampling import SAMPLING, Sampling, sample
from irann.settings import InputError, Setting
from irann.text import Vocabulary


def logits(v=65, b=6, seed=0):
    return 3 * torch.randn(b, v, dtype=torch.float64, generator=rng(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 65, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 0.05])
def test_equals_transformers_warpers_in_probability(temperature, top_k, top_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    x = logits()
    ours = filter_logits(x, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(
        ours.softmax(-1), warpers(None, x.clone()).softmax(-1), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_same_characters_have_the_probability(kind):
    x = logits().to(kind)
    x = x - x.amax(-1, keepdim=True)
    kept = filter_logits(x, top_p=0.999)
    assert kept.dtype == kind
    assert torch.equal(kept.isfinite(), filter_logits(x.float(), top_p=0.999).isfinite())


def test_by_hand():
    x = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    assert filter_logits(x, top_p=0.49).isfinite().tolist() == [True, False, False, False]
    assert filter_logits(x, top_p=0.51).isfinite().tolist() == [
        True,
        True,
        False,
        False,
    ]  # the crossing character stays
    assert filter_logits(x, top_p=0.0).isfinite().tolist() == [True, False, False, False]
    # of four equal ones, two have exactly a half, and no third is needed
    assert filter_logits(torch.zeros(4), top_p=0.5).isfinite().sum() == 2
    assert filter_logits(torch.tensor([1.0, 2.0, 2.0, 0.0]), top_k=1).isfinite().tolist() == [
        False,
        True,
        True,
        False,
    ]  # ties stay
    assert filter_logits(x, temperature=0).softmax(-1).tolist() == [1, 0, 0, 0]
    assert torch.equal(filter_logits(x, top_k=None, top_p=None).softmax(-1), x.softmax(-1))
    for kind in (torch.float64, torch.float32, torch.float16):
        assert filter_logits(logits().to(kind), temperature=1e-300).softmax(-1).isfinite().all()
    # temperature comes first: at 2 the four probabilities are flatter, so 0.5 needs two of them
    assert filter_logits(x, temperature=2.0, top_p=0.5).isfinite().sum() == 2


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}])
def test_samples_follow_the_filtered_probabilities(settings):
    x = filter_logits(logits(12, 1, seed=4), **settings)
    drawn = sample(x.expand(20_000, -1), rng(0))
    counts, p = drawn.bincount(minlength=12), x[0].softmax(-1)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0].numpy(), (20_000 * p[p > 0]).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"},
     {"top_k": -1}, {"top_k": 2.5}, {"top_p": -0.1}, {"top_p": 1.01}, {"top_p": float("nan")}],
)  # fmt: skip
def test_out_of_range(setting):
    with refuses(f"{next(iter(setting))} is a .*number from .*got"):
        filter_logits(logits(), **setting)


@dataclass(frozen=True)
class CountingConfig:
    vocabulary: int = 10
    window: int = 6


class Counting(Reader):
    """A model one can follow by hand: after i comes i + 1. It logs what it was asked to read."""

    def __init__(self, config=CountingConfig()):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.tensor(50.0))
        self.asked = []

    def read(self, ids, state=None):
        self.asked.append((0 if state is None else state, ids.shape[1]))
        assert (state or 0) + ids.shape[1] <= self.config.window
        return self.weight * torch.nn.functional.one_hot((ids + 1) % 10, 10).float(), (
            state or 0
        ) + ids.shape[1]


def test_a_model_that_only_counts_writes_without_a_parameter():
    class Counts(Reader):
        def read(self, ids, state=None):
            return torch.nn.functional.one_hot((ids + 1) % 10, 10).log(), None

    model = Counts(CountingConfig(window=1))
    assert model.device.type == "cpu" and model.num_parameters == 0
    assert [d.ids[0].tolist() for d in model.generate(torch.tensor([[8]]), 2)][-1] == [8, 9, 0]


def test_left_to_right_reads_each_character_once_and_rereads_half_a_window():
    model = Counting()
    drafts = list(model.generate(torch.tensor([[3]]), 12))
    assert [d.ids.shape[1] for d in drafts] == list(range(1, 14)) and all(
        d.settled == d.ids.shape[1] for d in drafts
    )
    assert drafts[-1].ids[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert model.asked == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (0, 3),
        (3, 1),
        (4, 1),
        (5, 1),
        (0, 3),
        (3, 1),
    ]


@pytest.mark.parametrize(
    "start, n, forgotten",
    [
        (2, 4, [0] * 5),
        (5, 4, [0, 0, 0, 4, 4]),
        (9, 6, [3, 3, 7, 7, 7, 7, 9]),
        (1, 9, [0] * 7 + [1] * 3),
    ],
)
def test_what_of_the_prompt_is_lost_is_said_at_the_start_and_with_each_rereading(
    start, n, forgotten
):
    model = Counting()
    drafts = list(model.generate(torch.arange(start)[None], n))
    assert [d.forgotten for d in drafts] == forgotten
    assert model.asked[0] == (0, min(start, 6)) and drafts[-1].ids[0].tolist() == [
        i % 10 for i in range(start + n)
    ]


@pytest.mark.parametrize("name", ["diffusion", "thinker-page"])
def test_what_of_the_prompt_is_lost_is_said_page_by_page(name):
    model = zoo.build(
        name, zoo.recipe(name, "tiny")[0]
    )  # sees 33 characters at once, and writes 16 of them
    drafts = model.generate(torch.zeros(1, 30, dtype=torch.long), 40, steps=2, generator=rng(0))
    assert {(d.ids.shape[1], d.forgotten) for d in drafts} == {
        (30, 13),
        (46, 13),
        (62, 29),
        (70, 30),
    }


class Stamping(lm.LanguageModel):
    """Writes pages by counting on from the position before; logs the windows it was given."""

    def __init__(self, window):
        super().__init__(CountingConfig(window=window))
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def generate(self, prompt, n, *, page=3):
        def write(ids, mask):
            assert ids.shape == mask.shape and ids.shape[1] <= self.config.window + 1
            first = int(mask[0].nonzero()[0])
            assert mask[0, first:].all() and not mask[0, :first].any()
            ids = ids.clone()
            for i in range(first, ids.shape[1]):
                ids[:, i] = (ids[:, i - 1] + 1) % 10
                yield Draft(ids, i + 1, {"at": i})

        return lm.page_by_page(self, prompt, n, page, write)


@given(st.integers(0, 30), st.integers(0, 25), st.integers(1, 8), st.integers(0, 8))
def test_pages_of_any_size_continue_prompts_of_any_length(length, n, page, more):
    model = Stamping(window=page + more)
    prompt = torch.arange(length)[None] % 10
    before = max(1, length)
    drafts = list(model.generate(prompt, n, page=page))
    assert [len(d.ids[0]) for d in drafts] == [before] + [
        min(before + page * (1 + i // page), before + n) for i in range(n)
    ]
    assert [d.settled for d in drafts] == list(range(before, before + n + 1))
    wanted = torch.arange(before + n) % 10
    assert torch.equal(drafts[-1].ids[0], wanted)
    for draft in drafts[1:]:  # what the window had no room for when this page was written
        assert draft.forgotten == min(before, max(0, draft.ids.shape[1] - page - more - 1))
    assert drafts[0].forgotten == (drafts[1].forgotten if n else 0)


def test_one_thread_at_a_time_uses_a_model():
    model, order = Counting(), []

    def write():
        order.append("waits")
        with lm.evaluating(model):
            order.append("writes")

    with lm.exclusive(model):
        thread = threading.Thread(target=write)
        thread.start()
        while not order:
            time.sleep(0.001)
        time.sleep(0.05)
        order.append("trained")
    thread.join(10)
    assert order == ["waits", "trained", "writes"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.lock.rlock is not model.lock.rlock


@pytest.mark.parametrize("wrong", ["gpt", None, torch.nn.Linear(1, 1)])
def test_what_is_no_model_is_refused_in_a_sentence(wrong):
    with refuses("a model comes first, as irann.load gives it; got"):
        lm.generate(wrong, "ROMEO:")


def test_writing_half_way_can_be_stopped():
    model = Counting()
    stream = model.generate(torch.tensor([[1]]), 50)
    next(stream), next(stream)
    stream.close()
    assert torch.equal(
        list(model.generate(torch.tensor([[1]]), 2))[-1].ids, torch.tensor([[1, 2, 3]])
    )
    assert torch.is_grad_enabled()


def test_a_reader_writes_with_settings_of_its_own():
    drew = []

    class Louder(Counting):
        settings: ClassVar = {"by": Setting(1, "added", low=0, high=9)}

        def read(self, ids, state=None, *, generator=None, by=1):
            drew.append(generator)
            return super().read((ids + by - 1) % 10, state)

    (*_, plain), (*_, louder) = (
        Louder().generate(torch.tensor([[1]]), 3, **own) for own in ({}, {"by": 3, "top_k": 1})
    )
    assert plain.ids.tolist() == [[1, 2, 3, 4]] and louder.ids.tolist() == [[1, 4, 7, 0]]
    with refuses("by is a whole number from 0 to 9"):
        Louder().generate(torch.tensor([[1]]), 3, by=10)
    text = torch.tensor([[1, 4, 7, 0]])
    assert (Louder().nll(text, by=3) < Louder().nll(text)).all()
    with refuses("by is a whole number from 0 to 9"):
        Louder().nll(text, by=10)
    drew.clear()
    generator = torch.Generator()
    Louder().nll(text, generator=generator)
    list(Louder().generate(text, 1, generator=generator))
    assert drew == [generator, generator]


def test_generate_from_text(corpus):
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    with pytest.raises(ValueError, match="no vocabulary"):
        lm.generate(model, "x")
    model.vocabulary = corpus.vocabulary
    assert lm.generate(model, "ROMEO:", 20, seed=1) == lm.generate(model, "ROMEO:", 20, seed=1)
    assert lm.generate(model, "", 5, seed=0).startswith("\n")
    assert isinstance(next(lm.stream(model, "a", 1)), Draft)
    with pytest.raises(ValueError, match="'é'"):
        lm.generate(model, "é")
    with pytest.raises(ValueError, match="GPT has no setting 'steps'"):
        lm.generate(model, "a", steps=3)
    assert len(lm.generate(model, "a", 3, seed=2**62)) == 4
    for seed in (-1, 2**62 + 1):
        with pytest.raises(ValueError, match="seed"):
            lm.generate(model, "a", seed=seed)


def test_a_text_whose_beginning_the_window_lost_comes_with_a_warning():
    model = Counting()
    model.vocabulary = Vocabulary("0123456789")
    with pytest.warns(
        UserWarning, match="the window holds 6 characters: the first 3 of the prompt are not read"
    ) as told:
        assert unwrap(lm.generate)(model, "012345678", 2) == "01234567890"
    assert len(told) == 1 and told[0].filename == __file__  # it names the caller's line
    with warnings.catch_warnings(action="error"):
        lm.generate(model, "012345", 2)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16])
def test_probabilities_are_drawn_from_in_float32_at_least(monkeypatch, kind):
    seen = []
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda p, n, generator: seen.append(p) or torch.zeros(len(p), n, dtype=torch.long),
    )
    sample(logits().to(kind))
    assert torch.equal(
        seen[0], logits().to(kind).to(torch.promote_types(kind, torch.float32)).softmax(-1)
    )


def test_ids_are_checked():
    model = Counting()
    for wrong in (
        torch.zeros(3, dtype=torch.long),
        torch.zeros(1, 3),
        torch.tensor([[-1]]),
        torch.tensor([[10]]),
        torch.tensor([[60_000]], dtype=torch.uint16),
    ):
        with refuses("ids"):
            model.generate(wrong, 1)
    for wrong, words in (
        (torch.zeros(3, dtype=torch.long), r"\(b, t\); got torch.int64 of shape \(3,\)"),
        (torch.zeros(1, 3), "whole numbers .*; got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), "whole numbers .*; got torch.bool"),
        (torch.zeros(1, 3, dtype=torch.complex64), "whole numbers .*; got torch.complex64"),
        ([[1, 2]], "ids are a tensor .*; got a list"),
    ):
        with pytest.raises(InputError, match=words):
            model.check_ids(wrong)


def test_a_vocabulary_of_another_model_is_named_before_anything_is_written():
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    model.vocabulary = Vocabulary("abc")
    with refuses("made for 65 characters, its vocabulary has 3"):
        lm.generate(model, "a", 3)


def test_the_defaults_that_are_offered_filter_nothing():
    offered = {name: setting.default for name, setting in SAMPLING.items()}
    assert Sampling(**offered) == Sampling()
    logits = torch.randn(3, 7)
    assert torch.equal(filter_logits(logits, **offered).softmax(-1), logits.softmax(-1))


def test_a_window_of_one_character_is_room_enough():
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny", window=1)[0])
    *_, last = model.generate(torch.zeros(1, 1, dtype=torch.long), 4)
    assert last.ids.shape == (1, 5)


def test_without_a_prompt_a_text_begins_after_a_line_break():
    model = model_of("\t\nab")
    assert next(lm.stream(model, "", 1, seed=0)).ids.tolist() == [[1]]
    model.vocabulary = Vocabulary("abcd")  # a text without lines
    assert next(lm.stream(model, "", 1, seed=0)).ids.tolist() == [[0]]


def test_a_prompt_read_in_pieces_fills_the_window_as_one_read_at_once_does(monkeypatch):
    monkeypatch.setattr(lm, "READ_AT_ONCE", 2)
    model = Counting()
    *_, draft = model.generate(torch.arange(6)[None], 3)
    assert draft.ids[0].tolist() == list(range(9))
    same = lm.Draft(draft.ids, draft.settled, draft.note, draft.forgotten)
    assert draft == draft != same  # tensors are not compared
    assert model.asked == [(0, 2), (2, 2), (4, 2), (0, 2), (2, 1), (3, 1)]


def test_an_error_in_the_middle_of_writing_leaves_the_model_training():
    model = Counting()
    with pytest.raises(KeyError), lm.evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training


def test_an_interrupt_before_anything_is_written_is_an_interrupt(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    model = Counting()
    model.vocabulary = Vocabulary("0123456789")
    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.generate(model, "0")


def test_an_interrupt_while_a_page_is_written_leaves_what_has_settled_and_says_so(monkeypatch):
    model = Stamping(window=8)
    model.vocabulary = Vocabulary("0123456789")
    write = model.generate

    def interrupted(prompt, n, generator):
        yield from islice(write(prompt, n), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    words = "interrupted: the text ends after 3 characters, prompt included"
    with pytest.warns(UserWarning, match=words) as told:
        assert unwrap(lm.generate)(model, "4", 6) == "456"
    assert len(told) == 1 and told[0].filename == __file__


def test_without_a_seed_each_text_is_another_one():
    model = model_of("\nabc")
    assert lm.generate(model, "a", 40) != lm.generate(model, "a", 40)


def test_who_names_no_length_gets_two_hundred_characters():
    model = Counting()
    model.vocabulary = Vocabulary("0123456789")
    *_, last = lm.stream(model, "0")
    assert last.ids.shape == (1, 201) and len(lm.generate(model, "0")) == 201
