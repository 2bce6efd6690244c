"""The benchmark compares what computes the same, and its arithmetic is right."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from irann import shakespeare, zoo
from irann.bench import quality
from irann.bench import suite as bench
from irann.checkpoint import CheckpointError
from irann.lm import Draft
from irann.bench.speed import write_once
from irann.training import train


def test_all_contestants_compute_the_same():
    inputs, runners = bench.scan_inputs(2, 33, 8), bench.contestants()
    assert "mambapy, parallel scan" in runners
    answers, gradients = {}, {}
    for name, scan in runners.items():
        bench.forward_backward(scan, inputs)
        answers[name], gradients[name] = scan(*inputs).detach(), [x.grad.clone() for x in inputs]
    loop = "plain loop (sequential)"
    for name in runners:
        size = max(1, answers[loop].abs().max().item())
        torch.testing.assert_close(answers[name], answers[loop], rtol=0, atol=5e-6 * size, msg=name)
        for ours, theirs in zip(gradients[name], gradients[loop], strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()), msg=name
            )


def test_arithmetic_by_hand():
    assert bench.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert bench.spread([3, 1, 2]) == {"median": 2, "low": 1, "high": 3}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`irann bench all --quick`, once -> its folder, its numbers, its page."""
    out, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    bench.main("all", quick=True, out=out)
    assert torch.get_num_threads() == threads
    return out, json.loads((out / "all.json").read_text()), (out / "all.md").read_text()


def test_quick_report(quick):
    _, numbers, page = quick
    assert all(
        row["ms"]["median"] > 0 and name in page for name, row in numbers["scan"]["rows"].items()
    )
    assert all(
        row["ms"]["median"] > 0 and name in page for name, row in numbers["step"]["rows"].items()
    )
    assert all(speed["median"] > 0 and name in page for name, speed in numbers["writing"].items())
    memory = numbers["memory"]
    assert (
        0 < memory["MB"]["irann, C kernel where there is one (auto)"] < 100
    )  # torch alone takes more
    assert (
        memory["MB"]["mambapy, parallel scan"] > 0
        and 0 < memory["grown"][0] < memory["grown"][1] < memory["grown"][2]
    )


def test_models_without_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("irann.zoo.WEIGHTS", tmp_path)
    page = "\n".join(bench._models(bench.trained_models(quick=True)))
    assert page.count("irann train") == len(bench.zoo.MODELS)


def test_what_was_measured_is_not_measured_again(quick, tmp_path, monkeypatch):
    kept = {
        name: part
        for name, part in quick[1].items()
        if name in ("torch", "threads", "quick", "growth", "memory", "step", "scan")
    }
    (tmp_path / "scan.json").write_text(json.dumps(kept))
    monkeypatch.setattr(bench, "scan_times", lambda quick: pytest.fail("measured again"))
    report = bench.main("scan", quick=True, out=tmp_path)
    assert report["scan"] == kept["scan"] and report["writing"]["irann, after 100"]["median"] > 0


def test_shipped_models_are_compared_with_the_real_thing(quick):
    out, report, page = quick
    assert set(report["models"]) == {"validation text", *bench.zoo.MODELS}
    for name in bench.zoo.MODELS:
        assert report["models"][name]["chars_per_second"]["median"] > 0 and f"| {name} |" in page
        assert 0 < report["models"][name]["quality"]["0.8"]["words that exist"]["mean"] <= 1
    assert "at most" in page
    assert (
        set(report["steps"]["rows"])
        == set(report["step_memory"]["MB"])
        == set(report["lengths"])
        == set(bench.zoo.MODELS)
    )
    assert all(
        one["first"]["median"] > 0 and one["chars_per_second"]["low"] > 0
        for row in report["lengths"].values()
        for one in row
    )
    assert len(report["parallel"]["diffusion"]) > 1 and "steps" not in report["parallel"]["gpt"][0]
    assert {path.name for path in out.glob("*.png")} == {
        f"all-{name}.png" for name in ("windows", "lengths", "parallel", "learning", "places")
    }
    assert (
        page.count("(from its card)") == 5
        and "| gpt | 1,794,432 | 1.4282 (from its card) | 2.060 |" in page
    )
    for one in report["lengths"]["mamba"]:
        first, rate = (one[key] for key in ("first", "chars_per_second"))
        assert (
            f"{first['median']:.3f} ({first['low']:.3f}, {first['high']:.3f}) | {rate['median']:.0f} ({rate['low']:.0f},"
            in page
        )
    for ms in report["windows"]["rows"]["attention"]:
        assert f"{ms['median']:.1f} ({ms['low']:.1f}, {ms['high']:.1f})" in page
    assert (
        "| mamba | "
        + " | ".join(f"{nats:.3f}" for _, nats in report["models"]["mamba"]["by_place"])
        + " |"
        in page
    )
    assert "- mamba: 1.501 after 4.1, " in page


