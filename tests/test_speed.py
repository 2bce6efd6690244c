"""What the models cost is counted right, on a clock that goes only when it is told to."""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses

from irann import machine, zoo
from irann.bench import engine, regressions, report, speed, suite, waiting
from irann.lm import Draft
from irann.text import Vocabulary


def test_what_is_compared_runs_in_turn_and_a_ratio_is_that_of_its_round(clock):
    """Each against the first, without the first round."""
    ran, taken = [], {"a": iter([100, 2, 8, 4]), "b": iter([100, 4, 16, 20])}

    def runner(name):
        return lambda: ran.append(name) or clock(next(taken[name]))

    rows = speed.in_turn({"a": runner("a"), "b": runner("b")}, 3)["rows"]
    assert ran == ["a", "b"] * 4
    same = {"median": 1, "low": 1, "high": 1}
    assert rows["a"] == {"ms": {"median": 4000, "low": 2000, "high": 8000}, "times": same}
    longer = {"median": 2, "low": 2, "high": 5}
    assert rows["b"] == {"ms": {"median": 16000, "low": 4000, "high": 20000}, "times": longer}


def test_every_model_s_step_is_its_own(monkeypatch):
    ran = []

    class Named:
        def __init__(self, name, config):
            self.name = name
            self.training = False

        def train(self):
            self.training = True
            return self

        def loss(self, ids):
            assert self.training
            ran.append(self.name)
            return torch.rand((), requires_grad=True), {}

    def in_turn(runners, rounds):
        return {"rows": {name: run() for name, run in runners.items()}}

    monkeypatch.setattr(zoo, "build", Named)
    monkeypatch.setattr(speed, "in_turn", in_turn)
    before = torch.get_rng_state()
    assert list(speed.training_steps(quick=True)["rows"]) == ran == list(zoo.MODELS)
    assert torch.equal(torch.get_rng_state(), before)  # what they draw is nobody else's


def test_a_layer_is_timed_at_every_window_both_ways(monkeypatch):
    lengths = []

    def in_turn(runners, rounds):
        for run in runners.values():
            layer, x = run.args
            layer.zero_grad()
            run()
            assert all(p.grad is not None for p in layer.parameters())
            lengths.append(x.shape)
        return {"rows": {name: {"ms": (name, len(lengths))} for name in runners}}

    monkeypatch.setattr(speed, "in_turn", in_turn)
    measured = speed.layer_against_window(quick=True)
    assert measured["lengths"] == (32, 64, 128)
    assert lengths == [(1, t, 192) for t in measured["lengths"] for _ in range(2)]
    assert measured["rows"] == {
        name: [(name, count) for count in (2, 4, 6)] for name in ("attention", "mamba")
    }


class Slow:
    """Reads the prompt for 5 seconds, shows a draft with one character settled, and has the rest
    after 2 more.
    """

    def __init__(self, clock):
        self.clock = clock

    def generate(self, prompt, n, generator=None):
        ids = torch.cat([prompt, prompt.new_zeros(1, n)], 1)
        yield Draft(prompt, prompt.shape[1])
        self.clock(5)
        yield Draft(ids, prompt.shape[1] + 1)
        self.clock(2)
        yield Draft(ids, prompt.shape[1] + n)


def test_speed_is_counted_from_the_first_draft_beyond_the_prompt(clock):
    assert speed.write_once(Slow(clock), torch.zeros(1, 3, dtype=torch.long), 14, iter([0])) == (
        5,
        2,
    )


def test_models_write_in_turn_and_every_round_has_a_seed_of_its_own(monkeypatch):
    seeds, loaded = [], []

    class Fast:
        def eval(self):
            return self

        def generate(self, prompt, n, generator):
            seeds.append(generator.initial_seed())
            yield Draft(torch.cat([prompt, prompt.new_zeros(1, n)], 1), prompt.shape[1] + n)

    monkeypatch.setattr(zoo, "build", lambda *_: Fast())
    monkeypatch.setattr(zoo, "shipped", lambda: ["gpt"])
    monkeypatch.setattr(zoo, "load", lambda name: loaded.append(name) or Fast())
    rows = speed.writing_by_length(quick=False)
    assert [(one["prompt"], one["reply"]) for one in rows["gpt"]] == [
        (prompt, reply) for prompt in (100, 1000, 10_000) for reply in (50, 250)
    ]
    in_turn = [seed for seed in (0, 0, 1, 2) for _ in zoo.MODELS]  # the first does not count
    assert seeds == in_turn * 6
    assert loaded == ["gpt"]


