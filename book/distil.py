"""python book/distil.py: a GPT of the size that ships learns what the three models that ship and
read from left to right expect together (appendix 5c). It begins with the weights of `gpt`.

The teachers are asked about the training part, and about 1.4 million characters of pages that Mamba
writes from short prompts: what they know by heart of the former they do not know of the latter.
Stopped with Ctrl-C and called
again, it goes on. At the end all are measured, alone and in votes, for
book/report/distillation.json, and the student becomes irann/weights/gpt-distilled.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import trange

import irann
from irann import zoo
from irann.lm import cross_entropy
from irann.training import Recipe, progress, soft_targets

NAME = "gpt-distilled"
REPORT = Path(__file__).parent / "report" / "distillation.json"
RUN = Path("runs") / NAME
WRITTEN = 22  # times 256 pages
PROMPT = 32  # characters of the training part that a page begins with
CHANGES = {"dropout": 0.05}  # of gpt's sizes: soft targets leave less to learn by heart
RECIPE = Recipe(
    steps=2800,
    batch=16,
    optimizer="muon",
    lr=1.4e-3,
    muon_lr=0.007,
    warmup=50,
    ema_decay=0.998,
    evaluate_every=250,
    precision="bfloat16",
    seed=2,
)


def main() -> None:
    text = irann.shakespeare.load()
    teachers: dict[str, Any] = {name: irann.load(name) for name in ("gpt", "mamba", "thinker")}
    reads = {name: model.read for name, model in teachers.items()}
    reads["thinker"] = partial(teachers["thinker"].read, stop="fixed")
    gpt = teachers["gpt"]
    student = irann.build("gpt", dataclasses.replace(gpt.config, **CHANGES))
    student.load_state_dict(gpt.state_dict())
    window = gpt.config.window
    lesson = RUN / "lesson.safetensors"
    if not lesson.exists():
        pages = write(teachers["mamba"], text.train, window)
        longer = dataclasses.replace(text, train=torch.cat([text.train, pages.flatten()]))
        RUN.mkdir(parents=True, exist_ok=True)
        targets = soft_targets(list(reads.values()), longer, window)
        part = lesson.with_suffix(".part")  # a lesson is there whole, or not at all
        save_file({"train": longer.train, "targets": targets}, part)
        part.replace(lesson)
    learnt = load_file(lesson)
    longer = dataclasses.replace(text, train=learnt["train"])
    ticks = irann.train(student, longer, RECIPE, run=RUN, resume=True, targets=learnt["targets"])
    for tick in progress(ticks, RECIPE.steps):
        if tick.validation is not None:
            print(f"{tick.step:,} steps: {tick.validation:.4f} nats per character")
    report(irann.load(RUN), text, teachers, reads)


def write(model: Any, train: Tensor, window: int) -> Tensor:
    """-> pages of a window that the model has written, each from a few characters of the text."""
    generator = torch.Generator().manual_seed(7)
    written = []
    for _ in trange(WRITTEN, desc=f"{type(model).__name__} writes"):
        starts = torch.randint(len(train) - PROMPT, (256, 1), generator=generator)
        prompts = train[starts + torch.arange(PROMPT)]
        *_, draft = model.generate(prompts, window - PROMPT, generator=generator)
        written.append(draft.ids.to(train.dtype))
    return torch.cat(written)


def report(student: Any, text: Any, teachers: dict[str, Any], reads: dict[str, Any]) -> None:
    """Measure all of them, and ship the student."""
    nats = {}
    for k in (1, 2, 3):
        for names in combinations(reads, k):
            nll = partial(vote_nll, [reads[name] for name in names])
            measured = irann.evaluate(teachers["gpt"], text, nll=nll)
            nats[", ".join(names)] = measured.nats_per_char
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    per_step = RECIPE.batch * student.config.window
    looks = [line for line in lines if "validation" in line]
    curve = [[line["step"] * per_step, round(line["validation"], 4)] for line in looks]
    card = zoo.ship(
        student,
        NAME,
        text,
        command="python book/distil.py",
        teachers=list(reads),
        recipe=dataclasses.asdict(RECIPE),
        seed=RECIPE.seed,
        step=student.card["step"],
        characters=student.card["characters"],
        hardware="one core of a CPU with bfloat16 units, beside other work",
        hours=round(lines[-1]["seconds"] / 3600, 2),
        curve=curve,
        corpus=text.sha256,
    )
    nats[NAME] = card["validation"]
    REPORT.write_text(json.dumps({"nats": nats, "curve": curve}, indent=1) + "\n")
    print("\n".join(f"{name:20} {value:.4f}" for name, value in nats.items()))


def vote_nll(reads: Sequence[Any], ids: Tensor, *, generator: Any = None) -> Tensor:
    """Nats of each character by the mean of the probabilities that the readers give it."""
    p = torch.stack([read(ids[:, :-1])[0].softmax(-1) for read in reads]).mean(0)
    return cross_entropy(p.log(), ids[:, 1:])


if __name__ == "__main__":
    main()
