"""The selective scan of `irann.core.scan`, fast. Nobody has to read this to learn.

    chunked.py   plain PyTorch, time outermost; with trees, for GPUs without Triton native.py
    scan.c, built on this machine, for CPUs triton.py    for CUDA GPUs

Each is an operator of torch (operator.py): torch.compile, torch.export and torch.func see one call.
The environment variable IRANN_KERNEL=0 switches the C kernel off.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from . import chunked, native


def scan(
    method: str,
    u: Float[Tensor, "b t e"],
    delta: Float[Tensor, "b t e"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    state: Float[Tensor, "b e n"],
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e n"]]:
    """y without D u, and the last state, by a method of `irann.core.scan` other than sequential;
    nothing empty.

    Raises ValueError for a method that is not to be had here.
    """
    n = A.shape[1]
    if method == "auto":
        method = fastest(u.device.type, n, u.dtype)
    elif reason := why_not(method, u.device.type, n, u.dtype):
        raise ValueError(f"method {method!r} is not to be had: {reason}")
    if method == "native":
        return native.scan(u, delta, A, B, C, state)
    if method == "triton":
        return _triton().scan(u, delta, A, B, C, state)
    lanes = state.numel()
    if method == "chunked":
        return chunked.scan(u, delta, A, B, C, state, span=chunked.span(lanes, chunked.ON_CPU))
    span = u.shape[1] if method == "parallel" else chunked.span(lanes, chunked.ELSEWHERE)
    return chunked.scan(u, delta, A, B, C, state, span=span, trees=True)


@torch.compiler.assume_constant_result
def fastest(device: str, n: int, dtype: torch.dtype) -> str:
    """-> "native", "chunked", "triton" or "trees": the fastest method for a type of device and n
    states."""
    if device == "cpu":
        return "chunked" if why_not("native", device, n, dtype) else "native"
    return "trees" if why_not("triton", device, n, dtype) else "triton"


@torch.compiler.assume_constant_result
def why_not(method: str, device: str, n: int, dtype: torch.dtype) -> str:
    """-> the reason that a method is not to be had, in words; empty if it is."""
    if method == "native":
        return "it wants a CPU" if device != "cpu" else native.why_not(n, dtype)
    if method == "triton":
        if _triton() is None:
            return "Triton is not installed"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"it wants a CUDA GPU, or Triton's interpreter (TRITON_INTERPRET=1); got {device}"
            )
    return ""


@functools.cache
def _triton() -> ModuleType | None:
    """-> triton.py, imported at its first use, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton as kernel

    return kernel


def describe(n: int = 16, dtype: torch.dtype = torch.float32) -> str:
    """-> which kernel a scan takes on the CPU and on the GPU of this machine, and why no faster
    one."""
    lines = []
    for device, best in (("cpu", "native"), ("cuda", "triton")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        reason = why_not(best, device, n, dtype)
        note = (
            f"no {best} kernel: {reason}"
            if reason
            else native.built(n, dtype)
            if best == "native"
            else ""
        )
        lines.append(f"{device}: {fastest(device, n, dtype)}" + (f" ({note})" if note else ""))
    return "\n".join(lines)
