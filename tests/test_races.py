"""Races are fair, go on where they stopped, and their arithmetic is right."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import excite, refuses
from torch.nn import functional as F

from irann import shakespeare, zoo
from irann.bench import quality, races, report, suite
from irann.lm import LanguageModel
from irann.text import Text

REPORTS = Path(__file__).parents[1] / "book/report"
TEXT = {"0.8": {"words": 0.5, "of all": 0.7}, "1.0": {"words": 0.25, "of all": 0.9}}


@pytest.fixture
def short(small, monkeypatch):
    """Races read an excerpt, quick to validate with."""
    monkeypatch.setattr(shakespeare, "load", lambda: small)
    return small


@pytest.fixture
def brief(short, monkeypatch):
    """Five steps of each arm, and texts of twenty characters, show as well that it runs."""
    measured = races.text_quality

    def arms_of(race, quick):
        few = {"steps": 5, "evaluate_every": 2}
        arms = race(quick)
        return {k: replace(arm, recipe=replace(arm.recipe, **few)) for k, arm in arms.items()}

    for name, race in races.RACES.items():
        monkeypatch.setitem(races.RACES, name, partial(arms_of, race))
    monkeypatch.setattr(races, "text_quality", lambda *given, count, n: measured(*given, count, 20))


@pytest.fixture
def idle(short, monkeypatch):
    """Arms are not run: what each is asked for is noted, and its row filled in."""
    asked = []

    def run_arm(arm, text, seed, folder, row, device):
        asked.append((folder.name, str(device)))
        row.update(parameters=1, characters=1, exact=True)
        result = {"nats": 2.0, "seconds": 1.0, "curves": [[1, 1.0, 2.0]]}
        for key, value in (result | {"measured": {}} if arm.measure else result).items():
            row[key].append(value)

    monkeypatch.setattr(races, "run_arm", run_arm)
    return asked


def size(arm):
    return sum(p.numel() for p in zoo.build(arm.model, arm.config).parameters())


# ------------------------------------------------------------------------------------ what is raced


@pytest.mark.parametrize(
    ("race", "within", "characters"),
    [("models", 1.04, 1_536_000), ("models-long", 1.08, 20_480_000)],
)
def test_all_models_race_at_equal_size_on_as_many_characters(race, within, characters):
    arms = races.RACES[race](quick=False)
    assert set(arms) == set(zoo.MODELS)
    assert max(map(size, arms.values())) / min(map(size, arms.values())) < within
    for name, arm in arms.items():
        assert arm.recipe.steps * arm.recipe.batch * arm.config.window == characters
        if race == "models-long":  # what ships, but for the sizes of two
            config, recipe = zoo.recipe(name, "gpu")
            assert name in ("diffusion", "thinker") or arm.config == config
            for key in ("lr", "muon_lr", "ema_decay"):
                assert getattr(arm.recipe, key) == getattr(recipe, key)


@pytest.mark.parametrize(("race", "deep"), [("thinker", (4, 6)), ("thinker-long", (4,))])
def test_the_arms_are_what_they_are_called(race, deep, small):
    arms = races.RACES[race](quick=False)
    assert abs(size(arms["thinker"]) / size(arms["gpt, equal parameters"]) - 1) < 0.01
    thinker = arms["thinker"].config
    assert len(arms) == 2 + len(deep)
    for rounds in deep:
        layers = arms[f"gpt, as deep as {rounds} rounds"].config.layers
        assert layers == thinker.prelude + thinker.core * rounds
    seeds = {(arm.config.window, arm.recipe.batch, arm.recipe.seed) for arm in arms.values()}
    assert len(seeds) == 1  # so all read the very same characters


def test_nanogpts_arm_is_as_it_is_published():
    theirs = races.nanogpt_arms(quick=False)["nanoGPT's recipe"]
    model = zoo.build("gpt", theirs.config)
    millions = (sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()) / 1e6
    assert round(millions, 2) == 0.80  # as nanoGPT prints it
    rates = [theirs.recipe.lr_factor(step) * 1e-3 for step in (99, 1999)]
    assert rates == pytest.approx([1e-3, 1e-4], rel=1e-4)


# ---------------------------------------------------------------------------- run, and gone on with


def test_a_race_is_run_once_and_goes_on_where_it_stopped(short, tmp_path, monkeypatch, capsys):
    rows = suite.main("thinker", quick=True, out=tmp_path, seeds=1)["rows"]
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "thinker.md").read_text().strip() and "of the gap" in page
    for name, row in rows.items():
        assert name in page and row["seconds"][0] > 0 and 2 < row["nats"][0] < 4.5
        assert len(row["nats"]) == 1
    kept = json.loads((tmp_path / "thinker.json").read_text())
    lost = kept["rows"].pop("gpt, as deep as 3 rounds")
    (tmp_path / "thinker.json").write_text(json.dumps(kept))
    ran, run_arm = [], races.run_arm

    def noted(*arguments):
        ran.append(arguments[3].name)
        run_arm(*arguments)

    monkeypatch.setattr(races, "run_arm", noted)
    again = races.run("thinker", seeds=1, quick=True, out=tmp_path)["rows"]
    assert ran == ["thinker-gpt-as-deep-as-3-rounds-0"]
    assert again["gpt, as deep as 3 rounds"]["nats"] == lost["nats"]


def test_a_second_seed_is_run_beside_the_first(idle, tmp_path):
    races.run("thinker", seeds=1, quick=True, out=tmp_path)
    first = [name for name, _ in idle]
    both = races.run("thinker", seeds=2, quick=True, out=tmp_path)
    second = [f"{name[:-1]}1" for name in first]
    assert [name for name, _ in idle] == first + second and both["seeds"] == 2
    idle.clear()
    races.run("thinker", seeds=2, quick=True, out=tmp_path / "anew")
    assert [name for name, _ in idle] == first + second  # side by side, on a machine as busy


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nanogpt", "of its time"),
        ("models-long", "Where each was lowest"),
        ("speedrun", "is above nanoGPT's 1.4697"),
    ],
)
def test_every_race_runs_and_says_what_it_found(name, words, brief, tmp_path, capsys, unchecked):
    suite.main(name, quick=True, out=tmp_path, seeds=1)
    assert words in capsys.readouterr().out


def test_the_race_of_all_models(brief, tmp_path, capsys, unchecked):
    found = suite.main("models", quick=True, out=tmp_path, seeds=1)
    page, rows = capsys.readouterr().out, found["rows"]
    assert list(rows) == ["gpt", "mamba", "thinker", "thinker-page", "diffusion"]
    assert page.count("| at most") == 2 and page.count("## Text at temperature") == 2
    for name, row in rows.items():
        assert row["exact"] == (name in ("gpt", "mamba", "thinker"))
        assert [point[0] for point in row["curves"][0]] == [384 * s for s in (2, 4, 5)]
        exist = f"{row['measured'][0]['0.8']['words that exist']:.3f}"
        assert f"| {name} | {exist} ({exist}, {exist}) | " in page
    bare = {"gpt": rows["gpt"] | {"measured": []}}
    assert "Text" not in report.markdown(found | {"rows": bare})


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_race_that_is_told_to_end_says_how_to_go_on(
    number, end, short, tmp_path, monkeypatch, capsys
):
    progress = races.progress

    def interrupting(ticks, steps):
        for tick in progress(ticks, steps):
            if tick.step == 3:
                os.kill(os.getpid(), number)
            yield tick

    monkeypatch.setattr(races, "progress", interrupting)
    before = signal.signal(number, signal.default_int_handler)  # a shell's & would have it ignored
    try:
        with pytest.raises(end) as ended:
            races.run("models", seeds=1, quick=True, out=tmp_path)
    finally:
        signal.signal(number, before)
    assert getattr(ended.value, "code", 143) == 143
    assert "step-00000004; the same command goes on from there" in capsys.readouterr().err


def test_a_row_of_other_settings_is_not_taken_for_done(idle, tmp_path, monkeypatch):
    def change(**settings):
        arms = races.nanogpt_arms(True)
        arms = {k: replace(arm, recipe=replace(arm.recipe, **settings)) for k, arm in arms.items()}
        monkeypatch.setitem(races.RACES, "nanogpt", lambda quick: arms)

    found = races.run("nanogpt", seeds=1, quick=True, out=tmp_path)
    change(lr=7e-3)
    with refuses(r"holds 'nanoGPT's recipe' with other settings \(lr\): .*recipe-\[0-9\]\*, or"):
        races.run("nanogpt", seeds=1, quick=True, out=tmp_path)
    done = len(idle)
    page = tmp_path / "nanogpt.json"
    old = page.read_text()
    page.write_text(old.replace('"final_lr_factor"', '"final_lr"'))  # as it was called once
    change(save_every=7, seed=5)  # how often it is saved changes nothing; each run has its own seed
    races.run("nanogpt", seeds=1, quick=True, out=tmp_path)
    page.write_text(old)
    assert races.run("nanogpt", seeds=1, quick=True, out=tmp_path)["rows"] == found["rows"]
    assert len(idle) == done


def test_a_race_says_what_it_ran_on_and_that_is_written_down_first(idle, tmp_path, monkeypatch):
    monkeypatch.setattr(races, "processor", lambda: "A chip")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    begun = races.run("models-long", seeds=1, quick=True, out=tmp_path)
    cpu = f"{begun['threads']} threads, torch {torch.__version__}"
    assert races.ran_on(begun) == f"A chip, {cpu}" and begun["notes"] == []
    page = tmp_path / "models-long.json"
    old = json.loads(page.read_text())
    del old["device"]  # older ones name none
    assert races.ran_on(old) == races.ran_on(old | {"device": "cpu"}) == cpu
    del old["rows"]["mamba"]
    page.write_text(json.dumps(old))
    done = len(idle)
    again = races.run("models-long", seeds=1, quick=True, out=tmp_path, device="cuda")
    assert [device for _, device in idle[done:]] == ["cuda"]
    note = f"mamba, seed 0: NVIDIA X, torch {torch.__version__}"
    assert again["notes"] == [note]
    for row in again["rows"].values():
        row["measured"] = []
    page = report.markdown(again)
    assert f"models-long: 1 seed, {cpu}" in page and f"({note})" in page
    again["rows"]["gpt"]["nats"] += [2.0, 2.0]
    assert "models-long: 1 to 3 seeds, " in report.markdown(again)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(races, "run_arm", stopped)
    # the last on another machine
    for version in (torch.__version__, torch.__version__, "9.9", "9.9"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(KeyboardInterrupt):
            races.run("thinker", quick=True, out=tmp_path, device="cuda")
    stored = json.loads((tmp_path / "thinker.json").read_text())
    assert stored["device"] == "NVIDIA X"
    assert stored["notes"] == ["gpt, equal parameters, seed 0: NVIDIA X, torch 9.9"]


def test_an_arm_that_was_trained_elsewhere_is_noted_as_trained_there(idle, tmp_path):
    """Its report was deleted, or it was stopped before it was measured."""

    def trained(arm, step, **place):
        saved = tmp_path / f"runs/models-{arm}-0/checkpoints/step-{step:08d}"
        saved.mkdir(parents=True)
        environment = {"torch": "1.0", "threads": 7, "device": "cpu", "gpu": None} | place
        (saved / "config.json").write_text(json.dumps({"step": step, "environment": environment}))

    trained("gpt", 20)
    trained("mamba", 4, gpu="NVIDIA X")
    report = races.run("models", seeds=1, quick=True, out=tmp_path)
    notes = ["gpt, seed 0: 7 threads, torch 1.0", "mamba, seed 0: NVIDIA X, torch 1.0"]
    assert report["notes"] == notes
    report["torch"], report["threads"], report["device"] = "1.0", 7, "A chip, 7 threads"
    for row in report["rows"].values():
        row |= {key: [] for key in ("nats", "seconds", "curves", "measured")}
    report["notes"] = []
    (tmp_path / "models.json").write_text(json.dumps(report))
    here = f"{races.hardware('cpu')}, torch {torch.__version__}"
    notes = races.run("models", seeds=1, quick=True, out=tmp_path)["notes"]
    assert notes[:3] == [
        f"gpt, seed 0: measured on {here}",  # all of its training was there
        "mamba, seed 0: NVIDIA X, torch 1.0",
        f"mamba, seed 0: {here}",
    ]


def test_eight_threads_are_another_machine_than_forty_eight():
    saved = {"environment": {"threads": 8, "torch": "2.13"}}  # an older one names no processor
    for threads, place in ((8, ""), (48, "8 threads, torch 2.13")):
        known = {"device": f"A chip, {threads} threads", "torch": "2.13"}
        assert races.elsewhere(saved, known) == place


def test_a_processor_is_named_as_the_system_names_it(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu: 0\nmodel name\t: A chip \nflags: a\n")
    assert races.processor() == "A chip"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor : 0\n")
    monkeypatch.setattr(races.platform, "processor", lambda: "")
    monkeypatch.setattr(races.platform, "machine", lambda: "arm64")
    assert races.processor() == "arm64"


def test_what_a_log_says_is_entered_under_its_seed_by_hand(short, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(races, "train", lambda *what, **how: asked.append((what, how)) or iter(()))
    arm = races.nanogpt_arms(quick=True)["ours, short"]
    recipe = replace(arm.recipe, steps=4)
    arm = replace(arm, recipe=recipe, measure=lambda model, text: {"trained": model})
    log = [{"step": 1, "seconds": 1.001}, {"step": 2, "seconds": 9.0, "validation": 1.5}]
    log += [{"step": 3, "seconds": 10.001}, {"step": 4, "seconds": 20.0, "validation": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row = {key: ["first"] for key in ("nats", "seconds", "curves", "measured")}
    # and no clock, as older reports have none
    races.run_arm(arm, short, 1, tmp_path, row)
    a_step = arm.recipe.batch * arm.config.window
    curve = [[2 * a_step, 2.0, 1.5], [4 * a_step, 4.0, 2.0]]
    assert row == {
        "nats": ["first", 2.0],  # the last, which is not the lowest
        "seconds": ["first", 4.004],  # two steps of a fast device are not nothing
        "clock": [math.nan, 20.0],  # with validation
        "curves": ["first", curve],
        "measured": ["first", {"trained": asked[0][0][0]}],
        "parameters": size(arm),
        "characters": 4 * a_step,
        "exact": True,
    }
    assert asked[0][1]["resume"] and asked[0][1]["run"] == tmp_path


def test_what_is_done_is_kept_when_a_later_arm_fails(idle, tmp_path, monkeypatch):
    run_arm = races.run_arm

    def failing(arm, *rest):
        run_arm(arm, *rest) if arm.model != "thinker" else 1 / 0

    monkeypatch.setattr(races, "run_arm", failing)
    with pytest.raises(ZeroDivisionError):
        races.run("models", seeds=1, quick=True, out=tmp_path)
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [name for name, row in rows.items() if row["nats"]] == ["gpt", "mamba"]


def test_an_arm_is_trained_on_the_device_that_it_is_given(short, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(LanguageModel, "to", lambda self, device: moved.append(device) or self)
    arm = races.nanogpt_arms(quick=True)["ours, short"]
    row = {"nats": [], "seconds": [], "curves": [], "measured": []}
    races.run_arm(arm, short, 0, tmp_path, row, "cuda")
    assert moved == ["cuda"]


def test_a_run_that_lost_its_last_line_is_measured_anew(short, tmp_path):
    arm = races.models_arms(quick=True)["gpt"]
    arm = replace(arm, recipe=replace(arm.recipe, steps=3, evaluate_every=0), measure=None)
    row, again = ({"nats": [], "seconds": [], "curves": []} for _ in range(2))
    races.run_arm(arm, short, 0, tmp_path, row)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    races.run_arm(arm, short, 0, tmp_path, again)
    assert again["nats"] == row["nats"] and again["curves"][0][-1][0] == 3 * 12 * 32
    log.unlink()
    with refuses(r"has lost its metrics\.jsonl: delete that folder"):
        races.run_arm(arm, short, 0, tmp_path, again)


# --------------------------------------------------------------------------------- what is measured


@pytest.fixture
def pages(short):
    """A few windows of validation text, and them as a text."""
    text = Text(short.train, short.val[:640], short.vocabulary, short.source, short.sha256)
    return text, torch.cat([text.train[-1:], text.val])


def test_nll_by_rounds_is_the_likelihood_by_round(pages):
    text, ids = pages
    model = excite(zoo.build("thinker", zoo.recipe("thinker", "tiny")[0]).eval())
    found, ids = races.nll_by_rounds(model, text), ids.unfold(0, 33, 32)
    with torch.no_grad():
        for rounds, nats in found["fixed"].items():
            want = model.nll(ids, stop="fixed", rounds=int(rounds)).mean().item()
            assert nats == pytest.approx(want, abs=1e-4), rounds
        taken = model.read(ids[:, :-1])[1].rounds.double().mean().item()
        nats, rounds = found["learned"]["0.5"]  # the default
        assert nats == pytest.approx(model.nll(ids).mean().item(), abs=1e-4)
    assert rounds == pytest.approx(taken)
    assert found["all"] == found["fixed"]["3"] != found["fixed"]["2"] and found["trained"] == 3
    by_threshold = [rounds for _, rounds in found["learned"].values()]
    assert by_threshold == sorted(by_threshold) and by_threshold[0] < by_threshold[-1]


def test_nll_in_equal_windows_gives_no_character_a_longer_past(pages):
    text, ids = pages
    model = excite(zoo.build("gpt", replace(zoo.recipe("gpt", "tiny")[0], window=128)).eval())
    ids = ids.unfold(0, 65, 64)
    with torch.no_grad():
        want = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:]).item()
    assert races.nll_in(model, text, 64) == {"windows of 64": pytest.approx(want, abs=1e-4)}


def test_text_quality_keeps_the_means_of_what_is_written(short, monkeypatch):
    measured = {"0.8": {"words that exist": quality.interval([0.25, 0.75]), "of all": 7}}

    def written(model, text, count, n):
        assert (model, text, count, n) == ("a", short, 3, 60)
        return measured, {}

    monkeypatch.setattr(quality, "written", written)
    means = {"0.8": {"words that exist": 0.5, "of all": 7}}
    assert races.text_quality("a", short, 3, 60) == means


# --------------------------------------------------------------------------------- what it comes to


@pytest.mark.parametrize("page", sorted(REPORTS.glob("*.md")), ids=lambda page: page.stem)
def test_stored_pages_are_what_the_stored_numbers_say(page):
    stored = json.loads(page.with_suffix(".json").read_text())
    assert page.read_text() == report.markdown(stored) + "\n"


STORED = [name for name in races.RACES if (REPORTS / f"{name}.json").exists()]


@pytest.mark.parametrize("name", STORED)
def test_stored_races_are_those_of_today(name, tmp_path, idle, monkeypatch):
    """Nothing of them would be run again, and no setting has another name."""
    stored = (REPORTS / f"{name}.json").read_text()
    (tmp_path / f"{name}.json").write_text(stored)
    rows, threads = json.loads(stored)["rows"], json.loads(stored)["threads"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seeds = min(len(row["nats"]) for row in rows.values())
    assert races.run(name, seeds=seeds, out=tmp_path)["rows"] == rows and idle == []


def test_stored_numbers_are_of_the_weights_that_ship():
    stored = json.loads((REPORTS / "all.json").read_text())
    for name in zoo.MODELS:
        assert suite.weights_of(zoo.card(name)) == stored[f"weights of {name}"], name


def test_seconds_do_not_count_a_busy_minute_nor_lost_lines():
    log = [{"step": i + 1, "seconds": 2.0 * (i + 1) + (60 if i > 4 else 0)} for i in range(12)]
    assert races.training_seconds(log) == 24
    log[-1] = log[-1] | {"validation": 2.0, "seconds": log[-1]["seconds"] + 9}
    assert races.training_seconds(log) == 24
    assert races.training_seconds(log[:3] + log[6:]) == 24
    seconds, log = 0.0, []
    for spent in (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 90.0):  # two kinds of steps, and a busy minute
        seconds += spent
        log.append({"step": len(log) + 1, "seconds": seconds})
    assert races.training_seconds(log) == 8 * 2.0


def test_sooner_by_hand():
    def row(seconds, nats):
        return {"seconds": seconds, "measured": [{"windows of 64": x} for x in nats]}

    rows = {
        "nanoGPT's recipe": row([20.0, 30.0, 100.0], [1.9, 1.8, 1.9]),
        "ours, short": row([5.0, 10.0, 10.0], [1.8, 1.6, 1.3]),
        "ours, long": row([30.0, 30.0, 100.0], [1.5, 1.5, 1.5]),
    }
    (line,) = report.of_nanogpt(rows)
    assert "takes 1/4.0 of its time (3.0 to 10.0) and ends 0.200 nats lower (0.100 to 0.600" in line
    assert "takes 1.00 times its time and ends 0.400 nats lower" in line  # all of it medians


def test_gap_and_lead_by_hand():
    rows = {
        "thinker": {"measured": [{"fixed": {"1": 1.55, "2": 1.5}}]},
        "gpt, equal parameters": {"nats": [1.6]},
        "gpt, as deep as 2 rounds": {"nats": [1.475]},
    }
    ((rounds, (closed, lead)),) = races.gap(rows).items()
    assert (rounds, closed, lead) == ("2", pytest.approx([0.8]), pytest.approx([0.1]))


def test_where_all_stand_when_the_fastest_is_done_by_hand():
    curve = [[10, 1.0, 3.0], [20, 2.0, 2.0], [30, 3.0, 1.8]]
    assert races.at_seconds(curve, 1.25) == pytest.approx(2.75)
    assert races.at_seconds([[10, 1.0, 3.0], [20, 1.0, 2.0]], 1.0) == 2.0
    assert math.isnan(races.at_seconds(curve, 0.5)) and math.isnan(races.at_seconds(curve, 3.5))
    assert races.lowest({"curves": [[[1, 0, 2.5], [2, 0, 1.25], [3, 0, 1.5]]]}) == [(2, 1.25)]

    def row(seconds, exact, *curves):
        return {"seconds": seconds, "exact": exact, "curves": curves, "measured": []}

    quick = row([2.0, 6.0], True, [[1, 1.0, 3.0], [2, 2.0, 2.0]], [[1, 3.0, 3.0], [2, 6.0, 1.0]])
    slow = row([4.0, 8.0], False, [[1, 0.0, 5.0], [2, 4.0, 3.0]], [[1, 4.0, 5.0], [2, 8.0, 4.0]])
    (line,) = report.of_models({"quick": quick, "slow": slow})
    assert line == (
        "When the fastest of them is done, after 2 or 6 s of training by seed, they stand at: "
        "quick 1.500 (1.000, 2.000), slow at most 4.250 (4.000, 4.500)."
    )
    a = row([1.0, 1.0], True, [[1, 1.0, 3.0]], [[1, 1.0, 3.0]])
    b = row([2.0, 2.0], True, [[1, 1.0, 3.0], [2, 2.0, 2.5]], [[1, 2.0, 3.0]])  # of one seed only
    (line,) = report.of_models({"a": a, "b": b})
    assert "a 3.000 (3.000, 3.000), b not measured yet" in line


def test_where_each_was_lowest_by_hand():
    falls = [[1000, 1.0, 2.5], [2000, 2.0, 1.25], [3000, 3.0, 1.5]]
    row = {"curves": [falls, falls[:1]], "nats": [1.5, 2.5], "exact": False, "measured": []}
    page = report.of_models_long({"diffusion": row | {"characters": 3000}})
    assert page[-1] == "| diffusion | at most 1.8750 (1.2500, 2.5000) | 2,000, 1,000 |"


def test_a_speedrun_is_judged_by_its_mean_in_the_windows_of_the_other_by_hand():
    row = {"seconds": [10.0, 20.0, 60.0], "clock": [11.0, 22.0, 99.0], "nats": [1.3] * 3}
    row["measured"] = [{"windows of 256": nats} for nats in (1.46, 1.47, 1.48)]
    row |= {"parameters": 9, "characters": 9, "exact": True}
    page = report.of_speedrun({"one GPU": row})
    begun = {"arm": {}, "nats": [], "seconds": [], "curves": []}  # and left before its first seed
    stored = {
        "race": "speedrun",
        "threads": 2,
        "torch": "2",
        "rows": {"one GPU": row, "two cores": begun},
    }
    assert "two cores" not in str(report._race(stored))
    assert "| 1 | 20 | 22 | 1.4700 |" in page and page[0] == "## one GPU"
    words = "The mean, 1.4700, is above nanoGPT's 1.4697, after 22 s by the clock (median)."
    assert page[-1].startswith(words)
    row["measured"] = [{"windows of 256": races.PUBLISHED}]
    assert "is at or under nanoGPT's 1.4697" in report.of_speedrun({"one GPU": row})[-1]


def test_only_what_every_seed_reaches_is_set_against_the_line():
    one = {"fixed": {"1": 2.0, "2": 1.5, "3": 1.4, "4": 1.4}, "trained": 4}
    ways = [{"0.5": [1.4, 2.0], "0.2": [1.3, mean]} for mean in (4.0, 3.0)]
    measured = [one | {"learned": learned} for learned in ways]
    small = {"nats": [1.6, 1.6]}
    page = report.of_thinker({"thinker": {"measured": measured}, "gpt, equal parameters": small})
    assert page[-1].startswith("Against the line that mixes fixed rounds, by mean rounds: -0.1000 ")
    assert "-0.0750 (-0.1000, -0.0500) at 3.0" in page[-1] and "at 4.0" not in page[-1]


def test_texts_over_seeds_by_hand():
    later = {t: {"words": row["words"] + 0.5, "of all": None} for t, row in TEXT.items()}
    page = report.texts_of_seeds({"gpt": {"measured": [TEXT, later]}})
    assert page[1] == "## Text at temperature 0.8 (means over seeds, lowest and highest seed)"
    assert "| gpt | 0.750 (0.500, 1.000) | 0.700 (0.700, 0.700) |" in page
    assert "| gpt | 0.500 (0.250, 0.750) | 0.900 (0.900, 0.900) |" in page
    bare = {"0.8": {"words": None}, "1.0": {"words": None}}
    assert "| gpt | none |" in report.texts_of_seeds({"gpt": {"measured": [bare]}})


def test_a_speedrun_takes_the_arm_of_its_device_and_keeps_the_clock(
    idle, short, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(races, "hardware", str)
    for threads, device in ((2, "cpu"), (16, "cpu"), (2, "cuda"), (16, "mps")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        races.run(
            "speedrun", seeds=1, quick=True, out=tmp_path / f"{device}{threads}", device=device
        )
    arms = ["two-CPU-cores", "16-CPU-threads", "one-GPU", "one-GPU"]
    assert [name for name, _ in idle] == [f"speedrun-{arm}-0" for arm in arms]
    monkeypatch.undo()
    monkeypatch.setattr(shakespeare, "load", lambda: short)
    (row,) = suite.main("speedrun", quick=True, out=tmp_path / "run", seeds=1)["rows"].values()
    assert row["clock"][0] > 0.9 * row["seconds"][0] > 0
    assert capsys.readouterr().out.startswith("## speedrun: 1 seed, ")


def test_every_seed_has_weights_and_windows_of_its_own(short, tmp_path, monkeypatch):
    arm = races.nanogpt_arms(quick=True)["ours, short"]
    arm = replace(arm, recipe=replace(arm.recipe, steps=3, evaluate_every=0), measure=None)
    begun, go = [], races.train

    def noted(model, text, recipe, **how):
        begun.append((model.wte.weight.detach().clone(), recipe.seed))
        return go(model, text, recipe, **how)

    monkeypatch.setattr(races, "train", noted)
    for seed in (0, 1):
        row = {"nats": [], "seconds": [], "curves": []}
        races.run_arm(arm, short, seed, tmp_path / str(seed), row)
    (one, first), (other, second) = begun
    assert not torch.equal(one, other) and (first, second) == (0, 1)
