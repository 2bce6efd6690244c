"""Hosts for irann/live/engine.c: WebAssembly under wasmtime, and the same file built by this
machine's compiler.
"""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import wasmtime

from irann.export import LIVE, weights_file

POINTERS = {"room", "remembered", "sha256"}  # and get_..., but for two
FLOATS = {"get_halted", "step_size"}
TYPES = {"i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}
ARGUMENTS = {"see_through": "d", "denoise": "dddf", "choose": "f", "keep_guess": "f"}
ARGUMENTS |= {"refine": "if", "set_rule": "fi"}


@cache
def module() -> tuple[wasmtime.Engine, wasmtime.Module]:
    engine = wasmtime.Engine()
    return engine, wasmtime.Module(engine, (LIVE / "engine.wasm").read_bytes())


@cache
def library() -> Path:
    """engine.c by this machine's compiler."""
    built = Path(tempfile.mkdtemp()) / "engine.so"
    command = ["cc", "-O2", "-march=native", "-shared", "-fPIC", "-o", built]
    subprocess.run([*command, LIVE / "engine.c", "-lm"], check=True)
    return built


class Wasm:
    def __init__(self, folder: Path):
        engine, compiled = module()
        self.store = wasmtime.Store(engine)
        self.exports = wasmtime.Instance(self.store, compiled, []).exports(self.store)
        self.memory = self.exports["memory"]

    def call(self, name: str, *arguments: float) -> Any:
        return self.exports[name](self.store, *arguments)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.memory.read(self.store, at, at + size))

    def write(self, at: int, data: bytes) -> None:
        self.memory.write(self.store, data, at)


class Native:
    """A library of its own for each, because a library holds one opened model."""

    def __init__(self, folder: Path):
        own = Path(shutil.copy(library(), folder / f"engine{len(list(folder.glob('*.so')))}.so"))
        self.library = ctypes.CDLL(str(own))

    def call(self, name: str, *arguments: float) -> Any:
        function = getattr(self.library, name)
        pointer = name in POINTERS or name.startswith("get_")
        function.restype = ctypes.c_void_p if pointer else ctypes.c_int
        if name in FLOATS:
            function.restype = ctypes.c_float
        if name == "get_rounds":
            function.restype = ctypes.c_int
        kinds = ARGUMENTS.get(name, "i" * len(arguments))
        return function(*(TYPES[kind](value) for kind, value in zip(kinds, arguments)))

    def read(self, at: int, size: int) -> bytes:
        return ctypes.string_at(at, size)

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(at, data, len(data))


class Engine:
    """A model opened in a host."""

    def __init__(self, host, model=None, data: bytes | None = None):
        self.host = host
        data = weights_file(model) if data is None else data
        self.vocabulary = model.config.vocabulary if model else 0
        host.write(host.call("room", len(data)), data)
        self.refused = host.call("open_model", len(data))

    def call(self, name: str, *arguments: float) -> Any:
        return self.host.call(name, *arguments)

    def floats(self, name: str, *shape: int, arguments: tuple = ()) -> np.ndarray:
        """What the engine's function `name` points at."""
        data = self.host.read(self.call(name, *arguments), 4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)

    def integers(self, name: str, n: int) -> list[int]:
        return np.frombuffer(self.host.read(self.call(name), 4 * n), np.int32).tolist()

    def put(self, name: str, values: Any, kind: Any = np.float32) -> None:
        values = np.ascontiguousarray(np.asarray(values).astype(kind))
        self.host.write(self.call(name), values.tobytes())

    def logits(self) -> np.ndarray:
        return self.floats("get_logits", self.vocabulary)

    def start(self, ids: list[int]) -> None:
        self.put("get_ids", ids, np.int32)
        self.call("restart", len(ids))

    def write(self, ids: list[int], n: int, temperature: float = 0.0, noise=None) -> list[int]:
        """n characters after ids; `noise()` gives the exponential numbers of a draw."""
        self.start(ids)
        written = []
        for _ in range(n):
            if noise:
                self.put("get_noise", noise())
            written.append(self.call("choose", temperature))
            self.call("push", written[-1])
        return written
