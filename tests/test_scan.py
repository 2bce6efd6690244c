"""irann.core.scan and every method of irann.kernels, against closed forms, against mambapy and
transformers, and against a loop written here once more."""

import functools
import shutil
from inspect import unwrap

import pytest
import torch
from helpers import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from mambapy.mamba import MambaBlock
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from irann import kernels
from irann.core.scan import discretise, selective_scan, step, tree

METHODS = ["sequential", "parallel", "chunked", "trees"]
METHODS += ["native"] if shutil.which("cc") else []
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 8 positions, so that small texts have several."""
    monkeypatch.setattr(kernels.chunked, "ON_CPU", 1)
    monkeypatch.setattr(kernels.chunked, "ELSEWHERE", 1)


def scan(u, delta, A, B, C, D=None, state=None, *, method):
    """selective_scan; and trees in chunks, which `auto` takes on a GPU without Triton."""
    if method != "trees":
        return selective_scan(u, delta, A, B, C, D, state=state, method=method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fastest", lambda *_: "trees")
        return selective_scan(u, delta, A, B, C, D, state=state)


def draw(b, t, e, n, *, decay=1.0, seed=0, dtype=torch.float64):
    """-> u, delta, A, B, C, D and a state; delta |A| is about `decay`."""
    generator = rng(seed)
    shapes = (b, t, e), (b, t, e), (e, n), (b, t, n), (b, t, n), (e,), (b, e, n)
    u, delta, A, *others = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    values = u, decay * (0.5 + delta.sigmoid()), -0.5 - A.sigmoid(), *others
    return [v.to(dtype).requires_grad_() for v in values]


def by_the_book(u, delta, A, B, C, D, state):
    """The two equations, element by element, with nothing of torch but its arithmetic."""
    h, y = state.clone(), torch.empty_like(u)
    for b, t, e in torch.cartesian_prod(*map(torch.arange, u.shape)).tolist():
        h[b, e] = (delta[b, t, e] * A[e]).exp() * h[b, e] + delta[b, t, e] * B[b, t] * u[b, t, e]
        y[b, t, e] = (C[b, t] * h[b, e]).sum() + D[e] * u[b, t, e]
    return y, h


def everything(inputs, method):
    """-> y, the last state, and the gradients of all inputs."""
    y, h = scan(*inputs, method=method)
    return y, h, *torch.autograd.grad(y.sin().sum() + h.cos().sum(), inputs)


def close(ours, oracle, relative=1e-10):
    for mine, theirs in zip(ours, oracle, strict=True):
        mine, theirs = mine.detach(), theirs.detach()
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.isfinite(mine).all()
        limit = relative * max(1, float(theirs.abs().max()))
        assert float((mine - theirs).abs().max()) <= limit


@methods
def test_three_positions_by_hand(method):
    half, one = torch.tensor(0.5).double().log(), torch.ones(1, 3, 1).double()
    u, D = torch.tensor([8.0, 0, 1]).double().reshape(1, 3, 1), torch.ones(1).double()
    y, state = scan(u, one, half.reshape(1, 1), one, 10 * one, D, method=method)
    assert y.flatten().tolist() == pytest.approx([88, 40, 31])  # h = 8, 4, 3; y = 10 h + u
    assert state.flatten().tolist() == pytest.approx([3])


SHAPES = [(2, 1, 3, 2), (1, 2, 1, 1), (2, 3, 5, 3), (1, 4, 17, 1), (3, 5, 2, 16), (1, 33, 9, 4)]


@methods
@pytest.mark.parametrize("b, t, e, n", SHAPES)
def test_equals_the_book(b, t, e, n, method):
    inputs = [v.detach() for v in draw(b, t, e, n)]
    close(scan(*inputs, method=method), by_the_book(*inputs), 1e-12)


@methods
def test_constant_input_is_a_geometric_sum(method):
    """With all held constant, h_t = delta B u (1 - a^t) / (1 - a): Euler's step for B, not ZOH."""
    t, delta, a = 50, 0.3, torch.tensor([0.9, 0.2]).double()
    ones = torch.ones(1, t, 1).double()
    B = torch.tensor([2.0, -1.0]).double().expand(1, t, 2)
    A = (a.log() / delta)[None]
    y, state = scan(5 * ones, delta * ones, A, B, torch.ones_like(B), method=method)
    h = 5 * delta * B[0] * (1 - a ** torch.arange(1, t + 1).double()[:, None]) / (1 - a)
    close([y[0, :, 0], state[0, 0]], [h.sum(1), h[-1]], 1e-12)


