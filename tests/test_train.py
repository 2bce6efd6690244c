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
from irann.checkpoint import CheckpointError
from irann.muon import Muon, orthogonalise
from irann.text import Text, Vocabulary
from irann.train import InUse, NotFinite, Recipe, RunError, Trainer, evaluate, optimizers, progress, train


def tiny(**changes):
    config, recipe = zoo.recipe("gpt", "tiny", **changes)
    return zoo.build("gpt", config), recipe


def test_ticks(small):
    model, recipe = tiny(steps=4)
    ticks = list(train(model, small, recipe))
    assert [t.step for t in ticks] == [1, 2, 3, 4] and ticks[-1].characters == 4 * 8 * 32
    assert all(t.chars_per_second > 0 and t.gradient > 0 and t.parts["nats_per_char"] == t.loss for t in ticks)
    assert ticks[0].validation is None and ticks[-1].validation == evaluate(model, small).nats_per_char
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
    """Against a model whose surprise is the character's own place: the sum tells which were scored, and how often."""

    class Places(torch.nn.Module):
        exact, config, device = True, dataclasses.make_dataclass("C", ["window"])(window=7), torch.device("cpu")

        def surprise(self, ids, generator=None):
            seen.append(ids)
            return ids[:, 1:].double()

    for length in (5, 7, 14, 100, 101):
        seen = []
        text = Text(torch.tensor([1000, 2000]), torch.arange(length), corpus.vocabulary)
        score = evaluate(Places(), text, batch=4)
        assert score.characters == length and score.nats_per_char == pytest.approx((length - 1) / 2)
        assert seen[0][0, 0] == 2000  # the first is predicted from the end of the training part
        assert sorted(i for page in seen for row in page[:, 1:].tolist() for i in row) == list(range(length))


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
    assert score.bits_per_char == pytest.approx(score.nats_per_char / math.log(2)) and "exact" not in str(score)


def test_accumulation_gives_the_same_gradient(small):
    one, recipe = tiny(batch=8, clip=0)
    four, _ = tiny()
    a, b = Trainer(one, small, recipe), Trainer(four, small, dataclasses.replace(recipe, accumulate=4))
    first, second = a.advance(), b.advance()
    assert first.loss == pytest.approx(second.loss, abs=1e-6) and first.gradient == pytest.approx(second.gradient, rel=1e-4)


def test_clipping_bounds_the_gradient(small):
    model, recipe = tiny(clip=0.01, optimizer="adamw")
    norms = []
    trainer = Trainer(model, small, recipe)
    trainer.optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
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
    assert losses + [t.loss for t in rest] == straight and any("resumed from" in note for note in rest[0].notes)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), third.state_dict().values()))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10)) and [row["loss"] for row in rows] == straight


def test_averaged_weights_are_what_is_measured_and_loaded(small, tmp_path):
    model, recipe = tiny(steps=6, average=0.5)
    *_, tick = train(model, small, recipe, run=tmp_path)
    assert evaluate(model, small).nats_per_char == tick.validation == evaluate(zoo.load(tmp_path), small).nats_per_char
    raw = checkpoint.load(tick.saved).model
    assert any(not torch.equal(raw[name], p) for name, p in model.state_dict().items())


def test_sigint_ends_the_step_and_saves(small, tmp_path):
    model, recipe = tiny(steps=50)
    before = signal.getsignal(signal.SIGINT)
    ticks = []
    for tick in train(model, small, recipe, run=tmp_path):
        ticks.append(tick)
        if tick.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert ticks[-1].interrupted == signal.SIGINT and ticks[-1].step == 4 and ticks[-1].saved.name == "step-00000004"
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


def test_another_vocabulary_of_the_same_size_is_refused(small):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe))
    other = Text(small.train, small.val, Vocabulary("".join(map(chr, range(0x400, 0x400 + len(small.vocabulary))))), "Cyrillic", "")
    for work in (lambda: evaluate(model, other), lambda: list(train(model, other, recipe))):
        with pytest.raises(ValueError, match=r"not those that the model was trained on: .* vocabulary=model.vocabulary"):
            work()


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
        return (loss * math.nan if where == "loss" else loss + (model.embed.weight.sum() * 0).sqrt() * 1.0), parts

    model.loss = broken
    with pytest.raises(NotFinite, match=r"at step 3 the loss is .* gradient's norm nan, learning rate"):
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
        list(train(model, small, dataclasses.replace(recipe, beta1=1.0), run=tmp_path, overwrite=True))
    assert checkpoint.listed(tmp_path) == before
    assert len(list(train(model, small, recipe, run=tmp_path, overwrite=True))) == 2
    with pytest.raises(ValueError, match="exclude"):
        train(model, small, recipe, run=tmp_path, resume=True, overwrite=True)


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
    assert "lr = 0.003, asked for is lr = 0.1" in resume(model, small, dataclasses.replace(recipe, lr=0.1))
    other = Text(small.train, small.val, small.vocabulary, "another excerpt", "1" * 64)
    message = resume(model, other, recipe)
    assert "000000000000" in message and "another excerpt, 111111111111" in message
    longer = Text(torch.cat([small.train, small.val]), small.val, small.vocabulary, small.source, small.sha256)
    assert f"first {len(small.train):,} characters" in resume(model, longer, recipe)
    longhand = small.vocabulary.decode(small.train)
    forth, back = (Text.of(page, vocabulary=small.vocabulary) for page in (longhand, longhand[::-1]))  # the same characters
    list(train(tiny(steps=2)[0], forth, recipe, run=tmp_path / "forth"))
    with pytest.raises(CheckpointError, match="trained on another text"):
        list(train(tiny(steps=2)[0], back, recipe, run=tmp_path / "forth", resume=True))
    shuffled = type(small.vocabulary)("".join(chr(200 + i) for i in range(65)))
    assert "knows the characters" in resume(model, Text(small.train, small.val, shuffled, "x", small.sha256), recipe)


