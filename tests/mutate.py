"""Do the tests notice? One small fault after another is put into a copy of the package, and the
tests that reach its line run, the quickest first.

    python tests/mutate.py irann/core/halting.py          every fault of one file
    python tests/mutate.py --sample 400 --seed 1          a random sample of all that is tested so

Each fault and its verdict becomes a line of the file `--out`; a second run of the same command goes
on where the first one was stopped. What survives, or is reached by no test, is read by a person: an
equivalent fault, a missing test, or a line that nobody needs. Which test reaches what is recorded
once, beside `--out`, and again after an edit.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import coverage
import pytest

ROOT = Path(__file__).parents[1]
OF_ALL = ["tests/test_settings.py", "tests/test_numbers.py"]
ALL_MODELS = ["tests/test_contract.py"]
TESTS = {  # what should notice a fault in a file, fastest first; a folder's tests are the file's
    "irann/core/attention.py": ["tests/test_attention.py"],
    "irann/core/halting.py": ["tests/test_halting.py"],
    "irann/core/noise.py": ["tests/test_noise.py", "tests/test_diffusion.py"],
    "irann/core/scan.py": ["tests/test_scan.py"],
    "irann/core/tree.py": ["tests/test_scan.py"],
    "irann/kernels": ["tests/test_scan.py", "tests/test_kernels.py"],
    "irann/settings.py": ["tests/test_settings.py", "tests/test_lm.py"],
    "irann/sampling.py": ["tests/test_lm.py", "tests/test_numbers.py"],
    "irann/text.py": ["tests/test_text.py"],
    "irann/lm.py": ["tests/test_lm.py", *ALL_MODELS],
    "irann/layers.py": [
        "tests/test_numbers.py",
        "tests/test_gpt.py",
        "tests/test_thinker.py",
        *ALL_MODELS,
    ],
    "irann/models/gpt.py": [*OF_ALL, "tests/test_gpt.py", *ALL_MODELS],
    "irann/models/interop.py": ["tests/test_gpt.py", "tests/test_mamba.py"],
    "irann/models/mamba.py": [*OF_ALL, "tests/test_mamba.py", *ALL_MODELS],
    "irann/models/recurrent.py": [*OF_ALL, "tests/test_thinker.py", "tests/test_thinker_page.py"],
    "irann/models/thinker.py": [*OF_ALL, "tests/test_thinker.py", *ALL_MODELS],
    "irann/models/thinker_page.py": [*OF_ALL, "tests/test_thinker_page.py", *ALL_MODELS],
    "irann/models/diffusion.py": [*OF_ALL, "tests/test_diffusion.py", *ALL_MODELS],
    "irann/models/denoiser.py": [*OF_ALL, "tests/test_diffusion.py", *ALL_MODELS],
    "irann/training": [
        *OF_ALL,
        "tests/test_distillation.py",
        "tests/test_train.py",
        "tests/test_faults.py",
        *ALL_MODELS,
    ],
    "irann/checkpoint.py": ["tests/test_checkpoint.py", "tests/test_faults.py"],
    "irann/chat/session.py": ["tests/test_chat.py"],
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.And: "or",
    ast.Or: "and",
}
# left out, they change nothing that a test could see
SILENT = ("strict", "stacklevel", "memory_format")


class Fault(NamedTuple):
    file: str
    line: int
    old: str
    new: str
    source: str  # the whole file with the fault in it


def faults(file: str, source: str) -> Iterator[Fault]:
    """-> every small fault of a file: another operator or number, a condition turned round, a
    statement, an argument or a method's call left out. Annotations, docstrings and the words of
    errors stay as they are.
    """
    lines = source.splitlines(keepends=True)
    starts = [sum(len(line.encode()) for line in lines[:i]) for i in range(len(lines) + 1)]
    raw = source.encode()

    def at(node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        first = starts[node.lineno - 1] + node.col_offset
        return first, starts[node.end_lineno - 1] + node.end_col_offset

    def fault(node: ast.expr | ast.stmt | ast.keyword, begin: int, end: int, new: str) -> Fault:
        changed = (raw[:begin] + new.encode() + raw[end:]).decode()
        return Fault(file, node.lineno, raw[begin:end].decode(), new, changed)

    for node in _computing(ast.parse(source)):
        begin, end = at(node)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = at(node.left), at(node.right)
            parts = [raw[slice(*left)].decode(), raw[slice(*right)].decode()]
            yield fault(node, begin, end, f"(({parts[0]}) {OPERATORS[type(node.op)]} ({parts[1]}))")
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            first = raw[slice(*at(node.left))].decode()
            rest = raw[at(node.comparators[0])[0] : end].decode()
            yield fault(node, begin, end, f"(({first}) {OPERATORS[type(node.ops[0])]} {rest})")
        elif isinstance(node, ast.BoolOp):
            values = [f"({raw[slice(*at(value))].decode()})" for value in node.values]
            yield fault(node, begin, end, f"({f' {OPERATORS[type(node.op)]} '.join(values)})")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield fault(node, begin, end, f"({raw[slice(*at(node.operand))].decode()})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = not node.value if isinstance(node.value, bool) else node.value + 1
            yield fault(node, begin, end, repr(value))
        elif isinstance(node, ast.If | ast.IfExp):
            test = at(node.test)
            yield fault(node.test, *test, f"(not ({raw[slice(*test)].decode()}))")
        elif isinstance(node, ast.Call):
            bare = isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
            if bare:
                yield fault(node, begin, end, raw[slice(*at(node.func.value))].decode())
            for word in node.keywords:
                if word.arg in SILENT:
                    continue
                first, last = at(word)
                if raw[last : last + 1] == b",":
                    last += 1
                yield fault(word, first, last, "")
        elif isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            yield fault(node, begin, end, "pass")
        elif isinstance(node, ast.Raise):
            yield fault(node, begin, end, "pass")


def _computing(node: ast.AST) -> Iterator:
    """-> the expressions and statements that compute something."""
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _computing(child)


def tests_of(file: str) -> list[str]:
    return TESTS.get(file) or TESTS[str(Path(file).parent)]


def tried_files() -> list[str]:
    """-> the files of the package that a sample is drawn from."""
    found = []
    for name in TESTS:
        path = ROOT / name
        found += [path] if path.is_file() else sorted(path.glob("*.py"))
    return [str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"]


def statement(source: str, line: int) -> tuple[range, bool]:
    """-> the lines of the statement around a line, and whether it runs when the file is imported.
    Of a function they are those of its body: its defaults count when it is called.
    """
    function = ast.FunctionDef | ast.AsyncFunctionDef
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    inner = around[-1]  # ast.walk goes from outside in
    begin, end = inner.lineno, (inner.end_lineno or 0) + 1
    body = getattr(inner, "body", None)
    if isinstance(inner, function):
        begin = inner.body[0].lineno
    elif body:
        end = max(begin + 1, body[0].lineno)
    return range(begin, end), not any(isinstance(node, function) for node in around)


class Recorder:
    """A plugin of pytest: the seconds of each test that passes, and the tests that reach each line,
    themselves, through a fixture, or in a process that they start.
    """

    def __init__(self, tree: Path, out: Path):
        self.tree = tree
        self.out = out
        self.settings = out.with_suffix(".rc")  # processes read it when they start
        self.within("")
        os.environ["COVERAGE_PROCESS_START"] = str(self.settings)
        self.seen = coverage.Coverage(config_file=str(self.settings))
        self.seen.start()
        self.parts: dict[str, list[str]] = {}  # a test and its fixtures
        self.seconds: dict[str, float] = {}

    def within(self, name: str) -> None:
        self.name = name
        self.settings.write_text(
            f"[run]\nparallel = true\nsource = {self.tree / 'irann'}\ncontext = {name}\n"
            f"data_file = {self.out.with_suffix('.coverage')}\n"
        )
        if name:
            self.seen.switch_context(name)

    def pytest_runtest_logstart(self, nodeid):
        self.within(nodeid)

    def pytest_runtest_setup(self, item):
        self.parts[item.nodeid] = [item.nodeid, *(f"fixture {x}" for x in item.fixturenames)]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = self.name
        self.within(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.within(before)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration

    def pytest_unconfigure(self):
        self.seen.stop()
        self.seen.save()
        self.seen.combine([str(self.out.parent)])
        data = self.seen.get_data()
        tests = {}
        for test in self.seconds:
            for part in self.parts[test]:
                tests.setdefault(part, []).append(test)
        lines = {}
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                at = f"{Path(file).relative_to(self.tree)}:{line}"
                found = {test for context in contexts for test in tests.get(context, [])}
                lines[at] = sorted(found) + [""] * ("" in contexts)
        self.out.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))


class Chosen:
    """A plugin of pytest: only these tests, the quickest first."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        order = list(dict.fromkeys(item.path for item in items))
        items[:] = [item for item in items if item.nodeid in self.seconds]
        items.sort(key=lambda item: (order.index(item.path), self.seconds[item.nodeid]))