def test_the_first_character_does_not_count_where_only_further_ones_are_asked_for(clock):
    assert speed.write_on(Slow(clock), torch.zeros(1, 3, dtype=torch.long), 14) == 7


def test_each_length_is_measured_with_its_own_prompt_and_reply(corpus, monkeypatch):
    prompts = []

    def write_once(model, prompt, reply, seeds):
        prompts.append(prompt)
        return prompt.shape[1], reply

    monkeypatch.setattr(speed, "write_once", write_once)
    for row in speed.writing_by_length(quick=True).values():
        for one, prompt in zip(row, (10, 100), strict=True):
            assert (one["first"]["median"], one["chars_per_second"]["median"]) == (prompt, 10)
            assert (one["prompt"], one["reply"]) == (prompt, 10)
    for prompt in prompts:  # a thinker thinks as long as the text asks
        assert torch.equal(prompt, corpus.val[None, : prompt.shape[1]])
    assert len(prompts) == 4 * len(zoo.MODELS)  # of each length one that does not count, and one


def test_a_number_of_steps_is_tried_by_words_judge_and_speed(clock):
    def generate(start, n, *, temperature, generator, steps):
        assert (temperature, steps) == (0.8, 4)
        clock(2 + 2 * generator.initial_seed())  # two seconds, then four, then six
        yield Draft(torch.cat([start, torch.ones(1, n, dtype=torch.long)], 1), 1 + n)

    corpus = SimpleNamespace(existing=lambda text: 0.5, judge=len)
    model = SimpleNamespace(generate=generate, device="cpu", vocabulary=Vocabulary("\nab"))
    row = speed.measured_at(model, {"steps": 4}, 3, 12, corpus)
    rates = {"median": 3, "low": 2, "high": 6}
    words, judge = speed.summary([0.5]), speed.summary([12])
    assert row == {"steps": 4, "words": words, "judge": judge, "chars_per_second": rates}
    corpus.existing = lambda text: None
    assert speed.measured_at(model, {"steps": 4}, 1, 12, corpus)["words"] is None


def test_training_beside_other_work_is_measured_in_each_way_of_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "BUSY", ["sleep", "inf"])
    assert waiting.beside_a_busy_one({"OMP_NUM_THREADS": "1"}, 5) > 0
    asked = []
    monkeypatch.setattr(waiting, "seconds", lambda ways, steps: asked.append(ways) or len(asked))
    measured = suite.main("waiting", quick=True, out=tmp_path)["waiting"]["rows"]
    ways = list(waiting.WAYS.values())
    assert asked == [[way] for way in ways] * 2 + [[way, way] for way in ways]
    assert measured["another training"] == {
        name: speed.summary([n]) for name, n in zip(waiting.WAYS, (7, 8, 9), strict=True)
    }
    asked.clear()
    waiting.waiting(quick=False)
    assert asked[:6] == [[way] for way in ways] * 2
    page = (tmp_path / "waiting.md").read_text()
    given = f"(steps 40, rounds 1, cores {machine.cores()})\n"
    assert page.startswith(f"## Seconds of training the tiny GPT beside other work {given}")
    assert "| quiet | 1.00 (1.00, 1.00) | 2.00 (2.00, 2.00) | 3.00 (3.00, 3.00) |" in page


def test_trainings_side_by_side_take_as_long_as_the_longest(monkeypatch):
    said = [
        Mock(returncode=0, communicate=lambda s=s: (f"steps\n{s}\n", None)) for s in (3.5, 10, 2)
    ]
    monkeypatch.setattr(subprocess, "Popen", Mock(side_effect=said))
    assert waiting.seconds([{}] * 3, 1) == 10


def test_what_keeps_a_core_busy_ends_with_whoever_began_it():
    begin = f"import subprocess as s; print(s.Popen({waiting.BUSY}).pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", begin], **pipes) as parent:
        busy = int(parent.stdout.readline())
        try:
            ready, _, _ = select.select([parent.stdout], [], [], 0.2)
            assert not ready  # both are at work: the busy one holds this pipe too
            parent.kill()
            ready, _, _ = select.select([parent.stdout], [], [], 20)
            assert ready and parent.stdout.read() == ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(busy, signal.SIGKILL)