def test_resume_falls_back_and_says_so(small, tmp_path):
    model, recipe = tiny(steps=6, save_every=2, evaluate_every=2)
    *_, _tick = train(model, small, recipe, run=tmp_path)
    newest = checkpoint.listed(tmp_path)[0]
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-5])
    ticks = list(train(tiny()[0], small, recipe, run=tmp_path, resume=True))
    assert [t.step for t in ticks] == [5, 6]
    assert "model.safetensors has" in ticks[0].notes[0] and "step-00000004" in ticks[0].notes[1]


def test_another_machine_is_warned_of(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=4)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream)
    stream.close()
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.warns(UserWarning, match=r"saved with torch .*, here it is 1\.0"):
        list(train(model, small, recipe, run=tmp_path, resume=True))


def test_a_checkpoint_tells_only_the_loss_it_was_measured_at(small, tmp_path):
    model, recipe = tiny(steps=9, evaluate_every=2, save_every=1)
    stream = train(model, small, recipe, run=tmp_path)
    ticks = [next(stream) for _ in range(3)]
    stream.close()
    third, second = checkpoint.listed(tmp_path)[:2]
    assert checkpoint.validation_of(third) is None and checkpoint.validation_of(second) == ticks[1].validation
    assert checkpoint.best(tmp_path)[0] == second


def test_a_signal_during_the_last_validation_is_passed_on(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=2)
    measure = Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda self: (os.kill(os.getpid(), signal.SIGTERM), measure(self))[1])
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
    described = Trainer.describe
    monkeypatch.setattr(Trainer, "describe", lambda self: described(self) | {"device": "cuda"})
    list(train(model, small, recipe, run=tmp_path))  # saved as from a GPU
    (folder,) = checkpoint.listed(tmp_path)
    assert checkpoint.load(folder).config["device"] == "cuda"
    with pytest.warns(UserWarning, match="saved with device cuda, here it is cpu"):
        list(train(model, small, recipe, run=tmp_path, resume=True))


def test_changes_are_made_at_once():
    """Halfway a page of 64 would not fit into a window of 32, and five heads would not divide a width of 192."""
    for changes in ({"window": 32, "page": 16}, {"page": 16, "window": 32}, {"heads": 5, "width": 160}, {"accumulate": "5", "batch": "10"}):
        config, recipe = zoo.recipe("diffusion", "full", **changes)
        assert all(getattr(config, name, None) == int(v) or getattr(recipe, name, None) == int(v) for name, v in changes.items())


def test_recipes_out_of_range():
    for name, value in (
        ("steps", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("beta1", 1.5),
        ("beta2", 1.0),
        ("lr", "3e-3"),
        ("clip", math.inf),
        ("average", 2.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is a (whole )?number from"):
            Recipe(**{name: value})
    for name, value in (("batch", 0), ("steps", 2.5), ("steps", math.inf), ("seed", 2**70), ("batch", 2.0)):
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


def test_orthogonalise_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for m, n in ((40, 20), (20, 40), (16, 16)):
        g = torch.randn(3, m, n, generator=generator)
        values = torch.linalg.svdvals(orthogonalise(g))
        assert values.min() > 0.3 and values.max() < 1.25
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        cosine = (orthogonalise(g) * (u @ vh)).sum((1, 2)) / orthogonalise(g).norm(dim=(1, 2)) / (u @ vh).norm(dim=(1, 2))
        assert cosine.min() > 0.95


def test_muon_by_hand():
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    stacked = torch.nn.Parameter(torch.cat([w.detach(), w.detach()]))
    grad = torch.randn(6, 4, generator=generator)
    w.grad, stacked.grad = grad, torch.cat([grad, grad])
    before = w.detach().clone()
    Muon([{"params": [w]}, {"params": [stacked], "stacked": 2}], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    update = 0.1 * grad * 0.9 + 0.1 * grad  # Nesterov: momentum looks one step ahead
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(6) * orthogonalise(update[None])[0]
    torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close(stacked.detach(), torch.cat([expected, expected]))


def test_which_parameter_goes_where(small):
    model, recipe = tiny(optimizer="muon")
    adam, muon = optimizers(model, recipe)
    hidden = {id(p) for group in muon.param_groups for p in group["params"]}
    assert hidden == {id(p) for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2}
    everything = [id(p) for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    plain = zoo.build("gpt", dataclasses.replace(model.config, norm="layer", bias=True))
    decays = {id(p) for group in optimizers(plain, Recipe())[0].param_groups if group["weight_decay"] for p in group["params"]}
    assert decays == {id(p) for p in plain.parameters() if p.ndim >= 2}


TWO = """
import sys, torch, torch.distributed as dist
from irann import zoo, shakespeare
from irann.train import Trainer
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
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path, small):
    """torchrun with two gloo processes: after two steps the weights are those of one process with the whole batch."""
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
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    model, recipe = tiny(batch=8, accumulate=2, clip=0)
    trainer = Trainer(model, small, recipe)
    trainer.advance(), trainer.advance()
    for name, theirs in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], theirs, atol=2e-5, rtol=1e-4)
