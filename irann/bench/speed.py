"""What models cost: a training step, the first character, each further one, growth with length.

Times are taken on one thread, and given as median, lowest and highest. What is compared by its time
runs in turn in one process, after a round that does not count; `speed_against_quality` takes one
model after the other. Untrained weights serve as well as trained ones where only time is asked for,
except for thinkers: how long they think depends on what they have learnt, and on the text.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from .. import shakespeare, zoo
from ..layers import Attention
from ..models.gpt import GPT, GPTConfig
from ..models.mamba import MambaConfig, Mixer
from . import quality

Value = TypeVar("Value")


def summary(values: Sequence[float]) -> dict[str, float]:
    """-> median, smallest, largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def seconds(run: Callable) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(runners: dict[str, Callable[[], Value]], rounds: int) -> dict[str, list[Value]]:
    """-> what each gives, round by round, in turn, after one round that does not count."""
    values: dict[str, list[Value]] = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, run in runners.items():
            values[name].append(run())
    return {name: taken[1:] for name, taken in values.items()}


def in_turn(runners: dict[str, Callable], rounds: int) -> dict:
    """Seconds of each, in turn -> by name ms, and `times` as long as the first, by round."""
    taken = alternate({name: partial(seconds, run) for name, run in runners.items()}, rounds)
    first = next(iter(taken.values()))
    rows = {}
    for name, values in taken.items():
        times = [value / of_first for value, of_first in zip(values, first, strict=True)]
        rows[name] = {"ms": summary([1000 * value for value in values]), "times": summary(times)}
    return {"rounds": rounds, "rows": rows}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids(b: int, t: int, vocabulary: int = 65) -> Int[Tensor, "b t"]:
    return torch.randint(vocabulary, (b, t), generator=seeded())


def finish(drafts) -> None:
    """Write a text to its end."""
    for _ in drafts:
        pass


def loss_backward(model: Any, ids: Tensor) -> None:
    model.loss(ids)[0].backward()


def training_steps(quick: bool) -> dict:
    """Loss and gradients of every model at shipped size (quick: tiny), for as many characters.

    What the page models draw makes some of their steps longer than others; every round draws its
    own.
    """
    which, b, rounds = ("tiny", 4, 2) if quick else ("gpu", 4, 9)
    runners = {}
    window = 0
    for name in zoo.MODELS:
        config = zoo.recipe(name, which)[0]
        window = config.window
        model = zoo.build(name, config).train()
        ids = random_ids(b, window + 1, config.vocabulary)
        runners[name] = partial(loss_backward, model, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"b": b, "t": window, **in_turn(runners, rounds)}


