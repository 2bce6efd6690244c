"""The benchmark compares what computes the same, says what it measured, and keeps it."""

import json
import os
import sys
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from conftest import refuses
from filelock import FileLock
from helpers import rng, threads

from irann import shakespeare, zoo
from irann.bench import quality, races, report, scan, speed, suite
from irann.checkpoint import CheckpointError
from irann.lm import LanguageModel
from irann.text import Text
from irann.training import InUse, Recipe, train


def test_all_contestants_compute_the_same():
    inputs, scans = scan.inputs_of(2, 33, 8), scan.contestants()
    assert scan.PEER in scans
    answers, gradients = {}, {}
    for name, run in scans.items():
        scan.forward_backward(run, inputs)
        answers[name] = run(*inputs).detach()
        gradients[name] = [x.grad.clone() for x in inputs]
    loop = "plain loop (sequential)"
    for name in scans:
        size = max(1, answers[loop].abs().max().item())
        torch.testing.assert_close(answers[name], answers[loop], rtol=0, atol=5e-6 * size, msg=name)
        for grad, right in zip(gradients[name], gradients[loop], strict=True):
            size = max(1, right.abs().max().item())
            torch.testing.assert_close(grad, right, rtol=0, atol=1e-5 * size, msg=name)


def test_each_contestant_runs_the_method_it_is_named_after(monkeypatch):
    asked = []
    monkeypatch.setattr(scan, "selective_scan", lambda *x, method: asked.append(method) or [x[0]])
    for name, run in scan.contestants().items():
        if name != scan.PEER:
            run(*scan.inputs_of(1, 2, 2))
            assert f"({asked[-1]})" in name
    assert asked == ["auto", "chunked", "sequential"]


# --------------------------------------------------------------------------------------- one report


@pytest.fixture(scope="module")
def quick(corpus, tmp_path_factory):
    """`irann bench all --quick`, once, by a tenth of the plays -> its folder, its numbers, its
    page.
    """
    out, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    part = Text(corpus.train[:100_000], corpus.val, corpus.vocabulary, corpus.source, corpus.sha256)
    with pytest.MonkeyPatch.context() as patch:  # as fast as it is for a reader
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(shakespeare, "load", lambda: part)
        suite.main("all", quick=True, out=out)
    assert torch.get_num_threads() == threads
    return out, json.loads((out / "all.json").read_text()), (out / "all.md").read_text()


def test_every_part_is_measured_and_told(quick):
    _, numbers, page = quick
    head = [*suite.conditions("all"), "threads", "quick", "without"]
    assert list(numbers) == [*head, *suite.parts_of("all")]
    for part in (numbers["scan"], numbers["step"], numbers["cache"], numbers["gpt"]["write"]):
        for name, row in part["rows"].items():
            assert row["ms"]["median"] > 0 and f"{name} | {report.cell(row['ms'])} | " in page
    assert f"| {' | '.join(numbers['writing'])} |" in page
    assert f"| {' | '.join(map(report.cell, numbers['writing'].values()))} |" in page
    for one in numbers["lengths"]["mamba"]:
        first, rate = report.cell(one["first"]), report.cell(one["chars_per_second"])
        assert f"| mamba | {one['prompt']} | {one['reply']} | {first} | {rate} |" in page
    for ms in numbers["windows"]["rows"]["attention"]:
        assert report.cell(ms) in page
    for part in (numbers["steps"]["rows"], numbers["lengths"]):
        assert list(part) == list(zoo.MODELS)
    assert len(numbers["parallel"]["diffusion"]) > 1
    assert "steps" not in numbers["parallel"]["gpt"][0]


def test_shipped_models_are_compared_with_the_real_thing(quick):
    _, numbers, page = quick
    rows = numbers["models"]
    assert list(rows) == ["validation text", *zoo.MODELS]
    assert page.count("(from its card)") == 5 and page.count("| at most ") == 4
    assert "| gpt | 1,794,432 | 1.4282 (from its card) | 2.060 |" in page
    assert [at for at, _ in rows["mamba"]["by_position"]] == [0, *(2**i for i in range(8))]
    for name in zoo.MODELS:
        assert rows[name]["chars_per_second"]["median"] > 0
        words = rows[name]["quality"]["0.8"]["words that exist"]
        assert 0 < words["mean"] <= 1
        assert f"| {name} | {words['mean']:.3f} ({words['low']:.3f}, {words['high']:.3f}) |" in page


