"""The floors of the house: imports point down only; nothing in the package can run what a file says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import irann

ROOT = Path(irann.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
FLOORS = [
    ("core", "text", "shakespeare", "quality"),
    ("lm", "layers"),
    ("models",),
    ("train", "checkpoint", "zoo", "muon"),
    ("chat", "figures", "bench", "races", "speed", "__main__"),
]


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports(path: Path) -> set[tuple[str, ...]]:
    """The modules of irann that a file imports, as parts below irann; wherever in the file the import stands."""
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


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=str)
def test_imports_point_down(path):
    here = path.with_suffix("").parts
    for there in imports(path):
        if there[0] == here[0]:  # a neighbour in the same folder
            assert here[0] in ("core", "chat"), (
                f"{path} imports {'.'.join(there)}: models never import each other"
            )
            continue
        if here[0] in ("core", "text"):
            raise AssertionError(
                f"{path} imports {'.'.join(there)}, but the ground floor imports nothing of irann"
            )
        assert floor(there[0]) <= floor(here[0]), (
            f"{path} (floor {floor(here[0])}) imports {'.'.join(there)} from above"
        )
    if here[0] == "models":
        assert {there[0] for there in imports(path)} <= {"core", "lm", "layers"}
    if here[0] in ("train", "chat"):
        assert not {there for there in imports(path) if there[0] == "models"}, (
            "train and chat speak only the protocol"
        )


def test_core_needs_torch_and_einops_only():
    allowed = {"torch", "einops", "math", "dataclasses", "collections", "functools", "typing"}
    kernel = {
        "ctypes",
        "hashlib",
        "os",
        "pathlib",
        "shutil",
        "subprocess",
        "tempfile",
        "platform",
    }  # to build and load scan.c
    for path in (ROOT / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {node.module.split(".")[0]}
            else:
                continue
            more = {"scan.py": kernel, "scan_triton.py": {"triton"}}.get(path.name, set())
            assert tops <= allowed | more, f"{path.name} imports {tops}"
        assert "nn.Module" not in path.read_text()


def test_importing_irann_loads_no_widgets_and_no_plots():
    code = "import irann, sys; print(sorted({'ipywidgets', 'matplotlib', 'IPython', 'typer', 'transformers', 'triton'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


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
