"""irann.kernels as operators of torch, the building of scan.c, and the Triton kernel.

Their numbers are held against oracles in test_scan.py.
"""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refuses
from helpers import threads
from test_scan import close, draw, everything

from irann import checkpoint, kernels
from irann.core.scan import selective_scan, step
from irann.kernels import chunked, native

PROGRAMS = Path(__file__).parent / "programs"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing built yet, and an empty cache; -> the folder of the cache."""
    monkeypatch.setattr(native, "_build", native._build.__wrapped__)
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def test_auto_takes_the_c_kernel_exactly_when_it_can(monkeypatch):
    best = "native" if shutil.which("cc") else "chunked"
    assert kernels.fastest("cpu", 16, torch.float32) == best
    assert kernels.fastest("cpu", 65, torch.float32) == "chunked"
    assert kernels.describe().startswith(f"cpu: {best}")
    selective_scan(*draw(1, 5, 100, 3)[:6], method=best)  # that is 3 states, of 100 channels
    assert "cpu: chunked (no C kernel: it is for 1 to 64 states; got 65)" in kernels.describe(65)
    monkeypatch.setenv("IRANN_KERNEL", "0")
    assert kernels.fastest("cpu", 16, torch.float32) == "chunked"
    assert "IRANN_KERNEL is 0" in kernels.describe()


@pytest.mark.parametrize("fault", ["missing", "broken", "nonsense", "nowhere to write"])
def test_without_a_kernel_torch_takes_over_in_silence(fault, fresh, monkeypatch, capfd):
    if fault == "nowhere to write":
        fresh.write_text("a file, not a folder")
    else:
        cc = {"missing": "no-such-compiler", "broken": "false", "nonsense": "cc '"}[fault]
        monkeypatch.setenv("CC", cc)
    inputs = draw(2, 20, 5, 3)
    close(everything(inputs, "auto"), everything(inputs, "chunked"), 0)
    with refuses("'native' is not to be had: .*(no C compiler|could not be built)"):
        selective_scan(*inputs[:6], method="native")
    assert "cpu: chunked (no C kernel: " in kernels.describe()
    assert capfd.readouterr() == ("", "")


def test_on_windows_where_gcc_s_vectors_end_a_process_torch_takes_over(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert kernels.describe().startswith("cpu: chunked (no C kernel: GCC on Windows")
    assert not checkpoint.environment()["kernel"] and not fresh.exists()


@needs_compiler
@pytest.mark.parametrize("cc", [" ", "env cc -DONE=1"])
def test_the_compiler_may_carry_arguments(cc, fresh, monkeypatch):
    monkeypatch.setenv("CC", cc)
    inputs = draw(2, 20, 5, 3)
    close(everything(inputs, "native"), everything(inputs, "sequential"))
    assert (cc.strip() or "cc") in kernels.describe() and len(list(fresh.glob("*.so"))) > 0


@needs_compiler
def test_a_check_compiles_nothing(fresh):
    u, delta, A, B, C, *_ = draw(2, 20, 5, 3)
    with refuses("delta should be"):
        selective_scan(u, delta[:1], A, B, C, method="native")
    assert not fresh.exists()


@needs_compiler
def test_a_damaged_kernel_is_built_again(fresh, monkeypatch, tmp_path):
    inputs = draw(2, 20, 5, 3)
    expected = everything(inputs, "native")
    damages = {
        "rubbish": lambda path, data: b"\xff rubbish",
        "cut off": lambda path, data: data[: len(data) // 2] if path.suffix == ".so" else data,
    }  # to load what was cut off would end the process
    for name, damage in damages.items():
        (tmp_path / name).mkdir()
        for path in fresh.iterdir():
            (tmp_path / name / path.name).write_bytes(damage(path, path.read_bytes()))
        monkeypatch.setenv("IRANN_CACHE", str(tmp_path / name))
        close(everything(inputs, "native"), expected, 0)
        assert all(path.stat().st_size > 1000 for path in (tmp_path / name).glob("*.so"))


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_kernel_that_others_may_write_or_own_is_built_again(fresh, monkeypatch):
    one, owner, mask, built = torch.ones(1, 1, 1), os.getuid(), os.umask(0o002), []
    try:
        selective_scan(one, one, 0 * one[0], one, one, method="native")
    finally:
        os.umask(mask)
    (kernel,) = fresh.glob("*.so")
    assert kernel.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(native, "_compile", lambda *_: built.append(1))
    for mode, me in ((0o755, owner), (0o775, owner), (0o757, owner), (0o755, owner + 1)):
        kernel.chmod(mode)
        monkeypatch.setattr(os, "getuid", lambda me=me: me)
        built.clear()
        selective_scan(one, one, 0 * one[0], one, one, method="native")
        assert bool(built) == ((mode, me) != (0o755, owner))


@needs_compiler
def test_a_compiler_without_openmp_will_do(fresh, monkeypatch, tmp_path):
    cc = tmp_path / "cc"
    cc.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1; esac\nexec cc "$@"\n')
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    one = torch.ones(1, 1, 1)
    assert selective_scan(one, one, 0 * one[0], one, one, method="native")[0].item() == 1
    assert f"built by {cc} without OpenMP, {fresh}" in native.kernel(1, torch.float32)[1]


@needs_compiler
def test_what_was_built_before_is_taken_as_it_is(fresh, monkeypatch):
    one = torch.ones(1, 1, 1)
    selective_scan(one, one, 0 * one[0], one, one, method="native")
    (built,) = fresh.glob("*.so")
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("built again"))
    assert selective_scan(one, one, 0 * one[0], one, one, method="native")[0].item() == 1
    assert native.kernel(1, torch.float32)[1].endswith(str(built))


@needs_compiler
def test_an_edited_source_is_built_again(fresh, monkeypatch, tmp_path):
    one = torch.ones(1, 1, 1)
    assert selective_scan(one, one, 0 * one[0], one, one, method="native")[0].item() == 1
    source, edited = native.SOURCE.read_text(), tmp_path / "scan.c"
    edited.write_text(source.replace("sum += h[n] * C", "sum += 3 * h[n] * C"))
    assert edited.read_text() != source
    monkeypatch.setattr(native, "SOURCE", edited)
    assert selective_scan(one, one, 0 * one[0], one, one, method="native")[0].item() == 3
    assert len(list(fresh.glob("*.so"))) == 2


@needs_compiler
def test_backward_takes_the_kernel_of_forward(monkeypatch):
    inputs = draw(2, 20, 5, 3)
    y, h = selective_scan(*inputs[:6], state=inputs[6])
    monkeypatch.setenv("IRANN_KERNEL", "0")
    gradients = torch.autograd.grad(y.sin().sum() + h.cos().sum(), inputs)
    close(gradients, everything(inputs, "auto")[2:])


@pytest.mark.parametrize("texts, n", [(1, 1), (1, 2), (1, 3), (2, 5), (3, 4)])
def test_the_kernel_shares_texts_among_threads(texts, n):
    inputs = draw(texts, 40, 50, 3)
    with threads(n):
        close(everything(inputs, "auto"), everything(inputs, "sequential"))


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone is slow there")
def test_numbers_without_a_full_mantissa_are_zero_in_the_kernel_and_only_there():
    """A trained model has steps of softplus(-90); computed with, they took ten times as long."""
    one = torch.ones(1, 40, 1, requires_grad=True)
    small = torch.full((1, 40, 1), 1e-39, requires_grad=True)
    with threads(1):
        y, h = selective_scan(1e30 * one, small, -one[0, :1], one, one, method="native")
        (du,) = torch.autograd.grad(1e30 * y.sum(), one)
        assert not y.any() and not h.any() and (du == 0).all()
        assert (small.detach() * 0.5).all()  # this thread's arithmetic is as it was


# --- operators of torch ---------------------------------------------------------------------------


def calls(b, t, e, n):
    """-> the operators, each with inputs; e is a multiple of the vectors of scan.c."""
    u, delta, A, B, C, _, state = draw(b, t, e, n)
    yield native.SCAN, (u, delta, A, B, C, state)
    if kernels.why_not("triton", "cpu", n, u.dtype) == "":
        from irann.kernels import triton

        yield triton.SCAN, (u, delta, A, B, C, state)
    u, delta, B, C = (
        v.detach().transpose(0, 1).contiguous().requires_grad_() for v in (u, delta, B, C)
    )
    for trees in (0, 1):
        yield chunked.SCAN, (u, delta, A, B, C, state, 8, trees)


@needs_compiler
@pytest.mark.parametrize("b, t, e, n", [(2, 9, 16, 3), (1, 1, 8, 1)])
def test_operators_keep_the_rules_of_torch(b, t, e, n):
    """No result shares memory with an input, shapes are foreseen, gradients registered, ..."""
    for operator, inputs in calls(b, t, e, n):
        torch.library.opcheck(operator, inputs)
        y, last, entry = operator(*(v.detach() if torch.is_tensor(v) else v for v in inputs))
        backward = getattr(torch.ops.irann, f"{operator._opname}_backward").default
        kept = [v.detach() for v in inputs[:5]]
        torch.library.opcheck(backward, (y, last, *kept, entry, *inputs[6:]))


@pytest.mark.parametrize("method", ["chunked", "parallel", "native"])
def test_a_second_differentiation_is_refused_in_a_sentence(method):
    u, *inputs = draw(1, 9, 3, 2)
    y, _ = selective_scan(u, *inputs[:5], method=method)
    (gradient,) = torch.autograd.grad(y.sin().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; method='sequential'"):
        gradient.sum().backward()
    with torch.no_grad():
        assert torch.equal(selective_scan(u, *inputs[:5], method=method)[0], y)


@needs_compiler
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("method", ["auto", "chunked", "parallel"])
def test_compile_export_and_func_see_one_operator(method, unchecked):
    """No graph breaks, any length of text, and the gradients of plain autograd."""
    u, delta, A, B, C, D, state = inputs = draw(3, 40, 19, 5)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A = torch.nn.Parameter(A.detach())
            self.D = torch.nn.Parameter(D.detach())

        def forward(self, u, delta, B, C):
            return selective_scan(u, delta, self.A, B, C, self.D, method=method)

    def loss(u, delta, A, B, C, D, state):
        y, last = selective_scan(u, delta, A, B, C, D, state=state, method=method)
        return y.sin().sum() + last.cos().sum()

    def one_text(u, delta, B, C, state):
        return loss(u[None], delta[None], A, B[None], C[None], D, state[None])

    torch._dynamo.reset()
    one = u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state
    for function, given in ((loss, inputs), (step, one)):
        assert torch._dynamo.explain(function)(*given).graph_break_count == 0
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(*inputs), inputs), expected, 1e-12)
    texts, length = [u, delta, B, C], {1: torch.export.Dim("t", min=2, max=4096)}
    layer = Layer()
    program = torch.export.export(layer, tuple(texts), dynamic_shapes=(length,) * 4)
    shorter = [x[:, :23] for x in texts]
    close(program.module()(*shorter), layer(*shorter), 1e-12)
    close(torch.func.grad(loss, tuple(range(7)))(*inputs), expected, 1e-12)
    per_text = torch.func.vmap(torch.func.grad(one_text))(u, delta, B, C, state)
    close([per_text], expected[:1], 1e-12)


def test_a_torch_without_its_private_parts_scans_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._functorch.utils", None)
    spec = importlib.util.spec_from_file_location("elsewhere", kernels.operator.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = chunked._forward, chunked._backward, chunked._spans
    scan = module.operator("chunked_elsewhere", *parts, options=("span", "trees"))
    *_, inputs = (inputs for _, inputs in calls(2, 9, 16, 3))
    found = []
    for each in (scan, chunked.SCAN):
        y, last, _ = each(*inputs)
        gradients = torch.autograd.grad(y.sin().sum() + last.sum(), inputs[:6])
        found.append([y, last, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --- Triton: on a GPU, or in its interpreter (conftest.py) ----------------------------------------


@pytest.mark.parametrize("b, t, e, n", [(2, 1, 3, 1), (2, 7, 4, 5), (1, 33, 35, 2)])
def test_triton_agrees_in_value_and_gradient(b, t, e, n):
    inputs = draw(b, t, e, n, decay=0.5)
    close(everything(inputs, "triton"), everything(inputs, "sequential"))


@pytest.mark.parametrize("b, t, e, n", [(1, 33, 35, 2), (2, 21, 3, 5), (1, 16, 2, 1)])
@pytest.mark.parametrize("stretches", [2, 5])
def test_triton_cuts_a_text_into_stretches_that_run_at_once(b, t, e, n, stretches, monkeypatch):
    pytest.importorskip("triton")
    from irann.kernels import triton

    inputs = draw(b, t, e, n, decay=0.5)
    expected = everything(inputs, "sequential")
    monkeypatch.setattr(triton, "SPAN", 3)
    monkeypatch.setattr(triton, "SHORTEST", 1)
    monkeypatch.setattr(triton, "FILL", stretches * b * triton._parts(e))
    assert 1 < triton._stretches(inputs[0])[1] <= stretches
    close(everything(inputs, "triton"), expected)


def test_many_texts_are_walked_as_they_are_and_one_long_text_fills_the_gpu():
    pytest.importorskip("triton")
    from irann.kernels import triton

    def meta(*shape):
        return triton._stretches(torch.empty(shape, device="meta"))

    assert meta(64, 1024, 2048) == (64, 1)
    spans, stretches = meta(1, 65536, 384)
    assert 128 < stretches <= triton.FILL // 12 and (stretches - 1) * spans < 4096
    assert meta(1, 100, 384) == (7, 1)  # too short to be cut


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_auto_is_right_on_every_device_there_is(device):
    inputs = [v.detach() for v in draw(2, 70, 40, 16)]
    y, h = selective_scan(*(v.to(device) for v in inputs[:6]), state=inputs[6].to(device))
    close([y.cpu(), h.cpu()], selective_scan(*inputs[:6], state=inputs[6], method="sequential"))


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses("CUDA"):
        selective_scan(*draw(1, 2, 1, 1)[:5], method="triton")


def test_a_triton_that_cannot_build_what_launches_it_is_not_taken(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_no_driver", kernels._no_driver.__wrapped__)
    for driver, best in (SimpleNamespace(active=1), "triton"), (Driver(), "trees"):
        monkeypatch.setattr(runtime, "driver", driver)
        assert kernels.fastest("cuda", 16, torch.float32) == best
    assert "no driver (Failed to find C compiler)" in kernels.describe()


@needs_compiler
def test_a_kernel_for_another_processor_is_not_taken(fresh, monkeypatch):
    one, run = torch.ones(1, 1, 1), native._run
    for target in (b"#define ONE", b"#define OTHER"):

        def asked(*command, target=target, **how):
            return target if "-dM" in command else run(*command, **how)

        monkeypatch.setattr(native, "_run", asked)
        selective_scan(one, one, 0 * one[0], one, one, method="native")
    assert len(list(fresh.glob("*.so"))) == 2


def test_a_gradient_that_was_given_is_not_written_into():
    u, delta, A, B, C, state = (x.detach() for x in draw(2, 5, 3, 4)[:6])
    _, last = chunked.scan(u.requires_grad_(), delta, A, B, C, torch.zeros(2, 3, 4).to(u), span=2)
    given = torch.ones(2, 4, 3).to(u).mT
    torch.autograd.grad(last, u, given)
    assert (given == 1).all()
