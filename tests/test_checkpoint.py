"""irann.checkpoint: whole or not there. Every fault here is caused on real files."""

import json
import os
import pickle
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch

from irann import checkpoint, zoo
from irann.checkpoint import CheckpointError, DiskError, Snapshot
from irann.training import train


def snapshot(step=1, validation=2.0):
    tensors = {
        "w": torch.randn(5, 3, generator=torch.Generator().manual_seed(step)),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    config = {"model": "GPT", "step": step, "validation": validation}
    return Snapshot(
        tensors,
        {"0.0.step": torch.tensor(3.0)},
        {"order": torch.arange(9, dtype=torch.uint8)},
        config,
        "\nab",
    )


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path / "checkpoints" / "step-00000001", snapshot())


def test_what_is_saved_is_what_is_loaded(saved):
    ours, theirs = snapshot(), checkpoint.load(saved)
    for part in checkpoint.TENSORS:
        assert getattr(ours, part).keys() == getattr(theirs, part).keys()
        for name, tensor in getattr(ours, part).items():
            assert tensor.dtype == getattr(theirs, part)[name].dtype and torch.equal(
                tensor, getattr(theirs, part)[name]
            )
    assert (
        theirs.config == ours.config
        and theirs.vocabulary == "\nab"
        and theirs.environment == checkpoint.environment()
    )
    assert sorted(p.name for p in saved.iterdir()) == sorted((*checkpoint.FILES, "manifest.json"))


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("fault", ["truncated", "empty", "padded", "bit flipped", "missing"])
def test_a_damaged_file_is_refused_by_name(saved, name, fault):
    path = saved / name
    data = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(
            {
                "truncated": data[:middle],
                "empty": b"",
                "padded": data + b"\0",
                "bit flipped": flipped,
            }[fault]
        )
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.load(saved)


def test_every_bit_of_the_manifest_counts(saved):
    path = saved / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.load(saved)


def test_another_format_version_is_named(saved):
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    (saved / "manifest.json").write_bytes(checkpoint._manifest(content | {"format": 2}))
    with pytest.raises(CheckpointError, match="format version 2, this irann reads version 1"):
        checkpoint.load(saved)


