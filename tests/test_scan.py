"""irann.core.scan against closed forms, against mambapy and transformers, and against a loop written here once more.

Every test runs twice, with the C kernel and without it: `auto` is then scan.c or plain PyTorch.
"""

import shutil

import pytest
import torch
from mambapy.mamba import MambaBlock
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from irann.core import scan
from irann.core.scan import discretise, selective_scan, step

METHODS = ["sequential", "parallel", "chunked", "auto"]
pytestmark = pytest.mark.usefixtures("with_and_without_kernel")


@pytest.fixture(params=["kernel", "torch"])
def with_and_without_kernel(request, monkeypatch):
    monkeypatch.setenv("IRANN_KERNEL", "1" if request.param == "kernel" else "0")
    monkeypatch.setattr(scan, "ON_CPU", 1)  # chunks of 8 places, so that small texts have several


def draw(b, t, e, n, *, decay=1.0, seed=0, dtype=torch.float64):
    """-> u, delta, A, B, C, D and a state; delta |A| is about `decay`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, t, e), (b, t, e), (e, n), (b, t, n), (b, t, n), (e,), (b, e, n)
    u, delta, A, *others = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    values = u, decay * (0.5 + delta.sigmoid()), -0.5 - A.sigmoid(), *others
    return [v.to(dtype) for v in values]


def by_the_book(u, delta, A, B, C, D, state):
    """The two equations, element by element, with nothing of torch but its arithmetic."""
    h, y = state.clone(), torch.empty_like(u)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            for e in range(u.shape[2]):
                h[b, e] = (delta[b, t, e] * A[e]).exp() * h[b, e] + delta[b, t, e] * B[b, t] * u[b, t, e]
                y[b, t, e] = (C[b, t] * h[b, e]).sum() + D[e] * u[b, t, e]
    return y, h


def close(ours, oracle, relative=1e-10):
    assert ours.dtype == oracle.dtype and ours.shape == oracle.shape
    assert torch.isfinite(ours).all()
    ours, oracle = ours.detach(), oracle.detach()
    assert float((ours - oracle).abs().max()) <= relative * max(1, float(oracle.abs().max()))


def test_the_kernel_is_there_exactly_when_it_can_be():
    assert (scan._kernel(16, torch.float32) is not None) == (shutil.which("cc") is not None and scan.os.environ["IRANN_KERNEL"] != "0")


@pytest.mark.parametrize("method", METHODS)
def test_three_places_by_hand(method):
    half, one = torch.tensor(0.5).double().log(), torch.ones(1, 3, 1).double()
    u = torch.tensor([8.0, 0, 1]).double().reshape(1, 3, 1)
    y, state = selective_scan(u, one, half.reshape(1, 1), one, 10 * one, torch.tensor([1.0]).double(), method=method)
    torch.testing.assert_close(y.flatten(), torch.tensor([88.0, 40, 31]).double())  # h = 8, 4, 3; y = 10 h + u
    torch.testing.assert_close(state.flatten(), torch.tensor([3.0]).double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("b, t, e, n", [(2, 1, 3, 2), (1, 2, 1, 1), (2, 3, 5, 3), (1, 4, 17, 1), (3, 5, 2, 16), (1, 33, 9, 4)])
def test_equals_the_book(b, t, e, n, method):
    given = draw(b, t, e, n)
    for ours, book in zip(selective_scan(*given[:6], state=given[6], method=method), by_the_book(*given), strict=True):
        close(ours, book, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_constant_input_is_a_geometric_sum(method):
    """With all held constant, h_t = delta B u (1 - a^t) / (1 - a): Euler's step for B, not the exact one."""
    t, delta, a = 50, 0.3, torch.tensor([0.9, 0.2]).double()
    ones = torch.ones(1, t, 1).double()
    B = torch.tensor([2.0, -1.0]).double().expand(1, t, 2)
    y, state = selective_scan(5 * ones, delta * ones, (a.log() / delta)[None], B, torch.ones_like(B), method=method)
    places = torch.arange(1, t + 1).double()[:, None]
    h = 5 * delta * B[0] * (1 - a**places) / (1 - a)
    close(y[0, :, 0], h.sum(1), 1e-12)
    close(state[0, 0], h[-1], 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_an_impulse_decays_exponentially(method):
    """y_t = C_t . a^t delta B_0 u_0: written through B of its place, read through C of ours."""
    u, delta, A, B, C, D, _ = draw(1, 40, 3, 2)
    u[:, 1:], delta[:] = 0, 0.4
    y, _ = selective_scan(u, delta, A, B, C, D, method=method)
    t = torch.arange(40).double()[:, None, None]
    expected = ((0.4 * A * t).exp() * 0.4 * B[:, :1] * u[0, 0][:, None] * C[0][:, None]).sum(2)
    expected[0] += D * u[0, 0]
    close(y[0], expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_scan_of_the_rest_goes_on_from_the_state(method):
    u, delta, A, B, C, D, state = (v.requires_grad_() for v in draw(2, 37, 5, 3))
    whole = selective_scan(u, delta, A, B, C, D, state=state, method=method)
    for cut in (1, 8, 20, 36):
        first, between = selective_scan(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, state=state, method=method)
        rest, last = selective_scan(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, state=between, method=method)
        pieces = torch.cat([first, rest], 1), last
        close(pieces[0], whole[0], 1e-12)
        close(last, whole[1], 1e-12)
    slopes = [torch.autograd.grad(y.sin().sum() + h.cos().sum(), (u, delta, A, B, C, state)) for y, h in (whole, pieces)]
    for ours, oracle in zip(*slopes, strict=True):
        close(ours, oracle)


@pytest.mark.parametrize("b, t, e, n", [(2, 1, 3, 1), (2, 7, 4, 5), (1, 32, 33, 2), (3, 33, 8, 4), (2, 257, 19, 16)])
def test_all_methods_agree_in_value_and_slope(b, t, e, n):
    given = [v.requires_grad_() for v in draw(b, t, e, n, decay=0.5)]

    def everything(method):
        y, h = selective_scan(*given[:6], state=given[6], method=method)
        return y, h, *torch.autograd.grad(y.sin().sum() + h.cos().sum(), given)

    reference = everything("sequential")
    for method in METHODS[1:]:
        for ours, oracle in zip(everything(method), reference, strict=True):
            close(ours, oracle)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("b, t, e, n", [(2, 9, 2, 2), (1, 2, 3, 1)])
def test_slopes_are_those_of_finite_differences(b, t, e, n, method):
    given = tuple(v.requires_grad_() for v in draw(b, t, e, n))
    assert torch.autograd.gradcheck(lambda *v: selective_scan(*v[:6], state=v[6], method=method), given)


def test_slopes_of_trees_chunk_by_chunk():
    """What `auto` does on a GPU, on the processor at hand."""
    u, delta, A, B, C, _, state = (v.requires_grad_() for v in draw(2, 21, 3, 2))
    assert torch.autograd.gradcheck(lambda *v: scan._Chunks.apply(*v, 8, scan._tree), (u, delta, A, B, C, state))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [0.1, 5, 20])
def test_long_texts_stay_finite_and_right(decay, method):
    """Quotients of cumulative products and cumulative sums of logarithms end in NaN here."""
    given = [v.requires_grad_() for v in draw(1, 2048, 4, 2, decay=decay)]
    single = [v.detach().float().requires_grad_() for v in given]
    exact = selective_scan(*given[:6], state=given[6], method="sequential")
    for inputs, relative in ((given, 1e-10), (single, 5e-6)):
        ours = selective_scan(*inputs[:6], state=inputs[6], method=method)
        for mine, oracle in zip(ours, exact, strict=True):
            close(mine, oracle.to(mine.dtype), relative)
        for slope in torch.autograd.grad(ours[0].sum(), inputs):
            assert torch.isfinite(slope).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [1, 3, 64, 257])
