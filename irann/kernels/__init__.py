"""The selective scan of `irann.core.scan`, fast. Nobody has to read this to learn.

    chunked.py   plain PyTorch, time outermost; with trees, for GPUs without Triton
    native.py    scan.c, built on this machine, for CPUs
    triton.py    for CUDA GPUs

Each is an operator of torch (operator.py): torch.compile, torch.export and torch.func.grad see one
call. vmap runs it row by row, and forward mode (jvp) it does not have: method="sequential" does.
The environment variable IRANN_KERNEL=0 switches the C kernel off.
"""

import functools
import importlib.util
import os

import torch

from . import chunked, native

HAS_TRITON = importlib.util.find_spec("triton") is not None


def scan(method, u, delta, A, B, C, state):
    """y without D u, and the last state, by a method other than sequential.

    The inputs are those of `selective_scan`, which has checked them; nothing may be empty. Raises
    ValueError for a method that is not to be had here.
    """
    n = A.shape[1]
    if method == "auto":
        method = fastest(u.device.type, n, u.dtype)
    elif reason := why_not(method, u.device.type, n, u.dtype):
        raise ValueError(f"method {method!r} is not to be had: {reason}")
    if method == "native":
        return native.scan(u, delta, A, B, C, state)
    if method == "triton":
        from . import triton

        return triton.scan(u, delta, A, B, C, state)
    lanes = state.numel()
    if method == "chunked":
        return chunked.scan(u, delta, A, B, C, state, span=chunked.span(lanes, chunked.ON_CPU))
    span = u.shape[1] if method == "parallel" else chunked.span(lanes, chunked.ELSEWHERE)
    return chunked.scan(u, delta, A, B, C, state, span=span, trees=True)


def fastest(device: str, n: int, dtype: torch.dtype) -> str:
    """-> native, chunked, triton or trees: the fastest method for a type of device."""
    if device == "cpu":
        return "chunked" if why_not("native", device, n, dtype) else "native"
    return "trees" if why_not("triton", device, n, dtype) else "triton"


def why_not(method: str, device: str, n: int, dtype: torch.dtype) -> str:
    """-> the reason that a method is not to be had, in words; empty if it is."""
    if method == "native":
        return "it wants a CPU" if device != "cpu" else native.why_not(n, dtype)
    if method == "triton":
        if not HAS_TRITON:
            return "Triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        if device != "cuda":
            return f"it wants a CUDA GPU, or the interpreter (TRITON_INTERPRET=1); got {device}"
        return _no_driver()
    return ""


@functools.cache
def _no_driver() -> str:
    """-> why Triton can launch nothing on this machine's GPU, in words; empty if it can.

    To launch, it builds a piece of C: without a C compiler or Python's headers it has no driver.
    """
    from triton.runtime import driver

    try:
        driver.active  # noqa: B018 (it is made when asked for)
    except Exception as error:
        return f"Triton has no driver ({' '.join(str(error).split())})"
    return ""


for _constant in (fastest, why_not):
    # torch.compile asks once and takes the answer. torch.compiler.assume_constant_result would set
    # this mark too, but it imports the whole compiler: importing irann would take twice as long.
    _constant._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def describe(n: int = 16, dtype: torch.dtype = torch.float32) -> str:
    """-> the method that `auto` takes on the CPU and on the GPU here, and why no faster one."""
    reason = why_not("native", "cpu", n, dtype)
    note = f"no C kernel: {reason}" if reason else native.kernel(n, dtype)[1]
    lines = [f"cpu: {fastest('cpu', n, dtype)} ({note})"]
    if torch.cuda.is_available():
        reason = why_not("triton", "cuda", n, dtype)
        note = f" (no Triton kernel: {reason})" if reason else ""
        lines.append(f"cuda: {fastest('cuda', n, dtype)}{note}")
    return "\n".join(lines)