@methods
def test_an_impulse_decays_exponentially(method):
    """y_t = C_t . a^t delta B_0 u_0: written through B of its position, read through C of ours."""
    u, delta, A, B, C, D, _ = (v.detach() for v in draw(1, 40, 3, 2))
    u[:, 1:], delta[:] = 0, 0.4
    y, _ = scan(u, delta, A, B, C, D, method=method)
    t = torch.arange(40).double()[:, None, None]
    want = ((0.4 * A * t).exp() * 0.4 * B[:, :1] * u[0, 0][:, None] * C[0][:, None]).sum(2)
    want[0] += D * u[0, 0]
    close([y[0]], [want], 1e-12)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 35), st.integers(1, 9))


@settings(max_examples=80, deadline=None)
@given(sizes, st.sampled_from(METHODS), st.data())
def test_any_chunking_equals_one_scan_in_value_and_gradient(shape, method, data):
    """And all methods agree with the loop that autograd differentiates."""
    u, delta, A, B, C, D, state = inputs = draw(*shape, decay=0.5, seed=shape[1])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, shape[1] - 1)), max_size=3)))
    pieces = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, shape[1]])]
    ys, h = [], state
    for i in pieces:
        y, h = scan(u[:, i], delta[:, i], A, B[:, i], C[:, i], D, h, method=method)
        ys.append(y)
    y = torch.cat(ys, 1)
    gradients = torch.autograd.grad(y.sin().sum() + h.cos().sum(), inputs)
    close([y, h, *gradients], everything(inputs, "sequential"))


@methods
@pytest.mark.parametrize("b, t, e, n", [(2, 9, 2, 2), (1, 2, 3, 1), (1, 18, 2, 2)])
def test_gradients_are_those_of_finite_differences(b, t, e, n, method):
    assert torch.autograd.gradcheck(lambda *v: scan(*v, method=method), draw(b, t, e, n))


@functools.cache
def a_long_text(decay):
    """-> inputs, and y and the last state of a loop over the positions."""
    u, delta, A, B, C, D, h = inputs = draw(1, 2048, 4, 2, decay=decay)
    y = []
    with torch.no_grad():
        for t in range(u.shape[1]):
            h = (delta[:, t, :, None] * A).exp() * h
            h = h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None]
            y.append((h @ C[:, t, :, None]).squeeze(-1) + D * u[:, t])
    return inputs, (torch.stack(y, 1), h)


@methods
@pytest.mark.parametrize("decay", [0.1, 5, 20])
def test_long_texts_stay_finite_and_right(decay, method):
    """Quotients of cumulative products and cumulative sums of logarithms end in NaN here."""
    inputs, exact = a_long_text(decay)
    single = [v.detach().float().requires_grad_() for v in inputs]
    for values, relative in ((inputs, 1e-10), (single, 5e-6)):
        y, h = scan(*values, method=method)
        close([y, h], [v.to(y.dtype) for v in exact], relative)
        for gradient in torch.autograd.grad(y.sum(), values):
            assert torch.isfinite(gradient).all()


@methods
@pytest.mark.parametrize("t", [1, 3, 64, 257])
def test_equals_mambapy_and_transformers(t, method):
    u, delta, A, B, C, D, _ = inputs = draw(2, t, 6, 4, dtype=torch.float32)
    y, state = scan(u, delta, A, B, C, D, method=method)
    theirs = MambaBlock.selective_scan(None, u, delta, A, B, C, D)
    close([y], [theirs], 5e-6)
    pairs = (torch.autograd.grad(out.sin().sum(), inputs[:6]) for out in (y, theirs))
    for mine, other in zip(*pairs, strict=True):
        assert float((mine - other).abs().max()) <= 1e-5 * float(other.abs().max())
    third = mamba_selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, return_last_state=True)
    close([y, state], [third[0].mT, third[1]], 5e-6)


