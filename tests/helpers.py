"""What tests of several files make and do."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from conftest import PROGRAMS

import irann
from irann import zoo
from irann.lm import LanguageModel
from irann.text import Vocabulary
from irann.training import Tick


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(b: int, t: int, v: int = 65, seed: int = 0) -> torch.Tensor:
    return torch.randint(v, (b, t), generator=rng(seed))


def model_of(characters: str, name: str = "gpt", **changes) -> LanguageModel:
    """-> a tiny model, new, whose vocabulary is these characters."""
    vocabulary = Vocabulary(characters)
    config, _ = zoo.recipe(name, "tiny", vocabulary=len(vocabulary), **changes)
    model = zoo.build(name, config, seed=0)
    model.vocabulary = vocabulary
    return model


def apart(*command, python=(sys.executable,), env=os.environ, **options):
    """Run a program by a Python of its own, without the type checker, which a compiler cannot see
    through -> what it has done, if it ends well.
    """
    paths = [str(Path(irann.__file__).parents[1]), str(PROGRAMS)]
    options = {"capture_output": True, "text": True, "timeout": 600} | options
    options["env"] = env | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*python, *map(str, command)], **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def book_module(path: str) -> ModuleType:
    """-> a module of the book, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        Path(path).stem, PROGRAMS.parents[1] / "book" / path
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def threads(n: int) -> Iterator[None]:
    """As many threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(run: str | Path) -> list[dict]:
    """-> what a run's metrics.jsonl tells, a dict for each step."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def left_after(n: int, ticks: Iterator[Tick]) -> list[Tick]:
    """-> the first steps of a training that is then left."""
    taken = list(islice(ticks, n))
    ticks.close()
    return taken


def cut(draws, rows):
    """The part of what was drawn for a batch that belongs to some of its rows."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in draws.items()
    }


def objective(model, batch, draws, rows):
    """-> loss, parts and gradients of a batch that is cut into groups of rows."""
    model.zero_grad(set_to_none=True)
    model.absorb()
    total, mean = 0.0, {}
    for group in rows:
        loss, parts = model.loss(batch[group], cut(draws, group))
        (loss / len(rows)).backward()
        total += loss.item() / len(rows)
        for part, value in parts.items():
            mean[part] = mean.get(part, 0.0) + value.item() / len(rows)
    model.absorb()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters()}
    numbers = {"loss": total} | mean
    return {k: torch.tensor(v, dtype=torch.double) for k, v in numbers.items()} | slopes
