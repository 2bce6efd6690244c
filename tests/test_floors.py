"""The floors of the house: imports point down only; nothing in the package can run what a file
says.
"""

import ast
import importlib
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS
from helpers import apart

import irann

ROOT = Path(irann.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
FLOORS = [
    ("core", "kernels", "machine", "settings", "text", "shakespeare"),
    ("lm", "sampling", "layers", "figures"),
    ("models",),
    ("training", "checkpoint", "zoo"),
    ("chat",),
    ("bench", "book", "doctor", "export", "runs", "__main__"),
]
NEIGHBOURS = {
    ("models", "thinker"): {"recurrent"},  # the network that both thinkers share
    ("models", "thinker_page"): {"recurrent"},
    ("models", "diffusion"): {"denoiser"},  # its network and how it writes
    ("models", "interop"): {"gpt", "mamba"},
}
LATE = {
    ("models", "gpt"): {"interop"},
    ("models", "mamba"): {"interop"},
}  # inside from_transformers


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports(path: Path) -> set[tuple[str, ...]]:
    """The modules of irann that a file imports, as parts below irann; wherever in the file the
    import stands.
    """
    package = ("irann", *path.with_suffix("").parts)[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = base + tuple((node.module or "").split(".") if node.module else ())
            found |= (
                {module} if len(module) > 1 else {(*module, alias.name) for alias in node.names}
            )
    return {module[1:] for module in found if module[0] == "irann" and len(module) > 1}


@pytest.mark.parametrize("path", [p for p in FILES if p != Path("__init__.py")], ids=str)
def test_imports_point_down(path):
    room = path.with_suffix("").parts
    for other in imports(path):
        if other[0] == room[0] == "models":
            allowed = NEIGHBOURS.get(room, set()) | LATE.get(room, set())
            assert other[1] in allowed, f"{path} imports {other[1]}: models never import each other"
        elif other[0] != room[0]:
            above = f"{path} (floor {floor(room[0])}) imports {'.'.join(other)} from above"
            assert floor(other[0]) <= floor(room[0]), above
    reached = {other[0] for other in imports(path)} - {room[0]}
    if room[0] in ("settings", "machine"):
        assert not reached
    if room[0] == "core":
        assert reached <= {"kernels"}
    if room[0] == "kernels":
        assert reached <= {"core", "machine"}
    if room[0] == "models":
        assert reached <= {"core", "lm", "sampling", "layers", "settings", "text"}
    if room[0] in ("training", "chat", "checkpoint"):
        assert "models" not in reached, (
            "training and chat speak only the protocol; zoo names the models"
        )


def test_core_is_the_syllabus_and_needs_torch_and_einops_only():
    allowed = {"torch", "einops", "jaxtyping", "math", "collections", "contextlib", "typing"}
    files = list((ROOT / "core").glob("*.py"))
    assert len(files) > 4
    for path in files:
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 350
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used = {(node.module or "").split(".")[0]}
            else:
                continue
            assert used <= allowed, f"{path.name} imports {used}"
        assert "nn.Module" not in path.read_text()


@pytest.mark.parametrize("room", ["core", "models", "training"])
def test_no_room_that_a_student_reads_has_a_file_longer_than_350_lines(room):
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / room).glob("*.py")}
    assert max(lengths.values()) <= 350, lengths


def test_no_name_of_the_package_hides_a_submodule():
    modules = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    for name in modules - {"__init__", "__main__"}:
        assert importlib.import_module(f"irann.{name}") is getattr(irann, name)


def test_a_newcomer_s_import_needs_no_widgets_and_no_plots_and_brings_all_that_is_told():
    said = apart(PROGRAMS / "without_widgets.py").stdout
    assert 'needs ipywidgets and IPython: pip install "irann[book]"' in said


def test_only_lacking_widgets_are_taken_for_lacking_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "irann.chat.widget", None)
    with pytest.raises(ModuleNotFoundError, match=r"irann\.chat\.widget"):
        _ = irann.Chat


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_can_run_what_it_reads(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {
                (getattr(node, "module", "") or "").split(".")[0]
            }
            assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, names
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "torch.load",
                "importlib.import_module",
                "np.load",
            }, called