def test_equals_mambapy_and_transformers(t, method):
    u, delta, A, B, C, D, _ = given = [v.requires_grad_() for v in draw(2, t, 6, 4, dtype=torch.float32)]
    ours, state = selective_scan(u, delta, A, B, C, D, method=method)
    (theirs := MambaBlock.selective_scan(None, u, delta, A, B, C, D)).sin().sum().backward()
    close(ours, theirs, 5e-6)
    slopes = torch.autograd.grad(ours.sin().sum(), given[:6])
    for mine, v in zip(slopes, given[:6], strict=True):
        assert float((mine - v.grad).abs().max()) <= 1e-5 * float(v.grad.abs().max())
    turned = (v.mT for v in (u, delta)), (v.mT for v in (B, C))
    third, last = mamba_selective_scan(*turned[0], A, *turned[1], D, return_last_state=True)
    close(ours, third.mT, 5e-6)
    close(state, last, 5e-6)


@pytest.mark.parametrize("with_D", [True, False])
def test_step_is_a_scan_of_one_place(with_D):
    u, delta, A, B, C, D, state = draw(3, 1, 5, 4)
    D = D if with_D else None
    whole = selective_scan(u, delta, A, B, C, D, state=state)
    y, h = step(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state)
    close(y, whole[0][:, 0], 1e-13)
    close(h, whole[1], 1e-13)


