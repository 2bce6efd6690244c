"""The selective scan: a memory of fixed size that each character decides how to rewrite.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t        y_t = C_t . h_t + D u_t

Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3 and algorithm 2. `delta`, `B` and `C` come from the text
itself, which is why no fixed convolution can stand in for the recurrence, and why it needs a scan.

The same numbers come in six ways, `method`:

| method     | how                                                    | depth in t | when it is the right one                     |
|------------|--------------------------------------------------------|------------|----------------------------------------------|
| sequential | the loop as written, differentiated by autograd         | t          | to read, and to hold the others against      |
| parallel   | a tree over the associative operator, in place          | 2 log2 t   | many processors and little else to do        |
| chunked    | time outermost, all else in one row, chunk after chunk  | t          | a CPU without a compiler                     |
| kernel     | the loop in C (scan.c), the state in registers          | t          | a CPU with a compiler                        |
| triton     | the same loop in Triton (scan_triton.py)                | t          | a CUDA GPU                                   |
| auto       | kernel or chunked on a CPU, triton or trees on a GPU    |            | always                                       |

A tree does twice the additions of the loop and streams (b t e n) numbers through memory at each of its levels. On a CPU
the loop therefore wins at every length: b, e and n alone keep the arithmetic busy. The same holds inside one kernel of a GPU;
launched one by one, though, single places are too little work, so without Triton a tree runs inside chunks that bound its
memory. All but `sequential` share one hand-derived backward that keeps the inputs and one state per chunk, and computes
the (b t e n) states anew.
"""

import ctypes
import functools
import hashlib
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from einops import einsum
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

METHODS = ("auto", "sequential", "parallel", "chunked", "kernel", "triton")
LOG2E = 1 / math.log(2)  # exp(x) = exp2(x log2 e), and exp2 is the cheaper one
ON_CPU, ELSEWHERE = 1 << 19, 1 << 24  # numbers in one (t b n e) buffer of a chunk: about a cache; about 64 MB


def discretise(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(b t e), (b t e), (e n), (b t n) -> (b t e n), (b t e n): what each place keeps of the state, and what it adds.

    The paper holds the input constant over a step (zero-order hold, eq. 4): keep exp(delta A), add
    (exp(delta A) - 1) / A B u. The published code, and we with it, keep that for A and take the Euler step delta B u
    for what is added; the two agree to first order in delta. Raises ValueError when the shapes do not belong together.
    """
    _check(u, delta, A, B)
    keep = torch.exp(einsum(delta, A, "b t e, e n -> b t e n"))
    add = einsum(delta * u, B, "b t e, b t n -> b t e n")
    return keep, add


def step(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """(b e), (b e), (e n), (b n), (b n), (e), (b e n) -> (b e), (b e n): one place of the recurrence, for writing.

    Source: the two equations at the top of this file. Raises ValueError when the shapes do not belong together.
    """
    _check_step(u, delta, A, B, C, D, state)
    state = torch.addcmul(torch.exp(delta.unsqueeze(2) * A) * state, (delta * u).unsqueeze(2), B.unsqueeze(1))
    y = torch.bmm(state, C.unsqueeze(2)).squeeze(2)
    return (y if D is None else torch.addcmul(y, D, u)), state


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, state: Tensor | None = None, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(b t e), (b t e), (e n), (b t n), (b t n), (e), (b e n) -> (b t e), (b e n): the outputs, and the state after the last place.

    A scan of one half, and of the other from the state it left, is the scan of the whole. Everything is differentiable,
    the state too, once. The method table is at the top of this file. Raises ValueError when the shapes do not belong
    together or a method is not to be had.
    """
    _check(u, delta, A, B, C, D, state, method)
    kind = functools.reduce(torch.promote_types, (v.dtype for v in (u, delta, A, B, C, D) if v is not None))
    exact = torch.float32 if kind.itemsize < 4 else kind  # half precision loses the state within a hundred places
    u, delta, A, B, C = (v.to(exact) for v in (u, delta, A, B, C))
    state = u.new_zeros(len(u), *A.shape) if state is None else state.to(exact)
    if method == "auto":
        if u.device.type == "cpu":
            method = "kernel" if _kernel(A.shape[1], exact) else "chunked"
        else:
            method = "triton" if u.device.type == "cuda" and _triton() else "trees"
    if u.numel() == 0 or B.numel() == 0:
        method = "sequential"
    if method == "sequential":
        y, state = _sequential(u, delta, A, B, C, state)
    elif method == "kernel":
        y, state = _Kernel.apply(u, delta, A, B, C, state)
    elif method == "triton":
        y, state = _Triton.apply(u, delta, A, B, C, state)
    else:
        loop = method == "chunked"
        span = u.shape[1] if method == "parallel" else _span(u.shape[1], len(u) * A.numel(), ON_CPU if loop else ELSEWHERE)
        y, state = _Chunks.apply(u, delta, A, B, C, state, span, _loop if loop else _tree)
    return (y if D is None else torch.addcmul(y, D.to(exact), u)).to(kind), state


def _sequential(u, delta, A, B, C, state):
    keep, add = discretise(u, delta, A, B)
    outputs = []
    for kept, added, c in zip(keep.unbind(1), add.unbind(1), C.unbind(1), strict=True):  # indexing would make backward quadratic in t
        state = kept * state + added
        outputs.append(einsum(state, c, "b e n, b n -> b e"))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(u)), state


