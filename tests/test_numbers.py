"""What everything computes today, number by number: tests/numbers.json.

Other tests say why a number is right. These only say that it has not moved: a draw that is made
twice, a row that is left out, a default that is another one. After a change that is meant to move
numbers, write them anew and look at what moved:

    python tests/test_numbers.py && git diff tests/numbers.json
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import rng

from irann import shakespeare, zoo
from irann.bench import quality, races
from irann.chat.session import Session
from irann.lm import Reader
from irann.text import Text, windows
from irann.training import evaluate, train

STORED = Path(__file__).with_name("numbers.json")
OF_GPT2 = dict(
    positions="learned", norm="layer", bias=True, activation="gelu", qk_norm=False, tied=True,
    init="gpt2",
)  # fmt: skip
FORMS = {
    name: (name, {}, dict(accumulate=2, ema_decay=0.9, dropout=0.1)) for name in zoo.MODELS
} | {
    "thinker that ships": (
        "thinker",
        zoo.DEEP | zoo.HALTING,
        dict(random_rounds=True, dropout=0.1),
    ),
    "gpt as GPT-2": ("gpt", OF_GPT2, dict(optimizer="adamw", lr_schedule="cosine", clip=0.1)),
    "mamba as published": ("mamba", dict(init="mamba", tied=True), dict(optimizer="adamw")),
}


def total(x) -> float | list:
    """-> a number that moves when any entry of a tensor does; of a container, one for each."""
    if isinstance(x, torch.Tensor):
        x = x.detach().double().flatten()
        return (x * torch.linspace(1, 2, len(x), dtype=torch.float64)).sum().item()
    if isinstance(x, dict):
        return [total(value) for value in x.values()]
    if isinstance(x, list | tuple):
        return [total(value) for value in x]
    return float(x)


def excerpt() -> Text:
    text = shakespeare.load()
    return Text(text.train[:6000], text.val[:150], text.vocabulary)


def of_a_model(form: str) -> dict:
    """A model's first weights, its draws, what four steps of training do to it, and all that it
    says afterwards.
    """
    name, own, how = FORMS[form]
    text = excerpt()
    config, recipe = zoo.recipe(
        name,
        "tiny",
        **own,
        **how,
        steps=4,
        batch=4,
        evaluate_every=2,
        warmup=2,
        final_lr_factor=0.1,
    )
    model = zoo.build(name, config).double()
    found: dict = {"parameters": {n: total(p) for n, p in model.named_parameters()}}
    ids = windows(text.train, config.window, 3, rng(1))
    found["draws"] = {n: total(x) for n, x in model.draw(ids, generator=rng(2)).items()}
    ticks = list(train(model, text, recipe))
    found["ticks"] = [
        [t.loss, list(t.parts.values()), t.grad_norm, t.lr, t.validation or 0.0] for t in ticks
    ]
    found["trained"] = {n: total(p) for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        found["nll"] = total(model.nll(ids, generator=rng(3)))
        found["train part"] = evaluate(model, excerpt_of_train(text), part="train").nats_per_char
        found["inside"] = {n: total(x) for n, x in model.inspect(ids[:1, :-1]).items()}
        if isinstance(model, Reader):
            logits, state = model.read(ids[:, :10])
            found["read"] = total(logits), total(model.read(ids[:, 10:20], state)[0])
    found["texts"] = {}
    for settings in modes(model):
        drafts = list(model.generate(ids[:2, :5], 20, generator=rng(4), **settings))
        settled = [draft.settled for draft in drafts]
        text_of = [text.vocabulary.decode(row) for row in drafts[-1].ids]
        found["texts"][str(settings)] = [*text_of, settled, sorted(drafts[-1].note)]
    return found


def excerpt_of_train(text: Text) -> Text:
    return dataclasses.replace(text, train=text.train[:200])


def modes(model) -> list[dict]:
    """-> nothing, the general settings, and each setting of its own away from its default."""
    found: list[dict] = [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}]
    for name, setting in model.settings.items():
        values = setting.choices or (setting.low, min(setting.high, 7))
        found += [{name: value} for value in values if value != setting.default]
    return found


def of_a_chat() -> dict:
    """A conversation, in each of its modes."""
    text, found = excerpt(), {}
    for mode in ("play", "plain"):
        config, recipe = zoo.recipe("gpt", "tiny", steps=30, evaluate_every=0)
        model = zoo.build("gpt", config)
        list(train(model, text, recipe))
        session = Session(model, mode=mode, seed=3, length=30, temperature=0.8)
        for said in ("Who is there?", "Speak again."):
            session.say(said)
            frames = list(session.reply())
        list(session.again())
        last = session.turns[-1]
        found[mode] = [session.scene(), len(frames), last.forgotten, last.ended]
    return found


def of_the_bench() -> dict:
    """Measures of two texts, and the settings of every arm of every race."""
    text = shakespeare.load()
    known = text.vocabulary.decode(text.train[:30_000])
    new = [text.vocabulary.decode(text.val[i : i + 300]) for i in (0, 5000)]
    measured = quality.report(new, quality.Corpus(known))
    return {
        "quality": measured,
        "races": {
            f"{race}, {name}": arm.settings()
            for race, arms in races.RACES.items()
            for name, arm in arms(False).items()
        },
    }


def of_the_zoo() -> dict:
    """Every recipe, whole, and how the text is cut."""
    text = shakespeare.load()
    recipes = {
        f"{name}, {which}": dataclasses.asdict(config) | dataclasses.asdict(recipe)
        for name, entry in zoo.MODELS.items()
        for which, (config, recipe) in entry.recipes.items()
    }
    cut = [len(text.train), len(text.val), total(text.train), total(text.val)]
    return {"recipes": recipes, "text": cut, "windows": total(windows(text.train, 50, 9, rng(5)))}


PARTS = {form: lambda form=form: of_a_model(form) for form in FORMS}
PARTS |= {"chat": of_a_chat, "bench": of_the_bench, "zoo": of_the_zoo}


def moved(now, then, at: str = "") -> list[str]:
    """-> where two trees of numbers and texts differ by more than rounding."""
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        return [line for key in now for line in moved(now[key], then[key], f"{at} / {key}")]
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        pairs = enumerate(zip(now, then))
        return [line for i, (a, b) in pairs for line in moved(a, b, f"{at} [{i}]")]
    numbers = isinstance(now, int | float) and isinstance(then, int | float)
    same = math.isclose(now, then, rel_tol=1e-4, abs_tol=2e-5) if numbers else now == then
    return [] if same else [f"{at}: {then!r} -> {now!r}"]


@pytest.mark.parametrize("part", PARTS)
def test_nothing_has_moved(part, unchecked):
    now = json.loads(json.dumps(PARTS[part]()))
    assert not (found := moved(now, json.loads(STORED.read_text())[part])), "\n".join(found[:20])


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: part() for name, part in PARTS.items()}, indent=1) + "\n")
