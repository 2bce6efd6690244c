"""What many tests need: a small text, models with excited weights, and a quiet machine."""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # each process of tests has a core; torch reads this once
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import chromium
import pytest
from filelock import FileLock

PROGRAMS = Path(__file__).parent / "programs"  # what tests start as processes of their own


@contextmanager
def refuses(words: str):
    """The block ends in an error that says `words` (a pattern), or in one of the type checker,
    which comes first.
    """
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError)) as caught:
        yield caught
    if not isinstance(caught.value, TypeCheckError):
        assert re.search(words, str(caught.value)), str(caught.value)


@contextmanager
def small_disk(size: int):
    """No file may grow beyond `size` bytes, for real, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pytest_configure(config):
    """Every call of the package is held to its types. Who only hands out tests loads nothing.

    Behind a shell's & or nohup, this process and all that it starts would not hear their signals.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if config.getoption("numprocesses", 0) and not hasattr(config, "workerinput"):
        return
    import torch
    from typechecker import checking

    if not torch.cuda.is_available():  # before anything imports triton, whose interpreter this is
        os.environ["TRITON_INTERPRET"] = "1"
    with checking("irann"):
        import irann  # noqa: F401
    if config.pluginmanager.has_plugin("nbval"):
        kernels_one_at_a_time(f"irann-{getattr(config, 'workerinput', {}).get('testrunuid')}.lock")


def kernels_one_at_a_time(lock):
    """A kernel looks for free ports and takes them a second later, when another process of tests may
    have found the same: then it never answers. Who has lost its ports to anybody else tries again.
    """
    from nbval import kernel

    start = kernel.start_new_kernel

    def started(*given, **how):
        with FileLock(Path(tempfile.gettempdir()) / lock):
            try:
                return start(*given, **how)
            except RuntimeError:
                return start(*given, **how)

    kernel.start_new_kernel = started


def pytest_sessionstart(session):
    """Before anything runs: a browser, or a sentence that says what stays untested."""
    if hasattr(session.config, "workerinput"):
        return  # of several processes the first one has looked
    wanted = session.config.getoption("file_or_dir") or ["tests"]
    if any("browser" in name or Path(name).is_dir() for name in wanted) and not chromium.get():
        print(chromium.MISSING, file=sys.stderr)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven by playwright."""
    from playwright.sync_api import sync_playwright

    program = chromium.found()
    if program is None:
        pytest.skip(chromium.MISSING)
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=chromium.SWITCHES)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The built book, once for all processes of a run; no warning is let pass."""
    root, out = Path(__file__).parents[1], tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        out = out.parent
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    files = ["--path-output", out, "--config", "book/_config.yml", "--toc", "book/_toc.yml"]
    built = out / "_build" / "built"
    with FileLock(out / "book.lock"):
        if not built.exists():
            command = [jupyter_book, "build", ".", *files, "-W"]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            built.touch()
    return built.with_name("html")


LONGEST = ("contract", "weights", "book", "cli", "faults", "races", "widget", "bench", "train")


def pytest_collection_modifyitems(items):
    """The files that take longest first: begun last they would leave one of two processes idle."""

    def place(item):
        if item.path.suffix == ".ipynb":
            return 0
        name = item.path.stem.removeprefix("test_")
        return 1 + LONGEST.index(name) if name in LONGEST else 2 + len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def corpus():
    from irann import shakespeare

    return shakespeare.load()


@pytest.fixture(scope="session")
def small(corpus):
    """The first few thousand characters of both parts, with the whole vocabulary, for what has to
    be fast.
    """
    from irann.text import Text

    return Text(corpus.train[:6000], corpus.val[:700], corpus.vocabulary, "an excerpt", "0" * 64)


@pytest.fixture
def unchecked(monkeypatch):
    """Types are not looked at: for what repeats, a thousand times, calls that other tests hold."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture
def command(capsys):
    """The command line in this process -> exit code, stdout, stderr; never a traceback."""
    from irann.__main__ import main

    def command(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out, err

    return command


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to: clock(2) lets two seconds go."""
    now = [0.0]
    monkeypatch.setattr("irann.bench.speed.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.append(now.pop() + seconds)


def excite(model, std: float = 0.6, seed: int = 0):
    """Draw every parameter anew and large: on default initialisation many a fault hides under the
    tolerance.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def stablelm(blocks, width: int, heads: int, gains=None):
    """Blocks with rotary positions, QK-norm, squared ReLU and plain norms, gains (blocks 2 d) -> a
    StableLM of transformers, double.

    It has all that they have, written by others. Its angles belong to channels j and j + c/2, ours
    to neighbours: so the channels of q and k change places. Its MLP is gated, relu(gate) * up: one
    matrix as both is the squared ReLU. Gains go into the matrices.
    """
    import torch
    from transformers import StableLmConfig, StableLmModel

    config = StableLmConfig(
        vocab_size=1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(blocks),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        layer_norm_eps=1e-5,
        hidden_act="relu",
        qk_layernorm=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
        },
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs, halves = (
        StableLmModel(config).double().eval(),
        torch.arange(width).view(heads, -1, 2).mT.flatten(),
    )
    with torch.no_grad():
        for i, (ours, layer) in enumerate(zip(blocks, theirs.layers, strict=True)):
            sees, widens = ours.attn.c_attn.weight, ours.mlp.c_fc.weight
            if gains is not None:
                sees, widens = sees * gains[i, 0], widens * gains[i, 1]
            q, k, v = sees.chunk(3)
            for here, there in (
                (q[halves], layer.self_attn.q_proj),
                (k[halves], layer.self_attn.k_proj),
                (v, layer.self_attn.v_proj),
                (ours.attn.c_proj.weight, layer.self_attn.o_proj),
                (widens, layer.mlp.gate_proj),
                (widens, layer.mlp.up_proj),
                (ours.mlp.c_proj.weight, layer.mlp.down_proj),
            ):
                there.weight.copy_(here)
    return theirs