# Two ways to turn x into h_t = a_t h_{t-1} + x_t along the first axis, in place; h before the first place is in x_0 already.


def _loop(a: Tensor, x: Tensor) -> None:
    """One fused multiply and add per place."""
    places = x.unbind()
    for before, now, kept in zip(places[:-1], places[1:], a.unbind()[1:], strict=True):
        torch.addcmul(now, kept, before, out=now)


def _tree(a: Tensor, x: Tensor) -> None:
    """The work-efficient tree (Blelloch 1990): places in pairs, pairs in fours, ..., then down again to those left out.

    A place is the map h -> a h + x, and maps compose: (a1, x1) then (a2, x2) is (a1 a2, a2 x1 + x2). Composition is
    associative, so any bracketing will do. Only products of a enter, never quotients or logarithms: nothing overflows.
    """
    a, t, stride = a.clone(), len(a), 1
    while stride < t:  # up: a place at the end of a pair takes in its left neighbour
        left, right = slice(stride - 1, t - stride, 2 * stride), slice(2 * stride - 1, t, 2 * stride)
        x[right].addcmul_(a[right], x[left])
        a[right] *= a[left]
        stride *= 2
    while stride > 1:  # down: whoever ends between two finished places takes in the finished one on its left
        stride //= 2
        left, right = slice(2 * stride - 1, t - stride, 2 * stride), slice(3 * stride - 1, t, 2 * stride)
        x[right].addcmul_(a[right], x[left])


def _span(t: int, lanes: int, numbers: int) -> int:
    """How many places make a chunk whose buffers hold about so many numbers: a power of two from 8 up, or all of t."""
    return max(1, min(t, 1 << max(3, round(math.log2(max(1, numbers / max(1, lanes)))))))


