"""irann.train and irann.muon: the loop, its promises, and what interrupts it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from irann import checkpoint, zoo
from irann.checkpoint import CheckpointError, DiskError, Snapshot
from irann.training.muon import Muon, orthogonalise
from irann.text import Text, Vocabulary
from irann.training import (
    InUse,
    NotFinite,
    Recipe,
    RunError,
    Trainer,
    evaluate,
    optimizers,
    progress,
    train,
)


def tiny(**changes):
    config, recipe = zoo.recipe("gpt", "tiny", **changes)
    return zoo.build("gpt", config), recipe


def test_ticks(small):
    model, recipe = tiny(steps=4)
    ticks = list(train(model, small, recipe))
    assert [t.step for t in ticks] == [1, 2, 3, 4] and ticks[-1].characters == 4 * 8 * 32
    assert all(
        t.chars_per_second > 0 and t.gradient > 0 and t.parts["nats_per_char"] == t.loss
        for t in ticks
    )
    assert (
        ticks[0].validation is None and ticks[-1].validation == evaluate(model, small).nats_per_char
    )
    assert list(progress(iter(ticks), 4, disable=True)) == ticks


def test_the_rate_warms_up_and_falls():
    for decay, middle in (("linear", 0.5), ("cosine", 0.5), ("none", 1.0)):
        recipe = Recipe(steps=110, warmup=10, decay=decay)
        assert [recipe.rate(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0] and recipe.rate(10) == 1.0
        assert recipe.rate(60) == pytest.approx(middle)
    assert Recipe(steps=110, warmup=10, final_lr=0.1).rate(109) == pytest.approx(0.1 + 0.9 * 0.01)


def test_the_rate_reaches_the_optimizers(small):
    model, recipe = tiny(steps=10, warmup=2, optimizer="muon", muon_lr=0.5, lr=0.1)
    trainer = Trainer(model, small, recipe)
    trainer.advance()
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.05, 0.25]


def test_evaluate_scores_every_character_once(corpus):
    """Against a model whose nll is the character's own place: the sum tells which were scored, and how often."""

    class Places(torch.nn.Module):
        exact, config, device = (
            True,
            dataclasses.make_dataclass("C", ["window"])(window=7),
            torch.device("cpu"),
        )

        def nll(self, ids, generator=None):
            seen.append(ids)
            return ids[:, 1:].double()

    for length in (5, 7, 14, 100, 101):
        seen = []
        text = Text(torch.tensor([1000, 2000]), torch.arange(length), corpus.vocabulary)
        score = evaluate(Places(), text, batch=4)
        assert score.characters == length and score.nats_per_char == pytest.approx((length - 1) / 2)
        assert seen[0][0, 0] == 2000  # the first is predicted from the end of the training part
        assert sorted(i for page in seen for row in page[:, 1:].tolist() for i in row) == list(
            range(length)
        )


def test_evaluate_equals_a_plain_sum_and_disturbs_nothing(small):
    model, _ = tiny()
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    score = evaluate(model, small)
    assert model.training and torch.equal(torch.rand(2), expected)
    model.eval()
    ids = torch.cat([small.train[-1:], small.val])
    total = 0.0
    for start in range(0, len(small.val), 32):
        page = ids[None, start : start + 33]
        total -= model(page[:, :-1]).log_softmax(-1).gather(-1, page[:, 1:, None]).sum().item()
    assert score.nats_per_char == pytest.approx(total / len(small.val), abs=1e-6)
    assert score.bits_per_char == pytest.approx(
        score.nats_per_char / math.log(2)
    ) and "exact" not in str(score)


def test_the_standard_error_is_that_of_a_mean_over_windows(corpus):
    """Windows whose nll is 1, 2, 3 and 4: a variance of 1.25, and three windows beside the one that fixes the mean."""

    class Stairs(torch.nn.Module):
        exact, config, device = (
            False,
            dataclasses.make_dataclass("C", ["window"])(window=5),
            torch.device("cpu"),
        )

        def nll(self, ids, generator=None):
            return ids[:, 1:] // 5 + 1.0

    text = Text(torch.tensor([0]), torch.arange(20), corpus.vocabulary)
    assert evaluate(Stairs(), text, batch=3).standard_error == pytest.approx(math.sqrt(1.25 / 3))