def test_one_model_alone_is_measured_by_its_name(small, tmp_path, monkeypatch, capsys, clock):
    likelihood = SimpleNamespace(nats_per_char=1.5, standard_error=0.1)
    rate = {1: 10, quality.SAMPLES: 100}  # characters per second, of one text and of many

    asked = []

    def samples(model, count, n, temperature, seed=0):
        asked.append((count, n, temperature, seed))
        clock(count * n / rate[count])
        return ["To be"] * count

    monkeypatch.setattr(shakespeare, "load", lambda: small)
    monkeypatch.setattr(quality, "counted", quality.Corpus)
    monkeypatch.setattr(quality, "samples", samples)
    monkeypatch.setattr(suite, "evaluate", lambda model, text: likelihood)
    monkeypatch.setattr(suite, "by_position", lambda model, text, pages: [[0, pages]])
    rows = suite.main("gpt", out=tmp_path)["models"]
    page = capsys.readouterr().out
    assert list(rows) == ["validation text", "gpt"] and page.startswith("## Models")
    rates = "10.0 (10.0, 10.0) | 100 (100, 100)"
    size = f"{rows['gpt']['parameters']:,}"
    assert f"| gpt | {size} | 1.5000 ± 0.1000 | 2.164 | {rates} |" in page
    assert {path.name for path in tmp_path.glob("gpt*")} == {"gpt.json", "gpt.md"}
    timed = [(1, seed) for seed in range(3)] + [(quality.SAMPLES, seed) for seed in range(3)]
    assert asked[-6:] == [(count, 200, 1.0, seed) for count, seed in timed]
    assert rows["gpt"]["by_position"] == [[0, 60]]


def test_models_without_weights_are_named(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shakespeare, "load", lambda: small)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    page = report.markdown({"models": suite.trained_models(quick=True)})
    assert page.count("irann train") == len(zoo.MODELS)
    with pytest.raises(CheckpointError, match="irann train mamba"):
        suite.main("mamba", quick=True, out=tmp_path)


def test_any_part_is_a_table_of_its_rows_however_deep_they_lie():
    write = {"rounds": 3, "rows": {"ours": {"ms": speed.summary([1.0, 2.0, 1234.0])}}}
    read = {"ours": [{"times": 2, "ms": None}, {"ms": 0.5}], "theirs": {"words": "many"}}
    page = report.part(
        "A title", {"b": 2, "n": 1.5, "write": write, "read": read, "notes": ["So."]}
    )
    assert page == [
        "",
        "## A title (b 2, n 1.5)",
        "",
        "|  | ms | times as long as the first | words that exist |",
        "|---|---|---|---|",
        "| write, ours | 2.00 (1.00, 1234) |  |  |",
        "| read, ours | none | 2 |  |",
        "| read, ours | 0.5000 |  |  |",
        "| read, theirs |  |  | many |",
        "",
        "So.",
    ]
    mean = {"mean": 0.5, "low": 0.0001, "high": 1.0}
    assert report.cell(mean) == "0.500 (0.000, 1.000)" and report.cell(12345) == "12,345"
    assert [report.digits(x) for x in (0.0123, 9.99, 9.996, 10.0, 99999.0, 0)] == (
        ["0.0123", "9.99", "10.0", "10.0", "99999", "0"]
    )
    rows = {"gpt": [speed.summary([1.0]), speed.summary([2.0])]}  # by length
    page = report.part("Ways", {"lengths": [128, 1024], "rows": rows})
    assert page[3] == "|  | 128 | 1024 |"
    assert page[5] == "| gpt | 1.00 (1.00, 1.00) | 2.00 (2.00, 2.00) |"


def test_a_table_of_models_has_a_cell_for_what_is_not_known():
    rate = speed.summary([10.0])
    row = {"parameters": 1234, "exact": False, "chars_per_second": rate}
    row["chars_per_second_of_a_batch"] = rate
    rows = {
        "gpt": row | {"nats_per_char": 1.5},
        "mamba": row | {"nats_per_char": None},
        "thinker": {"missing": "none yet"},
    }
    page = report.markdown({"models": rows})
    assert (
        "| gpt | 1,234 | at most 1.5000 | at most 2.164 | 10.0 (10.0, 10.0) | 10.0 (10.0, 10.0) |"
        in page
    )
    assert "| mamba | 1,234 | not measured |  | 10.0 (10.0, 10.0) |" in page
    assert "| thinker | none yet |  |  |  |  |" in page
    rows["gpt"]["quality"] = {"0.8": {"words": 0.5}, "1.0": {"words": 0.25}}
    _, cool, warm = report.markdown({"models": rows}).split("## Text at temperature ")
    assert cool.startswith("0.8") and "| gpt | 0.5000 |" in cool
    assert warm.startswith("1.0") and "| gpt | 0.2500 |" in warm


