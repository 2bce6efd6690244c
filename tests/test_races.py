"""Races are fair, go on where they stopped, and their arithmetic is right."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import excite

from irann import zoo
from irann.bench import quality, races
from irann.bench import suite as bench
from irann.text import Text, windows
from irann.training import Trainer


@pytest.fixture
def short(small, monkeypatch):
    """Races read an excerpt, quick to validate with."""
    monkeypatch.setattr("irann.shakespeare.load", lambda: small)
    return small


def test_a_race_is_run_once_and_goes_on_where_it_stopped(short, tmp_path, monkeypatch, capsys):
    report = bench.main("thinker", quick=True, out=tmp_path, seeds=1)
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "thinker.md").read_text().strip() and "of the gap" in page
    rows = report["rows"]
    assert {len(row["nats"]) for row in rows.values()} == {1}
    assert all(
        name in page and row["seconds"][0] > 0 and 2 < row["nats"][0] < 4.5
        for name, row in rows.items()
    )

    kept = json.loads((tmp_path / "thinker.json").read_text())
    lost = kept["rows"].pop("gpt, as deep as 3 rounds")
    (tmp_path / "thinker.json").write_text(json.dumps(kept))
    ran = []
    real = races.run_arm
    monkeypatch.setattr(
        races, "run_arm", lambda *arguments: ran.append(arguments[3].name) or real(*arguments)
    )
    again = races.run("thinker", seeds=1, quick=True, out=tmp_path)["rows"]
    assert (
        ran == ["thinker-gpt-as-deep-as-3-rounds-0"]
        and again["gpt, as deep as 3 rounds"]["nats"] == lost["nats"]
    )
    bench.main("thinker", quick=True, out=tmp_path, seeds=2)  # one seed from the file, one fresh
    assert ran[1:] == [
        f"thinker-{arm}-1"
        for arm in (
            "gpt-equal-parameters",
            "thinker",
            "gpt-as-deep-as-2-rounds",
            "gpt-as-deep-as-3-rounds",
        )
    ]
    assert "2 seeds" in capsys.readouterr().out


def test_quick_and_full_reports_and_damaged_ones_are_kept_apart(short, tmp_path):
    for name, work in (
        ("models", races.run),
        ("scan", lambda name, quick, out: bench.measure(name, quick, out)),
    ):
        page = tmp_path / f"{name}.json"
        for content in ("", "[]", "{}", "not json"):
            page.write_text(content)
            with pytest.raises(
                ValueError, match=f"{name}.json is not a report: delete it, or choose another --out"
            ):
                work(name, quick=True, out=tmp_path)
        page.write_text(json.dumps({"quick": True, "rows": {}}))
        with pytest.raises(ValueError, match=f"{name}.json holds a quick report"):
            work(name, quick=False, out=tmp_path)


def test_a_race_that_is_told_to_end_says_how_to_go_on(short, tmp_path, monkeypatch, capsys):
    real = races.progress

    def progress(ticks, steps):
        for tick in real(ticks, steps):
            if tick.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield tick

    monkeypatch.setattr(races, "progress", progress)
    with pytest.raises(SystemExit) as end:
        races.run("models", seeds=1, quick=True, out=tmp_path)
    assert (
        end.value.code == 143
        and "step-00000004; the same command goes on from there" in capsys.readouterr().err
    )


def test_a_row_of_other_settings_is_not_taken_for_done(short, tmp_path, monkeypatch):
    races.run("nanogpt", seeds=1, quick=True, out=tmp_path)
    monkeypatch.setitem(
        races.RACES,
        "nanogpt",
        lambda quick: {
            k: replace(arm, recipe=replace(arm.recipe, lr=7e-3))
            for k, arm in races.nanogpt_arms(quick).items()
        },
    )
    with pytest.raises(
        ValueError,
        match=r"nanogpt.json holds 'nanoGPT's recipe' with other settings \(lr\): .*recipe-\[0-9\]\*, or",
    ):
        races.run("nanogpt", seeds=1, quick=True, out=tmp_path)
    rarely = {
        k: replace(arm, recipe=replace(arm.recipe, save_every=7))
        for k, arm in races.nanogpt_arms(True).items()
    }
    monkeypatch.setitem(races.RACES, "nanogpt", lambda quick: rarely)
    monkeypatch.setattr(
        races, "run_arm", None
    )  # how often it is saved, and the seed that older reports name, change nothing
    page = tmp_path / "nanogpt.json"
    older = json.loads(page.read_text())
    for row in older["rows"].values():
        assert "seed" not in row["arm"]
        row["arm"]["seed"] = 1337
    page.write_text(json.dumps(older))
    assert races.run("nanogpt", seeds=1, quick=True, out=tmp_path)["rows"] == older["rows"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nanogpt", "of its time"),
        ("thinker-long", "With 2 rounds the thinker closes"),
        ("models-long", "Where each was lowest"),
    ],
)
def test_every_race_runs_and_tells(name, told, short, tmp_path, capsys):
    bench.main(name, quick=True, out=tmp_path, seeds=1)
    assert told in capsys.readouterr().out


def test_the_race_of_all_models(short, tmp_path, capsys):
    report = bench.main("models", quick=True, out=tmp_path, seeds=1)
    rows = report["rows"]
    page = capsys.readouterr().out
    assert (
        list(rows) == ["gpt", "mamba", "thinker", "thinker-page", "diffusion"]
        and page.count("| at most") == 2
    )
    for name, row in rows.items():
        assert [point[0] for point in row["curves"][0]] == [
            12 * 32 * step for step in (4, 8, 12, 16, 20)
        ]
        look = row["looks"][0]["0.8"]
        exist, judged = (
            f"{look[measure]:.3f}" for measure in ("words that exist", "judge, nats per character")
        )
        assert f"| {name} | {exist} ({exist}, {exist}) | {judged} ({judged}, {judged}) |" in page
    assert page.count("## Text at temperature") == 2 and "Text" not in races.markdown(
        report | {"rows": {"gpt": rows["gpt"] | {"looks": []}}}
    )
    sizes = [
        sum(p.numel() for p in zoo.build(arm.model, arm.config).parameters())
        for arm in races.model_arms(quick=False).values()
    ]
    assert max(sizes) / min(sizes) < 1.04
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "models-curves.png",
        "models-seconds.png",
    }


def test_the_long_race_trains_what_ships_at_equal_size_on_as_many_characters():
    arms = races.models_long_arms(quick=False)
    assert list(arms) == list(zoo.MODELS)
    sizes = [
        sum(p.numel() for p in zoo.build(arm.model, arm.config).parameters())
        for arm in arms.values()
    ]
    assert max(sizes) / min(sizes) < 1.08
    assert {arm.recipe.steps * arm.recipe.batch * arm.config.window for arm in arms.values()} == {
        20_480_000
    }
    for name, arm in arms.items():
        config, recipe = zoo.recipe(name, "gpu")
        assert name in ("diffusion", "thinker") or arm.config == config
        assert (arm.recipe.lr, arm.recipe.muon_lr, arm.recipe.average) == (
            recipe.lr,
            recipe.muon_lr,
            recipe.average,
        )


def test_a_race_says_what_it_ran_on(short, tmp_path, monkeypatch):
    assert races.hardware(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    assert races.hardware("cuda") == "NVIDIA X"
    with pytest.raises(
        ValueError, match="scan is measured on the CPU: leave --device out, it is for races"
    ):
        bench.main("scan", quick=True, out=tmp_path, device="cuda")
    report = races.run("models-long", seeds=1, quick=True, out=tmp_path)
    assert report["device"] == "cpu" and report["notes"] == []
    page = tmp_path / "models-long.json"
    old = json.loads(page.read_text())
    assert f"1 seeds, {old['threads']} threads, torch {torch.__version__}" in races.markdown(old)
    del (
        old["device"],
        old["rows"]["gpt"]["looks"][0],
        old["rows"]["mamba"],
    )  # as it was written before it named one
    page.write_text(json.dumps(old))

    def run_arm(arm, text, seed, folder, row, device):
        assert device == "cuda"
        row.update(
            parameters=1,
            characters=1,
            exact=True,
            nats=[2.0],
            seconds=[1.0],
            looks=[{}],
            curves=[[[1, 1.0, 2.0]]],
        )

    monkeypatch.setattr(races, "run_arm", run_arm)
    again = races.run("models-long", seeds=1, quick=True, out=tmp_path, device="cuda")
    on = f"NVIDIA X, torch {torch.__version__}"
    assert again["notes"] == [f"gpt, seed 0: looked at on {on}", f"mamba, seed 0: {on}"]
    row = again["rows"]["gpt"]
    row["curves"] = [[[1000, 0, 2.5], [2000, 0, 1.25], [3000, 0, 1.5]]]
    assert races.lowest(row) == [(2000, 1.25)]
    on_gpu = again | {
        "device": "NVIDIA X",
        "rows": {name: row | {"looks": []} for name, row in again["rows"].items()},
    }
    page = races.markdown(on_gpu)
    assert page.startswith(f"## models-long: 1 seeds, NVIDIA X, torch {torch.__version__}")
    assert "| gpt | 1.2500 (1.2500, 1.2500) | 2,000 |" in page and "Text" not in page


def test_a_race_is_trained_on_the_device_it_is_given_and_that_is_written_down_first(
    short, tmp_path, monkeypatch
):
    class Moved(Exception):
        pass

    class Model:
        def to(self, device):
            assert json.loads((tmp_path / "thinker.json").read_text())["device"] == "NVIDIA X"
            raise Moved(device)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(zoo, "build", lambda *_, seed: Model())
    for _ in range(2):
        with pytest.raises(Moved, match="cuda"):
            bench.main("thinker", quick=True, out=tmp_path, device="cuda")
    monkeypatch.setattr(torch, "__version__", "9.9")
    for _ in range(2):  # begun on another machine: that is written down before the work, and once
        with pytest.raises(Moved, match="cuda"):
            bench.main("thinker", quick=True, out=tmp_path, device="cuda")
        assert json.loads((tmp_path / "thinker.json").read_text())["notes"] == [
            "gpt, equal parameters, seed 0: NVIDIA X, torch 9.9"
        ]


def test_stored_pages_are_what_the_stored_numbers_say():
    reports = Path(__file__).parents[1] / "book/report"
    for page in reports.glob("*.md"):
        write = bench.markdown if page.stem == "all" else races.markdown
        assert (
            page.read_text() == write(json.loads(page.with_suffix(".json").read_text())) + "\n"
        ), page.stem


def test_what_a_stored_seed_lacks_is_measured_and_later_seeds_keep_their_place(
    short, tmp_path, monkeypatch
):
    report = races.run("nanogpt", seeds=2, quick=True, out=tmp_path)
    page = tmp_path / "nanogpt.json"
    old = json.loads(page.read_text())
    later = old["rows"]["ours, long"]
    assert len(later["nats"]) == 2
    later["looks"].clear()  # of both seeds: measuring the first must leave the second where it is
    del old["rows"]["ours, short"]["looks"][1]
    page.write_text(json.dumps(old))
    monkeypatch.setattr(
        races, "train", lambda *arguments, **settings: iter(())
    )  # nothing is trained again
    monkeypatch.setattr(torch, "__version__", "9.9")
    halfway = races.run("nanogpt", seeds=1, quick=True, out=tmp_path)["rows"]["ours, long"]
    assert (
        halfway | {"looks": 0} == report["rows"]["ours, long"] | {"looks": 0}
        and len(halfway["looks"]) == 1
    )
    again = races.run("nanogpt", seeds=2, quick=True, out=tmp_path)
    was, now = report["rows"]["ours, short"], again["rows"]["ours, short"]
    assert (
        now | {"looks": 0} == was | {"looks": 0}
        and now["looks"][0] == was["looks"][0]
        and len(now["looks"]) == 2
    )
    again_on = f"looked at on {again['threads']} threads, torch 9.9"
    looks = [
        f"{which}: {again_on}"
        for which in ("ours, long, seed 0", "ours, short, seed 1", "ours, long, seed 1")
    ]
    assert again["torch"] == report["torch"] and again["notes"] == looks
    assert looks[0] in races.markdown(again)
    again["rows"]["ours, long"]["nats"].pop()
    assert "1 to 2 seeds" in races.markdown(again)


@pytest.mark.parametrize(("race", "deep"), [("thinker", (4, 6)), ("thinker-long", (4,))])
def test_the_arms_are_what_they_are_called(race, deep, small):
    arms = races.RACES[race](quick=False)
    sizes = {
        name: sum(p.numel() for p in zoo.build(arm.model, arm.config).parameters())
        for name, arm in arms.items()
    }
    assert abs(sizes["thinker"] / sizes["gpt, equal parameters"] - 1) < 0.01
    thinker = arms["thinker"].config
    assert len(arms) == 2 + len(deep)
    for rounds in deep:
        assert (
            arms[f"gpt, as deep as {rounds} rounds"].config.layers
            == thinker.prelude + thinker.core * rounds
        )
    orders = [
        Trainer(zoo.build(arm.model, arm.config), small, arm.recipe).order for arm in arms.values()
    ]
    seen = [
        windows(small.train, arm.config.window, arm.recipe.batch, order)
        for arm, order in zip(arms.values(), orders, strict=True)
    ]
    assert all(torch.equal(ids, seen[0]) for ids in seen)  # the very same characters


def test_nanogpts_arm_is_as_it_is_published():
    theirs = races.nanogpt_arms(quick=False)["nanoGPT's recipe"]
    model = zoo.build("gpt", theirs.config)
    assert (
        round((sum(p.numel() for p in model.parameters()) - model.place.weight.numel()) / 1e6, 2)
        == 0.80
    )  # as nanoGPT prints it
    assert [theirs.recipe.rate(step) * 1e-3 for step in (99, 1999)] == pytest.approx(
        [1e-3, 1e-4], rel=1e-4
    )


def test_the_look_at_rounds_is_the_likelihood_by_round(short):
    model = excite(zoo.build("thinker", zoo.recipe("thinker", "tiny")[0]).eval())
    short = Text(short.train, short.val[:320], short.vocabulary, short.source, short.sha256)
    look = races.look_at_rounds(model, short)
    ids = torch.cat([short.train[-1:], short.val]).unfold(0, 33, 32)
    with torch.no_grad():
        logits, _, _ = model.every_round(ids[:, :-1], 12)
        taken = model.read(ids[:, :-1])[1].rounds
    for rounds, nats in look["fixed"].items():
        want = torch.nn.functional.cross_entropy(logits[..., int(rounds) - 1].mT, ids[:, 1:])
        assert nats == pytest.approx(want.item(), abs=1e-4), rounds
    assert look["all"] == look["fixed"]["3"] != look["fixed"]["2"]
    nats, rounds = look["learned"]["0.5"]
    assert nats == pytest.approx(
        model.nll(ids).mean().item(), abs=1e-4
    ) and rounds == pytest.approx(taken.double().mean().item())
    assert (taken := [rounds for _, rounds in look["learned"].values()]) == sorted(taken)


def test_the_look_at_text_keeps_the_means_of_what_is_written(short, monkeypatch):
    told = {"0.8": {"words that exist": quality.interval([0.25, 0.75]), "longest copy": 7}}
    monkeypatch.setattr(
        quality,
        "written",
        lambda model, text, count, n: (
            (told, {}) if (model, text, count, n) == ("a", short, 3, 60) else 0
        ),
    )
    assert races.look_at_text("a", short, 3, 60) == {
        "0.8": {"words that exist": 0.5, "longest copy": 7}
    }


def test_the_look_at_64_gives_no_character_a_longer_past(short):
    model = excite(zoo.build("gpt", replace(zoo.recipe("gpt", "tiny")[0], window=128)).eval())
    short = Text(short.train, short.val[:640], short.vocabulary, short.source, short.sha256)
    pages = torch.cat([short.train[-1:], short.val]).unfold(0, 65, 64)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(pages[:, :-1]).mT, pages[:, 1:]).item()
    assert races.look_at_64(model, short) == {"windows of 64": pytest.approx(want, abs=1e-4)}


def test_a_run_that_lost_its_last_line_is_measured_anew(short, tmp_path):
    arm, row, again = (
        races.model_arms(quick=True)["gpt"],
        *({"nats": [], "seconds": [], "curves": []} for _ in range(2)),
    )
    arm = replace(arm, recipe=replace(arm.recipe, steps=3, evaluate_every=0), look=None)
    races.run_arm(arm, short, 0, tmp_path, row)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    races.run_arm(arm, short, 0, tmp_path, again)
    assert again["nats"] == row["nats"] and again["curves"][0][-1][0] == 3 * 12 * 32
    log.unlink()
    with pytest.raises(ValueError, match=r"has lost its metrics\.jsonl: delete that folder"):
        races.run_arm(arm, short, 0, tmp_path, again)


def test_seconds_do_not_count_a_busy_minute_nor_lost_lines():
    log = [{"step": i + 1, "seconds": 2.0 * (i + 1) + (60 if i > 4 else 0)} for i in range(12)]
    assert races.training_seconds(log) == 24
    log[-1]["validation"] = 2.0
    log[-1]["seconds"] += 9
    assert races.training_seconds(log) == 24
    assert races.training_seconds(log[:3] + log[6:]) == 24


def test_sooner_by_hand():
    def row(seconds, nats):
        return {"seconds": seconds, "looks": [{"windows of 64": x} for x in nats]}

    rows = {
        "nanoGPT's recipe": row([20.0, 30.0], [1.9, 1.8]),
        "ours, short": row([5.0, 10.0], [1.8, 1.6]),
    }
    (told,) = races._sooner(rows | {"ours, long": row([30.0, 30.0], [1.5, 1.5])})
    assert "takes 1/3.5 of its time (3.0 to 4.0) and ends 0.150 nats lower (0.100 to 0.200)" in told
    assert "takes 1.25 times its time and ends 0.350 nats lower" in told


def test_arithmetic_by_hand():
    rows = {
        "thinker": {"looks": [{"fixed": {"1": 1.55, "2": 1.5}}]},
        "gpt, equal parameters": {"nats": [1.6]},
    }
    told = races.gap(rows | {"gpt, as deep as 2 rounds": {"nats": [1.475]}})
    assert (
        list(told) == ["2"]
        and told["2"][0] == pytest.approx([0.8])
        and told["2"][1] == pytest.approx([0.1])
    )
    log = [
        {"seconds": 1.0},
        {"seconds": 2.0},
        {"seconds": 9.0, "validation": 2.0},
        {"seconds": 11.5, "step": 4},
    ]
    curve = [[10, 1.0, 3.0], [20, 2.0, 2.0], [30, 3.0, 1.8]]
    assert races.at_seconds([[10, 1.0, 3.0], [20, 1.0, 2.0]], 1.0) == 2.0
    (told,) = races._at_equal_time(
        {
            name: {"seconds": [s], "exact": True, "curves": [[[1, s, 3.0]]]}
            for name, s in (("a", 1.0), ("b", 2.0))
        }
    )
    assert "a not measured yet, b not measured yet" in told
    two = {
        "seconds": [2.0, 6.0],
        "exact": True,
        "curves": [[[1, 1.0, 3.0], [2, 2.0, 2.0]], [[1, 3.0, 3.0], [2, 6.0, 1.0]]],
    }
    slow = {
        "seconds": [4.0, 8.0],
        "exact": False,
        "curves": [[[1, 0.0, 5.0], [2, 4.0, 3.0]], [[1, 4.0, 5.0], [2, 8.0, 4.0]]],
    }
    (told,) = races._at_equal_time({"quick": two, "slow": slow})
    assert told == (
        "When the fastest of them is done, after 2 or 6 s of training by seed, they stand at: "
        "quick 1.500 (1.000, 2.000), slow at most 4.250 (4.000, 4.500)."
    )
    looks = [
        {t: {"words": x + shift, "longest copy": n} for t, shift in (("0.8", 0.0), ("1.0", 0.5))}
        for x, n in ((0.2, 26), (0.3, 31))
    ]
    page = races._texts({"gpt": {"looks": looks}})
    assert (
        "| gpt | 0.250 (0.200, 0.300) | 28.500 (26, 31) |" in page
        and "| gpt | 0.750 (0.700, 0.800) | 28.500 (26, 31) |" in page
    )
    assert page[1] == "## Text at temperature 0.8 (means over seeds, lowest and highest seed)"
    assert races.at_seconds(curve, 1.25) == pytest.approx(2.75) and math.isnan(
        races.at_seconds(curve, 0.5)
    )
    assert races.training_seconds(log) == pytest.approx(4 * 1.5)
    clock, log = 0.0, []
    for spent in (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 90.0):  # two kinds of steps, and a busy minute
        log.append({"step": len(log) + 1, "seconds": (clock := clock + spent)})
    assert races.training_seconds(log) == pytest.approx(8 * 2.0)