def test_a_report_of_another_torch_is_not_gone_on_with(tmp_path, monkeypatch):
    (tmp_path / "scan.json").write_text(json.dumps({"quick": True, "torch": "1.0", "scan": {}}))
    with pytest.raises(
        ValueError,
        match=r"scan.json was measured with torch 1.0, this is .*: delete it, or choose another --out",
    ):
        bench.measure("scan", True, tmp_path)
    assert json.loads((tmp_path / "scan.json").read_text())["torch"] == "1.0"


def test_a_report_of_other_weights_says_so(quick, tmp_path, monkeypatch, capsys):
    assert (
        bench.measure("all", True, quick[0])["models"]["gpt"]["weights"]
        == zoo.load("gpt").card["sha256"][:12]
    )
    assert "other weights" not in capsys.readouterr().err
    numbers = json.loads((quick[0] / "all.json").read_text())
    numbers["models"]["mamba"]["weights"] = "0" * 12
    (tmp_path / "all.json").write_text(json.dumps(numbers))
    bench.measure("all", True, tmp_path)
    assert (
        f"{tmp_path / 'all.json'} was measured with other weights of mamba; to measure again, delete it"
        in capsys.readouterr().err
    )
    monkeypatch.setattr("irann.zoo.WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert bench.weights_of("gpt") is None
    bench.measure("all", True, quick[0])
    assert "other weights" not in capsys.readouterr().err  # there are none, so none are others
    for _ in train(
        zoo.build("gpt", zoo.recipe("gpt", "tiny")[0]),
        shakespeare.load(),
        replace(zoo.recipe("gpt", "tiny")[1], steps=1),
        run="runs/mine",
    ):
        pass
    assert bench.weights_of("gpt").startswith("step 1, 4.")


class Slow:
    """Reads the prompt for 5 seconds, shows a draft with one character settled, and has the rest after 2 more."""

    def __init__(self, clock):
        self.clock = clock

    def generate(self, prompt, n, generator=None):
        whole = torch.cat([prompt, prompt.new_zeros(1, n)], 1)
        yield Draft(prompt, prompt.shape[1])
        self.clock(5)
        yield Draft(whole, prompt.shape[1] + 1)
        self.clock(2)
        yield Draft(whole, prompt.shape[1] + n)


def test_speed_is_counted_from_the_first_draft_beyond_the_prompt(clock):
    assert write_once(Slow(clock), torch.zeros(1, 3, dtype=torch.long), 14, 0) == (5, 2)


def test_the_first_character_does_not_count_where_only_further_ones_are_asked_for(clock):
    assert bench.write_on(Slow(clock), torch.zeros(1, 3, dtype=torch.long), 14) == 7


def test_times_of_the_scan_are_against_the_first_and_without_the_first_round(monkeypatch, clock):
    taken = {"a": iter([100, 2, 2, 2]), "b": iter([100, 4, 4, 4])}
    monkeypatch.setattr(
        bench, "contestants", lambda: {name: spent.__next__ for name, spent in taken.items()}
    )
    monkeypatch.setattr(bench, "forward_backward", lambda scan, inputs: clock(scan()))
    rows = bench.scan_times(quick=True)["rows"]
    assert rows["a"] == {"ms": bench.spread([2000]), "times": bench.spread([1])}
    assert rows["b"] == {"ms": bench.spread([4000]), "times": bench.spread([2])}


def test_time_that_grows_with_the_square_of_the_length_is_said_to(monkeypatch):
    monkeypatch.setattr(bench, "forward_backward", lambda scan, inputs: inputs[0].shape[1] ** 2)
    assert bench.scan_growth(quick=True)["exponents"] == pytest.approx({"auto": 2, "chunked": 2})


def test_rows_are_named_after_what_they_run(monkeypatch):
    """A training step with and without the kernel, and a GPT that reads what is new or all anew."""
    monkeypatch.setattr(
        bench,
        "in_turn",
        lambda runners, rounds: {name: run() for name, run in runners.items() if name != "mambapy"},
    )
    switches, read = [], []
    loss, reads = bench.Mamba.loss, bench.GPT.read
    monkeypatch.setattr(
        bench.Mamba,
        "loss",
        lambda self, ids: switches.append(os.environ["IRANN_KERNEL"]) or loss(self, ids),
    )
    monkeypatch.setattr(
        bench.GPT,
        "read",
        lambda self, ids, state=None: read.append(ids.shape[1]) or reads(self, ids, state),
    )
    monkeypatch.setenv("IRANN_KERNEL", "mine")
    names = list(bench.training_step(quick=True))
    assert names[4:] == ["irann, kernel where there is one", "irann, plain torch"] and switches == [
        "1",
        "0",
    ]
    assert os.environ["IRANN_KERNEL"] == "mine"
    answer = bench.cache_gain(quick=True)
    assert list(answer)[2:] == ["with the cache", "without"] and read == [1] * answer["n"] + list(
        range(1, answer["n"] + 1)
    )


def test_a_place_is_given_the_mean_from_there_to_the_next():
    model = SimpleNamespace(config=SimpleNamespace(window=7), training=False)
    model.nll = lambda ids, generator: (
        (ids[:, 1:] - 1) % 7 + 0.0
    )  # the text counts places, if windows are cut side by side
    assert bench.by_place(model, SimpleNamespace(val=torch.arange(200)), pages=25) == [
        [0, 0],
        [1, 1],
        [2, 2.5],
        [4, 5],
    ]


def test_no_windows_are_measured_with_the_same_noise():
    model = SimpleNamespace(config=SimpleNamespace(window=1), training=False)
    model.nll = lambda ids, generator: torch.rand(len(ids), 1, generator=generator)
    noise = torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    ((_, nats),) = bench.by_place(model, SimpleNamespace(val=torch.arange(60)), pages=40)
    assert nats == pytest.approx(noise.mean().item())


def test_writing_leaves_out_the_first_round_and_the_first_character(monkeypatch, clock):
    rates = iter([1, 1, 100, 10, 200, 20])  # after 100 and after 1,000, three rounds
    monkeypatch.setattr(bench, "write_on", lambda model, prompt, n: next(rates))

    class Theirs:
        started = False

        def eval(self):
            return self

        def generate(self, ids, *, max_new_tokens, do_sample, top_k):
            assert do_sample and top_k == 0  # as ours: all characters may come
            clock(3 + (max_new_tokens - 1) / 5 + (0 if self.started else 50))
            self.started = True

    monkeypatch.setitem(
        sys.modules,
        "transformers",
        SimpleNamespace(MambaConfig=dict, MambaForCausalLM=lambda config: Theirs()),
    )
    told = bench.writing(quick=True)
    assert told["irann, after 100"] == {"median": 150, "low": 100, "high": 200}
    assert told["irann, after 1,000"] == {"median": 15, "low": 10, "high": 20}
    assert told["transformers, cached, after 100"] == pytest.approx(bench.spread([5.0, 5.0]))


def test_one_model_alone_is_measured_by_its_name(small, tmp_path, monkeypatch, capsys, clock):
    monkeypatch.setattr("irann.shakespeare.load", lambda: small)
    monkeypatch.setattr(quality, "counted", quality.Corpus)
    monkeypatch.setattr(
        bench,
        "evaluate",
        lambda model, text: SimpleNamespace(nats_per_char=1.5, standard_error=0.1),
    )
    monkeypatch.setattr(bench, "by_place", lambda model, text, pages: [[0, 2.0]])
    rate = {1: 10, quality.SAMPLES: 100}  # characters per second, of one text and of many
    shown = "10 (10, 10) | 100 (100, 100)"
    monkeypatch.setattr(
        quality,
        "samples",
        lambda model, vocabulary, count, n, *_: clock(count * n / rate[count]) or ["To be"] * count,
    )
    rows = bench.main("gpt", out=tmp_path)["models"]
    page = capsys.readouterr().out
    assert list(rows) == ["validation text", "gpt"] and {
        path.name for path in tmp_path.iterdir()
    } == {*("gpt.json", "gpt.md", "gpt-learning.png", "gpt-places.png")}
    assert (
        page.startswith("## Models")
        and f"| gpt | {rows['gpt']['parameters']:,} | 1.5000 ± 0.1000 | 2.164 | {shown} |" in page
    )
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="irann train mamba"):
        bench.main("mamba", out=tmp_path)


def test_another_subject_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of all, scan"):
        bench.main("everything", out=tmp_path)
