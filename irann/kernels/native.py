"""The selective scan in C (scan.c), with the state in registers: for a CPU with a compiler, but not
on Windows.

Built once per machine at the first scan, and kept in the cache (IRANN_CACHE, else
XDG_CACHE_HOME/irann, else ~/.cache/irann). The compiler is CC, which may carry arguments ("gcc
-m64", "ccache gcc"), else cc. Torch's OpenMP threads share the texts, and the channels of a text
where there are more threads than texts.
"""

import ctypes
import functools
import hashlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import pad

from .. import machine
from .operator import LOG2E, operator

SOURCE = Path(__file__).with_name("scan.c")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
REALS = {torch.float32: ("-DREAL=float", "-DWIDE=0"), torch.float64: ("-DREAL=double", "-DWIDE=1")}
BYTES = 64  # e is padded to the widest vector there is
SPAN = 32  # positions between two kept states


def scan(u, delta, A, B, C, state):
    """y without D u, and the last state."""
    e = u.shape[2]
    missing = -e % (BYTES // u.element_size())
    if missing:  # zeros change nothing
        u, delta = (pad(x, (0, missing)) for x in (u, delta))
        A, state = (pad(x, (0, 0, 0, missing)) for x in (A, state))
    inputs = (x.contiguous() for x in (u, delta, A, B, C, state))
    y, last, _ = SCAN(*inputs)
    if missing:
        y, last = y[..., :e], last[:, :e]
    return y, last


def _spans(u):
    return -(-u.shape[1] // SPAN)


def _forward(u, delta, A, B, C, state):
    b, e, n = state.shape
    y = u.new_empty(u.shape)
    last = u.new_empty(b, n, e)
    entry = u.new_empty(b * _spans(u) * n * e)
    _call("forward", u, n, (u, delta, A.T * LOG2E, B, C, state.mT), (y, last, entry))
    return y, last.mT.contiguous(), entry


def _backward(dy, dlast, u, delta, A, B, C, entry):
    b, t, e = u.shape
    n = A.shape[1]
    parts, _ = _parts(u)
    du = u.new_empty(u.shape)
    ddelta = u.new_empty(u.shape)
    dA = u.new_zeros(b, n, e)
    dB = u.new_empty(b, parts, t, n)
    dC = u.new_empty(b, parts, t, n)
    carry = dlast.mT.clone(memory_format=torch.contiguous_format)
    inputs = dy, u, delta, A.T * LOG2E, B, C, entry
    _call("backward", u, n, inputs, (carry, du, ddelta, dA, dB, dC))
    return du, ddelta, dA.sum(0).T.contiguous(), dB.sum(1), dC.sum(1), carry.mT.contiguous()


def _parts(u):
    """-> in how many parts, and how wide, a text's channels are cut: work for every thread."""
    b, _, e = u.shape
    lanes = BYTES // u.element_size()
    shares = math.ceil(torch.get_num_threads() / b)
    wide = math.ceil(e / (lanes * shares)) * lanes
    return math.ceil(e / wide), wide


def _call(name, u, n, inputs, outputs):
    library, _ = kernel(n, u.dtype)
    function = getattr(library, name)
    inputs = [x.contiguous() for x in inputs]
    sizes = (*u.shape, *_parts(u), torch.get_num_threads())
    function(*(x.data_ptr() for x in (*inputs, *outputs)), *sizes)


def switched_off() -> str:
    """-> why no kernel is wanted here, in words; empty if one is."""
    if os.environ.get("IRANN_KERNEL") == "0":
        return "IRANN_KERNEL is 0"
    if sys.platform == "win32":  # whose stack is aligned to 16 bytes: the process would end
        return "GCC on Windows misplaces its vectors (GCC's bug 54412)"
    return ""


def why_not(n: int, dtype: torch.dtype) -> str:
    """-> why there is no kernel for n states of a dtype, in words; empty if there is one."""
    if reason := switched_off():
        return reason
    if not 1 <= n <= 64:
        return f"it is for 1 to 64 states; got {n}"
    if dtype not in REALS:
        return f"it is for float32 and float64; got {dtype}"
    library, note = kernel(n, dtype)
    return "" if library else note


def kernel(n: int, dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    """-> scan.c for n states of a dtype, loaded, and how it was built; or None, and the reason."""
    return _build(n, dtype, os.environ.get("CC"))


@functools.cache
def _build(n, dtype, cc):
    """The name of what is built is a hash of the source, all options and all that cc targets."""
    try:
        compiler = shlex.split(cc or "") or ["cc"]
        source = SOURCE.read_bytes()
        target = _run(*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)
        cache = machine.cache()
        for openmp in Path(torch.__file__).parent.glob("lib/lib*omp*"):
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)  # torch's own threads, for scan.c
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"no C compiler ({error})"
    reason = ""
    for threads in ("-fopenmp",), ():
        options = (*OPTIONS, f"-DN={n}", f"-DSPAN={SPAN}", *REALS[dtype], *threads)
        key = b"\0".join([source, target, *map(str.encode, (*compiler, *options))])
        path = cache / f"scan-{hashlib.sha256(key).hexdigest()[:20]}.so"
        try:
            if not _intact(path):
                _compile(compiler, options, source, path)
            library = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:  # no OpenMP, or no place to write
            reason = f"scan.c could not be built ({error})"
            continue
        library.forward.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_long] * 6
        library.backward.argtypes = [ctypes.c_void_p] * 13 + [ctypes.c_long] * 6
        with_threads = "with OpenMP" if threads else "without OpenMP"
        return library, f"built by {shlex.join(compiler)} {with_threads}, {path}"
    return None, reason


def _compile(compiler, options, source, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "scan"
        listing = made.with_suffix(".sha256")
        _run(*compiler, *options, "-fPIC", "-c", "-o", f"{made}.o", "-x", "c", "-", input=source)
        _run(*compiler, "-shared", f"{made}.o", "-o", str(made))  # OpenMP is in the process already
        listing.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.chmod(0o755)  # whatever the umask: see _intact
        os.replace(made, path)
        os.replace(listing, path.with_suffix(".sha256"))


def _intact(path):
    """Is it there, as it was built, by us? To load one that was cut off would end the process."""
    try:
        if os.name == "posix" and (
            path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022
        ):
            return False  # in a shared cache: whoever else may write it may run as us
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest == path.with_suffix(".sha256").read_text()
    except (OSError, ValueError):
        return False


def _run(*command, input=None):
    return subprocess.run(command, input=input, check=True, capture_output=True, timeout=60).stdout


SCAN = operator("native", _forward, _backward, _spans, devices=("CPU",))
