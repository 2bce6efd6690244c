"""What many tests need: a small text, models with excited weights, and a quiet machine."""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its interpreter stands in for the GPU

from irann import bench, shakespeare, speed
from irann.text import Text


def pytest_collection_modifyitems(items):
    """The chapters first: they take longest, and begun last they would leave one of two processes idle."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session")
def corpus() -> Text:
    return shakespeare.load()


@pytest.fixture(scope="session")
def small(corpus) -> Text:
    """The first few thousand characters of both parts, with the whole vocabulary, for what has to be fast."""
    return Text(corpus.train[:6000], corpus.val[:700], corpus.vocabulary, "an excerpt", "0" * 64)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to: clock(2) lets two seconds go."""
    now = [0.0]
    for module in (bench, speed):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.append(now.pop() + seconds)


def excite(model: torch.nn.Module, std: float = 0.6, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter anew and large: on default initialisation many a fault hides under the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model