def test_accumulation_gives_the_same_gradient(small):
    one, recipe = tiny(batch=8, clip=0)
    four, _ = tiny()
    a, b = (
        Trainer(one, small, recipe),
        Trainer(four, small, dataclasses.replace(recipe, accumulate=4)),
    )
    first, second = a.advance(), b.advance()
    assert first.loss == pytest.approx(second.loss, abs=1e-6) and first.gradient == pytest.approx(
        second.gradient, rel=1e-4
    )


def test_clipping_bounds_the_gradient(small):
    model, recipe = tiny(clip=0.01, optimizer="adamw")
    norms = []
    trainer = Trainer(model, small, recipe)
    trainer.optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(
            torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        )
    )
    tick = trainer.advance()
    assert tick.gradient > 0.01 and norms == [pytest.approx(0.01, rel=1e-3)]


def test_resume_after_each_kind_of_stop_is_bitwise_with_dropout_and_average(small, tmp_path):
    changes = {"steps": 9, "dropout": 0.3, "average": 0.9, "save_every": 2, "evaluate_every": 4}
    model, recipe = tiny(**changes)
    straight = [t.loss for t in train(model, small, recipe)]
    again, _ = tiny(**changes)
    stream, losses = train(again, small, recipe, run=tmp_path), []
    for tick in stream:
        losses.append(tick.loss)
        if tick.step == 5:
            stream.close()  # what a break in a notebook's loop does
            break
    assert checkpoint.listed(tmp_path)[0].name == "step-00000005"
    third, _ = tiny(**changes)
    rest = list(train(third, small, recipe, run=tmp_path, resume=True))
    assert losses + [t.loss for t in rest] == straight and any(
        "resumed from" in note for note in rest[0].notes
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), third.state_dict().values())
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10)) and [
        row["loss"] for row in rows
    ] == straight


def test_averaged_weights_are_what_is_measured_and_loaded(small, tmp_path):
    model, recipe = tiny(steps=6, average=0.5)
    *_, tick = train(model, small, recipe, run=tmp_path)
    assert (
        evaluate(model, small).nats_per_char
        == tick.validation
        == evaluate(zoo.load(tmp_path), small).nats_per_char
    )
    raw = checkpoint.load(tick.saved).model
    assert any(not torch.equal(raw[name], p) for name, p in model.state_dict().items())


def test_the_average_by_hand(small):
    model, recipe = tiny(average=0.3)
    trainer = Trainer(model, small, recipe)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(1, 7):
        trainer.advance()
        decay = min(0.3, step / (step + 10))
        expected = {
            n: decay * expected[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()
        }
    for name, p in trainer.average.items():
        torch.testing.assert_close(p, expected[name])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_recipe(small, monkeypatch, precision):
    model, recipe = tiny(precision=precision)
    loss, mixed = model.loss, []
    monkeypatch.setattr(
        model, "loss", lambda ids: (mixed.append(torch.is_autocast_enabled("cpu")), loss(ids))[1]
    )
    Trainer(model, small, recipe).advance()
    assert mixed == [precision == "bfloat16"]


def test_sigint_ends_the_step_and_saves(small, tmp_path):
    model, recipe = tiny(steps=50)
    before = signal.getsignal(signal.SIGINT)
    ticks = []
    for tick in train(model, small, recipe, run=tmp_path):
        ticks.append(tick)
        if tick.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert (
        ticks[-1].interrupted == signal.SIGINT
        and ticks[-1].step == 4
        and ticks[-1].saved.name == "step-00000004"
    )
    assert signal.getsignal(signal.SIGINT) is before
    model(small.val[None, :5])  # still usable


def test_training_that_goes_on_in_a_second_cell_still_saves(small, tmp_path, monkeypatch):
    """A kernel gives Ctrl-C back to Python before each cell: the generator of an earlier cell must take it again."""
    model, recipe = tiny(steps=50)
    stream, loss, step = train(model, small, recipe, run=tmp_path), model.loss, 0
    next(stream), next(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(ids):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(ids)

    monkeypatch.setattr(model, "loss", interrupted)
    for tick in stream:
        step = tick.step
    assert tick.interrupted == signal.SIGINT and step == 4 and tick.saved.name == "step-00000004"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_vocabulary_of_the_same_size_is_refused(small, tmp_path):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe))
    other = Text(
        small.train,
        small.val,
        Vocabulary("".join(map(chr, range(0x400, 0x400 + len(small.vocabulary))))),
        "Cyrillic",
        "",
    )
    anew = lambda: list(
        train(model, other, recipe, run=tmp_path / "new", resume=True)
    )  # nothing is there that could be resumed
    for work in (lambda: evaluate(model, other), lambda: list(train(model, other, recipe)), anew):
        with pytest.raises(
            ValueError,
            match=r"not those that the model was trained on: .* vocabulary=model.vocabulary",
        ):
            work()
    list(train(tiny()[0], other, recipe, run=tmp_path / "other"))
    with pytest.raises(checkpoint.CheckpointError, match="or start another run"):
        list(train(model, small, recipe, run=tmp_path / "other", resume=True))
    assert model.vocabulary == small.vocabulary