# ----------------------------------------------------------------------------- what is gone on with


def test_what_was_measured_is_not_measured_again(quick, tmp_path, monkeypatch, capsys):
    kept = {name: part for name, part in quick[1].items() if name != "step"}
    (tmp_path / "scan.json").write_text(json.dumps(kept))
    monkeypatch.setattr(scan, "times", lambda quick: pytest.fail("measured again"))
    measured = suite.main("scan", quick=True, out=tmp_path)
    assert measured["scan"] == kept["scan"] and measured["step"]["rows"]
    capsys.readouterr()
    suite.measure("scan", True, tmp_path)
    assert "all of it is measured already; to measure again, delete" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "work"), [("models", races.run), ("scan", suite.measure)])
def test_quick_full_damaged_and_foreign_reports_are_kept_apart(name, work, tmp_path):
    page = tmp_path / f"{name}.json"
    for content in ("", "[]", "{}", "not json"):
        page.write_text(content)
        with refuses(f"{name}.json is not a report: delete it, or choose another --out"):
            races.stored(page, quick=True)
    page.write_text(json.dumps({"quick": True, "rows": {}}))
    with refuses(f"{name}.json holds a quick report"):
        work(name, quick=False, out=tmp_path)
    page.write_text(json.dumps({"quick": True, "torch": "1.0", "scan": {}}))
    if name == "scan":
        with refuses(r"irann unknown .here .*, torch 1.0 .here .*: delete it, or choose another"):
            work(name, quick=True, out=tmp_path)
        assert json.loads(page.read_text())["torch"] == "1.0"


def test_parts_are_measured_under_the_same_conditions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "parts_of", lambda what: {"models": lambda quick: 1})
    stored = suite.measure("all", True, tmp_path)
    assert stored["weights of gpt"] == zoo.load("gpt").card["sha256"][:12]
    monkeypatch.setattr(suite, "parts_of", lambda what: {"models": 0, "lengths": lambda quick: 2})
    for key in suite.conditions("all"):  # this machine's, irann's and torch's, and the weights
        (tmp_path / "all.json").write_text(json.dumps(stored | {key: "other"}))
        with refuses(rf"all\.json was measured with {key} other \(here .*: delete it, or choose"):
            suite.measure("all", True, tmp_path)
    done = stored | {"lengths": 2, "weights of mamba": "other"}  # nothing is missing, or mixed
    (tmp_path / "all.json").write_text(json.dumps(done))
    assert suite.measure("all", True, tmp_path) == done
    assert "already, with weights of mamba other (here " in capsys.readouterr().err
    assert "weights of gpt" not in suite.conditions("scan")
    for what, names in (("mamba", ["mamba"]), ("stopping", ["thinker"]), ("engine", zoo.MODELS)):
        shared = [key for key in suite.conditions(what) if "weights" in key]
        assert shared == [f"weights of {name}" for name in names]


def test_a_run_is_known_by_its_step_where_nothing_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "weights of gpt" not in suite.conditions("all")
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    for _ in train(model, shakespeare.load(), Recipe(steps=1, batch=2), run="runs/mine"):
        pass
    assert suite.conditions("gpt")["weights of gpt"].startswith("step 1, 4.")


def test_what_was_not_installed_is_measured_when_it_is(tmp_path, monkeypatch, capsys):
    there, ran = [], []
    monkeypatch.setattr(suite, "find_spec", lambda name: name in there or None)
    parts = {name: lambda quick, name=name: ran.append(name) or {} for name in ("scan", "writing")}
    monkeypatch.setattr(suite, "parts_of", lambda what: parts)
    page = suite.main("scan", quick=True, out=tmp_path)
    assert "Not beside scan, for it is not installed: mambapy (pip" in capsys.readouterr().out
    there.append("mambapy")
    for _ in range(2):
        page = suite.main("scan", quick=True, out=tmp_path)
    assert ran == ["scan", "writing", "scan"] and page["without"]["scan"] == []
    assert "mambapy" not in capsys.readouterr().out
    there.clear()
    assert suite.main("scan", quick=True, out=tmp_path) == page and len(ran) == 3  # kept