@pytest.mark.parametrize("size", [None, "12", {}])
def test_a_size_that_is_no_number_is_refused(saved, size):
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    content["files"]["rng.safetensors"]["size"] = size
    (saved / "manifest.json").write_bytes(checkpoint._manifest(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list rng\.safetensors"):
        checkpoint.load(saved)


def test_an_environment_that_is_none_is_refused(saved):
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    (saved / "manifest.json").write_bytes(checkpoint._manifest(content | {"environment": "x"}))
    with pytest.raises(CheckpointError, match="is not the manifest of a checkpoint"):
        checkpoint.load(saved)


def test_a_hundred_thousand_brackets_are_refused(saved, monkeypatch):
    deep = b"[" * 100_000
    monkeypatch.setattr(
        checkpoint,
        "_json",
        lambda value, plain=checkpoint._json: deep if "step" in value else plain(value),
    )
    checkpoint.save(saved, snapshot())
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(saved)
    assert checkpoint.validation_of(saved) is None
    (saved / "manifest.json").write_bytes(deep)
    with pytest.raises(CheckpointError, match="is not the manifest of a checkpoint"):
        checkpoint.load(saved)


class Trap:
    def __reduce__(self):
        return os.system, ("echo executed > trap",)


def test_pickle_is_refused_and_never_opened(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"model\.pt is a file.*never opened"):
        checkpoint.load(tmp_path / "model.pt")
    (saved / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    manifest = json.loads((saved / "manifest.json").read_bytes())  # even one that someone signed
    manifest.pop("sha256")
    import hashlib

    data = (saved / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (saved / "manifest.json").write_bytes(checkpoint._manifest(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(saved)
    assert not (tmp_path / "trap").exists()


def resigned(folder, **changes):
    """Change config.json and sign it anew, as someone with bad intentions would."""
    loaded = checkpoint.load(folder)
    config = loaded.config | changes
    checkpoint.save(
        folder, Snapshot(loaded.model, loaded.optimizer, loaded.rng, config, loaded.vocabulary)
    )


def test_a_config_that_names_something_to_import_is_refused(small, tmp_path):
    config, recipe = zoo.recipe("gpt", "tiny", steps=1)
    *_, tick = train(zoo.build("gpt", config), small, recipe, run=tmp_path)
    resigned(tick.saved, model="os.system")
    with pytest.raises(CheckpointError, match=r"holds a 'os\.system'; this irann knows GPT"):
        zoo.load(tmp_path)
    resigned(tick.saved, model="GPT", config={"nll": "__import__('os')"})
    with pytest.raises(CheckpointError, match="does not fit"):
        zoo.load(tmp_path)


def test_two_newest_and_the_best_are_kept(tmp_path):
    for step, validation in enumerate([3.0, 1.0, 2.0, None, 2.5, 2.4], start=1):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", snapshot(step, validation))
        checkpoint.tidy(tmp_path)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [6, 5, 2]
    assert (
        checkpoint.best(tmp_path)[0].name == "step-00000002"
        and checkpoint.newest(tmp_path)[0].name == "step-00000006"
    )


def test_only_steps_count_and_by_their_numbers(tmp_path):
    for name in (
        "step-9",
        "step-00000010",
        "step-100000000",
        "step-00000012-copy",
        "step-old",
        "step-",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in checkpoint.listed(tmp_path)] == [
        "step-100000000",
        "step-00000010",
        "step-9",
    ]


def test_a_damaged_best_does_not_push_out_the_next_best(tmp_path):
    for step, validation in enumerate([2.0, 1.0, 3.0, 3.0, 3.0], start=1):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", snapshot(step, validation))
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    checkpoint.tidy(tmp_path)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [5, 4, 2, 1]
    assert checkpoint.best(tmp_path)[0].name == "step-00000001"


def test_all_that_is_written_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(os.fstat(handle)), sync(handle))
    )
    saved = checkpoint.save(tmp_path / "checkpoints" / "step-00000001", snapshot())
    assert sorted(f.st_ino for f in flushed) == sorted(
        p.stat().st_ino for p in (*saved.iterdir(), saved, saved.parent)
    )
    assert all(f.st_size or stat.S_ISDIR(f.st_mode) for f in flushed)


def test_a_kill_while_one_is_replaced_leaves_one(tmp_path, saved, monkeypatch):
    remove = shutil.rmtree

    def killed(folder, **options):
        remove(folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoint.save(saved, snapshot(1, 1.0))
    assert checkpoint.newest(tmp_path)[1].config["validation"] == 1.0


def test_a_failed_or_killed_replacement_leaves_the_old_one(tmp_path, saved, monkeypatch):
    moves, move = [], os.rename

    def stuck(source, target):
        moves.append(source)
        if len(moves) == 2:  # the old one is out of the way, the new one does not come
            raise OSError(5, "input/output error")
        move(source, target)

    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskError, match="the older ones are intact"),
    ):
        patch.setattr(os, "rename", stuck)
        checkpoint.save(saved, snapshot(1, 1.0))
    assert (
        len(moves) == 3
        and checkpoint.newest(tmp_path)[0] == saved
        and not list(saved.parent.glob(".unfinished*"))
    )

    def broken(source, target):
        moves.append(source)
        if len(moves) > 1:  # nor can the old one be put back
            raise OSError(5, "input/output error")
        move(source, target)

    moves.clear()
    with monkeypatch.context() as patch, pytest.raises(DiskError):
        patch.setattr(os, "rename", broken)
        checkpoint.save(saved, snapshot(1, 1.0))
    assert checkpoint.listed(tmp_path) == []
    checkpoint.sweep(tmp_path)
    assert checkpoint.newest(tmp_path)[0] == saved

    (saved.parent / ".unfinished-abc").mkdir()
    saved.rename(
        saved.parent / ".unfinished-abc" / saved.name
    )  # killed there, nothing could put it back
    assert checkpoint.listed(tmp_path) == []
    assert checkpoint.sweep(tmp_path) == 1 and checkpoint.newest(tmp_path)[0] == saved


def test_damaged_ones_are_skipped_and_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", snapshot(step, 4.0 - step))
    (tmp_path / "checkpoints" / "step-00000003" / "rng.safetensors").unlink()
    folder, loaded, skipped = checkpoint.newest(tmp_path)
    assert folder.name == "step-00000002" and loaded.config["step"] == 2
    assert len(skipped) == 1 and "rng.safetensors is missing" in skipped[0]
    assert checkpoint.best(tmp_path)[0].name == "step-00000002"
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint in .*; train it anew \(--overwrite\)"
    ):
        checkpoint.newest(tmp_path)


def test_what_a_kill_left_is_swept(tmp_path, saved):
    (tmp_path / "checkpoints" / ".unfinished-abc").mkdir()
    assert checkpoint.listed(tmp_path) == [saved]
    assert checkpoint.sweep(tmp_path) == 1 and not list(
        (tmp_path / "checkpoints").glob(".unfinished*")
    )


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, saved):
    """A limit on file sizes makes the write fail half-way, for real, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = Snapshot({"w": torch.zeros(100_000)}, {}, {}, {"step": 2}, "ab")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DiskError, match="disk is full"):
            checkpoint.save(tmp_path / "checkpoints" / "step-00000002", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path)[0] == saved and os.listdir(tmp_path / "checkpoints") == [
        "step-00000001"
    ]


SAVER = """
import sys, torch
from pathlib import Path
from irann import checkpoint
run = Path(sys.argv[1])
step = 0
while True:
    step += 1
    tensors = {"w": torch.full((200, 1000), float(step))}
    saved = checkpoint.Snapshot(tensors, {}, {}, {"step": step, "validation": None}, "ab")
    checkpoint.save(run / "checkpoints" / f"step-{step:08d}", saved)
    checkpoint.tidy(run)
    print(step, flush=True)
"""


def test_killed_at_random_moments_the_newest_is_valid(tmp_path):
    """One process after the other is killed (SIGKILL) while it does nothing but save."""
    import random
    import time

    rng = random.Random(0)
    for attempt in range(2):
        run = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(run)], stdout=subprocess.PIPE, text=True
        ) as saver:
            first = int(saver.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.05))
            saver.kill()
            done = [first, *(int(line) for line in saver.stdout.read().split())]
        folder, loaded, skipped = checkpoint.newest(run)
        assert (
            not skipped and loaded.config["step"] >= done[-1]
        )  # nothing that was announced as saved is lost
        assert (loaded.model["w"] == loaded.config["step"]).all()