def gpt_beside_transformers(quick: bool) -> dict:
    """GPT-2 of 4 layers, width 192, 3 heads, window 256: training step, 200 cached characters."""
    layers, width, t, b, n, rounds = (2, 48, 64, 2, 20, 2) if quick else (4, 192, 256, 8, 200, 3)
    ours = GPT(GPTConfig(window=t, layers=layers, width=width, heads=3))
    ids = random_ids(b, t + 1)
    prompt = ids[:1, :8]
    training = {"irann": lambda: ours.train().loss(ids)[0].backward()}
    writing = {"irann": lambda: finish(ours.eval().generate(prompt, n, generator=seeded()))}
    try:
        theirs = ours.to_transformers()
    except ImportError:
        pass
    else:
        sampling = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
        mask = torch.ones_like(prompt)

        def train_theirs() -> None:
            logits = theirs.train()(ids[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

        def write_theirs() -> None:
            theirs.eval().generate(prompt, max_new_tokens=n, attention_mask=mask, **sampling)

        training["transformers"] = train_theirs
        writing["transformers"] = write_theirs
    step, write = in_turn(training, rounds), in_turn(writing, rounds)
    return {"step": step, "write": write, "b": b, "t": t, "n": n}


def cache_gain(quick: bool) -> dict:
    """GPT, recipe `full`: 500 characters with the KV cache, and with the whole window for each."""
    n, rounds = (40, 1) if quick else (500, 3)
    model = GPT(zoo.recipe("gpt", "full")[0]).eval()
    window = model.config.window
    newline = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def without() -> None:
        ids = newline
        generator = seeded()
        for _ in range(n):
            p = model(ids[:, -window:])[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)

    def cached() -> None:
        finish(model.generate(newline, n, generator=seeded()))

    measured = in_turn({"with the cache": cached, "without": without}, rounds)
    return {"n": n, "window": window, **measured}


def layer_against_window(quick: bool) -> dict:
    """A layer of attention and one of Mamba, width 192, batch 1, both passes, by window length."""
    lengths, rounds = ((32, 64, 128), 2) if quick else ((128, 256, 512, 1024, 2048, 4096), 3)
    layers = {"attention": Attention(192, 3), "mamba": Mixer(MambaConfig(width=192))}
    rows: dict[str, list] = {name: [] for name in layers}
    for t in lengths:
        x = torch.randn(1, t, 192, generator=seeded())
        runners = {name: partial(_both_ways, layer, x) for name, layer in layers.items()}
        measured = in_turn(runners, rounds)["rows"]
        for name, row in rows.items():
            row.append(measured[name]["ms"])
    return {"lengths": lengths, "rows": rows}


def _both_ways(layer: torch.nn.Module, x: Tensor) -> None:
    layer(x)[0].sum().backward()


def writing_by_length(quick: bool) -> dict:
    """Batch 1, sizes that ship: seconds to the first new character on the screen, and characters
    per second, by prompt and reply.

    The prompts are from the validation part. For a model that writes a page at once, the first
    draft of the page is what is first on the screen.
    """
    which = "gpu"
    prompts = (100, 1000, 10_000)
    replies = (50, 250)
    rounds = 3
    if quick:
        which = "tiny"
        prompts = (10, 100)
        replies = (10,)
        rounds = 1
    models = {
        name: zoo.load(name)
        if name in zoo.shipped() and not quick
        else zoo.build(name, zoo.recipe(name, which)[0]).eval()
        for name in zoo.MODELS
    }
    ids = shakespeare.load().val[None, : max(prompts)]
    rows: dict[str, list] = {name: [] for name in models}
    for prompt in prompts:
        for reply in replies:
            runners = {
                name: partial(write_once, model, ids[:, :prompt], reply, iter((0, *range(rounds))))
                for name, model in models.items()
            }
            for name, taken in alternate(runners, rounds).items():
                first, rate = zip(*taken, strict=True)
                measured = {"first": summary(first), "chars_per_second": summary(rate)}
                rows[name].append({"prompt": prompt, "reply": reply, **measured})
    return rows


def write_once(
    model: Any, prompt: Int[Tensor, "1 t"], n: int, seeds: Iterator[int]
) -> tuple[float, float]:
    """With the next seed -> seconds to the first draft beyond the prompt, and characters per second
    of the reply.
    """
    began = time.perf_counter()
    first = 0.0
    for draft in model.generate(prompt, n, generator=seeded(next(seeds))):
        if not first and draft.ids.shape[1] > prompt.shape[1]:
            first = time.perf_counter() - began
    return first, n / (time.perf_counter() - began)


class Arrivals:
    """What transformers' `generate` takes as a streamer: when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back that could be told now."""


def write_on(model: Any, prompt: Int[Tensor, "1 t"], n: int) -> float:
    """-> characters per second of the n characters after the first one that follows the prompt."""
    seen = 0
    began = 0.0
    for draft in model.generate(prompt, n + 1, generator=seeded()):
        if not seen and draft.settled > prompt.shape[1]:
            began = time.perf_counter()
            seen = draft.settled
    return (draft.settled - seen) / (time.perf_counter() - began)


def speed_against_quality(quick: bool) -> dict:
    """Existing words, judge and characters per second of all that ships; page models by steps."""
    counts, samples, n = ((2, 4), 1, 32) if quick else ((4, 8, 16, 32, 64), 6, 192)
    text = shakespeare.load()
    corpus = quality.counted(text.vocabulary.decode(text.train))
    rows: dict[str, list] = {}
    for name in sorted(zoo.MODELS.keys() & zoo.shipped()):
        model = zoo.load(name)
        choices = [{"steps": count} for count in counts] if "steps" in model.settings else [{}]
        rows[name] = [measured_at(model, settings, samples, n, corpus) for settings in choices]
    return rows


def measured_at(model: Any, settings: dict, samples: int, n: int, corpus: Any) -> dict:
    """-> the settings, and what the model's texts and its speed are with them."""
    texts, rates = [], []
    for seed in range(samples):
        began = time.perf_counter()
        texts += quality.samples(model, 1, n, 0.8, seed, **settings)
        rates.append(n / (time.perf_counter() - began))
    words = [part for text in texts if (part := corpus.existing(text)) is not None]
    measured = {
        "words": summary(words) if words else None,
        "judge": summary([corpus.judge(text) for text in texts]),
        "chars_per_second": summary(rates),
    }
    return settings | measured