def test_discretise_keeps_by_the_exponential_and_adds_by_euler():
    u, delta, A, B = (torch.full(s, v).double() for s, v in (((1, 1, 1), 3.0), ((1, 1, 1), 0.5), ((1, 1), -2.0), ((1, 1, 1), 7.0)))
    keep, add = discretise(u, delta, A, B)
    torch.testing.assert_close(keep.item(), 0.36787944117144233)
    assert add.item() == 10.5


@pytest.mark.parametrize("method", METHODS)
def test_extremes_of_the_exponent(method):
    """Nothing survives exp(-1000), everything survives exp(0), growth is growth, and not-a-number is not hidden."""
    table = [(-1000, 0), (-1e30, 0), (-0.34, 0.7117703227626097), (0, 1), (2, 7.38905609893065), (torch.nan, torch.nan), (1e5, torch.inf)]
    for dtype, relative in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        one = torch.ones(1, 1, 1, dtype=dtype)
        for exponent, kept in table:
            _, h = selective_scan(0 * one, one, exponent * one[0], one, one, state=one, method=method)
            torch.testing.assert_close(h, kept * one, rtol=relative, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_may_be_strided_and_of_any_precision(method):
    u, delta, A, B, C, D, state = draw(2, 12, 6, 4)
    turned = (v.mT.contiguous().mT for v in (u, delta, A, state))
    strided = next(turned), next(turned), next(turned), *torch.cat([B, C], 2).split(4, 2), D, next(turned)
    oracle = selective_scan(u, delta, A, B, C, D, state=state, method=method)
    ours = selective_scan(*strided[:6], state=strided[6], method=method)
    assert torch.equal(ours[0], oracle[0]) and torch.equal(ours[1], oracle[1])
    y, h = selective_scan(*(v.bfloat16() for v in (u, delta, A, B, C, D)), method=method)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert float((y - selective_scan(u, delta, A, B, C, D)[0]).abs().max()) < 0.1 * float(y.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_read_changes_nothing(method):
    *given, state = draw(2, 0, 3, 2)
    y, h = selective_scan(*given, state=state, method=method)
    assert y.shape == (2, 0, 3) and torch.equal(h, state)


@pytest.mark.parametrize("method", ["parallel", "chunked", "auto"])
def test_the_states_are_not_held_for_backward(method):
    b, t, e, n = 2, 512, 16, 16
    *given, state = (v.requires_grad_() for v in draw(b, t, e, n))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: held.append(v.numel()), lambda v: v):
        selective_scan(*given, state=state, method=method)
    assert max(held) <= b * t * e * n / 8 and sum(held) < 0.6 * b * t * e * n, held


def test_the_tree_is_logarithmically_deep():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "addcmul" in str(function)
            return function(*args, **(kwargs or {}))

    for t in (16, 256, 4096):
        with Count() as count:
            selective_scan(*draw(1, t, 1, 1)[:5], method="parallel")
        assert count.calls <= 2 * t.bit_length() + 1, (t, count.calls)


@pytest.mark.parametrize("fault", ["no compiler", "broken compiler", "nowhere to write"])
def test_without_a_kernel_torch_takes_over_in_silence(fault, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(scan, "_build", scan._build.__wrapped__)  # without what earlier tests have built
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "cache"))
    if fault == "nowhere to write":
        (tmp_path / "cache").write_text("a file, not a folder")
    else:
        monkeypatch.setenv("CC", "no-such-compiler" if fault == "no compiler" else "false")
    given = draw(2, 20, 5, 3)
    assert torch.equal(selective_scan(*given[:6])[0], selective_scan(*given[:6], method="chunked")[0])
    with pytest.raises(ValueError, match="compiler"):
        selective_scan(*given[:6], method="kernel")
    assert capfd.readouterr() == ("", "")


def test_a_damaged_kernel_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "_build", scan._build.__wrapped__)
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "first"))
    given = draw(2, 20, 5, 3)
    expected, _ = selective_scan(*given[:6])
    (tmp_path / "second").mkdir()
    for built in (tmp_path / "first").glob("*"):
        (tmp_path / "second" / built.name).write_bytes(b"\xff rubbish")
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "second"))
    assert torch.equal(selective_scan(*given[:6])[0], expected)
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "second").glob("*.so"))
    (tmp_path / "third").mkdir()
    for built in (tmp_path / "second").iterdir():  # cut off: to load it would end the process
        whole = built.read_bytes()
        (tmp_path / "third" / built.name).write_bytes(whole[: len(whole) // 2] if built.suffix == ".so" else whole)
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "third"))
    assert torch.equal(selective_scan(*given[:6])[0], expected)


