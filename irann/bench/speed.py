"""What the models cost: a step of training, the first character, each further one, and how that grows with length.

Times are taken on one thread, and given as median, lowest and highest. What is to be compared runs in turn in one process, after
a round that does not count. Untrained weights serve as well as trained ones where only time is asked for, except for thinkers:
how long they think depends on what they have learnt, and on the text.
"""

import statistics
import time
from collections.abc import Callable

import torch

from .. import shakespeare, zoo
from ..layers import Attention
from ..models.gpt import GPT, GPTConfig
from ..models.mamba import MambaConfig, Mixer
from . import quality


def spread(values: list[float]) -> dict[str, float]:
    """-> median, smallest, largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(a: list[float], b: list[float]) -> list[float]:
    """How many times as long a took as b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def in_turn(runners: dict[str, Callable], rounds: int) -> dict:
    """Everyone in turn, after one round that does not count -> ms, and times as long as the first."""
    seconds = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, run in runners.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(runners))
    rows = {
        name: {
            "ms": spread([1000 * s for s in taken[1:]]),
            "times": spread(ratios(taken[1:], seconds[first][1:])),
        }
        for name, taken in seconds.items()
    }
    return {"rounds": rounds, "rows": rows}


def steps_of_all(quick: bool) -> dict:
    """Loss and gradients of every model at the size that ships (quick: tiny), the same number of characters each.

    What the page models draw makes some of their steps longer than others; every round draws its own.
    """
    which, b, rounds = ("tiny", 4, 2) if quick else ("gpu", 4, 9)
    runners, window = {}, None
    for name in zoo.MODELS:
        config = zoo.recipe(name, which)[0]
        model, window = zoo.build(name, config).train(), config.window
        ids = torch.randint(
            config.vocabulary, (b, window + 1), generator=torch.Generator().manual_seed(0)
        )
        runners[name] = lambda model=model, ids=ids: model.loss(ids)[0].backward()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"b": b, "t": window, **in_turn(runners, rounds)}


def gpt_beside_transformers(quick: bool) -> dict:
    """The plain GPT-2 of 4 layers, width 192, 3 heads, window 256: a training step, and 200 characters with the cache."""
    layers, width, t, b, n, rounds = (2, 48, 64, 2, 20, 2) if quick else (4, 192, 256, 8, 200, 3)
    ours = GPT(GPTConfig(window=t, layers=layers, width=width, heads=3))
    ids = torch.randint(65, (b, t + 1), generator=torch.Generator().manual_seed(0))
    prompt = ids[:1, :8]

    def write():
        for _ in ours.eval().generate(prompt, n, generator=torch.Generator().manual_seed(0)):
            pass

    training, writing = {"irann": lambda: ours.train().loss(ids)[0].backward()}, {"irann": write}
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return {
            "step": in_turn(training, rounds),
            "write": in_turn(writing, rounds),
            "b": b,
            "t": t,
            "n": n,
        }
    quiet = {
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "activation_function": "gelu",
    }
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=65,
            n_positions=t,
            n_embd=width,
            n_layer=layers,
            n_head=3,
            **quiet,
            bos_token_id=0,
            eos_token_id=None,
        )
    )

    def train_theirs():
        logits = theirs.train()(ids[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    def write_theirs():
        mask = torch.ones_like(prompt)
        theirs.eval().generate(
            prompt, max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0, attention_mask=mask
        )

    training["transformers"], writing["transformers"] = train_theirs, write_theirs
    return {
        "step": in_turn(training, rounds),
        "write": in_turn(writing, rounds),
        "b": b,
        "t": t,
        "n": n,
    }


def cost_against_window(quick: bool) -> dict:
    """One layer of attention and one of Mamba, width 192, batch 1, forward and backward, by the length of the window."""
    lengths, rounds = ((32, 64, 128), 2) if quick else ((128, 256, 512, 1024, 2048, 4096), 3)
    attention, mixer = Attention(192, 3), Mixer(MambaConfig(width=192))
    rows: dict[str, list] = {"attention": [], "mamba": []}
    for t in lengths:
        x = torch.randn(1, t, 192, generator=torch.Generator().manual_seed(0))
        runners = {
            "attention": lambda x=x: attention(x)[0].sum().backward(),
            "mamba": lambda x=x: mixer(x)[0].sum().backward(),
        }
        measured = in_turn(runners, rounds)["rows"]
        for name, row in rows.items():
            row.append(measured[name]["ms"])
    return {"lengths": lengths, "rows": rows}


def writing_by_length(quick: bool) -> dict:
    """Batch 1, sizes that ship: seconds to the first new character on the screen, and characters per second, by prompt and reply.

    The prompts are from the validation part. For a model that writes a page at once, the first draft of the page is what is
    first on the screen.
    """
    which, prompts, replies, rounds = (
        ("tiny", (10, 100), (10,), 1) if quick else ("gpu", (100, 1000, 10_000), (50, 250), 3)
    )
    rows: dict[str, list] = {}
    ids = shakespeare.load().val[None, : max(prompts)]
    for name in zoo.MODELS:
        model = (
            zoo.load(name)
            if name in zoo.shipped() and not quick
            else zoo.build(name, zoo.recipe(name, which)[0]).eval()
        )
        write_once(model, ids[:, : prompts[0]], replies[0], 0)  # does not count
        rows[name] = []
        for prompt in prompts:
            for reply in replies:
                took = [write_once(model, ids[:, :prompt], reply, seed) for seed in range(rounds)]
                first, speed = zip(*took, strict=True)
                rows[name].append(
                    {
                        "prompt": prompt,
                        "reply": reply,
                        "first": spread(first),
                        "chars_per_second": spread(speed),
                    }
                )
    return rows


def write_once(model, prompt: torch.Tensor, n: int, seed: int) -> tuple[float, float]:
    """-> seconds to the first draft that goes beyond the prompt, and characters per second over the whole reply."""
    began, first = time.perf_counter(), None
    for draft in model.generate(prompt, n, generator=torch.Generator().manual_seed(seed)):
        if first is None and draft.ids.shape[1] > prompt.shape[1]:
            first = time.perf_counter() - began
    return first, n / (time.perf_counter() - began)


def speed_against_quality(quick: bool, corpus: quality.Corpus, vocabulary) -> dict:
    """Words that exist, the judge and characters per second of all that ships; of models that write a page at once, by steps."""
    counts, samples, n = ((2, 4), 1, 32) if quick else ((4, 8, 16, 32, 64), 6, 192)
    rows: dict[str, list] = {}
    for name in zoo.shipped():
        model = zoo.load(name)
        choices = [{"steps": count} for count in counts] if "steps" in model.settings else [{}]
        rows[name] = [
            _tried(model, settings, samples, n, corpus, vocabulary) for settings in choices
        ]
    return rows


def _tried(model, settings, samples, n, corpus, vocabulary):
    start = vocabulary.encode("\n")[None]
    texts, speeds = [], []
    for seed in range(samples):
        began = time.perf_counter()
        *_, draft = model.generate(
            start, n, temperature=0.8, generator=torch.Generator().manual_seed(seed), **settings
        )
        speeds.append(n / (time.perf_counter() - began))
        texts.append(vocabulary.decode(draft.ids[0, 1:]))
    told = {
        "words": [corpus.existing(text) for text in texts],
        "judge": [corpus.judge(text) for text in texts],
    }
    return (
        settings
        | {name: spread(values) for name, values in told.items()}
        | {"chars_per_second": spread(speeds)}
    )