def test_a_hangup_that_is_ignored_stays_ignored(small):
    """As under nohup."""
    model, recipe = tiny(steps=3)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ticks = [
            (tick, os.kill(os.getpid(), signal.SIGHUP))[0] for tick in train(model, small, recipe)
        ]
        assert len(ticks) == 3 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("by", ["a signal", "a fault"])
def test_a_validation_that_was_cut_off_is_made_up_for(small, tmp_path, monkeypatch, by):
    def run(name, **options):
        model, recipe = tiny(steps=6, evaluate_every=2)
        return train(model, small, recipe, run=tmp_path / name, **options)

    def told(name):
        rows = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        return [(row["step"], row["loss"], row.get("validation")) for row in rows]

    list(run("straight"))
    stream = run("cut")
    next(stream)
    if by == "a signal":
        os.kill(os.getpid(), signal.SIGTERM)
        assert next(stream).interrupted == signal.SIGTERM
    else:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Trainer, "validate", lambda self: 1 / 0)
            next(stream)
    stopped = checkpoint.newest(tmp_path / "cut")[0]
    assert (
        stopped.name == "step-00000002"
        and checkpoint.validation_of(stopped) is None
        and len(told("cut")) == 2
    )
    stream = run("cut", resume=True)
    next(stream)
    assert checkpoint.validation_of(stopped) == told("straight")[1][2]
    list(stream)
    assert told("cut") == told("straight")
    assert [checkpoint.validation_of(p) for p in checkpoint.listed(tmp_path / "cut")] == [
        checkpoint.validation_of(p) for p in checkpoint.listed(tmp_path / "straight")
    ]


def test_a_step_is_told_before_it_is_saved(small, tmp_path, monkeypatch):
    """A kill between the two would leave a run that is done, and its last line missing."""
    model, recipe = tiny(steps=4, save_every=2)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream), next(stream), next(stream)

    def full(folder, snapshot):
        raise DiskError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(DiskError):
        patch.setattr(checkpoint, "save", full)
        next(stream)
    assert "validation" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])
    assert [tick.step for tick in train(tiny()[0], small, recipe, run=tmp_path, resume=True)] == [
        3,
        4,
    ]
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]


def test_a_second_sigint_quits_at_once(small):
    model, recipe = tiny(steps=50)
    with pytest.raises(KeyboardInterrupt):
        for _ in train(model, small, recipe):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_a_thread_leaves_signals_alone(small):
    model, recipe = tiny(steps=2)
    ticks = []
    thread = threading.Thread(target=lambda: ticks.extend(train(model, small, recipe)))
    thread.start()
    thread.join()
    assert len(ticks) == 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_the_update(small, tmp_path, where):
    model, recipe = tiny(steps=9, save_every=1)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream), next(stream)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    plain = model.loss

    def broken(ids):
        loss, parts = plain(ids)
        return (
            loss * math.nan
            if where == "loss"
            else loss + (model.embed.weight.sum() * 0).sqrt() * 1.0
        ), parts

    model.loss = broken
    with pytest.raises(
        NotFinite, match=r"at step 3 the loss is .* gradient's norm nan, learning rate"
    ):
        next(stream)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert checkpoint.newest(tmp_path)[1].config["step"] == 2
    with pytest.raises(StopIteration):
        next(stream)