@pytest.mark.parametrize("with_D", [True, False])
def test_step_is_a_scan_of_one_position(with_D):
    u, delta, A, B, C, D, state = draw(3, 1, 5, 4)
    D = D if with_D else None
    y, h = selective_scan(u, delta, A, B, C, D, state=state)
    close(step(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state), [y[:, 0], h], 1e-13)


def test_a_step_goes_on_from_a_scan_in_half_precision():
    u, delta, A, B, C, D, _ = (x.bfloat16() for x in draw(3, 2, 5, 4))
    _, state = selective_scan(u[:, :1], delta[:, :1], A, B[:, :1], C[:, :1], D)
    wanted, last = selective_scan(u, delta, A, B, C, D)
    y, h = step(u[:, 1], delta[:, 1], A, B[:, 1], C[:, 1], D, state)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    close([y, h], [wanted[:, 1], last], 1e-6)
    y, _ = step(u[:, 1], delta[:, 1], A, B[:, 1], C[:, 1], None, state)
    assert y.dtype == torch.bfloat16


def test_discretise_keeps_by_the_exponential_and_adds_by_euler():
    one = torch.ones(1, 1, 1).double()
    keep, add = discretise(3 * one, 0.5 * one, -2 * one[0], 7 * one)
    assert keep.item() == pytest.approx(0.36787944117144233) and add.item() == 10.5


@methods
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_extremes_of_the_exponent(dtype, relative, method):
    """Nothing survives exp(-1000), all survives exp(0), growth is growth, and NaN is not hidden."""
    table = {
        -1000: 0,
        -1e30: 0,
        -80: 1.8048513878454153e-35,
        -0.34: 0.7117703227626097,
        0: 1,
        2: 7.38905609893065,
        80: 5.54062238439351e34,
        1e5: torch.inf,
    }
    one = torch.ones(1, 1, 1, dtype=dtype)
    for exponent, kept in [*table.items(), (torch.nan, torch.nan)]:
        _, h = scan(0 * one, one, exponent * one[0], one, one, None, one, method=method)
        limit = relative * max(1, abs(exponent))  # an exponent is rounded, too
        torch.testing.assert_close(h, kept * one, rtol=limit, atol=0, equal_nan=True)


@methods
@pytest.mark.parametrize(
    "dtype, bits", [(torch.float32, torch.int32), (torch.float64, torch.int64)]
)
def test_a_nan_with_a_payload_stays_nan(dtype, bits, method):
    """Its low bits must not move into the exponent, and make a number of it."""
    exponent = 0x7FC00000 if bits == torch.int32 else 0x7FF8000000000000
    for payload in (1, 0x155, 0x1FF):
        nan = torch.tensor([[exponent + payload]], dtype=bits).view(dtype)
        one = torch.ones(1, 5, 1, dtype=dtype)
        for delta, A in ((one, nan), (nan.expand(1, 5, 1), one[0, :1])):
            A = A.clone().requires_grad_()
            y, h = scan(one, delta, A, one, one, None, one[:, :1], method=method)
            assert y.isnan().all() and h.isnan().all()
            assert torch.autograd.grad(y.sum(), A)[0].isnan().all()


@methods
def test_inputs_may_be_strided_and_of_any_precision(method):
    u, delta, A, B, C, D, state = inputs = draw(2, 12, 6, 4)
    u, delta, A, state = (v.mT.contiguous().mT for v in (u, delta, A, state))
    B, C = torch.cat([B, C], 2).split(4, 2)
    close(scan(u, delta, A, B, C, D, state, method=method), scan(*inputs, method=method), 1e-15)
    y, h = scan(*(v.bfloat16() for v in inputs), method=method)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    oracle, _ = scan(*inputs, method="sequential")
    assert (y - oracle).abs().max() < 0.1 * y.abs().max()