def test_trainings_side_by_side_last_as_long_as_the_longest_and_only_in_their_own_way(monkeypatch):
    began, ended, fails = [], [], 0

    class Process:
        def __init__(self, command, env=None, **_):
            began.append((command[1:], env))
            self.said = f"a warning\n{len(began)}.5\n"
            self.returncode = fails

        def communicate(self):
            assert len(began) == 2  # nobody is waited for before all run
            return self.said, None

        def kill(self):
            ended.append("killed")

        def wait(self):
            ended.append("gone")

    monkeypatch.setattr(waiting.subprocess, "Popen", Process)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    way = {"OMP_NUM_THREADS": "1"}
    assert waiting.seconds([way, {}], 40) == 2.5
    assert [command for command, _ in began] == [["-m", "irann.bench.waiting", "40"]] * 2
    chosen = [(env.get("OMP_NUM_THREADS"), env.get("OMP_WAIT_POLICY")) for _, env in began]
    assert chosen == [("1", None), (None, None)] and "PATH" in began[0][1]
    began.clear()
    fails = 4
    with pytest.raises(subprocess.CalledProcessError, match="exit status 4"):
        waiting.seconds([way, {}], 40)
    began.clear()
    monkeypatch.setattr(waiting, "seconds", lambda ways, steps: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        waiting.beside_a_busy_one(way, 40)
    assert ended == ["killed", "gone"]


def test_what_became_slower_than_in_the_stored_report_is_named(tmp_path, monkeypatch):
    def rows(**times):
        return {"rows": {name: {"times": {"median": time}} for name, time in times.items()}}

    parts = {
        "cache": lambda quick: rows(**{"with": 1.0, "without": 2.0, "new": 2.0, "busy": 0.7}),
        "gpt": lambda quick: {"rounds": 3, "step": rows(irann=1.0, transformers=4.0)},
        "scan": lambda quick: rows(ours=1.0),  # whose peer is not installed here
    }
    stored = {
        "cache": rows(**{"with": 1.0, "without": 4.0, "busy": 1.0}),
        "gpt": parts["gpt"](True),
        "scan": rows(ours=1.0, mambapy=9.0),
    }
    (tmp_path / "all.json").write_text(json.dumps(stored))
    monkeypatch.setattr(regressions, "STORED", tmp_path / "all.json")
    monkeypatch.setattr(regressions, "PARTS", parts)
    suite.main("regressions", out=tmp_path)
    page = (tmp_path / "regressions.md").read_text()
    assert "| cache: with, over without | 0.2500 | 0.5000 | 2.0000 | **slower** |" in page
    assert "| gpt, step: irann, over transformers | 0.2500 | 0.2500 | 1.0000 |  |" in page
    assert "| cache: busy, over without | 0.2500 | 0.3500 | 1.4000 |  |" in page
    assert "cache: new" not in page  # there is nothing to compare it with
    assert "Not timed, for want of a peer: scan: ours, over mambapy." in page
    quick = report.markdown({"regressions": regressions.regressions(quick=True)})
    assert "| cache: with, over without | 0.2500 | 0.5000 |\n" in quick and "slower**" not in quick
    assert "--quick cannot say what became slower" in quick and "--quick" not in page
    monkeypatch.setattr(regressions, "STORED", tmp_path / "none.json")
    with refuses("clone of the repository"):
        suite.main("regressions", quick=True, out=tmp_path / "other")


def test_the_stored_report_has_what_is_watched():
    stored = json.loads(regressions.STORED.read_text())
    watched = [
        key for name in regressions.PARTS for key, _ in regressions.ratios(name, stored[name])
    ]
    assert len(watched) == 12 and sum("transformers" in key for key in watched) == 2


@pytest.mark.parametrize("compiler", ["no-such-compiler", 'gcc "'])  # a quote is left open
def test_the_engine_is_timed_beside_pytorch_and_what_cannot_run_it_is_named(
    tmp_path, monkeypatch, clock, compiler
):
    engine.library.cache_clear()
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(zoo, "shipped", lambda: ["gpt"])
    monkeypatch.setattr(engine, "greedy", lambda model, ids, n: lambda: clock(n / 10))
    monkeypatch.setattr(engine, "greedy_engine", lambda opened, ids, n: lambda: clock(n / 40))
    suite.main("engine", quick=True, out=tmp_path)
    engine.library.cache_clear()
    page = (tmp_path / "engine.md").read_text()
    assert page.startswith("## Greedy text, batch 1, one thread (n 8, rounds 1)\n")
    assert "| gpt, PyTorch | 10.0 (10.0, 10.0) | 1.00 (1.00, 1.00) |" in page
    assert "| gpt, WebAssembly | 40.0 (40.0, 40.0) | 4.00 (4.00, 4.00) |" in page
    assert ", native |" not in page and "no C compiler built the engine" in page


def test_the_engine_s_ratio_is_that_of_its_round_and_missing_hosts_are_named(monkeypatch, clock):
    taken = {"PyTorch": iter([9, 2, 8, 4] * 3), "native": iter([9, 2, 2, 4] * 3)}
    able = {"native": lambda: None}
    monkeypatch.setattr(engine, "hosts", lambda: (able, ["why not"]))
    monkeypatch.setattr(engine, "Engine", lambda host, model: model)
    monkeypatch.setattr(zoo, "shipped", lambda: ["gpt"])
    spend = lambda by: lambda *_: lambda: clock(next(taken[by]))  # noqa: E731
    monkeypatch.setattr(engine, "greedy", spend("PyTorch"))
    monkeypatch.setattr(engine, "greedy_engine", spend("native"))
    alternate = engine.alternate
    monkeypatch.setattr(engine, "alternate", lambda runners, rounds: alternate(runners, 3))
    measured = engine.beside_pytorch(quick=True)
    assert measured["rows"]["gpt"]["native"]["times as fast"] == {"median": 1, "low": 1, "high": 4}
    assert "|\n\nwhy not\n" in report.markdown({"engine": measured})


def test_a_machine_without_wasmtime_times_the_other_host(monkeypatch):
    monkeypatch.setattr(engine, "library", lambda: "engine.so")
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    engine.module.cache_clear()
    assert list(engine.hosts()[0]) == ["native"] and suite.without("engine") == ["wasmtime"]


def test_pytorch_and_the_engine_write_greedily_as_much_in_as_many_steps():
    for name in zoo.MODELS:
        model, asked = zoo.build(name, zoo.recipe(name, "tiny")[0]).eval(), []
        note = lambda *given, asked=asked, **how: asked.append((given, how)) or ()  # noqa: E731
        model.generate = note
        ids = torch.tensor([3, 5])
        engine.greedy(model, ids, 16)()
        steps = {"steps": 4} if name in ("diffusion", "thinker-page") else {}
        ((prompt, n), how) = asked.pop()
        assert (prompt.tolist(), n, how) == ([[3, 5]], 16, {"temperature": 0.0} | steps)
        opened = SimpleNamespace(model=model, write=note, denoise=note, refine=note)
        engine.greedy_engine(opened, ids, 16)()
        ((given, _),) = asked
        page, mask = [3, 5, *[0] * 16], [0, 0, *[1] * 16]
        want = {"diffusion": (page, mask, 4, 1.0, 0.0), "thinker-page": (page, mask, 4, 0.0)}
        assert given[: len(given) - (name in want)] == want.get(name, ([3, 5], 16))


def test_the_engine_and_pytorch_write_the_same_pages_when_they_are_timed():
    model = zoo.load("thinker-page")
    ids = model.vocabulary.encode("ROMEO:\n")
    runs = engine.Engine(engine.Wasm(), model)
    *_, draft = model.generate(ids[None], 16, temperature=0.0, steps=4)
    engine.greedy_engine(runs, ids, 16)()
    assert runs.integers("get_shown", len(ids) + 16) == draft.ids[0].tolist()


def test_transformers_writes_with_its_cache_too(monkeypatch):
    from transformers import GPT2LMHeadModel

    lengths, forward = [], GPT2LMHeadModel.forward

    @functools.wraps(forward)  # its signature is looked at
    def noted(self, input_ids=None, *rest, **how):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *rest, **how)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", noted)
    found = speed.gpt_beside_transformers(quick=True)
    assert lengths.count(1) == 3 * (found["n"] - 1)  # two rounds, and one that does not count