def test_a_run_directory_holds_one_run(small, tmp_path):
    model, recipe = tiny(steps=2)
    list(train(model, small, recipe, run=tmp_path))
    with pytest.raises(RunError, match="holds another run; resume it"):
        list(train(model, small, recipe, run=tmp_path))
    assert list(train(model, small, recipe, run=tmp_path, resume=True)) == []
    before = checkpoint.listed(tmp_path)
    with pytest.raises(ValueError, match="beta"):  # what is refused costs nothing
        list(
            train(
                model, small, dataclasses.replace(recipe, beta1=1.0), run=tmp_path, overwrite=True
            )
        )
    assert checkpoint.listed(tmp_path) == before
    assert len(list(train(model, small, recipe, run=tmp_path, overwrite=True))) == 2
    with pytest.raises(ValueError, match="exclude"):
        train(model, small, recipe, run=tmp_path, resume=True, overwrite=True)


def test_a_run_that_cannot_be_removed_is_not_begun_anew(small, tmp_path):
    model, recipe = tiny(steps=2)
    (tmp_path / "checkpoints").write_text("a file, which no folder can replace")
    with pytest.raises(DiskError, match=r"run directory .* cannot be written \(Not a directory\)"):
        next(train(model, small, recipe, run=tmp_path, overwrite=True))


def test_two_trainers_one_directory(small, tmp_path):
    model, recipe = tiny(steps=3)
    first = train(model, small, recipe, run=tmp_path)
    next(first)
    with pytest.raises(InUse, match=f"in use by process {os.getpid()} on "):
        next(train(tiny()[0], small, recipe, run=tmp_path))
    first.close()
    assert not (tmp_path / "owner.txt").exists()
    assert list(train(model, small, recipe, run=tmp_path, resume=True))


def test_resume_refuses_what_does_not_fit_and_names_both(small, tmp_path):
    model, recipe = tiny(steps=2)
    list(train(model, small, recipe, run=tmp_path))

    def resume(model, text, recipe):
        with pytest.raises(CheckpointError) as caught:
            list(train(model, text, recipe, run=tmp_path, resume=True))
        return str(caught.value)

    wide, _ = tiny(width=64)
    assert "width = 32, asked for is width = 64" in resume(wide, small, recipe)
    assert "lr = 0.003, asked for is lr = 0.1" in resume(
        model, small, dataclasses.replace(recipe, lr=0.1)
    )
    other = Text(small.train, small.val, small.vocabulary, "another excerpt", "1" * 64)
    message = resume(model, other, recipe)
    assert "000000000000" in message and "another excerpt, 111111111111" in message
    longer = Text(
        torch.cat([small.train, small.val]), small.val, small.vocabulary, small.source, small.sha256
    )
    assert f"first {len(small.train):,} characters" in resume(model, longer, recipe)
    forth, back = (
        Text(ids, small.val, small.vocabulary) for ids in (small.train, small.train.flip(0))
    )  # no hash, equal lengths
    list(train(tiny(steps=2)[0], forth, recipe, run=tmp_path / "ids"))
    assert list(train(tiny(steps=2)[0], forth, recipe, run=tmp_path / "ids", resume=True)) == []
    with pytest.raises(CheckpointError, match="trained on another text"):
        list(train(tiny(steps=2)[0], back, recipe, run=tmp_path / "ids", resume=True))
    longhand = small.vocabulary.decode(small.train)
    forth, back = (
        Text.of(page, vocabulary=small.vocabulary) for page in (longhand, longhand[::-1])
    )  # the same characters
    list(train(tiny(steps=2)[0], forth, recipe, run=tmp_path / "forth"))
    with pytest.raises(CheckpointError, match="trained on another text"):
        list(train(tiny(steps=2)[0], back, recipe, run=tmp_path / "forth", resume=True))
    shuffled = type(small.vocabulary)("".join(chr(200 + i) for i in range(65)))
    assert "knows the characters" in resume(
        model, Text(small.train, small.val, shuffled, "x", small.sha256), recipe
    )


def test_resume_falls_back_and_says_so(small, tmp_path):
    model, recipe = tiny(steps=6, save_every=2, evaluate_every=2)
    *_, _tick = train(model, small, recipe, run=tmp_path)
    newest = checkpoint.listed(tmp_path)[0]
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-5])
    ticks = list(train(tiny()[0], small, recipe, run=tmp_path, resume=True))
    assert [t.step for t in ticks] == [5, 6]
    assert "model.safetensors has" in ticks[0].notes[0] and "step-00000004" in ticks[0].notes[1]