def test_the_way_back_takes_the_kernel_that_went_there(monkeypatch):
    given = [v.requires_grad_() for v in draw(2, 20, 5, 3)]
    y, _ = selective_scan(*given[:6])
    monkeypatch.setenv("IRANN_KERNEL", "0")
    for ours, oracle in zip(
        torch.autograd.grad(y.sum(), given[:6]), torch.autograd.grad(selective_scan(*given[:6])[0].sum(), given[:6]), strict=True
    ):
        close(ours, oracle)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_kernel_shares_one_text_among_threads(threads):
    given = [v.requires_grad_() for v in draw(1, 40, 50, 3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        slopes = [torch.autograd.grad(selective_scan(*given[:6], method=m)[0].sin().sum(), given[:6]) for m in ("auto", "sequential")]
    finally:
        torch.set_num_threads(before)
    for ours, oracle in zip(*slopes, strict=True):
        close(ours, oracle)


def test_what_does_not_fit_is_named():
    u, delta, A, B, C, D, state = draw(2, 5, 3, 4)
    for change, words in (
        ({"delta": delta[:, :4]}, "delta should be"),
        ({"A": A[:2]}, "A should be"),
        ({"B": B[:, :, :3]}, "B should be"),
        ({"C": C[:1]}, "C should be"),
        ({"D": D[:2]}, "D should be"),
        ({"state": state[:1]}, "state should be"),
        ({"u": u[0]}, "wants u"),
        ({"u": u.long()}, "real numbers"),
        ({"B": B.to("meta")}, "one device"),
        ({"method": "magic"}, "method is one of"),
    ):
        with pytest.raises(ValueError, match=words):
            selective_scan(**({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "state": state} | change))


def test_a_step_never_stretches_what_does_not_fit():
    u, delta, A, B, C, D, state = draw(2, 1, 3, 4)
    given = {"u": u[:, 0], "delta": delta[:, 0], "A": A, "B": B[:, 0], "C": C[:, 0], "D": D, "state": state}
    step(**given | {"D": None})
    for name, wrong in (
        *(("u", u), ("u", u[:1, 0]), ("u", u[:, 0, :1]), ("delta", delta[:, 0, :1]), ("A", A[:1]), ("A", A[:, :1]), ("A", A[:, 0])),
        *(("B", B[:, 0, :1]), ("C", C[:1, 0]), ("D", D[:1]), ("state", state[:1]), ("state", state[:, :1]), ("state", None)),
    ):
        with pytest.raises(ValueError, match="a step wants u, delta"):
            step(**given | {name: wrong})
    for name, wrong in (("A", A[:1]), ("B", B[:, :, :1]), ("delta", delta[:, :, :1])):
        with pytest.raises(ValueError, match=f"{name} should be"):
            discretise(**{"u": u, "delta": delta, "A": A, "B": B} | {name: wrong})


@pytest.mark.parametrize("b, t, e, n", [(2, 1, 3, 1), (2, 7, 4, 5), (1, 33, 35, 2)])
def test_triton_agrees_in_value_and_slope(b, t, e, n):
    """On a GPU, or in Triton's interpreter (conftest.py)."""
    given = [v.requires_grad_() for v in draw(b, t, e, n, decay=0.5)]

    def everything(method):
        y, h = selective_scan(*given[:6], state=given[6], method=method)
        return y, h, *torch.autograd.grad(y.sin().sum() + h.cos().sum(), given)

    for ours, oracle in zip(everything("triton"), everything("sequential"), strict=True):
        close(ours, oracle)


def test_triton_s_slopes_are_those_of_finite_differences():
    given = tuple(v.requires_grad_() for v in draw(1, 18, 2, 2))
    assert torch.autograd.gradcheck(lambda *v: selective_scan(*v[:6], state=v[6], method="triton"), given, fast_mode=True)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_auto_is_right_on_every_device_there_is(device):
    given = draw(2, 70, 40, 16)
    theirs = selective_scan(*given[:6], state=given[6], method="sequential")
    moved = [v.to(device) for v in given]
    for ours, oracle in zip(selective_scan(*moved[:6], state=moved[6]), theirs, strict=True):
        close(ours.cpu(), oracle)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA"):
        selective_scan(*draw(1, 2, 1, 1)[:5], method="triton")