class _Chunks(torch.autograd.Function):
    """Chunk after chunk of `span` places, each by `scan`; time outermost and e innermost, so that every row is long.

    Backward, with g_t the gradient of h_t and dy_t of y_t, runs the same scan from the right:

        g_t = C_t dy_t + a_{t+1} g_{t+1},    dC_t = h_t dy_t,    d(delta u B)_t = g_t,    d(delta A)_t = a_t g_t h_{t-1}

    Kept for it: the inputs and the state at the entry of each chunk.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, span, scan):
        u, delta, B, C = (v.transpose(0, 1).contiguous() for v in (u, delta, B, C))
        (t, b, e), n = u.shape, A.shape[1]
        A2, x, y = (A.T * LOG2E).contiguous(), delta * u, torch.empty_like(u)
        a, h = u.new_empty(span, b, n, e), u.new_empty(span + 1, b, n, e)
        h[0] = state.mT
        entry = u.new_empty(-(-t // span), b, n, e)
        for k, now in enumerate(_chunks(t, span)):
            entry[k] = h[0]
            s = len(u[now])
            _states(delta[now], x[now], A2, B[now], a[:s], h[: s + 1], scan)
            torch.bmm(C[now].view(-1, 1, n), h[1 : s + 1].view(-1, n, e), out=y[now].view(-1, 1, e))
            h[0] = h[s]
        ctx.save_for_backward(u, delta, A, B, C, entry)
        ctx.span, ctx.scan = span, scan
        return y.transpose(0, 1), h[0].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, delta, A, B, C, entry = ctx.saved_tensors
        dy = dy.transpose(0, 1).contiguous()
        (t, b, e), n = u.shape, A.shape[1]
        A, x = A.T.contiguous(), delta * u
        A2, dx, ddelta = A * LOG2E, torch.empty_like(u), torch.empty_like(u)
        dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        a, g, h = u.new_empty(ctx.span, b, n, e), u.new_empty(ctx.span, b, n, e), u.new_empty(ctx.span + 1, b, n, e)
        carry = dstate.mT.contiguous()  # a_{t+1} g_{t+1} from the chunk on the right
        row, rows = (lambda v: v.view(-1, 1, v.shape[-1])), (lambda v: v.view(-1, n, e))
        for k, now in reversed(list(enumerate(_chunks(t, ctx.span)))):
            s = len(u[now])
            at, gt, ht = a[:s], g[:s], h[: s + 1]
            ht[0] = entry[k]
            _states(delta[now], x[now], A2, B[now], at, ht, ctx.scan)
            torch.mul(C[now][..., None], dy[now][:, :, None], out=gt)
            gt[-1] += carry
            _from_the_right(at, gt, ctx.scan)
            torch.bmm(row(dy[now]), rows(ht[1:]).mT, out=row(dC[now]))
            torch.bmm(row(x[now]), rows(gt).mT, out=row(dB[now]))
            torch.bmm(row(B[now]), rows(gt), out=row(dx[now]))
            at *= gt
            carry.copy_(at[0])
            at *= ht[:-1]  # the gradient of delta A
            torch.sum(torch.mul(at, A, out=gt), 2, out=ddelta[now])
            dA += at.mul_(delta[now][:, :, None]).sum((0, 1))
        ddelta.addcmul_(dx, u)
        du = dx.mul_(delta)
        return du.transpose(0, 1), ddelta.transpose(0, 1), dA.T, dB.transpose(0, 1), dC.transpose(0, 1), carry.mT, None, None


def _chunks(t, span):
    return [slice(start, min(start + span, t)) for start in range(0, t, span)]


def _states(delta, x, A2, B, a, h, scan):
    """(t b e), (t b e), (n e), (t b n): fill a (t b n e) with what is kept, and h[1:] from h[0] with the states."""
    torch.mul(delta[:, :, None], A2, out=a).exp2_()
    torch.mul(B[..., None], x[:, :, None], out=h[1:])
    h[1].addcmul_(a[0], h[0])
    scan(a, h[1:])


def _from_the_right(a, g, scan):
    """g_t += a_{t+1} g_{t+1}, in place, from the last place to the first."""
    if scan is _loop:
        places, kept = g.unbind(), a.unbind()
        for i in range(len(g) - 2, -1, -1):
            torch.addcmul(places[i], kept[i + 1], places[i + 1], out=places[i])
    else:
        turned = g.flip(0)
        scan(a.roll(-1, 0).flip(0), turned)  # the first factor is never read
        g.copy_(turned.flip(0))


# ---------------------------------------------------------------------------------------------- the kernel: scan.c


class _Kernel(torch.autograd.Function):
    """scan.c, shared out over texts and, where there are fewer texts than threads, over runs of channels."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state):
        library = _kernel(A.shape[1], u.dtype)
        (b, t, e), n = u.shape, A.shape[1]
        lanes, span = library.lanes(), library.span()
        u, delta, A2, first = (pad(v, (0, -e % lanes)).contiguous() for v in (u, delta, A.T * LOG2E, state.mT))  # zeros change nothing
        B, C = B.contiguous(), C.contiguous()
        y, entry = torch.empty_like(u), u.new_empty(b, -(-t // span) + 1, n, u.shape[2])
        entry[:, 0] = first
        _call(library.forward, (u, delta, A2, B, C, y, entry), u.shape, lanes)
        ctx.save_for_backward(u, delta, A2, B, C, entry)
        ctx.e, ctx.library = e, library
        return y[..., :e], entry[:, -1, :, :e].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, delta, A2, B, C, entry = ctx.saved_tensors
        (b, t, width), n, e = u.shape, len(A2), ctx.e
        library = ctx.library
        parts = _parts(b, width, library.lanes())[0]
        dy, carry = (pad(v, (0, width - e)).clone(memory_format=torch.contiguous_format) for v in (dy, dstate.mT))
        du, ddelta, dA = torch.empty_like(u), torch.empty_like(u), u.new_zeros(b, n, width)
        dB, dC = u.new_empty(b, parts, t, n), u.new_empty(b, parts, t, n)
        _call(library.backward, (dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC), u.shape, library.lanes())
        return du[..., :e], ddelta[..., :e], dA.sum(0).T[:e], dB.sum(1), dC.sum(1), carry[..., :e].mT


def _parts(b, width, lanes):
    """-> how many runs of channels each text is cut into, so that every thread has work, and how wide a run is."""
    wide = -(-width // (lanes * -(-torch.get_num_threads() // b))) * lanes
    return -(-width // wide), wide


def _call(function, tensors, shape, lanes):
    numbers = (*shape, *_parts(shape[0], shape[2], lanes), torch.get_num_threads())
    function(*(ctypes.c_void_p(v.data_ptr()) for v in tensors), *map(ctypes.c_long, numbers))


def _kernel(n: int, dtype: torch.dtype):
    """-> scan.c built for n states of a dtype, or None: switched off (IRANN_KERNEL=0), no compiler, n beyond 64."""
    if os.environ.get("IRANN_KERNEL") == "0" or not 1 <= n <= 64 or dtype not in (torch.float32, torch.float64):
        return None
    return _build(n, dtype, os.environ.get("CC", "cc"))


@functools.cache
def _build(n, dtype, compiler):
    """Built once per machine: the name in the cache is a hash of the source, the options and all that the compiler targets."""
    real = ["-DREAL=double", "-DWIDE=1"] if dtype == torch.float64 else ["-DREAL=float", "-DWIDE=0"]
    options = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", f"-DN={n}", *real]
    try:
        source = Path(__file__).with_suffix(".c").read_bytes()
        target = _run(compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)
        cache = Path(os.environ.get("IRANN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irann")
        for openmp in Path(torch.__file__).parent.glob("lib/lib*omp*"):  # torch's own threads, for all to see
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError, RuntimeError):  # no compiler, no home folder
        return None
    for threads in (["-fopenmp"], []):
        name = hashlib.sha256(b"\0".join([source, target, *map(str.encode, options + threads)])).hexdigest()[:20]
        built = cache / f"scan-{name}.so"
        try:
            if not _whole(built):
                cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=cache) as folder:
                    made = os.path.join(folder, "scan")
                    _run(compiler, *options, *threads, "-fPIC", "-c", "-o", made + ".o", "-x", "c", "-", input=source)
                    _run(compiler, "-shared", made + ".o", "-o", made)  # not linked to OpenMP: it is in the process already
                    Path(made + ".sha256").write_text(hashlib.sha256(Path(made).read_bytes()).hexdigest())
                    os.replace(made, built)
                    os.replace(made + ".sha256", built.with_suffix(".sha256"))
            library = ctypes.CDLL(str(built))
            library.lanes.restype = library.span.restype = ctypes.c_long
            return library
        except (OSError, subprocess.SubprocessError):  # no OpenMP, or no place to write
            continue
    return None


def _whole(built: Path) -> bool:
    """Is it there, and as it was built? To load a library that was cut off would end the process."""
    try:
        return hashlib.sha256(built.read_bytes()).hexdigest().encode() == built.with_suffix(".sha256").read_bytes()
    except OSError:
        return False


def _run(*command, input=None):
    return subprocess.run(command, input=input, check=True, capture_output=True, timeout=60).stdout


# ---------------------------------------------------------------------------------- the kernel for GPUs: scan_triton.py


class _Triton(torch.autograd.Function):
    """scan_triton.py, one program for each text and each run of channels."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state):
        kernels = _triton()
        u, delta, A2, B, C = (v.contiguous() for v in (u, delta, A.T * LOG2E, B, C))
        (b, t, e), n = u.shape, len(A2)
        y, entry = torch.empty_like(u), u.new_empty(b, -(-t // kernels.SPAN) + 1, n, e)
        entry[:, 0] = state.mT
        kernels.forward(u, delta, A2, B, C, y, entry)
        ctx.save_for_backward(u, delta, A2, B, C, entry)
        return y, entry[:, -1].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, delta, A2, B, C, entry = ctx.saved_tensors
        (b, t, e), n, kernels = u.shape, len(A2), _triton()
        dy, carry = dy.contiguous(), dstate.mT.clone(memory_format=torch.contiguous_format)
        du, ddelta, dA = torch.empty_like(u), torch.empty_like(u), u.new_empty(b, n, e)
        dB, dC = u.new_empty(b, kernels.parts(e), t, n), u.new_empty(b, kernels.parts(e), t, n)
        kernels.backward(dy, u, delta, A2, B, C, entry, carry, du, ddelta, dA, dB, dC)
        return du, ddelta, dA.sum(0).T, dB.sum(1), dC.sum(1), carry.mT


@functools.cache
def _triton():
    """-> scan_triton, or None where there is no Triton."""
    try:
        from . import scan_triton
    except ImportError:
        return None
    return scan_triton


def _check_step(u, delta, A, B, C, D, state):
    fits = u.ndim == A.ndim == 2 and state is not None
    if fits:
        (b, e), n = u.shape, A.shape[1]
        fits = delta.shape == (b, e) and A.shape == (e, n) and B.shape == C.shape == (b, n) and state.shape == (b, e, n)
    if not fits or (D is not None and D.shape != (e,)):
        given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "state": state}
        got = ", ".join(f"{name} {v if v is None else tuple(v.shape)}" for name, v in given.items())
        raise ValueError(f"a step wants u, delta (b e), A (e n), B, C (b n), D (e) or None and a state (b e n); got {got}")


def _check(u, delta, A, B, C=None, D=None, state=None, method="auto"):
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}")
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "state": state}
    got = ", ".join(f"{name} {tuple(v.shape)}" for name, v in given.items() if v is not None)
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"the scan wants u (b t e) and A (e n); got {got}")
    (b, t, e), n = u.shape, A.shape[1]
    wanted = {"delta": (b, t, e), "A": (e, n), "B": (b, t, n), "C": (b, t, n), "D": (e,), "state": (b, e, n)}
    for name, shape in wanted.items():
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"{name} should be {shape} beside u {tuple(u.shape)} and A {tuple(A.shape)}; got {got}")
    for name, v in given.items():
        if v is not None and not v.is_floating_point():
            raise ValueError(f"{name} should hold real numbers; got {v.dtype}")
        if v is not None and v.device != u.device:
            raise ValueError(f"{name} is on {v.device} and u on {u.device}; the scan wants one device")
    if method == "kernel" and (u.device.type != "cpu" or not _kernel(n, torch.float64 if u.dtype == torch.float64 else torch.float32)):
        raise ValueError(f"the kernel wants a CPU, a C compiler, IRANN_KERNEL other than 0 and n from 1 to 64; got {u.device}, n {n}")
    if method == "triton" and not (_triton() and (u.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(f"this method wants a CUDA GPU and Triton (or its interpreter, TRITON_INTERPRET=1); got {u.device}")
