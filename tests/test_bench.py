"""The benchmark compares what computes the same, and its arithmetic is right."""

import json
import time

import pytest
import torch

from irann import bench
from irann.lm import Draft
from irann.speed import write_once


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
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()), msg=name)


def test_arithmetic_by_hand():
    assert bench.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert bench.ratios([4.0, 9.0], [2.0, 3.0]) == [2, 3]
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
    assert all(row["ms"]["median"] > 0 and name in page for name, row in numbers["scan"]["rows"].items())
    assert all(row["ms"]["median"] > 0 and name in page for name, row in numbers["step"]["rows"].items())
    assert all(speed["median"] > 0 and name in page for name, speed in numbers["writing"].items())
    assert numbers["memory"]["MB"]["mambapy, parallel scan"] > 0


def test_models_without_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("irann.zoo.WEIGHTS", tmp_path)
    page = "\n".join(bench._models(bench.trained_models(quick=True)))
    assert page.count("irann train") == len(bench.zoo.MODELS)


def test_what_was_measured_is_not_measured_again(quick, tmp_path, monkeypatch):
    kept = {name: part for name, part in quick[1].items() if name in ("torch", "threads", "quick", "growth", "memory", "step", "scan")}
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
    assert set(report["steps"]["rows"]) == set(report["step_memory"]["MB"]) == set(report["lengths"]) == set(bench.zoo.MODELS)
    assert all(one["first"]["median"] > 0 and one["chars_per_second"]["low"] > 0 for row in report["lengths"].values() for one in row)
    assert len(report["parallel"]["diffusion"]) > 1 and "steps" not in report["parallel"]["gpt"][0]
    assert {path.name for path in out.glob("*.png")} == {f"all-{name}.png" for name in ("windows", "lengths", "parallel")}


def test_speed_is_counted_from_the_first_draft_beyond_the_prompt():
    class Slow:
        def generate(self, prompt, n, generator=None):
            yield Draft(prompt, prompt.shape[1])
            time.sleep(0.05)
            yield Draft(torch.cat([prompt, prompt.new_zeros(1, n)], 1), prompt.shape[1] + n)
            time.sleep(0.05)

    first, speed = write_once(Slow(), torch.zeros(1, 3, dtype=torch.long), 10, 0)
    assert 0.05 <= first < 0.1 and 10 / 0.2 < speed < 10 / 0.1


def test_another_subject_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of all, scan"):
        bench.main("everything", out=tmp_path)
