"""irann/live/engine.c beside PyTorch: WebAssembly under wasmtime, and the same file built by this
machine's compiler. The tests hold both to PyTorch's numbers; the benchmark times them.
"""

import atexit
import ctypes
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import zoo
from ..export import LIVE, weights_file
from ..models.diffusion import Diffusion
from ..models.thinker_page import PageThinker
from ..settings import InputError
from .speed import alternate, finish, seconds, summary

# what a function gives: an int, of get_... a pointer, but for these
GIVES: dict[str, Any] = dict.fromkeys(("room", "remembered", "sha256"), ctypes.c_void_p)
GIVES |= {"get_halted": ctypes.c_float, "step_size": ctypes.c_float, "get_rounds": ctypes.c_int}
TYPES = {"i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}
ARGUMENTS = {"see_through": "d", "denoise": "dddf", "choose": "f", "keep_guess": "f"}
ARGUMENTS |= {"refine": "if", "set_rule": "fi"}


@cache
def module() -> tuple[Any, Any]:
    import wasmtime

    engine = wasmtime.Engine()
    return engine, wasmtime.Module(engine, (LIVE / "engine.wasm").read_bytes())


atexit.register(module.cache_clear)  # before wasmtime itself is taken apart


@cache
def library() -> Path:
    """engine.c by this machine's compiler: CC, else cc."""
    built = Path(tempfile.mkdtemp()) / "engine.so"
    command = [*(shlex.split(os.environ.get("CC", "")) or ["cc"]), "-O3", "-march=native"]
    # the engine's vectors have 128 bits; behind wider ones GCC leaves what slows all other code
    if platform.machine() in ("x86_64", "AMD64"):
        command.append("-mprefer-vector-width=128")
    command += ["-fno-math-errno", "-shared", "-fPIC", "-o", built, LIVE / "engine.c", "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return built


class Wasm:
    def __init__(self):
        import wasmtime

        engine, compiled = module()
        self.store = wasmtime.Store(engine)
        self.exports: Any = wasmtime.Instance(self.store, compiled, []).exports(self.store)
        self.memory: Any = self.exports["memory"]

    def call(self, name: str, *arguments: float) -> Any:
        return self.exports[name](self.store, *arguments)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.memory.read(self.store, at, at + size))

    def write(self, at: int, data: bytes) -> None:
        self.memory.write(self.store, data, at)


class Native:
    """A library of its own for each, because a library holds one opened model."""

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(str(shutil.copy(library(), folder)))

    def call(self, name: str, *arguments: float) -> Any:
        function = getattr(self.library, name)
        usual = ctypes.c_void_p if name.startswith("get_") else ctypes.c_int
        function.restype = GIVES.get(name, usual)
        kinds = ARGUMENTS.get(name, "i" * len(arguments))
        return function(*(TYPES[kind](value) for kind, value in zip(kinds, arguments, strict=True)))

    def read(self, at: int, size: int) -> bytes:
        return ctypes.string_at(at, size)

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(at, data, len(data))


class Engine:
    """A model opened in a host."""

    def __init__(self, host: Any, model: Any = None, data: bytes | None = None):
        self.host = host
        self.model = model
        data = weights_file(model) if data is None else data
        host.write(host.call("room", len(data)), data)
        self.refused = host.call("open_model", len(data))

    def call(self, name: str, *arguments: float) -> Any:
        if self.refused:
            raise InputError(f"the engine cannot open this model (code {self.refused})")
        return self.host.call(name, *arguments)

    def floats(self, name: str, *shape: int, arguments: tuple = ()) -> np.ndarray:
        """What the engine's function `name` points at."""
        data = self.host.read(self.call(name, *arguments), 4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)

    def integers(self, name: str, n: int) -> list[int]:
        return np.frombuffer(self.host.read(self.call(name), 4 * n), np.int32).tolist()

    def put(self, name: str, values: Any, kind: Any = np.float32) -> None:
        self.host.write(self.call(name), np.asarray(values).astype(kind).tobytes())

    def logits(self) -> np.ndarray:
        return self.floats("get_logits", self.model.config.vocabulary)

    def start(self, ids: list[int]) -> None:
        self.put("get_ids", ids, np.int32)
        self.call("restart", len(ids))

    def write(
        self, ids: list[int], n: int, temperature: float = 0.0, noise: Callable | None = None
    ) -> list[int]:
        """n characters after ids; `noise()` gives the exponential numbers of a draw."""
        self.start(ids)
        written = []
        for _ in range(n):
            if noise:
                self.put("get_noise", noise())
            written.append(self.call("choose", temperature))
            self.call("push", written[-1])
        return written

    def begin(self, ids: Any, mask: Any) -> None:
        """A page, to be written where mask is 1."""
        self.put("get_ids", ids, np.int32)
        self.put("get_mask", mask, np.uint8)
        self.call("page", len(ids))

    def denoise(
        self, ids: Any, mask: Any, steps: int, eta: float, temperature: float, noise: Callable
    ) -> Iterator[tuple[int, list[int]]]:
        """-> how many are settled, and the page, by step; `noise()`: normals (1 t channels)."""
        self.begin(ids, mask)
        self.put("get_noisy", noise())
        alpha_bar = [1.0, *self.model.schedule.alpha_bar.tolist()]
        for tau, after in itertools.pairwise([*self.model.timesteps(steps), 0]):
            if eta and after:
                self.put("get_noise", noise())
            settled = self.call("denoise", alpha_bar[tau], alpha_bar[after], eta, temperature)
            yield settled, self.integers("get_shown", len(ids))

    def refine(
        self, ids: Any, mask: Any, steps: int, temperature: float, noise: Callable
    ) -> Iterator[tuple[int, list[int]]]:
        """-> how many are still masked, and the page, by step; `noise()`: exponentials (t v)."""
        self.begin(ids, mask)
        for left in range(steps, 0, -1):
            self.put("get_noise", noise())
            masked = self.call("refine", left, temperature)
            yield masked, self.integers("get_shown", len(ids))


# ------------------------------------------------------------------------------------ the benchmark


def hosts() -> tuple[dict[str, Callable], list[str]]:
    """-> what can run the engine on this machine, and why its compiler cannot build it."""
    able: dict[str, Callable] = {}
    notes = []
    try:
        library()
        able["native"] = Native
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        notes.append(f"no C compiler built the engine ({error}): set CC, or install one")
    with suppress(ImportError):
        module()
        able["WebAssembly"] = Wasm
    return able, notes


def beside_pytorch(quick: bool) -> dict:
    """Characters per second of greedy text at batch 1: of PyTorch and of the engine, in turn, all
    that ships. A page is written in a quarter as many steps as it has characters.
    """
    n, rounds = (8, 1) if quick else (64, 9)
    able, notes = hosts()
    rows: dict[str, dict] = {}
    for name in sorted(zoo.MODELS.keys() & zoo.shipped()):
        model: Any = zoo.load(name)
        ids = model.vocabulary.encode("ROMEO:\n")
        runners = {"PyTorch": greedy(model, ids, n)}
        runners |= {by: greedy_engine(Engine(host(), model), ids, n) for by, host in able.items()}
        rates = {by: partial(rate, n, write) for by, write in runners.items()}
        taken = alternate(rates, rounds)
        rows[name] = {}
        for by, values in taken.items():
            times = [a / b for a, b in zip(values, taken["PyTorch"], strict=True)]
            rows[name][by] = {"chars_per_second": summary(values), "times as fast": summary(times)}
    return {"n": n, "rounds": rounds, "rows": rows, "notes": notes}


def rate(n: int, write: Callable) -> float:
    """-> characters per second of a text of n."""
    return n / seconds(write)


def greedy(model: Any, ids: Any, n: int) -> Callable[[], None]:
    steps = {"steps": n // 4} if "steps" in model.settings else {}
    return lambda: finish(model.generate(ids[None], n, temperature=0.0, **steps))


def greedy_engine(engine: Engine, ids: Any, n: int) -> Callable[[], None]:
    model = engine.model
    page = [*ids.tolist(), *[0] * n]
    mask = [0] * len(ids) + [1] * n
    if isinstance(model, Diffusion):
        noise = partial(torch.randn, 1, len(page), model.config.channels)
        return lambda: finish(engine.denoise(page, mask, n // 4, 1.0, 0.0, noise))
    if isinstance(model, PageThinker):
        noise = partial(torch.ones, len(page), model.config.vocabulary)
        return lambda: finish(engine.refine(page, mask, n // 4, 0.0, noise))
    return lambda: finish(engine.write(ids.tolist(), n))