def test_why_one_was_skipped_is_told_although_no_step_follows(small, tmp_path):
    model, recipe = tiny(steps=6, save_every=2)
    list(train(model, small, recipe, run=tmp_path))
    (checkpoint.listed(tmp_path)[0] / "rng.safetensors").unlink()
    model.loss = lambda ids: 1 / 0
    with pytest.warns(
        UserWarning, match=r"set aside as skipped-step-00000006: .*rng\.safetensors is missing"
    ):
        with pytest.raises(ZeroDivisionError):
            next(train(model, small, recipe, run=tmp_path, resume=True))


@pytest.mark.parametrize(
    "name, what, value",
    [
        ("python", "platform.python_version", lambda: "2.7"),
        ("torch", "torch.__version__", "1.0"),
        ("threads", "torch.get_num_threads", lambda: 64),
        ("machine", "platform.machine", lambda: "an abacus"),
        ("cpu", "torch.backends.cpu.get_cpu_capability", lambda: "beads"),
        ("kernel", "os.environ", os.environ | {"IRANN_KERNEL": "0"}),
        ("gpu", None, None),
        ("compile", None, None),
    ],
)
def test_another_machine_is_warned_of(small, tmp_path, monkeypatch, name, what, value):
    model, recipe = tiny(steps=2)
    describe, gpu = Trainer.describe, "a slate"
    monkeypatch.setattr(Trainer, "describe", lambda self: describe(self) | {"gpu": gpu})
    monkeypatch.setattr(torch, "compile", lambda call: call)
    monkeypatch.setitem(os.environ, "IRANN_KERNEL", "1")
    monkeypatch.setitem(os.environ, "CC", sys.executable)  # anything that is there
    stream = train(model, small, recipe, run=tmp_path)
    next(stream)
    stream.close()
    if what:
        monkeypatch.setattr(what, value)
    elif name == "gpu":
        gpu = "an abacus"
    else:
        recipe = dataclasses.replace(recipe, compile=True)
    with pytest.warns(
        UserWarning, match=f"saved with {name} .*, here it is .*: not bitwise"
    ) as told:
        list(train(model, small, recipe, run=tmp_path, resume=True))
    assert len(told) == 1


def test_what_an_older_checkpoint_did_not_note_is_no_difference(small, tmp_path, recwarn):
    model, recipe = tiny(steps=1)
    *_, tick = train(model, small, recipe, run=tmp_path)
    content = json.loads((tick.saved / "manifest.json").read_bytes()) | {
        "environment": {"torch": torch.__version__}
    }
    content.pop("sha256")
    (tick.saved / "manifest.json").write_bytes(checkpoint._manifest(content))
    assert list(train(model, small, recipe, run=tmp_path, resume=True)) == [] and not recwarn.list


def test_resuming_on_mps_is_said_not_to_be_bitwise(small, tmp_path):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe, run=tmp_path))
    trainer = Trainer(model, small, recipe)
    trainer.device = torch.device("mps")
    with (
        pytest.warns(UserWarning, match="generator of mps: not bitwise"),
        pytest.warns(UserWarning, match="device cpu, here it is mps"),
    ):
        trainer.resume(tmp_path)


