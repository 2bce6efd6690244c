"""Soft targets: what teachers expect at each position, and a student that learns it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import excite
from helpers import book_module, left_after, rng
from safetensors.torch import load_file

import irann
from irann.settings import InputError
from irann.training import Recipe, soft_targets, train

READERS = ("gpt", "mamba", "thinker")
TEXT = irann.Text.of("to be or not to be, that is the question\n" * 12)
VOCABULARY = len(TEXT.vocabulary)
SURE = torch.eye(VOCABULARY)[TEXT.train]
RECIPE = Recipe(steps=3, batch=4, optimizer="muon", seed=5)


def tiny(name, seed=1):
    config, _ = irann.recipe(name, "tiny", window=16, vocabulary=VOCABULARY)
    return irann.build(name, config, seed=seed)


def teacher(seed):
    """A reader with an opinion: a GPT whose weights are large."""
    model = tiny("gpt", seed).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng(seed)) * 0.3)
    return model


@pytest.mark.parametrize("name", READERS)
def test_targets_that_are_sure_of_the_text_train_as_the_text_does(name):
    plain, taught = tiny(name), tiny(name)
    without = list(train(plain, TEXT, RECIPE))
    ticks = list(train(taught, TEXT, RECIPE, targets=SURE))
    assert [t.loss for t in ticks] == pytest.approx([t.loss for t in without], abs=1e-5)
    for ours, theirs in zip(taught.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", READERS)
def test_a_student_comes_to_expect_what_the_targets_say_whatever_the_text_is(name):
    p = torch.arange(1, VOCABULARY + 1).float() ** 2
    p /= p.sum()
    student = tiny(name)
    recipe = Recipe(steps=40, batch=4, lr=5e-2, seed=1)
    *_, last = train(student, TEXT, recipe, targets=p.expand(len(TEXT.train), -1))
    entropy = -(p * p.log()).sum().item()
    assert entropy <= last.loss < entropy + 0.02
    assert last.parts["nats_per_char"] > entropy + 0.3  # of the text, which is told as it is


def test_soft_targets_are_the_teachers_mean_each_position_from_half_a_window_at_least():
    teachers = [teacher(1), teacher(2)]
    targets = soft_targets([model.read for model in teachers], TEXT, 16, batch=3)
    assert targets.shape == (len(TEXT.train), VOCABULARY) and targets.dtype == torch.float16
    ids = TEXT.train
    last = len(ids) - 17
    starts = [*range(0, last, 8), last]
    for position in (1, 5, 8, 9, 16, 17, 100, len(ids) - 9, len(ids) - 1):
        covering = [s for s in starts if s < position <= s + 16 and (s == 0 or position - s > 8)]
        wanted = [
            torch.stack([m(ids[None, s:position])[0, -1].softmax(-1) for m in teachers]).mean(0)
            for s in covering
        ]
        assert min((targets[position] - w).abs().max().item() for w in wanted) < 2e-3, position
    torch.testing.assert_close(
        targets[0].float(), torch.full((VOCABULARY,), 1 / VOCABULARY), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(targets.float().sum(-1), torch.ones(len(ids)), atol=5e-3, rtol=0)


def test_a_reading_brings_its_settings():
    model = tiny("thinker").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng(1)) * 0.2)
    one, three = (
        soft_targets([partial(model.read, stop="fixed", rounds=r)], TEXT, 16) for r in (1, 3)
    )
    assert (one - three).abs().max() > 0.01


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_batch_in_pieces_has_the_same_objective(pieces):
    targets = soft_targets([teacher(1).read], TEXT, 16)
    whole, cut = (
        [tick.loss for tick in train(tiny("gpt"), TEXT, recipe, targets=targets)]
        for recipe in (RECIPE, Recipe(**vars(RECIPE) | {"accumulate": pieces}))
    )
    assert whole == pytest.approx(cut, abs=1e-5)


def test_a_run_goes_on_with_its_targets_only(tmp_path):
    targets = soft_targets([teacher(1).read], TEXT, 16)
    run = tmp_path / "run"
    left_after(1, train(tiny("gpt"), TEXT, RECIPE, run=run, targets=targets))
    for other in (None, targets.bfloat16(), soft_targets([teacher(2).read], TEXT, 16)):
        with pytest.raises(irann.checkpoint.CheckpointError, match="targets of SHA-256"):
            list(train(tiny("gpt"), TEXT, RECIPE, run=run, resume=True, targets=other))
    resumed, straight = tiny("gpt"), tiny("gpt")
    list(train(resumed, TEXT, RECIPE, run=run, resume=True, targets=targets))
    with_a_past = (targets.float().requires_grad_() * 1).half()  # whose gradient nobody wants
    list(train(straight, TEXT, RECIPE, targets=with_a_past))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name, targets, said",
    [
        ("gpt", torch.ones(3, VOCABULARY), "probabilities of shape"),
        (
            "gpt",
            torch.ones(len(TEXT.train), VOCABULARY, dtype=torch.long),
            "probabilities of shape",
        ),
        ("gpt", [1.0], "probabilities of shape"),
        ("gpt", torch.ones(len(TEXT.train), VOCABULARY), "probabilities of shape"),  # logits
        ("gpt", SURE * 2 - 1 / VOCABULARY, "probabilities of shape"),
        ("gpt", SURE.index_fill(0, torch.tensor(3), 0.0), "probabilities of shape"),  # one of many
        ("diffusion", torch.ones(len(TEXT.train), VOCABULARY), "from left to right"),
    ],
)
def test_targets_that_cannot_be_learnt_are_refused(name, targets, said):
    model = tiny(name) if name != "diffusion" else irann.build("diffusion", vocabulary=VOCABULARY)
    with pytest.raises(InputError, match=said):
        train(model, TEXT, RECIPE, targets=targets)


def test_a_window_that_the_text_does_not_hold_is_refused():
    def read(ids):
        return torch.zeros(*ids.shape, VOCABULARY), None

    longest = len(TEXT.train) - 1
    for window in (-3, 1, longest + 1):
        with pytest.raises(InputError, match=f"a window is of 2 to {longest} .*; got {window}"):
            soft_targets([read], TEXT, window)
    for window in (2, longest):
        assert len(soft_targets([read], TEXT, window)) == len(TEXT.train)


def test_teachers_that_cannot_teach_this_text_are_refused():
    other = teacher(1)
    other.vocabulary = irann.Vocabulary("".join(map(chr, range(VOCABULARY))))
    config, _ = irann.recipe("gpt", "tiny", window=16, vocabulary=VOCABULARY + 1)
    for reads, more, said in (
        ([], {}, "at least one teacher"),
        ([teacher(1)], {}, "by its reading"),
        ([other.read], {}, "not those that the model was trained on"),
        ([partial(other.read)], {}, "not those that the model was trained on"),
        ([irann.build("gpt", config).read], {}, f"{VOCABULARY + 1} different .* has {VOCABULARY}"),
        ([teacher(1).read], {"batch": 0}, "batch is a whole number from 1"),
    ):
        with pytest.raises(InputError, match=said):
            soft_targets(reads, TEXT, 16, **more)


def test_the_script_teaches_measures_and_ships(tmp_path, monkeypatch):
    distil = book_module("distil.py")
    trained = {name: tiny(name).eval() for name in READERS}
    for model in trained.values():
        model.vocabulary = TEXT.vocabulary
    excite(trained["thinker"], 0.1)
    load, learn, save = irann.load, irann.train, distil.save_file
    begun = []

    def noted(student, *given, **how):
        begun.append({name: p.clone() for name, p in student.named_parameters()})
        return learn(student, *given, **how)

    def interrupted(lesson, path):
        Path(path).write_bytes(b"half of a lesson")
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(irann, "train", noted)
    monkeypatch.setattr(irann, "load", lambda name: trained.get(name) or load(name))
    monkeypatch.setattr(irann.shakespeare, "load", lambda: TEXT)
    monkeypatch.setattr(irann.zoo, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(distil, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(distil, "WRITTEN", 2)
    monkeypatch.setattr(distil, "PROMPT", 4)
    monkeypatch.setattr(distil, "RECIPE", RECIPE)

    monkeypatch.setattr(distil, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil.main()
    monkeypatch.setattr(distil, "save_file", save)
    distil.main()  # it goes on
    lesson = load_file(distil.RUN / "lesson.safetensors")
    assert len(lesson["train"]) == len(lesson["targets"]) == len(TEXT.train) + 2 * 256 * 16
    pages = distil.write(trained["mamba"], TEXT.train, 16)
    assert torch.equal(lesson["train"], torch.cat([TEXT.train, pages.flatten()]))
    assert not torch.equal(pages[:256], pages[256:])  # none is written again
    train = TEXT.vocabulary.decode(TEXT.train)
    assert all(TEXT.vocabulary.decode(page[:4]) in train for page in pages)
    for name, p in trained["gpt"].named_parameters():
        assert torch.equal(begun[0][name], p)
    measured = json.loads((tmp_path / "report.json").read_text())
    nats = measured["nats"]
    assert list(nats)[:4] == ["gpt", "mamba", "thinker", "gpt, mamba"]
    assert nats["gpt"] == pytest.approx(irann.evaluate(trained["gpt"], TEXT).nats_per_char)
    assert nats["gpt, mamba"] < (nats["gpt"] + nats["mamba"]) / 2
    student = irann.load("gpt-distilled")
    assert student.card["teachers"] == list(READERS) and student.config.dropout == 0.05
    assert measured["curve"][-1][0] == student.card["characters"] == 3 * 4 * 16
    assert irann.evaluate(student, TEXT).nats_per_char == pytest.approx(nats["gpt-distilled"])
    thinker = trained["thinker"]
    fixed = irann.evaluate(thinker, TEXT, nll=partial(thinker.nll, stop="fixed")).nats_per_char
    assert nats["thinker"] == pytest.approx(fixed, abs=1e-5)
    assert nats["thinker"] != pytest.approx(irann.evaluate(thinker, TEXT).nats_per_char, abs=1e-3)

    metrics = distil.RUN / "metrics.jsonl"
    *before, last = metrics.read_text().splitlines()
    slow = json.dumps(json.loads(last) | {"seconds": 5400.0})
    metrics.write_text("\n".join([*before, slow]) + "\n")
    distil.main()  # there is nothing left to learn
    assert json.loads((tmp_path / "report.json").read_text()) == measured
    assert irann.load("gpt-distilled").card["hours"] == 1.5


def test_a_vote_is_the_mean_of_probabilities():
    distil = book_module("distil.py")
    votes = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    reads = [lambda ids, vote=vote: (vote.expand(*ids.shape, 2), None) for vote in votes]
    nats = distil.vote_nll(reads, torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(nats, -torch.tensor([[0.7, 0.3]]).log())
