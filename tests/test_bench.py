"""The benchmark compares what computes the same, and its arithmetic is right."""

import json

import pytest
import torch

from irann import bench


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


def test_quick_report(tmp_path, capsys):
    threads = torch.get_num_threads()
    bench.main("scan", quick=True, out=tmp_path)
    page, numbers = capsys.readouterr().out, json.loads((tmp_path / "scan.json").read_text())
    assert page.strip() == (tmp_path / "scan.md").read_text().strip()
    assert all(row["ms"]["median"] > 0 and name in page for name, row in numbers["scan"]["rows"].items())
    assert all(row["ms"]["median"] > 0 and name in page for name, row in numbers["step"]["rows"].items())
    assert all(speed["median"] > 0 and name in page for name, speed in numbers["writing"].items())
    assert numbers["memory"]["MB"]["mambapy, parallel scan"] > 0
    assert torch.get_num_threads() == threads


def test_models_without_weights_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("irann.zoo.WEIGHTS", tmp_path)
    bench.main("all", quick=True, out=tmp_path / "report")
    assert capsys.readouterr().out.count("irann train") == len(bench.zoo.MODELS)


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    bench.main("scan", quick=True, out=tmp_path)
    kept = json.loads((tmp_path / "scan.json").read_text())
    del kept["writing"]
    (tmp_path / "scan.json").write_text(json.dumps(kept))
    monkeypatch.setattr(bench, "scan_times", lambda quick: pytest.fail("measured again"))
    assert bench.main("scan", quick=True, out=tmp_path)["scan"] == kept["scan"]


def test_shipped_models_are_compared_with_the_real_thing(tmp_path, capsys):
    rows = bench.main("all", quick=True, out=tmp_path)["models"]
    page = capsys.readouterr().out
    assert set(rows) == {"validation text", *bench.zoo.MODELS}
    for name in bench.zoo.MODELS:
        assert rows[name]["chars_per_second"]["median"] > 0 and f"| {name} |" in page
        assert 0 < rows[name]["quality"]["0.8"]["words that exist"]["mean"] <= 1
    assert "at most" in page


def test_another_subject_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of all, scan"):
        bench.main("everything", out=tmp_path)