def test_a_part_that_fails_takes_nothing_of_the_others_with_it(tmp_path, monkeypatch):
    """And each is measured on one thread."""
    parts = {"scan": lambda quick: torch.get_num_threads(), "step": lambda quick: 1 / 0}
    monkeypatch.setattr(suite, "parts_of", lambda what: parts)
    with threads(2):
        with pytest.raises(ZeroDivisionError):
            suite.measure("scan", True, tmp_path)
        assert torch.get_num_threads() == 2
        del parts["step"]
        suite.measure("scan", True, tmp_path)
        assert torch.get_num_threads() == 2
    stored = json.loads((tmp_path / "scan.json").read_text())
    assert stored["scan"] == 1 and "step" not in stored


def test_a_race_gets_the_seeds_and_the_device_that_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(races, "run", lambda *what, **how: asked.append((what, how)) or {})
    monkeypatch.setattr(report, "markdown", lambda measured: "h \u2192 x")
    suite.main("thinker", quick=True, out=tmp_path, seeds=5, device="cuda:1")
    suite.main("nanogpt", out=tmp_path)
    how = {"quick": True, "out": tmp_path, "seeds": 5, "device": "cuda:1"}
    default = {"quick": False, "out": tmp_path, "seeds": 3, "device": "cpu"}
    assert asked == [(("thinker",), how), (("nanogpt",), default)]
    assert (tmp_path / "thinker.md").read_bytes() == b"h \xe2\x86\x92 x\n"


def test_a_report_that_another_process_writes_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "measure", lambda what, quick, out: {})
    with FileLock(tmp_path / ".scan.lock"):
        with pytest.raises(InUse, match=r"scan\.json: wait for it, or choose another --out"):
            suite.main("scan", quick=True, out=tmp_path)
        suite.main("engine", quick=True, out=tmp_path)
    suite.main("scan", quick=True, out=tmp_path)


def test_another_subject_and_what_is_for_races_only_are_refused(tmp_path):
    with refuses("one of all, scan, .*thinker-long, .*mamba; got 'everything'"):
        suite.main("everything", out=tmp_path)
    for given in ({"device": "cuda"}, {"seeds": 10}):
        with refuses("scan is measured on the CPU, with .* leave --device and --seeds out, they"):
            suite.main("scan", quick=True, out=tmp_path, **given)
    with refuses("seeds is a whole number from 1 up; got 0"):
        suite.main("models", quick=True, out=tmp_path, seeds=0)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- its arithmetic


def test_a_table_tells_the_sizes_of_what_ran_and_which_peers_it_lacks(monkeypatch):
    def random_ids(b, t, vocabulary=65):
        seen.append((b, t - 1))
        return torch.zeros(b, t, dtype=torch.long)

    seen, made, config = [], [], scan.MambaConfig
    monkeypatch.setattr(scan, "MambaConfig", lambda **sizes: made.append(sizes) or config(**sizes))
    for module in (scan, speed):
        monkeypatch.setattr(module, "random_ids", random_ids)
        monkeypatch.setattr(module, "in_turn", lambda runners, _: {"rows": list(runners)})
    monkeypatch.setattr(scan, "inputs_of", lambda *sizes: seen.append(sizes) or [])
    monkeypatch.setattr(scan, "alternate", lambda runners, _: dict.fromkeys(runners, [1.0]))
    for quick in (True, False):
        told = scan.times(quick)
        assert seen.pop() == (told["b"], told["t"], told["e"])
        for part in (scan.training_step, speed.gpt_beside_transformers, speed.training_steps):
            told = part(quick)
            assert set(seen) == {(told["b"], told["t"])}, part
            seen.clear()
            if part is scan.training_step:
                sizes = {"window": told["t"], "layers": told["layers"], "width": told["width"]}
                assert made.pop() == sizes
    parts = {name: suite.parts_of("all")[name] for name in ("scan", "step", "writing", "gpt")}
    whole = {name: part(True) for name, part in parts.items()}
    for peer in ("mambapy", "transformers"):
        with monkeypatch.context() as patch:
            for module in (peer, f"{peer}.pscan", f"{peer}.mamba"):
                patch.setitem(sys.modules, module, None)
            lacking = [name for name, part in parts.items() if part(True) != whole[name]]
        assert lacking == [name for name in parts if peer in suite.PEERS[name]]


