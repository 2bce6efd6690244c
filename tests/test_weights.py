"""The weights that ship are what their cards say."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import excite, refuses
from helpers import rng
from safetensors.torch import load_file

from irann import checkpoint, lm, runs, shakespeare, zoo
from irann.checkpoint import CheckpointError
from irann.settings import InputError
from irann.text import Text
from irann.training import evaluate, train

NAMES = sorted(zoo.MODELS)
TEACHERS = ["gpt", "mamba", "thinker"]
BOOK = Path(__file__).parent.parent / "book"
MADE = dict.fromkeys(NAMES, ("gpu", {}))  # by which recipe, changed how
MADE["thinker"] = (
    "full",
    {"steps": 5500, "evaluate_every": 1100, "precision": "bfloat16", "seed": 0}
    | {"halt_width": 0, "prior": 0.5, "prior_weight": 0.1},
)


@pytest.fixture(scope="module")
def text():
    return shakespeare.load()


def card(name):
    return json.loads((zoo.WEIGHTS / f"{name}.json").read_text())


def test_every_model_ships_and_is_small():
    sizes = [path.stat().st_size for path in zoo.WEIGHTS.glob("*.safetensors")]
    assert zoo.shipped() == sorted([*NAMES, "gpt-distilled"])
    assert max(sizes) <= 16e6 and sum(sizes) <= 50e6


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_how_it_was_made(name):
    told, model, (which, changes) = card(name), zoo.load(name), MADE[name]
    config, recipe = zoo.recipe(name, which, **changes)
    if name == "thinker":
        halting = told["halting"]
        assert halting["command"] == "python book/halting.py" and halting["hours"] > 0
        assert halting["config"] == zoo.HALTING and zoo.Recipe(**halting["recipe"]).steps
        config = replace(config, **zoo.HALTING)
    assert told["command"] == f"irann train {name} --recipe {which}" + "".join(
        f" --set {key}={value}" for key, value in changes.items()
    )
    assert model.config == config
    assert zoo.Recipe(**told["recipe"]) == recipe
    assert told["seed"] == recipe.seed
    assert told["characters"] == told["step"] * recipe.batch * config.window
    assert told["hardware"]
    assert told["hours"] > 0
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert told["exact"] == model.exact


def test_what_is_learnt_from_others_ships_beside_them():
    told, model = card("gpt-distilled"), zoo.load("gpt-distilled")
    with refuses("no weights ship as 'gpt-destilled'; there are .*gpt-distilled"):
        zoo.card("gpt-destilled")
    assert told["command"] == "python book/distil.py" and told["teachers"] == TEACHERS
    assert model.num_parameters == zoo.load("gpt").num_parameters
    assert told["validation"] < min(card(name)["validation"] for name in TEACHERS)
    assert told["characters"] == told["step"] * told["recipe"]["batch"] * model.config.window
    report = json.loads((BOOK / "report" / "distillation.json").read_text())["nats"]
    assert report["gpt-distilled"] == told["validation"]
    assert all(
        report[name] == pytest.approx(card(name)["validation"], abs=1e-4)
        for name in ("gpt", "mamba")
    )


def test_the_likelihood_is_the_card_s(text):
    ours = evaluate(zoo.load("gpt"), text)
    assert ours.characters == 111_540
    assert ours.nats_per_char == pytest.approx(card("gpt")["validation"], abs=2e-4)


@pytest.mark.parametrize(
    "name, whole, nats", [("mamba", 1.43176, 1.25869), ("thinker", 1.40507, 1.24052)]
)
def test_the_likelihood_of_a_part_is_that_of_the_day_when_the_whole_was_the_card_s(
    name, whole, nats, text
):
    """Of the models that take longer."""
    part = Text(text.train, text.val[: 40 * 256 + 1], text.vocabulary)
    assert evaluate(zoo.load(name), part).nats_per_char == pytest.approx(nats, abs=2e-4)
    assert card(name)["validation"] == pytest.approx(whole, abs=2e-4)


@pytest.mark.parametrize("name, nats", [("diffusion", 1.75185), ("thinker-page", 1.94950)])
def test_the_bound_of_a_part_is_that_of_the_day_and_near_the_card_s(name, nats, text):
    """A part of the text and few draws: far from the card's number would be a fault, beside it is
    chance.
    """
    model, told = zoo.load(name), card(name)
    part = text.val[: 6 * model.config.window + 1]
    row = model.nll(part.unfold(0, model.config.window + 1, model.config.window), generator=rng(0))
    assert row.mean().item() == pytest.approx(nats, abs=1e-3)
    assert nats == pytest.approx(told["validation"], abs=0.25)
    assert 0 < told["standard_error"] < 0.03


@pytest.mark.parametrize("name", ["gpt", "mamba", "gpt-distilled"])
def test_the_sample_can_be_had_again(name):
    told = card(name)["sample"]
    *_, draft = lm.stream(
        zoo.load(name), "\n", 60, seed=told["seed"], temperature=told["temperature"]
    )
    assert zoo.load(name).vocabulary.decode(draft.ids[0, 1:]) == told["text"][:60]


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    whole = zoo.WEIGHTS
    for kind in ("safetensors", "json"):
        (tmp_path / f"gpt.{kind}").write_bytes((zoo.WEIGHTS / f"gpt.{kind}").read_bytes())
    broken = bytearray((tmp_path / "gpt.safetensors").read_bytes())
    broken[-1] ^= 1
    (tmp_path / "gpt.safetensors").write_bytes(broken)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="install irann again"):
        zoo.load("gpt")
    (tmp_path / "gpt.safetensors").write_bytes((whole / "gpt.safetensors").read_bytes())
    card = (whole / "gpt.json").read_text()
    for wrong in (card.replace('"heads": 3', '"heads": 1'), "[]", "{}", card[:-40]):
        assert wrong != card
        (tmp_path / "gpt.json").write_text(wrong)
        for opened in (zoo.load, lambda _: list(runs.listing())):
            with pytest.raises(CheckpointError, match="install irann again"):
                opened("gpt")


def test_a_run_is_found_by_name_although_its_newest_config_is_damaged(tmp_path, monkeypatch, small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=4, save_every=2)
    list(train(zoo.build("gpt", config), small, recipe, run=tmp_path / "runs" / "mine"))
    (checkpoint.listed(tmp_path / "runs" / "mine")[0] / "config.json").write_text("")
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"skipped: .*config\.json has 0 bytes") as told:
        assert zoo.load("gpt").card["step"] == 2
    assert len(told) == 1


def test_of_a_run_the_best_is_loaded_and_not_the_newest(tmp_path, small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=4, evaluate_every=2)
    *_, tick = train(zoo.build("gpt", config), small, recipe, run=tmp_path)
    newest = checkpoint.load(tick.saved)
    checkpoint.save(tick.saved, replace(newest, config=newest.config | {"validation": 9.0}))
    assert zoo.load(tmp_path).card["step"] == 2
    assert zoo.load(tick.saved).card["step"] == 4  # which was asked for by its own path


def test_what_is_loaded_of_a_run_has_its_card_and_is_ready_to_write(tmp_path, small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=4, evaluate_every=2)
    *_, tick = train(zoo.build("gpt", config), small, recipe, run=tmp_path)
    saved, said = checkpoint.load(tick.saved), []
    model = zoo.load(tmp_path, say=said.append)
    assert not model.training and said == []
    names = "model config recipe step characters seconds validation exact corpus".split()
    assert model.card == {name: saved.config[name] for name in names}
    assert zoo.load(tmp_path, device="meta").device.type == "meta"
    (tick.saved / "rng.safetensors").unlink()
    with warnings.catch_warnings(action="error"):  # whoever listens is not warned
        assert zoo.load(tmp_path, say=said.append).card["step"] == 2
    (reason,) = said
    assert reason.startswith("skipped: ") and reason.endswith("rng.safetensors is missing")


def test_what_is_not_there_is_told_with_a_way_out(tmp_path, monkeypatch):
    saved = checkpoint.Snapshot({}, {}, {}, {"model": "Mamba"}, "ab")
    checkpoint.save(tmp_path / "runs" / "sonnets" / "checkpoints" / "step-00000001", saved)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(
        InputError, match=r"'runs/sonets' is neither .*; did you mean runs/sonnets\?"
    ):
        zoo.load("runs/sonets")
    with pytest.raises(InputError, match="nor a run or checkpoint on this disk$"):
        zoo.load("elsewhere")
    with pytest.raises(CheckpointError, match="no trained weights for gpt yet; .*irann train gpt"):
        zoo.load("gpt")
    Path("runs", "x", "checkpoints").mkdir(parents=True)
    for place in ("runs", "runs/x/checkpoints"):
        with pytest.raises(InputError, match=f"'{place}' is neither a model"):
            zoo.load(place)
    with pytest.raises(
        InputError, match="no recipe 'huge' for gpt; there are tiny, demo, full, gpu"
    ):
        zoo.recipe("gpt", "huge")


def test_a_vocabulary_of_another_size_is_not_taken_for_the_model_s(tmp_path, small):
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    model.vocabulary = small.vocabulary
    saved = checkpoint.load(zoo.save(model, tmp_path / "mine"))
    checkpoint.save(tmp_path / "mine", replace(saved, vocabulary="ab"))
    with pytest.raises(CheckpointError, match="has 2 characters in its vocabulary.* made for 65"):
        zoo.load(tmp_path / "mine")


def test_weights_are_drawn_by_the_seed_and_from_nobody_else_s_generator(monkeypatch):
    config, recipe = zoo.recipe("gpt", "tiny")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("GPUs are seeded"))
    plain, same, other = (
        zoo.build("gpt", config, **seed).wte.weight for seed in ({}, {"seed": 1337}, {"seed": 1})
    )
    with torch.device("meta"):  # whatever torch's default is
        assert zoo.load("gpt").device.type == "cpu"
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(plain, same) and not torch.equal(plain, other) and recipe.seed == 1337


def test_the_newest_run_is_the_one_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs")
    for age, name in enumerate(("b", "c", "a")):
        saved = checkpoint.Snapshot({}, {}, {}, {"model": "GPT"}, "ab")
        os.utime(
            checkpoint.save(folder / name / "checkpoints" / "step-00000001", saved),
            (100 - age, 100 - age),
        )
    assert zoo.newest_run("gpt").name == "b"
    for name in ("d", "e"):
        other = checkpoint.Snapshot({}, {}, {}, {"model": "Mamba"}, "ab")
        made = checkpoint.save(folder / name / "checkpoints" / "step-00000001", other)
        os.utime(made, (200, 200) if name == "e" else (99.5, 99.5))
    older = checkpoint.save(folder / "e" / "checkpoints" / "step-00000000", saved)
    os.utime(older, (1, 1))  # the newest of a run counts
    (folder / "f").mkdir()
    assert [run.name for run in zoo.runs()] == ["e", "b", "d", "c", "a"]
    assert zoo.newest_run("gpt").name == "b"
    assert zoo.newest_run("mamba").name == "e"
    assert zoo.newest_run("thinker") is None


def test_what_a_buffer_counts_ships_whole(tmp_path, monkeypatch, text):
    """Half precision ends at 65,504."""
    model = zoo.build("diffusion", zoo.recipe("diffusion", "tiny")[0])
    model.vocabulary = text.vocabulary
    model.level_count.fill_(100_001.0)
    write = zoo.stream
    monkeypatch.setattr(
        zoo, "stream", lambda model, prompt, n, **settings: write(model, prompt, 16, **settings)
    )  # quick
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    zoo.ship(
        model,
        "diffusion",
        type(text)(text.train[:2000], text.val[:200], text.vocabulary, text.source, text.sha256),
    )
    assert (zoo.load("diffusion").level_count == 100_001).all()


def test_ship_writes_what_load_reads(tmp_path, monkeypatch, text):
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    model.vocabulary = text.vocabulary
    small = type(text)(text.train[:2000], text.val[:600], text.vocabulary, text.source, text.sha256)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    told = zoo.ship(model, "gpt", small, hardware="a slate")
    again = zoo.load("gpt")
    assert again.card == told and told["hardware"] == "a slate"
    measured = evaluate(again, small)
    assert measured.nats_per_char == told["validation"] and told["exact"]
    assert measured.standard_error == told["standard_error"]
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    file = load_file(tmp_path / "gpt.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.float16}


def test_the_sample_on_a_card_is_the_one_it_describes(tmp_path, monkeypatch, small):
    model = excite(zoo.build("gpt", zoo.recipe("gpt", "tiny")[0]), 0.2)
    model.vocabulary = small.vocabulary
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    told = zoo.ship(model, "gpt", small)["sample"]
    how = {"seed": told["seed"], "temperature": told["temperature"]}
    assert lm.generate(zoo.load("gpt"), "\n", 300, **how)[1:] == told["text"]
