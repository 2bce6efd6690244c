"""What the models cost is counted right, on a clock that goes only when it is told to."""

from types import SimpleNamespace

import torch

from irann import zoo
from irann.bench import speed
from irann.lm import Draft
from irann.text import Vocabulary


def test_times_are_against_the_first_and_without_the_first_round(clock):
    taken = {"a": iter([100, 2, 2]), "b": iter([100, 4, 4])}
    runners = {name: lambda spent=spent: clock(next(spent)) for name, spent in taken.items()}
    rows = speed.in_turn(runners, 2)["rows"]
    assert rows["a"] == {"ms": speed.spread([2000]), "times": speed.spread([1])}
    assert rows["b"] == {"ms": speed.spread([4000]), "times": speed.spread([2])}


def test_every_model_s_step_is_its_own(monkeypatch):
    ran = []

    class Named:
        def __init__(self, name, config):
            self.name = name

        def train(self):
            return self

        def loss(self, ids):
            ran.append(self.name)
            return torch.zeros((), requires_grad=True), {}

    monkeypatch.setattr(zoo, "build", Named)
    monkeypatch.setattr(
        speed,
        "in_turn",
        lambda runners, rounds: {"rows": {name: run() for name, run in runners.items()}},
    )
    assert list(speed.steps_of_all(quick=True)["rows"]) == ran == list(zoo.MODELS)


def test_each_length_is_measured_with_its_own_prompt_and_reply(corpus, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        speed,
        "write_once",
        lambda model, prompt, reply, seed: prompts.append(prompt) or (prompt.shape[1], reply),
    )
    for row in speed.writing_by_length(quick=True).values():
        assert [(one["first"]["median"], one["chars_per_second"]["median"]) for one in row] == [
            (10, 10),
            (100, 10),
        ]
        assert [(one["prompt"], one["reply"]) for one in row] == [(10, 10), (100, 10)]
    assert all(
        torch.equal(prompt, corpus.val[None, : prompt.shape[1]]) for prompt in prompts
    )  # a thinker thinks as long as the text asks
    assert len(prompts) == 3 * len(zoo.MODELS)  # one that does not count, and one of each length


def test_a_number_of_steps_is_tried_by_words_judge_and_speed(clock):
    def generate(start, n, *, temperature, generator, steps):
        assert (temperature, steps) == (0.8, 4)
        clock(2 + 2 * generator.initial_seed())  # two seconds, then four, then six
        yield Draft(torch.cat([start, torch.ones(1, n, dtype=torch.long)], 1), 1 + n)

    corpus = SimpleNamespace(existing=lambda text: 0.5, judge=len)
    told = speed._tried(
        SimpleNamespace(generate=generate), {"steps": 4}, 3, 12, corpus, Vocabulary("\nab")
    )
    assert told == {
        "steps": 4,
        "words": speed.spread([0.5]),
        "judge": speed.spread([12]),
        "chars_per_second": {"median": 3, "low": 2, "high": 6},
    }