def test_rows_are_named_after_what_they_run(monkeypatch):
    """A training step with and without the kernel, and a GPT that reads what is new or all anew."""

    def in_turn(runners, rounds):
        return {name: run() for name, run in runners.items() if name != "mambapy"}

    switches, lengths = [], []
    loss, read = scan.Mamba.loss, speed.GPT.read

    def noted_loss(self, ids, draws=None):
        switches.append(os.environ["IRANN_KERNEL"])
        return loss(self, ids, draws)

    def noted_read(self, ids, state=None):
        lengths.append(ids.shape[1])
        return read(self, ids, state)

    for module in (scan, speed):
        monkeypatch.setattr(module, "in_turn", in_turn)
    monkeypatch.setattr(scan.Mamba, "loss", noted_loss)
    monkeypatch.setattr(speed.GPT, "read", noted_read)
    monkeypatch.setenv("IRANN_KERNEL", "mine")
    names = list(scan.training_step(quick=True))[4:]
    assert names == ["irann, kernel where there is one", "irann, plain torch"]
    assert switches == ["1", "0"] and os.environ["IRANN_KERNEL"] == "mine"
    answer = speed.cache_gain(quick=True)
    n = answer["n"]
    assert list(answer)[2:] == ["with the cache", "without"]
    assert lengths == [1] * n + list(range(1, n + 1))


class Told(LanguageModel):
    """A model whose nats are those that it is told."""

    def __init__(self, window, nll):
        super().__init__(SimpleNamespace(window=window))
        self.nll = nll


def test_a_position_is_given_the_mean_from_there_to_the_next():
    # the text counts positions, if windows are cut side by side; nothing is left to dropout
    model = Told(7, lambda ids, generator: (ids[:, 1:] - 1) % 7 + 9.0 * model.training).train()
    rows = suite.by_position(model, SimpleNamespace(val=torch.arange(200)), pages=25)
    assert rows == [[0, 0], [1, 1], [2, 2.5], [4, 5]] and model.training
    wide = Told(300, lambda ids, generator: ids[:, 1:] - 1.0)  # to the end of the window
    assert suite.by_position(wide, SimpleNamespace(val=torch.arange(301)), 1)[-1] == [256, 277.5]


def test_no_windows_are_measured_with_the_same_noise():
    model = Told(1, lambda ids, generator: torch.rand(len(ids), 1, generator=generator))
    noise = torch.rand(40, 1, generator=rng(0))
    ((_, nats),) = suite.by_position(model, SimpleNamespace(val=torch.arange(60)), pages=40)
    assert nats == pytest.approx(noise.mean().item())


def test_writing_leaves_out_the_first_round_and_the_first_character(monkeypatch, clock):
    rates = iter([1, 1, 100, 10, 200, 20])  # after 100 and after 1,000, three rounds
    prompts = []

    def write_on(model, prompt, n):
        prompts.append(prompt.shape[1])
        return next(rates)

    monkeypatch.setattr(scan, "write_on", write_on)

    class Theirs:
        started = False

        def eval(self):
            return self

        def generate(self, ids, *, max_new_tokens, do_sample, top_k, streamer):
            assert do_sample and top_k == 0  # as ours: all characters may come
            streamer.put(ids)
            clock(3 + (0 if self.started else 50))
            streamer.put(ids[0, :1])
            for _ in range(max_new_tokens - 1):
                clock(1 / 5)
                streamer.put(ids[0, :1])
            streamer.end()
            self.started = True

    monkeypatch.setattr(scan.Mamba, "to_transformers", lambda self: Theirs())
    measured = scan.writing(quick=True)
    assert prompts == [100, 1000] * 3
    assert measured["irann, after 100"] == {"median": 150, "low": 100, "high": 200}
    assert measured["irann, after 1,000"] == {"median": 15, "low": 10, "high": 20}
    assert measured["transformers, cached, after 100"] == pytest.approx(speed.summary([5.0, 5.0]))


def test_words_count_as_existing_by_the_training_part_alone(small, monkeypatch):
    monkeypatch.setattr(shakespeare, "load", lambda: small)
    monkeypatch.setattr(quality, "counted", lambda train: train)
    monkeypatch.setattr(zoo, "shipped", lambda: ["gpt"])
    monkeypatch.setattr(speed, "measured_at", lambda *given: given[-1])
    for quick in (True, False):
        corpus = small.vocabulary.decode(small.train)
        assert speed.speed_against_quality(quick) == {"gpt": [corpus]}