@methods
def test_nothing_to_read_changes_nothing(method):
    *inputs, state = draw(2, 0, 3, 2)
    y, h = scan(*inputs, state, method=method)
    assert y.shape == (2, 0, 3) and torch.equal(h, state)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_states_are_not_held_for_backward(method):
    b, t, e, n = shape = 2, 512, 16, 16
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: held.append(v.numel()), lambda v: v):
        scan(*draw(*shape), method=method)
    assert max(held) <= b * t * e * n / 8 and sum(held) < 0.6 * b * t * e * n, held


def test_the_tree_is_logarithmically_deep():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "addcmul" in str(function)
            return function(*args, **(kwargs or {}))

    for t in (16, 256, 4096):
        a, x = torch.rand(2, t, 3).double()
        want = [x[0]]
        for i in range(1, t):
            want.append(a[i] * want[-1] + x[i])
        with Count() as count:
            tree(a, x)
        close([x], [torch.stack(want)], 1e-13)
        assert count.calls <= 2 * t.bit_length() + 1, (t, count.calls)


@pytest.mark.parametrize("method, deep", [("chunked", True), ("parallel", False), ("trees", False)])
def test_a_loop_or_a_tree_runs_as_the_method_says(method, deep, monkeypatch):
    for size in ("ON_CPU", "ELSEWHERE"):
        monkeypatch.setattr(kernels.chunked, size, 10**6)  # one chunk
    with torch.profiler.profile() as profile:
        everything(draw(1, 256, 2, 2), method)
    calls = sum(event.count for event in profile.key_averages() if "addcmul" in event.key)
    assert calls > 3 * 255 if deep else calls < 100, calls  # forward, anew, and from the right


def test_what_does_not_fit_is_named():
    u, delta, A, B, C, D, state = draw(2, 5, 3, 4)
    inputs = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, state=state)
    for name, wrong, words in (
        *(("delta", delta[:, :4], "delta should be"), ("A", A[:2], "A should be")),
        *(("B", B[:, :, :3], "B should be"), ("C", C[:1], "C should be")),
        *(("D", D[:2], "D should be"), ("state", state[:1], "state should be")),
        *(("u", u[0], r"u should be \(b, t, e\); got"), ("u", u.long(), "real numbers")),
        *(("B", B.to("meta"), "one device"), ("method", "magic", "method is one of")),
    ):
        with pytest.raises(ValueError, match=words):
            unwrap(selective_scan)(**inputs | {name: wrong})  # without the type checker
        if name in ("delta", "A", "B"):
            with pytest.raises(ValueError, match=words):
                unwrap(discretise)(**{"u": u, "delta": delta, "A": A, "B": B} | {name: wrong})


def test_a_step_never_stretches_what_does_not_fit():
    u, delta, A, B, C, D, state = draw(2, 1, 3, 4)
    u, delta, B, C = (v[:, 0] for v in (u, delta, B, C))
    inputs = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, state=state)
    step(**inputs | {"D": None})
    for name, wrong in (
        *(("u", u[:, None]), ("u", u[:1]), ("u", u[:, :1]), ("delta", delta[:, :1])),
        *(("A", A[:1]), ("A", A[:, :1]), ("A", A[:, 0]), ("B", B[:, :1]), ("C", C[:1])),
        *(("D", D[:1]), ("state", state[:1]), ("state", state[:, :1]), ("state", None)),
    ):
        words = "wants a state" if wrong is None else f"^{'.*' if name in 'uA' else name} should be"
        with pytest.raises(ValueError, match=words):
            unwrap(step)(**inputs | {name: wrong})  # without the type checker


@methods
@pytest.mark.parametrize("finest", range(6))
def test_a_mixture_is_computed_in_its_finest_precision(method, finest):
    *inputs, _ = draw(2, 3, 3, 2)
    y, h = scan(*(v if i == finest else v.float() for i, v in enumerate(inputs)), method=method)
    assert y.dtype == h.dtype == torch.float64