def test_weights_that_do_not_fit_are_one_line(small, tmp_path):
    model, recipe = tiny(steps=1)
    *_, tick = train(model, small, recipe, run=tmp_path)
    loaded = checkpoint.load(tick.saved)
    weights = {
        name: tensor for name, tensor in loaded.model.items() if not name.startswith("blocks.0")
    }
    checkpoint.save(tick.saved, Snapshot(**vars(loaded) | {"model": weights}))
    for work in (
        lambda: list(train(model, small, recipe, run=tmp_path, resume=True)),
        lambda: zoo.load(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="does not fit.*Missing key") as caught:
            work()
        assert "\n" not in str(caught.value)


def test_a_checkpoint_tells_only_the_loss_it_was_measured_at(small, tmp_path):
    model, recipe = tiny(steps=9, evaluate_every=2, save_every=1)
    stream = train(model, small, recipe, run=tmp_path)
    ticks = [next(stream) for _ in range(3)]
    stream.close()
    third, second = checkpoint.listed(tmp_path)[:2]
    assert (
        checkpoint.validation_of(third) is None
        and checkpoint.validation_of(second) == ticks[1].validation
    )
    assert checkpoint.best(tmp_path)[0] == second


def test_a_signal_during_the_last_validation_is_passed_on(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=2)
    measure = Trainer.validate
    monkeypatch.setattr(
        Trainer, "validate", lambda self: (os.kill(os.getpid(), signal.SIGTERM), measure(self))[1]
    )
    *_, last = train(model, small, recipe, run=tmp_path)
    assert last.step == 2 and last.interrupted == signal.SIGTERM and last.saved


def test_a_damaged_memory_is_not_saved(small, tmp_path):
    """What is no parameter counts too: diffusion remembers the loss by noise level."""
    config, recipe = zoo.recipe("diffusion", "tiny", steps=2)
    model = zoo.build("diffusion", config)
    model.unsure[3] = math.nan
    with pytest.raises(NotFinite, match="not finite"):
        list(train(model, small, recipe, run=tmp_path))
    assert not checkpoint.listed(tmp_path)


def test_a_run_that_failed_before_its_first_step_is_no_run(small, tmp_path):
    model, recipe = tiny(steps=1)
    loss, model.loss = model.loss, lambda ids: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(train(model, small, recipe, run=tmp_path))
    model.loss = loss
    assert len(list(train(model, small, recipe, run=tmp_path))) == 1


def test_another_device_is_warned_of(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=2)
    describe = Trainer.describe
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "describe", lambda self: describe(self) | {"device": "cuda"})
        list(train(model, small, recipe, run=tmp_path))  # saved as from a GPU
    (folder,) = checkpoint.listed(tmp_path)
    assert checkpoint.load(folder).config["device"] == "cuda"
    with pytest.warns(UserWarning, match="saved with device cuda, here it is cpu"):
        list(train(model, small, recipe, run=tmp_path, resume=True))


def test_changes_are_made_at_once():
    """Halfway a page of 64 would not fit into a window of 32, and five heads would not divide a width of 192."""
    for changes in (
        {"window": 32, "page": 16},
        {"page": 16, "window": 32},
        {"heads": 5, "width": 160},
        {"accumulate": "5", "batch": "10"},
    ):
        config, recipe = zoo.recipe("diffusion", "full", **changes)
        assert all(
            getattr(config, name, None) == int(v) or getattr(recipe, name, None) == int(v)
            for name, v in changes.items()
        )