def recorded(tree: Path, tests: set[str], out: Path) -> dict[str, dict]:
    """-> for each file of tests, what a `Recorder` saw: stored beside `out`, and taken from there
    as long as the package and the file are the same.
    """
    stored = out.with_suffix(".reach.json")
    reach = json.loads(stored.read_text()) if stored.exists() else {}
    package = sorted((tree / "irann").rglob("*.py"))
    for test in sorted(tests):
        read = b"".join(path.read_bytes() for path in [*package, tree / test])
        state = hashlib.sha256(read).hexdigest()
        if reach.get(test, {}).get("state") == state:
            continue
        print(f"recording {test}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            seen = Path(folder) / "reach.json"
            child = os.fork()
            if not child:
                _test(tree, [test], partial(Recorder, tree, seen), "-q")
            if _verdict(child, 3600) != "survived":
                print(f"{test}: not all of its tests pass without a fault", file=sys.stderr)
            reach[test] = json.loads(seen.read_text()) | {"state": state}
        stored.write_text(json.dumps(reach))
    return reach


def tests_that_reach(fault: Fault, healthy: str, reach: dict[str, dict]) -> dict[str, float]:
    """-> those tests, and the seconds that each took."""
    lines, imported = statement(healthy, fault.line)
    found = {}
    for test in tests_of(fault.file):
        seconds = reach[test]["seconds"]
        lines_of = reach[test]["lines"]
        names = {x for i in lines for x in lines_of.get(f"{fault.file}:{i}", [])}
        if imported:  # a default, a range, a table: any test may meet it without running a line
            names = set(seconds)
        elif "" in names:  # then whatever runs something of this file may notice
            names = {
                x
                for at, found in lines_of.items()
                if at.startswith(f"{fault.file}:")
                for x in found
            } - {""}
        found |= {name: seconds[name] for name in names}
    return found


def notices(tree: Path, fault: Fault, tests: dict[str, float], limit: float) -> str:
    """-> the verdict: caught, survived, unreached by any test, or limit, where the tests did not
    end in several times their time.
    """
    if not tests:
        return "unreached"
    path = tree / fault.file
    healthy = path.read_text()
    path.write_text(fault.source)
    try:
        child = os.fork()
        if not child:
            files = [
                name for name in tests_of(fault.file) if any(x.startswith(name) for x in tests)
            ]
            _test(tree, files, partial(Chosen, tests), "-qx")
        return _verdict(child, min(limit, 30 + 5 * sum(tests.values())))
    finally:
        path.write_text(healthy)


def _test(tree: Path, tests: list[str], plugin: Callable[[], object], how: str) -> NoReturn:
    """In a process of its own, which has torch already: run the tests of the copy and exit."""
    os.setsid()
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    os._exit(int(pytest.main([*options, how, *tests], plugins=[plugin()])))


def _verdict(child: int, limit: float) -> str:
    began = time.monotonic()
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "caught"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "limit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of the package; none: all that are listed")
    parser.add_argument("--sample", type=int, help="try so many of the faults, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one fault's tests")
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    given = parser.parse_args()

    files = given.files or tried_files()
    chosen = [fault for file in files for fault in faults(file, (ROOT / file).read_text())]
    if given.sample:
        random.Random(given.seed).shuffle(chosen)
        chosen = chosen[: given.sample]
    known = {}
    if given.out.exists():
        for line in given.out.read_text().splitlines():
            row = json.loads(line)
            known[row["file"], row["line"], row["old"], row["new"]] = row["verdict"]

    import beartype  # noqa: F401  once, for all children
    import hypothesis  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        listed = ["git", "ls-files", "irann", "tests", "pyproject.toml", "book", "README.md"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        reach = recorded(
            tree, {test for fault in chosen for test in tests_of(fault.file)}, given.out
        )
        counts = {"caught": 0, "survived": 0, "unreached": 0, "limit": 0}
        for i, fault in enumerate(chosen, 1):
            key = fault[:4]
            if key not in known:
                healthy = (tree / fault.file).read_text()
                tests = tests_that_reach(fault, healthy, reach)
                known[key] = notices(tree, fault, tests, given.limit)
                row = dict(zip(("file", "line", "old", "new"), key), verdict=known[key])
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            counts[known[key]] += 1
            if known[key] != "caught":
                print(f"{known[key]}: {fault.file}:{fault.line}  {fault.old!r} -> {fault.new!r}")
            print(f"{i} of {len(chosen)}: {counts}", file=sys.stderr)


if __name__ == "__main__":
    main()
