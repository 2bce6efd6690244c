"""irann.checkpoint: whole or not there. Every fault here is caused on real files."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
import sys

import pytest
import torch
from conftest import PROGRAMS, small_disk
from helpers import apart, left_after, rng
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irann import checkpoint, machine, zoo
from irann.checkpoint import CheckpointError, DiskError, Snapshot
from irann.training import train

EVERY_FILE = [*checkpoint.FILES, "manifest.json"]


def snapshot(step=1, validation=2.0):
    weights = torch.randn(5, 3, generator=rng(step))
    return Snapshot(
        {"w": weights, "half": torch.ones(2, dtype=torch.bfloat16)},
        {"adamw.w.step": torch.tensor(3.0)},
        {"order": torch.arange(9, dtype=torch.uint8)},
        {"model": "GPT", "step": step, "validation": validation},
        "\nab",
    )


def save_run(run, *validations):
    for step, validation in enumerate(validations, start=1):
        checkpoint.save(run / "checkpoints" / f"step-{step:08d}", snapshot(step, validation))


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path / "checkpoints" / "step-00000001", snapshot())


def sign(folder, **changes):
    """Make the manifest fit whatever lies in the folder now, as someone with bad intentions
    would.
    """
    listing = {}
    for name in checkpoint.FILES:
        data = (folder / name).read_bytes()
        listing[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {"format": checkpoint.FORMAT, "files": listing} | changes
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text)


def test_what_is_saved_is_what_is_loaded(saved):
    ours, theirs = snapshot(), checkpoint.load(saved)
    for part in checkpoint.TENSORS:
        assert getattr(ours, part).keys() == getattr(theirs, part).keys()
        for name, tensor in getattr(ours, part).items():
            loaded = getattr(theirs, part)[name]
            assert tensor.dtype == loaded.dtype and torch.equal(tensor, loaded)
    assert theirs.config == ours.config and theirs.vocabulary == "\nab"
    assert sorted(p.name for p in saved.iterdir()) == sorted(EVERY_FILE)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    tied = {"one": whole, "same": whole, "row": whole[1], "turned": whole.T}
    checkpoint.save(tmp_path / "tied", dataclasses.replace(snapshot(), model=tied))
    loaded = checkpoint.load(tmp_path / "tied").model
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tied.items())


# ------------------------------------------------------------------------------------------- damage


def refused(folder, name):
    """Whether a checkpoint is refused in a sentence that names the file, or the manifest that lists
    it.
    """
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    return name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVERY_FILE)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
def test_any_changed_byte_of_any_file_is_refused_by_name(saved, name, where, byte):
    path = saved / name
    data = path.read_bytes()
    place = int(where * len(data))
    changed = data[:place] + bytes([data[place] ^ byte]) + data[place + 1 :]
    path.write_bytes(changed)
    try:
        assert refused(saved, name)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("name", EVERY_FILE)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(end=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=9))
def test_any_cut_and_any_padding_of_any_file_is_refused_by_name(saved, name, end, more):
    path = saved / name
    data = path.read_bytes()
    try:
        for wrong in (data[: int(end * len(data))], data + b"\n" + more):
            path.write_bytes(wrong)
            assert refused(saved, name)
        path.unlink()
        assert refused(saved, f"{name} is missing")
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"format": 1}, "format version 1, this irann reads version 2: train the run anew"),
        ({"format": 7}, "format version 7, this irann reads version 2"),
        ({"format": "2"}, "damaged"),
        ({"format": 2.0}, "damaged"),
        ({"files": {}}, "does not list"),
        ({"files": []}, "does not list"),
        ({"files": {"model.safetensors": 3}}, "does not list"),
        ({"more": 1}, "damaged"),
    ],
)
def test_a_well_written_manifest_of_something_else_is_refused(saved, content, reason):
    sign(saved, **content)
    assert refused(saved, reason)


def test_the_manifest_says_on_what_it_was_made_and_may_not_say_otherwise(saved):
    environment = {"torch": "2.13.0", "threads": 2}
    made = snapshot()
    checkpoint.save(
        saved, dataclasses.replace(made, config=made.config | {"environment": environment})
    )
    assert json.loads((saved / "manifest.json").read_text())["environment"] == environment
    sign(saved)  # as older ones are
    assert checkpoint.load(saved).config["environment"] == environment
    sign(saved, environment=environment | {"threads": 3})
    assert refused(saved, "its environment is not the one in config.json")


def test_a_checkpoint_of_the_first_edition_is_refused_with_a_way_out(saved):
    """Its manifest carried versions and its own hash."""
    sign(saved, format=1, environment={"torch": "2.10"}, sha256="0" * 64)
    assert refused(saved, "--overwrite") and refused(saved, "the irann that began it")


@pytest.mark.parametrize("deep", ["config.json", "manifest.json"])
def test_a_hundred_thousand_brackets_are_refused(saved, deep):
    (saved / deep).write_bytes(b"[" * 100_000)
    if deep == "config.json":
        sign(saved)
        assert checkpoint.validation_of(saved) is None
    assert refused(saved, "cannot be read" if deep == "config.json" else "is not the manifest")


class Trap:
    def __reduce__(self):
        return os.system, ("echo executed > trap",)


def test_pickles_are_refused_and_never_opened(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    for ending in ("pt", "pth", "bin", "ckpt", "safetensors"):
        path = tmp_path / f"model.{ending}"
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(CheckpointError, match=rf"model\.{ending} is a file.*never opened"):
            checkpoint.load(path)
    for i, name in enumerate(checkpoint.FILES):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(pickle.dumps(Trap(), protocol=i))
        sign(saved)
        assert refused(saved, "cannot be read")
        (saved / name).write_bytes(whole)
    assert not (tmp_path / "trap").exists()


def rewrite(folder, **changes):
    loaded = checkpoint.load(folder)
    config = loaded.config | changes.pop("config", {})
    checkpoint.save(folder, dataclasses.replace(loaded, config=config, **changes))


@pytest.fixture
def run_of_gpt(small, tmp_path):
    """A run of one step, its config, and how to go on with it."""
    config, recipe = zoo.recipe("gpt", "tiny", steps=1)
    list(train(zoo.build("gpt", config), small, recipe, run=tmp_path))

    def go_on():
        return list(train(zoo.build("gpt", config), small, recipe, run=tmp_path, resume=True))

    return tmp_path, checkpoint.listed(tmp_path)[0], go_on


def test_a_run_of_damaged_checkpoints_only_is_refused_and_stays_as_it_is(run_of_gpt):
    run, folder, go_on = run_of_gpt
    (folder / "model.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="no valid checkpoint in .*has 0 bytes.*--overwrite"):
        go_on()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_whose_recipe_has_an_older_edition_s_names_is_gone_on_with(small, tmp_path):
    how = dict(save_every=1, ema_decay=0.5, lr_schedule="constant", final_lr_factor=0.1)
    config, recipe = zoo.recipe("gpt", "tiny", steps=2, **how)
    *_, whole = train(zoo.build("gpt", config), small, recipe, run=tmp_path / "whole")
    first, *_ = train(zoo.build("gpt", config), small, recipe, run=tmp_path / "old")
    newest, folder = checkpoint.listed(tmp_path / "old")
    shutil.rmtree(newest)
    older = dataclasses.asdict(recipe)
    for now, then in dict(ema_decay="average", final_lr_factor="final_lr").items():
        older[then] = older.pop(now)
    older["decay"] = "none" if older.pop("lr_schedule") == "constant" else None
    corpus = checkpoint.config_of(folder)["corpus"]
    assert len(corpus.pop("ids")) == 64
    rewrite(folder, config={"recipe": older, "corpus": corpus})
    assert zoo.load(tmp_path / "old").card["recipe"] == dataclasses.asdict(recipe)
    *_, tick = train(zoo.build("gpt", config), small, recipe, run=tmp_path / "old", resume=True)
    assert (tick.step, tick.loss) == (whole.step, whole.loss) and first.step == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "os.system"},
        {"model": "__import__('os').system"},
        {"model": ["GPT"]},
        {"config": {"__import__": "os"}},
        {"config": {"py/object": "os.system"}},
        {"config": None},
    ],
)
def test_a_config_that_names_something_to_import_is_refused(run_of_gpt, changes):
    run, folder, go_on = run_of_gpt
    rewrite(folder, config=changes)
    with pytest.raises(CheckpointError, match="holds a .*this irann knows GPT|does not fit"):
        zoo.load(run)
    with pytest.raises(CheckpointError):
        go_on()


@pytest.mark.filterwarnings("ignore:.*not bitwise")
def test_well_signed_nonsense_is_a_sentence_or_harmless(run_of_gpt):
    """Whatever is missing from, or wrong in, files whose hashes fit."""
    run, folder, go_on = run_of_gpt
    whole = {name: (folder / name).read_bytes() for name in checkpoint.FILES}
    plain = json.loads(whole["config.json"])
    configs = [[], "text", {}]
    for name in plain:
        configs.append({key: value for key, value in plain.items() if key != name})
        configs += [plain | {name: wrong} for wrong in ("x", None, [], {})]
    for config in configs:
        (folder / "config.json").write_text(json.dumps(config))
        sign(folder)
        for work in (lambda: zoo.load(folder), go_on):
            try:
                work()
            except CheckpointError as error:
                assert "\n" not in str(error)
    (folder / "config.json").write_bytes(whole["config.json"])
    shuffled = json.loads(whole["vocabulary.json"])[::-1]
    for wrong in (shuffled, [], {}, ["ab"], ["b", "a"], ["a", "a"], "ab", 3, ["a", 3]):
        (folder / "vocabulary.json").write_text(json.dumps(wrong))
        sign(folder)
        for work in (lambda: zoo.load(folder), go_on):
            with pytest.raises(CheckpointError):
                work()


# ------------------------------------------------------------------------------- which one is taken


def test_two_newest_and_the_best_are_kept(tmp_path):
    for step, validation in enumerate([3.0, 1.0, 2.0, None, 2.5, 2.4], start=1):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", snapshot(step, validation))
        checkpoint.tidy(tmp_path)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [6, 5, 2]
    assert checkpoint.best(tmp_path)[0].name == "step-00000002"
    assert checkpoint.newest(tmp_path)[0].name == "step-00000006"


def test_a_checkpoint_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("busy")

    monkeypatch.setattr(os, "rmdir", refuse)
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", snapshot(step, None))
    checkpoint.tidy(tmp_path)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000004"


def test_only_steps_count_and_by_their_numbers(tmp_path):
    wanted = ["step-100000000", "step-00000010", "step-9"]
    for name in (*reversed(wanted), "step-00000012-copy", "step-old", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in checkpoint.listed(tmp_path)] == wanted


def test_what_is_no_loss_is_not_the_best(tmp_path):
    save_run(tmp_path, 0, *(wrong for wrong in ("1.0", [], {}, None)), 3.0)
    assert checkpoint.best(tmp_path)[1].config["validation"] == 0
    scored = checkpoint.by_validation(checkpoint.listed(tmp_path))
    assert [int(folder.name[5:]) for folder in scored] == [1, 6]


def test_a_damaged_best_does_not_push_out_the_next_best(tmp_path):
    save_run(tmp_path, 2.0, 1.0, 3.0, 3.0, 3.0)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    checkpoint.tidy(tmp_path)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [5, 4, 2, 1]
    assert checkpoint.best(tmp_path)[0].name == "step-00000001"


def test_damaged_ones_are_skipped_and_named(tmp_path):
    save_run(tmp_path, 3.0, 2.0, 1.0)
    (tmp_path / "checkpoints" / "step-00000003" / "rng.safetensors").unlink()
    folder, loaded, skipped = checkpoint.newest(tmp_path)
    assert folder.name == "step-00000002" and loaded.config["step"] == 2
    assert len(skipped) == 1 and "rng.safetensors is missing" in skipped[0]
    assert checkpoint.best(tmp_path)[0].name == "step-00000002"
    for folder in checkpoint.listed(tmp_path)[1:]:
        (folder / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.best(tmp_path)
    assert [str(caught.value).count(f"step-0000000{i}") for i in (1, 2, 3)] == [1, 1, 1]
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet; wait .* \(--resume\)"):
        checkpoint.newest(tmp_path)


def test_one_that_may_have_been_the_best_is_named(tmp_path):
    save_run(tmp_path, 2.0, 1.0, 3.0)
    (tmp_path / "checkpoints" / "step-00000002" / "config.json").write_bytes(b"")
    folder, _, (reason,) = checkpoint.best(tmp_path)
    assert folder.name == "step-00000001" and "step-00000002/config.json has 0 bytes" in reason


def test_where_all_are_damaged_the_way_out_is_to_begin_anew(tmp_path):
    save_run(tmp_path, 3.0)
    (tmp_path / "checkpoints" / "step-00000001" / "rng.safetensors").unlink()
    message = r"no valid checkpoint in .*rng.safetensors is missing; train it anew \(--overwrite\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.newest(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_others_may_read_a_checkpoint_as_the_umask_has_it(tmp_path):
    before = os.umask(0o027)
    try:
        save_run(tmp_path, 3.0)
        machine.write_atomically(tmp_path / "corpus.txt", b"text")
    finally:
        os.umask(before)
    (folder,) = checkpoint.listed(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "corpus.txt").stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "corpus.txt"]


def test_a_new_checkpoint_survives_older_damaged_ones_with_higher_numbers(run_of_gpt, small):
    """What is saved after falling back must not be tidied away behind them."""
    run, folder, _ = run_of_gpt
    config, recipe = zoo.recipe("gpt", "tiny", steps=4)
    rewrite(folder, config={"recipe": dataclasses.asdict(recipe)})
    for step in (7, 8):
        shutil.copytree(folder, folder.with_name(f"step-{step:08d}"))
        (folder.with_name(f"step-{step:08d}") / "model.safetensors").write_bytes(b"")
    (tick,) = left_after(1, train(zoo.build("gpt", config), small, recipe, run=run, resume=True))
    assert tick.step == 2 and len(tick.notes) == 3
    for step, note in zip((8, 7), tick.notes):  # the newest first
        assert note.startswith(f"skipped, and set aside as skipped-step-0000000{step}: ")
        assert f"/step-0000000{step}/model.safetensors has 0 bytes" in note
    assert checkpoint.newest(run)[1].config["step"] == 2
    assert len(list((run / "checkpoints").glob("skipped-*"))) == 2
    with pytest.raises(DiskError, match="step-00000099 cannot be renamed"):
        checkpoint.set_aside(run / "checkpoints" / "step-00000099")


def test_a_checkpoint_may_be_set_aside_a_second_time(tmp_path, saved):
    for step in (1, 2):
        name = checkpoint.set_aside(checkpoint.save(saved, snapshot(step)))
    assert os.listdir(saved.parent) == [name] == ["skipped-step-00000001"]
    assert checkpoint.load(saved.parent / name).config["step"] == 2


def test_only_nothing_and_a_checkpoint_may_be_replaced(tmp_path, saved):
    for name in ("empty", "full", "versioned"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "versioned" / "manifest.json").write_text('{"format": "2", "files": {}}')
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("nowhere", "empty", saved):
        assert checkpoint.replaceable(tmp_path / name)
    for name in ("full", "versioned", "link"):
        assert not checkpoint.replaceable(tmp_path / name)


# ---------------------------------------------------------------------------------- disks and kills


def test_the_reason_of_a_failed_write_is_told_in_words():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert checkpoint.why(OSError(number, "x")) == "the disk is full: free some space"
    assert checkpoint.why(PermissionError(13, "Permission denied", "a")) == "Permission denied"
    assert checkpoint.why(OSError("no reason")) == "no reason"


def test_all_that_is_written_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, sync = [], os.fsync

    def watched(handle):
        flushed.append(os.fstat(handle))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    saved = checkpoint.save(tmp_path / "checkpoints" / "step-00000001", snapshot())
    wanted = [p.stat().st_ino for p in (*saved.iterdir(), saved, saved.parent)]
    assert sorted(f.st_ino for f in flushed) == sorted(wanted)
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


@pytest.mark.parametrize("fault", [PermissionError(13, "in use"), KeyboardInterrupt()])
def test_a_model_of_any_name_outlives_a_failed_replacement(tmp_path, monkeypatch, fault):
    moves, move = [], os.rename

    def stuck(source, target):
        moves.append(source)
        if len(moves) == 2:
            raise fault
        move(source, target)

    mine = checkpoint.save(tmp_path / "mine[1]", snapshot(1, 1.0))
    with monkeypatch.context() as patch, pytest.raises((DiskError, KeyboardInterrupt)):
        patch.setattr(os, "rename", stuck)
        checkpoint.save(mine, snapshot(2, 2.0))
    assert checkpoint.load(mine).config["step"] == 1
    assert os.listdir(tmp_path) == ["mine[1]"]
    os.mkdir(tmp_path / ".unfinished-0")
    os.rename(mine, tmp_path / ".unfinished-0/mine[1]")  # as a kill between two renames leaves it
    assert checkpoint.load(checkpoint.found(mine)).config["step"] == 1
    newer = checkpoint.save(mine, snapshot(2, 2.0))
    assert checkpoint.found(mine) == newer and checkpoint.found(tmp_path / "no") == tmp_path / "no"
    assert os.listdir(tmp_path) == ["mine[1]"]  # nothing older comes back when it is removed


@pytest.mark.parametrize("put_back", [True, False])
def test_a_failed_replacement_leaves_the_old_one(tmp_path, saved, monkeypatch, put_back):
    moves, move = [], os.rename

    def stuck(source, target):
        moves.append(source)
        if len(moves) == 2 or (len(moves) > 2 and not put_back):
            raise OSError(5, "input/output error")
        move(source, target)

    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskError, match="the older ones are intact"),
    ):
        patch.setattr(os, "rename", stuck)
        checkpoint.save(saved, snapshot(1, 1.0))
    if not put_back:
        assert checkpoint.listed(tmp_path) == [] and checkpoint.sweep(tmp_path) == 1
    assert checkpoint.newest(tmp_path)[0] == saved
    assert not list(saved.parent.glob(".unfinished*"))


def test_what_a_kill_left_is_swept_and_what_it_moved_is_put_back(tmp_path, saved):
    (saved.parent / ".unfinished-abc").mkdir()
    (saved.parent / ".unfinished-def").mkdir()
    saved.rename(saved.parent / ".unfinished-def" / saved.name)
    assert checkpoint.listed(tmp_path) == []
    assert checkpoint.sweep(tmp_path) == 2 and checkpoint.newest(tmp_path)[0] == saved
    assert not list(saved.parent.glob(".unfinished*"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, saved):
    big = Snapshot({"w": torch.zeros(100_000)}, {}, {}, {"step": 2}, "ab")
    with small_disk(20_000), pytest.raises(DiskError, match="disk is full"):
        checkpoint.save(tmp_path / "checkpoints" / "step-00000002", big)
    assert checkpoint.newest(tmp_path)[0] == saved
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_killed_at_random_moments_the_newest_is_valid(tmp_path):
    """One process after the other is killed (SIGKILL) while it does nothing but save."""
    assert apart(PROGRAMS / "saver.py", tmp_path).stdout.count("survived") == 10


def test_whether_the_kernel_can_be_had_is_part_of_the_environment(monkeypatch):
    monkeypatch.delenv("IRANN_KERNEL", raising=False)
    for there in (f"{sys.executable} -some-option", f"'{sys.executable}'"):
        monkeypatch.setenv("CC", there)  # a program that there is
        assert checkpoint.environment()["kernel"] is True
    for nowhere in ("/no/such/compiler", "no 'such"):
        monkeypatch.setenv("CC", nowhere)
        assert checkpoint.environment()["kernel"] is False
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setenv("IRANN_KERNEL", "0")
    assert checkpoint.environment()["kernel"] is False