def test_recipes_out_of_range():
    for name, value in (
        ("steps", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("beta1", 1.5),
        ("momentum", 1.0),  # its mean would never move
        ("beta2", 1.0),
        ("lr", "3e-3"),
        ("clip", math.inf),
        ("average", 2.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is a (whole )?number from"):
            Recipe(**{name: value})
    for name, value in (
        ("batch", 0),
        ("steps", 2.5),
        ("steps", math.inf),
        ("seed", 2**70),
        ("batch", 2.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is a whole number from"):
            Recipe(**{name: value})
    for name in ("optimizer", "decay", "precision"):
        with pytest.raises(ValueError, match=f"{name} is one of"):
            Recipe(**{name: "other"})
    with pytest.raises(ValueError, match="batch of 8 .* 3 equal parts"):
        Recipe(batch=8, accumulate=3)


def test_texts_that_do_not_fit(small):
    model, recipe = tiny()
    with pytest.raises(ValueError, match="3 different characters, the model was made for 65"):
        train(model, Text.of("abc" * 100), recipe)
    with pytest.raises(ValueError, match="training part has 20 characters"):
        train(model, Text(small.train[:20], small.val, small.vocabulary), recipe)
    with pytest.raises(ValueError, match="validation part is empty"):
        train(model, Text(small.train, small.val[:0], small.vocabulary), recipe)


def test_orthogonalise_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for m, n in ((40, 20), (20, 40), (16, 16)):
        g = torch.randn(3, m, n, generator=generator)
        values = torch.linalg.svdvals(orthogonalise(g))
        assert values.min() > 0.3 and values.max() < 1.25
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        cosine = (
            (orthogonalise(g) * (u @ vh)).sum((1, 2))
            / orthogonalise(g).norm(dim=(1, 2))
            / (u @ vh).norm(dim=(1, 2))
        )
        assert cosine.min() > 0.95


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_by_hand(shape):
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, generator=generator))
    stacked = torch.nn.Parameter(torch.cat([w.detach(), w.detach()]))
    muon = Muon(
        [{"params": [w]}, {"params": [stacked], "stacked": 2}],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.5,
    )
    expected, momentum = w.detach().clone(), torch.zeros(shape)
    for _ in range(2):
        grad = torch.randn(shape, generator=generator)
        w.grad, stacked.grad = grad, torch.cat([grad, grad])
        muon.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = 0.9 * momentum + 0.1 * grad  # Nesterov: momentum looks one step ahead
        expected = (
            expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(6) * orthogonalise(update[None])[0]
        )
        torch.testing.assert_close(w.detach(), expected)
        torch.testing.assert_close(stacked.detach(), torch.cat([expected, expected]))


def test_which_parameter_goes_where(small):
    model, recipe = tiny(optimizer="muon")
    adam, muon = optimizers(model, recipe)
    hidden = {id(p) for group in muon.param_groups for p in group["params"]}
    assert hidden == {
        id(p) for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2
    }
    everything = [id(p) for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    plain = zoo.build("gpt", dataclasses.replace(model.config, norm="layer", bias=True))
    decays = {
        id(p)
        for group in optimizers(plain, Recipe())[0].param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert decays == {id(p) for p in plain.parameters() if p.ndim >= 2}


def test_what_the_recipe_says_arrives_in_the_optimizers():
    recipe = Recipe(
        optimizer="muon", lr=0.1, beta1=0.7, beta2=0.8, muon_lr=0.2, momentum=0.6, weight_decay=0.3
    )
    for name, spared in (("mamba", "log_A"), ("diffusion", "points")):
        model = zoo.build(name, zoo.recipe(name, "tiny")[0])
        adam, muon = optimizers(model, recipe)
        without = {
            id(p)
            for group in adam.param_groups
            if not group["weight_decay"]
            for p in group["params"]
        }
        matrices = {
            n: p
            for n, p in model.named_parameters()
            if n.split(".")[-1] == spared or spared in n.split(".")
        }
        assert matrices and all(p.ndim == 2 and id(p) in without for p in matrices.values())
        assert {group["weight_decay"] for group in adam.param_groups} == {0.3, 0.0}
        assert all(
            group["betas"] == (0.7, 0.8) and group["lr"] == 0.1 for group in adam.param_groups
        )
        assert all(
            (g["momentum"], g["weight_decay"], g["lr"]) == (0.6, 0.3, 0.2)
            for g in muon.param_groups
        )


TWO = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from irann import zoo, shakespeare
from irann.training import Trainer
from irann.text import Text
dist.init_process_group("gloo")
corpus = shakespeare.load()
text = Text(corpus.train[:6000], corpus.val[:700], corpus.vocabulary)
config, recipe = zoo.recipe("gpt", "tiny", batch=8, accumulate=2, clip=0)
trainer = Trainer(zoo.build("gpt", config), text, recipe)
for _ in range(2):
    tick = trainer.advance()
if dist.get_rank() == 0:
    from safetensors.torch import save_file
    save_file(trainer.model.state_dict(), sys.argv[1])
dice = [None, None]
dist.all_gather_object(dice, trainer.rng.cpu_state)
assert not torch.equal(*dice)  # each draws its own
run = Path(sys.argv[1]).parent
trainer.save(run)
dist.barrier()
again = Trainer(zoo.build("gpt", config, seed=1), text, recipe)
again.resume(run)
assert torch.equal(again.rng.cpu_state, dice[dist.get_rank()])
assert trainer.advance().loss == again.advance().loss
assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.model.parameters()))
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path, small):
    """torchrun with two gloo processes: after two steps the weights are those of one process with the whole batch; resumed, they go on."""
    from safetensors.torch import load_file

    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(script),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, recipe = tiny(batch=8, accumulate=2, clip=0)
    trainer = Trainer(model, small, recipe)
    trainer.advance(), trainer.advance()
    for name, theirs in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], theirs, atol=2e-5, rtol=1e-4)
