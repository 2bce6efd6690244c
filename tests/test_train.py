"""irann.training: the loop, its promises, and what interrupts it."""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import refuses, small_disk
from helpers import left_after, rng, rows_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import irann
from irann import checkpoint, figures, lm, zoo
from irann.checkpoint import CheckpointError, DiskError
from irann.lm import LanguageModel
from irann.settings import InputError
from irann.text import Text, Vocabulary
from irann.training import (
    InUse,
    Likelihood,
    NotFinite,
    Recipe,
    RunError,
    Signals,
    Tick,
    bars,
    evaluate,
    evaluation,
    loop,
    optimizers,
    progress,
    run,
    state,
    train,
)
from irann.training.muon import Muon, orthogonalise
from irann.training.run import Metrics
from irann.training.state import State


def tiny(name="gpt", **changes):
    config, recipe = zoo.recipe(name, "tiny", **changes)
    return zoo.build(name, config), recipe


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.fixture
def states(monkeypatch):
    """What the trainings of a test hold, to look inside."""
    made = []

    class Kept(State):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(loop, "State", Kept)
    return made


# ----------------------------------------------------------------------------------------- the loop


def test_ticks(small):
    model, recipe = tiny(steps=4)
    ticks = list(train(model, small, recipe))
    assert [t.step for t in ticks] == [1, 2, 3, 4] and ticks[-1].characters == 4 * 8 * 32
    assert all(t.chars_per_second > 0 and t.grad_norm > 0 for t in ticks)
    assert all(t.parts == {"nats_per_char": t.loss} for t in ticks)
    assert ticks[0].validation is None
    assert ticks[-1].validation == evaluate(model, small).nats_per_char
    assert list(progress(iter(ticks), 4, disable=True)) == ticks


def test_steps_that_take_the_same_time_have_the_same_speed(small, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    model, recipe = tiny(steps=40)
    speeds = [tick.chars_per_second for tick in train(model, small, recipe)]
    assert speeds == pytest.approx([8 * 32.0] * 40)  # a step is one look at the clock long


def test_seconds_are_those_of_every_sitting_and_of_validating_too(small, tmp_path, monkeypatch):
    now = itertools.count()  # a step is one look at the clock long, and so is a validation
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    seconds = []
    for resume in (False, True):
        model, recipe = tiny(steps=4, evaluate_every=2)
        ticks = train(model, small, recipe, run=tmp_path, resume=resume)
        seconds += [tick.seconds for tick in left_after(3, ticks)]
    assert seconds == [1, 3, 4, 6]
    assert [row["seconds"] for row in rows_of(tmp_path)] == seconds
    told = checkpoint.newest(tmp_path)[1].config
    assert (told["seconds"], told["characters"], told["exact"]) == (6, 4 * 8 * 32, True)
    assert not State(*tiny("diffusion")[:1], small, recipe).describe()["exact"]


def test_the_bar_says_the_loss_of_now_and_what_was_validated_last(monkeypatch):
    drawn, made = [], bars.bar
    monkeypatch.setattr(bars, "bar", lambda **how: drawn.append(made(**how)) or drawn[-1])
    measured = [(1, 2.5, None), (2, 2.25, 2.375), (3, 2.0, None)]
    ticks = [Tick(step, loss, {}, 0.1, 1.0, 1234.4, validation=v) for step, loss, v in measured]
    shown = [drawn[0].postfix for _ in progress(ticks, 3, file=io.StringIO())]
    assert shown == [
        "loss 2.500, 1,234 chars/s",
        "loss 2.250, val 2.3750, 1,234 chars/s",
        "loss 2.000, val 2.3750, 1,234 chars/s",
    ]


def test_the_bar_of_a_resumed_run_begins_where_it_stood(monkeypatch):
    """So that its rate, and the time left, are those of this sitting."""
    drawn, made = [], bars.bar
    monkeypatch.setattr(bars, "bar", lambda **how: drawn.append(made(**how)) or drawn[-1])
    ticks = [Tick(step, 2.0, {}, 0.1, 1.0, 10.0) for step in (6, 7, 8)]
    shown = [(drawn[0].n, drawn[0].initial) for _ in progress(ticks, 20, file=io.StringIO())]
    assert shown == [(6, 5), (7, 5), (8, 5)] and drawn[0].total == 20


def test_a_card_tells_of_no_other_weights(small, tmp_path):
    """What is trained on is no longer what its card measured, nor of its text only."""
    model = zoo.load("gpt")
    assert model.card["validation"]
    list(train(model, small, Recipe(steps=1, batch=1)))
    told = irann.load(irann.save(model, tmp_path / "mine")).card
    assert told["validation"] is None and told["corpus"]["training_characters"] == len(small.train)
    with pytest.raises(InputError, match="val part has no character"):
        evaluate(model, dataclasses.replace(small, val=small.val[:0]))


def test_in_a_notebook_the_curve_grows_and_at_last_holds_every_step(monkeypatch):
    pictures, drawn, draw = [], [], figures.learning_curve

    def learning_curve(seen, **how):
        ax = draw(seen, **how)
        drawn.append((len(seen), how["name"], len(ax.lines[0].get_xdata())))
        return ax

    monkeypatch.setattr(figures, "learning_curve", learning_curve)
    monkeypatch.setattr(bars, "EVERY", 0)  # seconds between two pictures
    monkeypatch.setattr(
        bars, "updatable_output", lambda bundle: SimpleNamespace(update=pictures.append)
    )
    attended = []  # a picture is no cell: the page does not scroll to it
    shell = SimpleNamespace(get_ipython=lambda: "a notebook's")
    monkeypatch.setattr(figures, "sys", SimpleNamespace(modules={"IPython": shell}))
    monkeypatch.setattr("matplotlib_inline.backend_inline.set_matplotlib_formats", str)
    monkeypatch.setattr(figures.lab, "attend", lambda: attended.append(len(drawn)))
    ticks = (Tick(step, 3.0 - step / 10, {}, 0.1, step, 10.0) for step in range(1, 8))
    for tick in bars.watch(ticks, 9, name="mine"):
        assert drawn[0] == (1, "mine", 1)  # before the step is handed on
        if tick.step == 5:
            break  # a reader who stops sees what there is
    assert drawn[-1] == (5, "mine", 5) and len(pictures) == len(drawn) > 1
    assert pictures[0].format == "png" and len({picture.data for picture in pictures}) > 1
    assert attended == []
    assert list(bars.watch(iter(()), 9)) == []  # of a run that is done no step is left to draw


def test_a_curve_takes_a_tenth_of_the_time_at_most(monkeypatch):
    now, drawn = [0.0], []

    def draw(seen, looks):
        drawn.append(now[0])
        now[0] += 2

    def ticks():
        for step in range(1, 51):
            now[0] += 1
            yield Tick(step, 2.0, {}, 0.1, 1.0, 10.0)

    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(bars, "_curve", draw)
    monkeypatch.setattr(
        bars, "updatable_output", lambda bundle: SimpleNamespace(update=lambda picture: None)
    )
    assert len(list(bars.watch(ticks(), 50))) == 50
    # two seconds each, of 20 that follow; and one at the end in any case
    assert drawn == [2, 25, 48, 56]


def test_only_a_notebook_has_a_place_for_a_curve(monkeypatch):
    import IPython

    monkeypatch.setattr(IPython.display, "display", lambda *_, **how: how["display_id"])
    for shell, place in (
        (None, None),
        (SimpleNamespace(), None),
        (SimpleNamespace(kernel=1), True),
    ):
        monkeypatch.setattr(IPython.core.getipython, "get_ipython", lambda shell=shell: shell)
        assert bars.updatable_output({}) is place


def test_the_growing_curve_takes_looks_and_leaves_no_trace_in_matplotlib():
    import matplotlib.pyplot as plt

    ticks = [Tick(step, 3.0, {}, 0.1, step, 10.0) for step in (1, 2)]
    before, opened = dict(plt.rcParams), plt.get_fignums()
    plain, again, beside = (
        bars._curve(ticks, looks).data for looks in ({}, {}, {"references": {"even": 4.0}})
    )
    assert plain == again != beside
    assert dict(plt.rcParams) == before and plt.get_fignums() == opened


def test_the_bar_is_silent_without_a_standard_error(small, monkeypatch):
    model, recipe = tiny(steps=2)
    assert bars.bar([1], disable=True).disable  # options are tqdm's
    monkeypatch.setattr(sys, "stderr", None)
    assert len(list(progress(train(model, small, recipe), 2))) == 2


def test_the_rate_warms_up_and_falls():
    for schedule, quarter, middle in (
        ("linear", 0.75, 0.5),
        ("cosine", 0.5 + 0.25 * math.sqrt(2), 0.5),
        ("constant", 1.0, 1.0),
    ):
        recipe = Recipe(steps=110, warmup=10, lr_schedule=schedule)
        assert [recipe.lr_factor(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0] and recipe.lr_factor(
            10
        ) == 1.0
        assert recipe.lr_factor(35) == pytest.approx(quarter)
        assert recipe.lr_factor(60) == pytest.approx(middle)
    assert Recipe(steps=110, warmup=10, final_lr_factor=0.1).lr_factor(109) == pytest.approx(
        0.1 + 0.9 * 0.01
    )


def test_the_rate_reaches_the_optimizers_at_every_step_and_after_resuming(small, tmp_path, states):
    rates = []
    for resume in (False, True):
        model, recipe = tiny(steps=4, warmup=3, muon_lr=0.5, lr=0.1, save_every=1)
        stream = train(model, small, recipe, run=tmp_path, resume=resume)
        for tick in stream:
            rates.append([o.param_groups[0]["lr"] for o in states[-1].optimizers])
            assert tick.lr == rates[-1][0]
            if tick.step == 2:
                break
        stream.close()
    wanted = [[0.1 * r, 0.5 * r] for r in (1 / 3, 2 / 3, 1.0, 1.0)]
    assert rates == [pytest.approx(pair) for pair in wanted]


def only_trains_on(text, ids):
    """Whether every row of ids is a stretch of the training part."""
    pages = text.train.unfold(0, ids.shape[1], 1)
    return all((pages == row).all(1).any() for row in ids)


def test_it_trains_on_the_training_part_only(small, monkeypatch):
    model, recipe = tiny(steps=3)
    seen, loss = [], model.loss
    monkeypatch.setattr(model, "loss", lambda ids, draws: seen.append(ids) or loss(ids, draws))
    list(train(model, small, recipe))
    assert len(seen) == 3 and all(only_trains_on(small, ids) for ids in seen)
    assert len({tuple(row.tolist()) for ids in seen for row in ids}) > 20


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_a_step_does_not_depend_on_how_its_batch_is_cut(name, small):
    """Loss, parts, gradients and what is learnt, for every model: in 1, 2 and 8 pieces."""
    told, changed = [], []
    for pieces in (1, 2, 8):
        model, recipe = tiny(name, batch=8, accumulate=pieces, steps=2, optimizer="adamw", lr=1e-2)
        recipe = dataclasses.replace(recipe, warmup=0, evaluate_every=0)
        ticks = list(train(model.double(), small, recipe))
        told.append([(t.loss, t.grad_norm, *t.parts.values()) for t in ticks])
        changed.append(weights(model))
    for i in (1, 2):
        for one, other in zip(told[0], told[i], strict=True):
            assert other == pytest.approx(one, rel=1e-6, abs=1e-7)
        for key, tensor in changed[0].items():
            torch.testing.assert_close(changed[i][key], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_that_of_the_mean_over_the_batch(small, states, monkeypatch, accumulate):
    """By hand: the rows that the stream of windows gives, all at once."""
    model, recipe = tiny(batch=8, accumulate=accumulate, clip=0)
    reference = copy.deepcopy(model)
    seen, loss, found = [], model.loss, {}
    monkeypatch.setattr(model, "loss", lambda ids, draws: seen.append(ids) or loss(ids, draws))

    def keep(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters()})

    stream = train(model, small, recipe)
    monkeypatch.setattr(Muon, "step", keep)
    tick = next(stream)
    wanted, _ = reference.loss(torch.cat(seen))
    wanted.backward()
    assert tick.loss == pytest.approx(wanted.item(), abs=1e-6)
    for name, p in reference.named_parameters():
        if name in found and found[name] is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "diffusion"])
def test_what_the_loss_of_somebody_else_left_is_no_part_of_a_step(small, name):
    """Neither gradients nor what diffusion has seen of its noise levels."""
    after = []
    for leaves in (False, True):
        model, recipe = tiny(name, steps=3)
        ticks = train(model, small, recipe)
        for _ in range(3):
            if leaves:
                model.loss(small.train[None, :33])[0].backward()
            next(ticks)
        after.append(weights(model))
    assert equal(*after)


def test_muon_takes_a_closure_as_every_optimizer_of_torch_does():
    ours, other = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))

    def loss_of(p):
        loss = (p * torch.arange(6.0).view(3, 2)).square().sum()
        loss.backward()
        return loss

    wanted = loss_of(other)
    Muon([other]).step()
    assert Muon([ours]).step(lambda: loss_of(ours)) == wanted
    assert torch.equal(ours, other) and not torch.equal(ours, torch.ones(3, 2))


def test_muon_leaves_alone_what_has_no_gradient():
    idle, busy = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    busy.grad = torch.ones(3, 2)
    muon = Muon([idle, busy], weight_decay=0.5)
    muon.step()
    assert torch.equal(idle, torch.ones(3, 2)) and not torch.equal(busy, idle)
    assert idle not in muon.state


def test_draws_are_made_once_for_the_whole_batch_and_cut_with_it(small, monkeypatch):
    model, recipe = tiny(batch=8, accumulate=4, steps=1)
    seen, loss, absorbed = [], model.loss, []

    def draw(ids, *, generator):
        noise = torch.rand(len(ids), 3, generator=generator)
        return {
            "row": torch.arange(len(ids)),
            "noise": noise,
            "all": torch.tensor(5.0),
            "flag": True,
        }

    def take(ids, draws):
        seen.append((ids, draws))
        return loss(ids, None)

    monkeypatch.setattr(model, "draw", draw)
    monkeypatch.setattr(model, "loss", take)
    monkeypatch.setattr(model, "absorb", lambda: absorbed.append(len(seen)))
    list(train(model, small, recipe))
    assert [draws["row"].tolist() for _, draws in seen] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(draws["all"] == 5 and draws["flag"] is True for _, draws in seen)
    assert len(torch.cat([draws["noise"] for _, draws in seen]).unique()) == 24
    assert absorbed == [4]  # once, after all pieces


def test_no_piece_of_a_step_is_read_before_the_next(small):
    """On meta, where nothing can be: to read makes a GPU wait."""
    model, recipe = tiny(batch=8, accumulate=4)
    state = State(model, small, recipe)
    batch = small.train[: 8 * 33].view(8, 33).to("meta")
    told = loop._gradients(loop._Loss(model.to("meta")), state, batch, {})
    assert len(told) == 4 and all(loss.is_meta for loss, _ in told)


def test_clipping_bounds_the_gradient(small, monkeypatch):
    model, recipe = tiny(clip=0.01, optimizer="adamw", steps=1)
    norms, step = [], torch.optim.AdamW.step

    def measure(self, *arguments):
        gradients = [p.grad.norm() for p in model.parameters()]
        norms.append(torch.stack(gradients).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", measure)
    (tick,) = train(model, small, recipe)
    assert tick.grad_norm > 0.01 and norms == [pytest.approx(0.01, rel=1e-3)]


def test_dropout_is_on_while_training_whatever_was_before(small, tmp_path):
    """As after `zoo.load`, which gives a model in eval mode, and after every validation."""
    losses = []
    for kind in ("new", "evaluated", "sober"):
        model, recipe = tiny(steps=4, evaluate_every=2, dropout=0.0 if kind == "sober" else 0.5)
        if kind == "evaluated":
            model.eval()
        losses.append([tick.loss for tick in train(model, small, recipe)])
    assert losses[0] == losses[1] and losses[0] != losses[2]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_recipe(small, monkeypatch, precision):
    model, recipe = tiny(precision=precision)
    loss, mixed = model.loss, []

    def look(ids, draws):
        mixed.append(torch.is_autocast_enabled("cpu"))
        return loss(ids, draws)

    monkeypatch.setattr(model, "loss", look)
    next(train(model, small, recipe))
    assert mixed == [precision == "bfloat16"]


def test_averaged_weights_are_what_is_measured_loaded_and_left_in_the_model(small, tmp_path):
    model, recipe = tiny(steps=6, ema_decay=0.5)
    *_, tick = train(model, small, recipe, run=tmp_path)
    assert evaluate(model, small).nats_per_char == tick.validation
    assert evaluate(zoo.load(tmp_path), small).nats_per_char == tick.validation
    raw = checkpoint.load(tick.saved).model
    assert any(not torch.equal(raw[name], p) for name, p in model.state_dict().items())
    model, recipe = tiny(steps=6, ema_decay=0.5)
    *_, tick = train(model, small, recipe, run=tmp_path / "stopped", stop=lambda: signal.SIGTERM)
    assert tick.step == 1 and equal(weights(model), weights(zoo.load(tmp_path / "stopped")))


def test_whoever_leaves_the_loop_has_the_weights_of_the_last_step_in_training_mode(small, tmp_path):
    model, recipe = tiny(steps=4, ema_decay=0.9)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream), next(stream)
    before = weights(model)
    stream.close()
    assert equal(weights(model), before) and model.training
    list(train(model, small, recipe, run=tmp_path, resume=True))
    assert not equal(weights(model), before) and model.training


def test_without_a_run_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, recipe = tiny(steps=4, save_every=1)
    (tick,) = left_after(1, train(model, small, recipe))
    assert tick.saved is None
    assert all(tick.saved is None for tick in train(model, small, recipe))
    assert os.listdir(tmp_path) == []


def test_the_average_by_hand(small, states):
    model, recipe = tiny(ema_decay=0.3, warmup=0, lr=0.1, muon_lr=0.5)
    stream = train(model, small, recipe)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(1, 7):
        next(stream)
        decay = min(0.3, step / (step + 10))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, p in states[0].average.named_parameters():
        torch.testing.assert_close(p, expected[name])


def test_training_runs_whatever_torch_s_default_device_is(small, tmp_path):
    """The windows are drawn on the CPU; "meta" stands in for a GPU, and would be met anywhere."""
    losses = []
    for device in ("cpu", "meta"):
        model, recipe = tiny(steps=2)
        torch.set_default_device(device)
        try:
            run = tmp_path / device
            losses.append([tick.loss for tick in train(model, small, recipe, run=run)])
        finally:
            torch.set_default_device(None)
    assert losses[0] == losses[1]


def test_training_has_gradients_whatever_the_caller_s_mode_is(small):
    model, recipe = tiny(steps=2)
    other = copy.deepcopy(model)
    expected = [tick.loss for tick in train(model, small, recipe)]
    with torch.no_grad():
        assert [tick.loss for tick in train(other, small, recipe)] == expected
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        train(model, small, recipe)
    ticks = train(copy.deepcopy(model), small, recipe)
    next(ticks)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        next(ticks)
    with torch.inference_mode():
        model, _ = tiny()
    with pytest.raises(InputError, match="inference_mode"):
        train(model, small, recipe)


def test_a_training_whose_model_another_one_changed_is_refused_and_saves_nothing(small, tmp_path):
    model, recipe = tiny(steps=6, evaluate_every=0)
    first = train(model, small, recipe, run=tmp_path / "first")
    next(first)
    second = train(model, small, recipe)
    next(second)
    left = train(model, small, recipe, run=tmp_path / "left")
    next(left)
    next(second := train(model, small, recipe))
    with pytest.raises(InputError, match="another training of this model"):
        next(first)
    left.close()
    for name in ("first", "left"):
        assert not checkpoint.listed(tmp_path / name)  # its weights would be another one's
    assert [tick.step for tick in second] == [2, 3, 4, 5, 6]
    done = tmp_path / "done"  # one after the other is nobody's harm
    assert len(list(train(model, small, recipe, run=done))) == 6
    next(third := train(model, small, recipe, run=tmp_path / "third"))
    assert not list(train(model, small, recipe, run=done, resume=True))  # no step, other weights
    with pytest.raises(InputError, match="another training of this model"):
        next(third)
    assert not checkpoint.listed(tmp_path / "third")


def test_what_the_caller_draws_is_not_moved_by_training(small):
    torch.manual_seed(3)
    expected = torch.rand(4).tolist()
    model, recipe = tiny(steps=3, dropout=0.5)
    torch.manual_seed(3)
    drawn = [torch.rand(()).item() for _ in train(model, small, recipe)]
    model.loss = lambda ids, draws: torch.rand(9) / "a fault halfway"
    with pytest.raises(TypeError):
        next(train(model, small, recipe))
    assert [*drawn, torch.rand(()).item()] == expected


def test_of_a_training_that_was_begun_nobody_says_that_nothing_was_trained(small):
    model, recipe = tiny(steps=2)
    for begun in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ticks = train(model, small, recipe)
            if begun:
                next(ticks)
            del ticks
        assert any("nothing was trained" in str(one.message) for one in told) != begun


@pytest.mark.parametrize("work", ["writes", "loads"])
def test_another_thread_that_draws_leaves_training_undisturbed(small, tmp_path, work):
    """From the global generator."""

    def losses(disturbed):
        model, recipe = tiny(steps=30, dropout=0.2, evaluate_every=0)
        model.vocabulary = small.vocabulary
        saved = irann.save(model, tmp_path / "saved")
        got = []
        trainer = threading.Thread(target=lambda: got.extend(train(model, small, recipe)))
        trainer.start()
        while disturbed and trainer.is_alive():
            if work == "loads":
                irann.load(saved)
            else:
                lm.generate(model, "to", 10)
        trainer.join()
        return [tick.loss for tick in got]

    alone = losses(False)
    assert len(alone) == 30 and losses(True) == alone


def test_two_trainings_in_two_threads_are_as_one_after_the_other(small):
    def losses(got):
        model, recipe = tiny(steps=20, dropout=0.2, evaluate_every=0)
        got.extend(tick.loss for tick in train(model, small, recipe))

    alone, one, other = [], [], []
    losses(alone)
    threads = [threading.Thread(target=losses, args=(got,)) for got in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one == other == alone


# --------------------------------------------------------------------------------------- evaluation


class Stub(LanguageModel):
    """A model whose negative log-likelihood is a known function of the ids."""

    def __init__(self, window, nll, exact=True):
        super().__init__(dataclasses.make_dataclass("C", ["window"])(window=window))
        self.exact = exact
        self.answer = nll

    device = torch.device("cpu")

    def nll(self, ids, *, generator=None):
        return self.answer(ids)


def test_evaluate_scores_every_character_once(corpus):
    """Against a model whose nll is the character's own position: the sum tells which were scored,
    and how often.
    """
    for length in (5, 7, 14, 100, 101):
        seen = []
        text = Text(torch.tensor([1000, 2000]), torch.arange(length), corpus.vocabulary)
        model = Stub(7, lambda ids, seen=seen: seen.append(ids) or ids[:, 1:].double())
        score = evaluate(model, text, batch=4)
        assert score.characters == length and score.nats_per_char == pytest.approx((length - 1) / 2)
        assert seen[0][0, 0] == 2000  # the first is predicted from the end of the training part
        scored = [i for page in seen for row in page[:, 1:].tolist() for i in row]
        assert sorted(scored) == list(range(length))


@pytest.mark.parametrize("wrong", [{"part": "test"}, {"window": 0}, {"window": -3}, {"batch": 0}])
def test_what_cannot_be_evaluated_is_named(small, wrong):
    with refuses(f"{next(iter(wrong))} is "):
        evaluate(tiny()[0], small, **wrong)
    for seed in (2**70, math.nan):
        with refuses("seed is a whole number"):
            zoo.build("gpt", seed=seed)
        with refuses("seed is a whole number"):
            evaluate(tiny()[0], small, seed=seed)


@pytest.mark.parametrize("name", ["diffusion", "thinker-page"])
def test_a_bound_is_another_with_another_seed_and_the_same_with_the_same(small, name):
    model = tiny(name)[0]
    by_seed = [evaluate(model, small, seed=seed).nats_per_char for seed in (0, 1, 0)]
    assert by_seed[0] == by_seed[2] != by_seed[1]


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
    assert score.bits_per_char == pytest.approx(score.nats_per_char / math.log(2))
    assert "bound" not in str(score)
    twice = evaluate(model, small, nll=lambda ids, generator: 2 * model.nll(ids))
    assert twice.nats_per_char == pytest.approx(2 * score.nats_per_char)


def test_the_standard_error_is_that_of_a_mean_over_windows(corpus):
    """Windows whose nll is on average 1, 2, 3 and 4: a variance of 1.25, and three windows beside
    the one that fixes the mean. A fifth of two characters weighs two fifths of the others. How
    characters of one window differ does not count.
    """
    differ = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])

    def error(length, exact=False, nll=lambda ids: (ids // 5 + 1 + differ[ids % 5])[:, 1:]):
        text = Text(torch.tensor([0]), torch.arange(length), corpus.vocabulary)
        found = evaluate(Stub(5, nll, exact), text, batch=3)
        assert ("standard error unknown" in str(found)) == math.isnan(found.standard_error)
        return found.standard_error

    assert error(20) == pytest.approx(math.sqrt(1.25 / 3))
    assert error(22) == pytest.approx(math.sqrt((200 / 22 - (60 / 22) ** 2) / 4))
    assert error(20, exact=True) == 0 == error(5, exact=True)
    assert math.isnan(error(5))  # nothing is known of the spread of one
    for nats in (0.1, 0.3, 0.7, 1.1):  # all alike: what rounding leaves may be below nothing
        alike = error(22, nll=lambda ids, nats=nats: torch.full_like(ids[:, 1:], nats, dtype=float))
        assert alike == pytest.approx(0, abs=1e-7)


def test_a_likelihood_is_told_in_nats_and_bits_and_a_bound_as_one():
    told = f"{math.log(2):.4f} nats per character (1.0000 bits) over 1,234 characters"
    assert str(Likelihood(math.log(2), 0.0, 1234, True)) == told
    bound = str(Likelihood(math.log(2), 0.02, 1234, False))
    assert bound == f"at most, a bound (standard error 0.0200), {told}"


# ------------------------------------------------------------------------------------------ signals


def test_sigint_while_a_step_runs_ends_it_and_saves(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=50)
    loss, step = model.loss, 0

    def handled():
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return held, [signal.getsignal(number) for number in signal.valid_signals()]

    before = handled()

    def interrupted(ids, draws):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(ids, draws)

    monkeypatch.setattr(model, "loss", interrupted)
    for tick in train(model, small, recipe, run=tmp_path):
        step = tick.step
        assert handled() == before  # between two steps each signal does what it did
    assert tick.interrupted == signal.SIGINT and tick.step == 4
    assert tick.saved.name == "step-00000004"
    model(small.val[None, :5])  # still usable


def test_an_interrupt_between_two_steps_saves_too(small, tmp_path):
    model, recipe = tiny(steps=50)
    with pytest.raises(KeyboardInterrupt):
        for tick in train(model, small, recipe, run=tmp_path):
            if tick.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert checkpoint.listed(tmp_path)[0].name == "step-00000003"


def test_whoever_drives_the_loop_owns_the_signals(small, tmp_path):
    model, recipe = tiny(steps=50)
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as stop:
        for tick in train(model, small, recipe, run=tmp_path, stop=stop):
            if tick.step == 2:
                signal.raise_signal(signal.SIGTERM)
    assert tick.interrupted == signal.SIGTERM and tick.step == 3 and tick.saved
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigint_quits_at_once(small):
    model, recipe = tiny(steps=50)
    with pytest.raises(KeyboardInterrupt), Signals() as stop:
        for _ in train(model, small, recipe, stop=stop):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_nobody_asked_for_is_raised_again_at_the_end():
    with pytest.raises(KeyboardInterrupt), Signals():
        signal.raise_signal(signal.SIGINT)
    with Signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop() == signal.SIGINT
    with stop:
        assert stop() == 0  # what came in an earlier block is over


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_counts_and_of_a_second_only_sigint_quits(first):
    before, quits = signal.signal(first, signal.SIG_DFL), []
    try:
        with Signals() as stop:
            assert signal.getsignal(first) == stop.note  # or the next line would end the tests
            signal.raise_signal(first)
            assert stop() == first
            for second in (signal.SIGTERM, signal.SIGINT):
                try:
                    signal.raise_signal(second)
                except KeyboardInterrupt:
                    quits.append(second)
            assert stop() == first and quits == [signal.SIGINT]
    finally:
        signal.signal(first, before)


def test_a_handler_that_was_set_inside_the_block_stays():
    def mine(*_):
        pass

    before = signal.getsignal(signal.SIGTERM)
    try:
        with Signals():
            signal.signal(signal.SIGTERM, mine)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_that_others_handle_or_ignore_stay_theirs(small):
    """As SIGHUP under nohup."""
    heard = []
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    term = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        model, recipe = tiny(steps=3)
        with Signals() as stop:
            for _ in train(model, small, recipe, stop=stop):
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGTERM)
            assert stop() == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert heard == ["SIGTERM"] * 3
    finally:
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGTERM, term)


def test_training_in_a_thread_leaves_signals_alone(small):
    model, recipe = tiny(steps=2)
    ticks = []
    thread = threading.Thread(target=lambda: ticks.extend(train(model, small, recipe)))
    thread.start()
    thread.join()
    assert len(ticks) == 2


@pytest.mark.parametrize("by", ["a signal", "a fault"])
def test_a_validation_that_was_cut_off_is_made_up_for(small, tmp_path, monkeypatch, by):
    def run(name, **options):
        model, recipe = tiny(steps=6, evaluate_every=2)
        return train(model, small, recipe, run=tmp_path / name, **options)

    def told(name):
        rows = rows_of(tmp_path / name)
        return [(row["step"], row["loss"], row.get("validation")) for row in rows]

    list(run("straight"))
    asked = iter([0, signal.SIGTERM])
    stream = run("cut", stop=(lambda: next(asked)) if by == "a signal" else None)
    next(stream)
    if by == "a signal":
        assert next(stream).interrupted == signal.SIGTERM
    else:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(loop, "evaluate", lambda *_, **__: 1 / 0)
            next(stream)
    stopped = checkpoint.newest(tmp_path / "cut")[0]
    assert stopped.name == "step-00000002" and checkpoint.validation_of(stopped) is None
    assert len(told("cut")) == 2
    stream = run("cut", resume=True)
    next(stream)
    assert checkpoint.validation_of(stopped) == told("straight")[1][2]
    list(stream)
    assert [row[0] for row in told("cut")][-4:] == [3, 4, 5, 6]
    # the line of that step is there, and learns what was measured later
    assert told("cut") == told("straight")


def test_what_fails_while_the_first_step_is_validated_is_raised_and_the_step_kept(
    small, tmp_path, monkeypatch
):
    model, recipe = tiny(steps=4, evaluate_every=1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "evaluate", lambda *_, **__: 1 / 0)
        list(train(model, small, recipe, run=tmp_path))
    assert [folder.name for folder in checkpoint.listed(tmp_path)] == ["step-00000001"]
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


@pytest.mark.parametrize("answer", [None, 0, signal.SIGINT])
def test_a_signal_during_a_step_ends_training_also_beside_a_caller_s_own_stop(small, answer):
    model, recipe = tiny(steps=3)
    plain = model.loss

    def loss(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*given)

    model.loss = loss
    ticks = list(train(model, small, recipe, stop=lambda: answer))
    assert [tick.interrupted for tick in ticks] == [answer or signal.SIGTERM]


def test_a_signal_during_the_last_validation_is_passed_on(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=2)

    def late(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", late)
    *_, last = train(model, small, recipe, run=tmp_path)
    assert last.step == 2 and last.interrupted == signal.SIGTERM and last.saved
    assert last.validation is not None


def test_a_signal_while_a_step_is_saved_ends_training_too(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=9, save_every=2, ema_decay=0.9)
    save = checkpoint.save

    def late(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", late)
    *_, last = train(model, small, recipe, run=tmp_path)
    assert (last.step, last.interrupted, last.saved.name) == (2, signal.SIGINT, "step-00000002")
    assert equal(weights(model), weights(zoo.load(tmp_path)))  # the averaged ones


# -------------------------------------------------------------------------------- a run's directory


def test_resuming_after_a_break_is_bitwise_with_dropout_and_average(small, tmp_path):
    changes = {"steps": 9, "dropout": 0.3, "ema_decay": 0.9, "save_every": 2, "evaluate_every": 4}
    model, recipe = tiny(**changes)
    straight = [t.loss for t in train(model, small, recipe)]
    stream, losses = train(tiny(**changes)[0], small, recipe, run=tmp_path), []
    for tick in stream:
        losses.append(tick.loss)
        torch.rand(tick.step)  # what the caller draws changes nothing
        if tick.step == 5:
            break
    stream.close()  # which leaving a notebook's cell does, where it has no name
    assert checkpoint.listed(tmp_path)[0].name == "step-00000005"
    third = zoo.build("gpt", model.config, seed=3)
    rest = list(train(third, small, recipe, run=tmp_path, resume=True))
    assert losses + [t.loss for t in rest] == straight
    assert "resumed from" in rest[0].notes[0] and not rest[1].notes
    assert equal(weights(model), weights(third))
    told = [(row["step"], row["loss"]) for row in rows_of(tmp_path)]
    assert told == list(enumerate(straight, 1))
    fourth = zoo.build("gpt", model.config, seed=4)  # nothing left to do: as at the end
    assert list(train(fourth, small, recipe, run=tmp_path, resume=True)) == []
    assert equal(weights(model), weights(fourth))


def test_resuming_is_bitwise_in_double_precision_too(small, tmp_path):
    recipe = tiny(steps=4, save_every=2)[1]
    model, cut, rest = (tiny()[0].double() for _ in range(3))
    list(train(model, small, recipe))
    left_after(2, train(cut, small, recipe, run=tmp_path))
    list(train(rest, small, recipe, run=tmp_path, resume=True))
    assert equal(weights(model), weights(rest))


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
    assert "validation" in rows_of(tmp_path)[3]
    again = train(tiny()[0], small, recipe, run=tmp_path, resume=True)
    assert [tick.step for tick in again] == [3, 4]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyboardInterrupt])
def test_a_step_that_broke_off_halfway_is_not_saved(small, tmp_path, monkeypatch, fault):
    """Some of its weights would be those of the step after."""
    model, recipe = tiny(steps=9, evaluate_every=0)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream), next(stream)
    before = weights(model)

    def broken(self, closure=None):
        raise fault

    with monkeypatch.context() as patch, pytest.raises(fault):
        patch.setattr(Muon, "step", broken)
        next(stream)
    assert not equal(weights(model), before)
    assert not checkpoint.listed(tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_the_update(small, tmp_path, where):
    model, recipe = tiny(steps=9, save_every=1)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream), next(stream)
    before, plain = weights(model), model.loss

    def broken(ids, draws):
        loss, parts = plain(ids, draws)
        root = (model.wte.weight.sum() * 0).sqrt()  # its slope is infinite
        return loss * math.nan if where == "loss" else loss + root, parts

    model.loss = broken
    rate = f"{recipe.lr * 3 / recipe.warmup:g}"
    message = rf"at step 3 the loss .* gradient's norm nan, learning rate {rate}: .* a check"
    with pytest.raises(NotFinite, match=message):
        next(stream)
    assert equal(before, weights(model)) and checkpoint.newest(tmp_path)[1].config["step"] == 2
    assert all(p.grad is None for p in model.parameters())  # a notebook may call backward itself
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("what", ["a buffer", "the validation"])
def test_what_is_not_finite_is_not_saved(small, tmp_path, monkeypatch, what):
    """What is no parameter counts too: diffusion remembers the loss by noise level."""
    model, recipe = tiny("diffusion", steps=2, adaptive=False)
    if what == "a buffer":
        model.level_loss[3] = math.nan
    else:
        nll = model.nll
        monkeypatch.setattr(model, "nll", lambda ids, generator=None: nll(ids) * math.inf)
    with pytest.raises(
        NotFinite, match=r"after step 2 the (weights are|validation loss is).* norm .* rate"
    ):
        list(train(model, small, recipe, run=tmp_path))
    assert not checkpoint.listed(tmp_path)


@pytest.mark.parametrize("which", ["model", "average"])
def test_who_leaves_with_weights_that_are_not_finite_saves_none(small, tmp_path, states, which):
    model, recipe = tiny(steps=2, ema_decay=0.5)
    stream = train(model, small, recipe, run=tmp_path)
    next(stream)
    getattr(states[0], which).wte.weight.data[0, 0] = math.inf
    stream.close()
    assert not checkpoint.listed(tmp_path)


def test_a_run_directory_holds_one_run(small, tmp_path):
    model, recipe = tiny(steps=2)
    list(train(model, small, recipe, run=tmp_path))
    (tmp_path / "metrics.jsonl").unlink()  # its checkpoints are enough
    other = tiny()[0]
    with pytest.raises(RunError, match="holds another run; resume it"):
        list(train(other, small, recipe, run=tmp_path))
    assert other.card is None and other.vocabulary is None
    before = checkpoint.listed(tmp_path)
    frozen = zoo.build("gpt", model.config).requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):  # what is refused costs nothing
        list(train(frozen, small, recipe, run=tmp_path, overwrite=True))
    assert checkpoint.listed(tmp_path) == before
    assert len(list(train(model, small, recipe, run=tmp_path, overwrite=True))) == 2
    with pytest.raises(InputError, match="exclude"):
        train(model, small, recipe, run=tmp_path, resume=True, overwrite=True)


def test_overwriting_a_run_spares_what_is_not_of_it(small, tmp_path):
    model, recipe = tiny(steps=1)
    *_, tick = train(model, small, recipe, run=tmp_path)
    for name in ("step-00000009", "skipped-step-00000009", "step-00000009-mine", "my-step-9"):
        (tick.saved.parent / name).mkdir()
    list(train(model, small, recipe, run=tmp_path, overwrite=True))
    left = sorted(os.listdir(tick.saved.parent))
    assert left == ["my-step-9", "step-00000001", "step-00000009-mine"]


@pytest.mark.parametrize("end", ["error", "kill"])
def test_a_run_that_is_overwritten_stays_until_its_successor_has_a_checkpoint(small, tmp_path, end):
    model, recipe = tiny(steps=3)
    list(train(model, small, recipe, run=tmp_path))
    (tmp_path / "checkpoints" / "mine").write_text("not of the run")
    (tmp_path / "events.out.tfevents.1").write_text("of the run")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = tiny()[0]
    loss, other.loss = other.loss, lambda ids, draws: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(train(other, small, recipe, run=tmp_path, overwrite=True))
    if end == "kill":  # it left the old run aside, and could not put it back
        for log in ("metrics.jsonl", "events.out.tfevents.1"):
            os.rename(tmp_path / log, tmp_path / "checkpoints" / log)
        os.rename(tmp_path / "checkpoints", tmp_path / "replaced")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "metrics.jsonl").write_text("")
        with pytest.raises(RunError, match="another run"):
            next(train(other, small, recipe, run=tmp_path))
    now = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert now == before
    other.loss = loss
    recipe = dataclasses.replace(recipe, save_every=2)
    ticks = train(other, small, recipe, run=tmp_path, overwrite=True)
    for saved in (False, True):
        next(ticks)
        assert (tmp_path / "replaced").exists() is not saved
    ticks.close()
    names = [path.name for path in checkpoint.listed(tmp_path)]
    assert names == ["step-00000002"] and (tmp_path / "checkpoints" / "mine").exists()
    assert not (tmp_path / "events.out.tfevents.1").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_run_that_its_disk_has_no_room_for_is_not_begun(small, tmp_path, monkeypatch):
    model, recipe = tiny(steps=1)
    *_, tick = train(copy.deepcopy(model), small, recipe, run=tmp_path / "first")
    size = sum(path.stat().st_size for path in tick.saved.iterdir())  # with the optimizer's memory
    assert size > 2 * sum(tensor.nbytes for tensor in model.state_dict().values())
    free = [0.9 * size, 1.1 * size]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(DiskError, match=r"a checkpoint of [\d,]+ bytes in .*the disk is full"):
        next(train(model, small, recipe, run=tmp_path))
    assert next(train(model, small, recipe, run=tmp_path)).step == 1
    free = [0, 0]  # what is overwritten makes room, but not for a model that is larger
    larger, anew = tiny(width=64)[0], {"run": tmp_path / "first", "overwrite": True}
    with pytest.raises(DiskError, match="what is there is intact"):
        next(train(larger, small, recipe, **anew))
    assert checkpoint.listed(tmp_path / "first") == [tick.saved]
    ticks = train(model, small, dataclasses.replace(recipe, steps=2), **anew)
    assert next(ticks).step == 1  # the old run made room, and is not set aside
    assert not (tmp_path / "first" / "replaced").exists() and not checkpoint.listed(
        tmp_path / "first"
    )
    ticks.close()


@pytest.mark.parametrize("looked", [irann.watch, progress])
@pytest.mark.parametrize("how", ["break", "error"])
def test_who_leaves_a_loop_that_is_watched_loses_nothing_although_the_ticks_have_a_name(
    small, tmp_path, looked, how
):
    model, recipe = tiny(steps=9)
    ticks = train(model, small, recipe, run=tmp_path)
    with suppress(KeyboardInterrupt):
        for tick in looked(ticks, recipe.steps):
            if tick.step == 3 and how == "break":
                break
            if tick.step == 3:
                raise KeyboardInterrupt
    assert checkpoint.newest(tmp_path)[1].config["step"] == 3
    assert len(list(train(model, small, recipe, run=tmp_path, resume=True))) == 6
    some = train(model, small, recipe)
    for _ in looked(itertools.islice(some, 2), 2):  # part of it: the rest may follow
        pass
    assert next(some).step == 3


@pytest.mark.parametrize("rank, wanted", [(0, ["clear", "wait", "go on"]), (1, ["wait", "go on"])])
def test_all_processes_look_at_a_run_after_the_first_has_swept_it(
    small, tmp_path, monkeypatch, rank, wanted
):
    order = []
    whole = state.State(*tiny()[:1], small, tiny()[1])
    whole.rank, whole.world = rank, 2
    monkeypatch.setattr(run, "gathered", lambda mine: order.append("wait") or [mine, *others])
    monkeypatch.setattr(run.Run, "_clear", lambda self, size: order.append("clear"))
    monkeypatch.setattr(run.Run, "_go_on", lambda self: order.append("go on") or ())
    monkeypatch.setattr(state, "gathered", lambda mine: [mine, mine])
    others = [None]
    with run.Run(tmp_path, whole, resume=True):
        assert order == wanted
    others = [RunError("it holds another run")]  # each of them ends in the sentence of the first
    with pytest.raises(RunError, match="holds another"), run.Run(tmp_path, whole, resume=True):
        pass


def test_a_process_that_is_refused_tells_the_others(small, tmp_path, monkeypatch):
    list(train(*tiny()[:1], small, tiny(steps=1)[1], run=tmp_path))
    told = []
    monkeypatch.setattr(run, "gathered", lambda mine: told.append(mine) or [mine])
    with pytest.raises(RunError, match="holds another run; resume it") as refused:
        next(train(*tiny()[:1], small, tiny()[1], run=tmp_path))
    assert told == [refused.value] and not (tmp_path / "owner.txt").exists()


def test_to_resume_or_overwrite_takes_a_run(small):
    for wish in ("resume", "overwrite"):
        with pytest.raises(InputError, match="about a run: say which, with run="):
            train(*tiny()[:1], small, tiny()[1], **{wish: True})
    with pytest.raises(InputError, match="run is empty"):  # and not the folder one is in
        train(*tiny()[:1], small, tiny()[1], run="")


def test_averaged_weights_of_a_model_of_other_letters_are_measured_on_the_run_s(small, tmp_path):
    """The letters of a run that is gone on with are its own, whatever the model came with."""
    model, recipe = tiny(steps=4, evaluate_every=2, ema_decay=0.9)
    left_after(2, train(model, small, recipe, run=tmp_path))
    other, _ = tiny()
    other.vocabulary = Vocabulary("".join(chr(ord(c) + 400) for c in small.vocabulary.characters))
    *_, last = train(other, small, recipe, run=tmp_path, resume=True)
    assert last.step == 4 and last.validation is not None


def test_resuming_where_nothing_was_saved_begins_and_says_so(small, tmp_path):
    model, recipe = tiny(steps=2)
    first, second = train(model, small, recipe, run=tmp_path, resume=True)
    assert first.notes == (f"there is no checkpoint in {tmp_path} yet: beginning with step 1",)
    assert first.step == 1 and not second.notes


def test_metrics_tell_what_the_ticks_told(small, tmp_path):
    model, recipe = tiny("thinker", steps=4, evaluate_every=2)
    ticks = list(train(model, small, recipe, run=tmp_path))
    rows = rows_of(tmp_path)
    assert len(ticks) == len(rows) and len(ticks[0].parts) > 1
    for tick, row in zip(ticks, rows, strict=True):
        told = {name: getattr(tick, name) for name in ("step", "loss", "lr", "grad_norm")}
        told |= tick.parts | ({} if tick.validation is None else {"validation": tick.validation})
        about = {
            "seconds": pytest.approx(tick.seconds, abs=6e-4),
            "chars_per_second": pytest.approx(tick.chars_per_second, abs=0.6),
        }
        assert row == told | about
    assert [row["step"] for row in rows if "validation" in row] == [2, 4]


def test_lines_that_a_kill_cut_off_are_written_anew(small, tmp_path):
    ticks = []
    for resume in (False, True):
        model, recipe = tiny(steps=4)
        ticks += left_after(2, train(model, small, recipe, run=tmp_path, resume=resume))
        if not resume:
            with open(tmp_path / "metrics.jsonl", "ab") as file:
                file.write(b'{"step": 3, "loss": 9.0}\n\xff\0\0\n[]\n{"step": 4, "lo')
    told = [(row["step"], row["loss"]) for row in rows_of(tmp_path)]
    assert told == [(tick.step, tick.loss) for tick in ticks] and len(told) == 4


def test_metrics_are_rewritten_whole_or_not_at_all(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    lines = "".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(9))
    metrics.path.write_text(lines)
    words = r"metrics\.jsonl could not be written \(the disk is full.*the checkpoints are intact"
    with small_disk(50), pytest.raises(DiskError, match=words):
        metrics.keep(7)
    assert metrics.path.read_text() == lines
    metrics.keep(7)
    assert metrics.path.read_text() == "".join(lines.splitlines(keepends=True)[:8])


def test_a_run_that_failed_before_its_first_step_is_no_run(small, tmp_path):
    model, recipe = tiny(steps=1)
    loss, model.loss = model.loss, lambda ids, draws: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(train(model, small, recipe, run=tmp_path))
    model.loss = loss
    assert len(list(train(model, small, recipe, run=tmp_path))) == 1


def test_a_run_that_cannot_be_removed_is_not_begun_anew(small, tmp_path):
    model, recipe = tiny(steps=2)
    (tmp_path / "checkpoints").write_text("a file, which no folder can replace")
    with pytest.raises(DiskError, match=r"run directory .* cannot be written \(Not a directory\)"):
        next(train(model, small, recipe, run=tmp_path, overwrite=True))


def test_two_trainers_one_directory(small, tmp_path):
    model, recipe = tiny(steps=3)
    first = train(model, small, recipe, run=tmp_path)
    next(first)
    who = f"process {os.getpid()} on "
    with pytest.raises(InUse, match=f"in use by {who}.* this one: close\\(\\) its ticks"):
        next(train(tiny()[0], small, recipe, run=tmp_path))
    assert (tmp_path / "owner.txt").exists()
    (tmp_path / "owner.txt").unlink()
    with pytest.raises(InUse, match="in use by another process; wait for it"):
        next(train(tiny()[0], small, recipe, run=tmp_path))
    (tmp_path / "owner.txt").write_bytes("process 5 on Zoë".encode("latin-1"))
    with pytest.raises(InUse, match="in use by process 5 on Zo\ufffd; wait for it"):
        next(train(tiny()[0], small, recipe, run=tmp_path))
    first.close()
    assert not (tmp_path / "owner.txt").exists()
    assert list(train(model, small, recipe, run=tmp_path, resume=True))


def test_a_run_from_before_a_setting_goes_on_with_its_default(small, tmp_path, monkeypatch):
    describe = State.describe

    def older(state):
        described = describe(state)
        return described | {
            "config": {k: v for k, v in described["config"].items() if k != "random_rounds"}
        }

    model, recipe = tiny("thinker", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(State, "describe", older)
        list(train(model, small, recipe, run=tmp_path))
    other, _ = tiny("thinker", random_rounds=True)
    with pytest.raises(
        CheckpointError, match="random_rounds = False, asked for is random_rounds = T"
    ):
        next(train(other, small, recipe, run=tmp_path, resume=True))
    assert not list(train(model, small, recipe, run=tmp_path, resume=True))


def test_resume_refuses_what_does_not_fit_and_names_both(small, tmp_path):
    model, recipe = tiny(steps=2)
    list(train(model, small, recipe, run=tmp_path))

    def refused(model, text, recipe):
        with pytest.raises(CheckpointError) as caught:
            list(train(model, text, recipe, run=tmp_path, resume=True))
        return str(caught.value)

    assert "width = 32, asked for is width = 64" in refused(tiny(width=64)[0], small, recipe)
    faster = dataclasses.replace(recipe, lr=0.1)
    assert "lr = 0.003, asked for is lr = 0.1" in refused(model, small, faster)
    other, plan = tiny("mamba", steps=2)
    assert "model = 'GPT', asked for is model = 'Mamba'" in refused(other, small, plan)
    renamed = Text(small.train, small.val, small.vocabulary, "another excerpt", "1" * 64)
    assert "SHA-256 = '0000000000000000', asked for is text of" in refused(model, renamed, recipe)
    both = torch.cat([small.train, small.val])
    longer = dataclasses.replace(small, train=both)
    assert f"training characters = {len(small.train)}, asked for" in refused(model, longer, recipe)
    shorter = dataclasses.replace(small, val=small.val[:500])
    assert "train and val of SHA-256 = '" in refused(model, shorter, recipe)
    nameless = Text(small.train, small.val, small.vocabulary)
    list(train(tiny(steps=2)[0], nameless, recipe, run=tmp_path / "ids"))
    for part in ("train", "val"):
        turned = dataclasses.replace(nameless, **{part: getattr(small, part).flip(0)})
        with pytest.raises(CheckpointError, match="text of SHA-256 = "):  # equal lengths, no hash
            list(train(tiny(steps=2)[0], turned, recipe, run=tmp_path / "ids", resume=True))
    shuffled = Vocabulary("".join(chr(200 + i) for i in range(65)))
    cyrillic = dataclasses.replace(small, vocabulary=shuffled)
    assert "characters = " in refused(model, cyrillic, recipe)


def test_another_vocabulary_of_the_same_size_is_refused(small, tmp_path):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe))
    letters = "".join(map(chr, range(0x400, 0x400 + len(small.vocabulary))))
    other = dataclasses.replace(small, vocabulary=Vocabulary(letters))
    message = r"not those that the model was trained on: .* vocabulary=model.vocabulary"
    for work in (
        lambda: evaluate(model, other),
        lambda: train(model, other, recipe),
        lambda: train(model, other, recipe, run=tmp_path, resume=True),  # nothing to resume there
    ):
        with pytest.raises(InputError, match=message):
            work()


def test_resume_falls_back_and_says_so_even_if_no_step_follows(small, tmp_path):
    model, recipe = tiny(steps=6, save_every=2, evaluate_every=2)
    list(train(model, small, recipe, run=tmp_path))
    file = checkpoint.listed(tmp_path)[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    ticks = list(train(tiny()[0], small, recipe, run=tmp_path, resume=True))
    assert [t.step for t in ticks] == [5, 6]
    assert "model.safetensors has" in ticks[0].notes[0] and "step-00000004" in ticks[0].notes[1]
    (checkpoint.listed(tmp_path)[0] / "rng.safetensors").unlink()
    model.loss = lambda ids, draws: 1 / 0
    message = r"set aside as skipped-step-00000006: .*rng\.safetensors is missing"
    with pytest.warns(UserWarning, match=message) as told, pytest.raises(ZeroDivisionError):
        next(train(model, small, recipe, run=tmp_path, resume=True))
    assert len(told) == 1  # that it was resumed is no cause for alarm


@pytest.mark.parametrize(
    "name, then",
    [
        ("python", "2.7"),
        ("torch", "1.0"),
        ("threads", 64),
        ("machine", "an abacus"),
        ("cpu", "beads"),
        ("kernel", None),
        ("device", "cuda"),
        ("gpu", "a slate"),
        ("compile", True),
        ("processes", 3),
        ("weights", "float64"),
    ],
)
def test_another_machine_is_warned_of(small, tmp_path, name, then):
    model, recipe = tiny(steps=2)
    *_, tick = train(model, small, recipe, run=tmp_path)
    saved = checkpoint.load(tick.saved)
    around = saved.config["environment"] | {name: then}
    changed = dataclasses.replace(saved, config=saved.config | {"environment": around})
    checkpoint.save(tick.saved, changed)
    message = f"saved with {name} {then}, here it is .*: not bitwise"
    with pytest.warns(UserWarning, match=message) as told:
        list(train(model, small, recipe, run=tmp_path, resume=True))
    assert len(told) == 1


@pytest.mark.parametrize("device, why", [("cuda", "no fixed order"), ("mps", "generator of mps")])
def test_a_gpu_s_run_is_gone_on_with_and_a_warning(small, tmp_path, monkeypatch, device, why):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a slate")
    model, recipe = tiny()
    state = State(model, small, recipe)
    state.device = torch.device(device)
    with pytest.warns(UserWarning, match=f"{why}.*: not bitwise from here on") as told:
        run.Run(tmp_path, state)._warn_of_differences(tmp_path, state.snapshot())
    assert len(told) == 1


def test_resuming_in_another_precision_is_warned_of_and_goes_on(small, tmp_path):
    model, recipe = tiny(steps=4)
    left_after(1, train(model.double(), small, recipe, run=tmp_path))
    with pytest.warns(UserWarning, match="saved with weights float64, here it is float32"):
        assert len(list(train(tiny()[0], small, recipe, run=tmp_path, resume=True))) == 3


def test_the_streams_of_another_device_are_begun_anew(small, tmp_path):
    model, recipe = tiny("diffusion", steps=3, dropout=0.1)
    left_after(1, train(model, small, recipe, run=tmp_path))
    (folder,) = checkpoint.listed(tmp_path)
    saved = checkpoint.load(folder)
    gpu = torch.zeros(16, dtype=torch.uint8)
    rng = {"order": saved.rng["order"], "draws": gpu, "cuda.0": gpu}
    checkpoint.save(folder, dataclasses.replace(saved, rng=rng))
    again = train(tiny("diffusion", dropout=0.1)[0], small, recipe, run=tmp_path, resume=True)
    assert [tick.step for tick in again] == [2, 3]


def test_a_checkpoint_tells_only_the_loss_it_was_measured_at(small, tmp_path):
    model, recipe = tiny(steps=9, evaluate_every=2, save_every=1)
    ticks = left_after(3, train(model, small, recipe, run=tmp_path))
    third, second = checkpoint.listed(tmp_path)  # the first is tidied away
    assert checkpoint.validation_of(third) is None
    assert checkpoint.validation_of(second) == ticks[1].validation
    assert checkpoint.best(tmp_path)[0] == second


# ----------------------------------------------------------------------- parameters, by their names


def test_a_frozen_parameter_is_neither_stepped_nor_decayed(small):
    for optimizer in ("adamw", "muon"):
        model, recipe = tiny(steps=3, optimizer=optimizer)
        frozen = {"wte.weight", "h.0.mlp.c_fc.weight"}
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = weights(model)
        list(train(model, small, recipe))
        same = {name for name, w in model.state_dict().items() if torch.equal(w, before[name])}
        assert same == frozen


@pytest.mark.parametrize("name", ["gpt", "mamba"])
@pytest.mark.parametrize("how", ["frozen", "unfrozen"])
def test_optimizer_states_never_go_to_another_parameter(small, tmp_path, name, how):
    """Handed over by number, fused AdamW would write past the end of a smaller one."""
    first, recipe = tiny(name, steps=8, evaluate_every=0)
    second = zoo.build(name, first.config)
    changed = second if how == "frozen" else first
    victim = next(n for n, p in first.named_parameters() if p.ndim == 2)
    changed.get_parameter(victim).requires_grad_(False)
    left_after(2, train(first, small, recipe, run=tmp_path))
    with pytest.raises(CheckpointError, match=f"frozen parameters = .*{victim}"):
        list(train(second, small, recipe, run=tmp_path, resume=True))
    if how == "frozen":
        second.get_parameter(victim).requires_grad_(True)
        assert len(list(train(second, small, recipe, run=tmp_path, resume=True))) == 6


@pytest.mark.parametrize("fault", ["shape", "stranger", "part", "kind"])
def test_states_are_checked_before_a_kernel_sees_them(small, tmp_path, fault):
    model, recipe = tiny(steps=2)
    *_, tick = train(model, small, recipe, run=tmp_path)
    saved = checkpoint.load(tick.saved)
    memory = dict(saved.optimizer)
    victim = "adamw.wte.weight.exp_avg"
    if fault == "shape":
        memory[victim] = memory[victim][:3].clone()
    elif fault == "stranger":
        memory["adamw.wxe.weight.exp_avg"] = memory.pop(victim)
    elif fault == "part":
        del memory[victim]
    else:
        memory[victim] = memory[victim].long()
    checkpoint.save(tick.saved, dataclasses.replace(saved, optimizer=memory))
    with pytest.raises(CheckpointError, match=r"step-00000002 does not fit: .*adamw\.w.e\.weight"):
        list(train(model, small, recipe, run=tmp_path, resume=True))


def test_weights_that_do_not_fit_are_one_line(small, tmp_path):
    model, recipe = tiny(steps=1)
    *_, tick = train(model, small, recipe, run=tmp_path)
    saved = checkpoint.load(tick.saved)
    kept = {name: w for name, w in saved.model.items() if not name.startswith("h.0")}
    checkpoint.save(tick.saved, dataclasses.replace(saved, model=kept))
    for work in (
        lambda: list(train(model, small, recipe, run=tmp_path, resume=True)),
        lambda: zoo.load(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="does not fit.*Missing key") as caught:
            work()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    ["CUDA out of memory. Tried to allocate", "can't allocate memory", "CUDA error: out of memory"],
)
def test_too_little_memory_to_resume_is_no_fault_of_the_checkpoint(
    small, tmp_path, monkeypatch, words
):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe, run=tmp_path))

    def full(self, saved):
        raise RuntimeError(words)

    monkeypatch.setattr(State, "restore", full)
    with pytest.raises(RuntimeError, match=words):
        next(train(model, small, recipe, run=tmp_path, resume=True))


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_a_copy_trains_writes_and_is_saved_as_the_original(small, name, tmp_path):
    """deepcopy, pickle, state_dict with assign, and a model from the meta device."""
    model, recipe = tiny(name, steps=3)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assigned = zoo.build(name, model.config, seed=1)
    assigned.load_state_dict(weights(model), assign=True)
    with torch.device("meta"):
        empty = zoo.build(name, model.config)
    empty.load_state_dict(weights(model), assign=True)
    wanted = [tick.loss for tick in train(model, small, recipe)]
    text = irann.generate(model, "a", 9, seed=1)
    for sibling in (copied, pickled, assigned, empty):
        assert [tick.loss for tick in train(sibling, small, recipe)] == wanted
        assert equal(weights(model), weights(sibling))
        assert irann.generate(sibling, "a", 9, seed=1) == text
        saved = irann.save(sibling, tmp_path / "saved")
        assert equal(weights(model), weights(irann.load(saved)))
    os.mkdir(tmp_path / ".unfinished-0")
    os.rename(saved, tmp_path / ".unfinished-0/saved")  # where a kill may leave it
    assert equal(weights(model), weights(irann.load(saved)))


def test_what_cannot_be_saved_is_refused_before_the_first_step(small, tmp_path):
    model, recipe = tiny(steps=1)
    odd = dataclasses.replace(small, source="caf\udce9.txt")  # a name that is not UTF-8
    *_, tick = train(model, odd, recipe, run=tmp_path / "name")
    assert checkpoint.load(tick.saved).config["corpus"]["source"] == "caf\\udce9.txt"
    plain = model.config
    model.config = dataclasses.make_dataclass("C", ["vocabulary", "window", "kind"])(65, 32, {1})
    model.vocabulary = None
    with pytest.raises(InputError, match="could not be saved: .*set is not JSON"):
        next(train(model, small, recipe, run=tmp_path / "config"))
    assert not (tmp_path / "config").exists()
    model.config = plain


# --------------------------------------------------------------------------- recipes and optimizers


def test_changes_are_made_at_once():
    """Halfway a page of 64 would not fit into a window of 32, and five heads would not divide a
    width of 192.
    """
    for changes in (
        {"window": 32, "page": 16},
        {"page": 16, "window": 32},
        {"heads": 5, "width": 160},
        {"accumulate": "5", "batch": "10"},
    ):
        config, recipe = zoo.recipe("diffusion", "full", **changes)
        both = dataclasses.asdict(config) | dataclasses.asdict(recipe)
        assert all(both[name] == int(value) for name, value in changes.items())
    with pytest.raises(InputError, match="colour is nothing that can be set; there are accumulate"):
        zoo.recipe("gpt", colour="red")
    with pytest.raises(InputError, match="compile is true or false; got 'maybe'"):
        zoo.recipe("gpt", compile="maybe")


def test_texts_and_batches_that_do_not_fit(small, monkeypatch):
    model, recipe = tiny()
    with pytest.raises(InputError, match="3 different characters, the model was made for 65"):
        train(model, Text.of("abc" * 100), recipe)
    with pytest.raises(InputError, match="training part has 20 characters"):
        train(model, dataclasses.replace(small, train=small.train[:20]), recipe)
    with pytest.raises(InputError, match="validation part is empty"):
        train(model, dataclasses.replace(small, val=small.val[:0]), recipe)
    with pytest.raises(InputError, match="training part has 32 characters.* take 33"):
        train(model, dataclasses.replace(small, train=small.train[:32]), recipe)
    for part in ("train", "val"):
        odd = dataclasses.replace(small, **{part: getattr(small, part) + 65})
        with pytest.raises(InputError, match=r"ids lie in 0\.\.64; got 65\.\."):
            train(model, odd, recipe)
    least = dataclasses.replace(small, train=small.train[:33], val=small.val[:1])
    assert len(list(train(model, least, tiny(steps=1)[1]))) == 1
    with pytest.raises(InputError, match="batch of 8 .* 3 equal parts"):
        Recipe(batch=8, accumulate=3)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "rank_and_world", lambda: (1, 3))
        with pytest.raises(InputError, match="batch of 8 .* 3 processes in 1 pieces"):
            train(model, small, recipe)
        patch.setattr(evaluation, "rank_and_world", lambda: (1, 2))
        with pytest.raises(InputError, match="batch of 6 .* 2 processes in 2 pieces"):
            train(model, small, dataclasses.replace(recipe, batch=6, accumulate=2))
    with pytest.raises(InputError, match="every parameter of the model is frozen"):
        train(model.requires_grad_(False), small, recipe)


def test_orthogonalise_brings_singular_values_near_one():
    generator = rng(0)
    for m, n in ((40, 20), (20, 40), (16, 16)):
        g = torch.randn(3, m, n, generator=generator)
        o = orthogonalise(g)
        values = torch.linalg.svdvals(o)
        assert values.min() > 0.3 and values.max() < 1.25
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        cosine = (o * (u @ vh)).sum((1, 2)) / o.norm(dim=(1, 2)) / (u @ vh).norm(dim=(1, 2))
        assert cosine.min() > 0.95


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_by_hand(shape):
    generator = rng(0)
    w = nn.Parameter(torch.randn(shape, generator=generator))
    stacked = nn.Parameter(torch.cat([w.detach(), w.detach()]))
    groups = [{"params": [w]}, {"params": [stacked], "stacked": 2}]
    muon = Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, momentum = w.detach().clone(), torch.zeros(shape)
    for _ in range(2):
        grad = torch.randn(shape, generator=generator)
        w.grad, stacked.grad = grad, torch.cat([grad, grad])
        muon.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = 0.9 * momentum + 0.1 * grad  # Nesterov: momentum looks one step ahead
        step = 0.1 * 0.2 * math.sqrt(6) * orthogonalise(update[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - step
        torch.testing.assert_close(w.detach(), expected)
        torch.testing.assert_close(stacked.detach(), torch.cat([expected, expected]))


def test_muon_is_an_optimizer_to_others():
    model, recipe = tiny(optimizer="muon")
    ids = torch.randint(65, (2, 33))
    both = optimizers(model, recipe)
    for optimizer in both:
        loss = optimizer.step(lambda: model.loss(ids)[0].backward() or 3.0)
    assert loss == 3.0
    kept = get_optimizer_state_dict(model, both)["state"]
    assert any("momentum" in state for state in kept.values())


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_which_parameter_goes_where(name):
    """And what the recipe says arrives there: Muon takes linear maps but heads, decay spares what
    the model names.
    """
    plan = {"lr": 0.1, "beta1": 0.7, "beta2": 0.8, "muon_lr": 0.2, "momentum": 0.6}
    model, _ = tiny(name, **({"halt_width": 4} if name == "thinker" else {}))
    adam, muon = optimizers(model, Recipe(optimizer="muon", weight_decay=0.3, **plan))
    names = {p: n for n, p in model.named_parameters()}
    taken = [names[p] for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(names.values())
    linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    heads = {n for n in linear if n.startswith(("lm_head.", "halt_head."))}
    for group in muon.param_groups:
        assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.6, 0.3, 0.2)
        for p in group["params"]:
            assert group["stacked"] == getattr(linear.pop(names[p]), "stacked", 1)
    assert linear.keys() == heads
    for group in adam.param_groups:
        assert group["betas"] == (0.7, 0.8) and group["lr"] == 0.1
        for p in group["params"]:
            spared = p.ndim < 2 or names[p].endswith(model.no_decay)
            assert group["weight_decay"] == (0.0 if spared else 0.3), names[p]
    spares = {"mamba": ["A_log"], "diffusion": ["word_embedding"]}
    for word in spares.get(name, []):
        matrices = [n for n, p in model.named_parameters() if word in n and p.ndim == 2]
        assert matrices and all(n.endswith(model.no_decay) for n in matrices)


def test_fused_queries_keys_and_values_are_three_matrices():
    model, recipe = tiny()
    _, muon = optimizers(model, recipe)
    stacks = {p: g["stacked"] for g in muon.param_groups for p in g["params"]}
    assert stacks[model.h[0].attn.c_attn.weight] == 3 and stacks[model.h[0].mlp.c_fc.weight] == 1


def test_the_averaged_model_is_measured_with_the_buffers_of_now(small):
    model, recipe = tiny("diffusion", steps=4, ema_decay=0.9)
    short = dataclasses.replace(small, val=small.val[:64])
    *_, tick = train(model, short, recipe)
    assert tick.validation == evaluate(model, short).nats_per_char


def test_windows_noise_and_dropout_have_streams_of_their_own_by_the_seed(small):
    streams = []
    for seed in (1, 5):
        model, recipe = tiny(seed=seed)
        state = State(model, small, recipe)
        streams += [state.order.get_state(), state.draws.get_state(), state.dropout.states["cpu"]]
    assert len({tuple(stream.tolist()) for stream in streams}) == 6
    for _ in range(2):  # a step's dropout is not that of the step before
        with state.dropout.drawing():
            streams.append(torch.rand(8))
    assert not torch.equal(*streams[-2:])


def test_nothing_of_a_recipe_may_change_on_the_way_but_how_often_it_is_looked_at(small, tmp_path):
    model, recipe = tiny(steps=1)
    list(train(model, small, recipe, run=tmp_path))
    for name, setting in Recipe.settings().items():
        now = getattr(recipe, name)
        if setting.choices:
            other = next(choice for choice in setting.choices if choice != now)
        elif setting.type is bool:
            other = not now
        else:
            other = 2 * now or 1 if setting.type is int else now / 2 or 0.5
        asked = dataclasses.replace(recipe, **{name: other})
        go_on = train(tiny()[0], small, asked, run=tmp_path, resume=True)
        if name in {"evaluate_every", "save_every", "compile"}:
            assert list(go_on) == []
        else:
            with pytest.raises(CheckpointError, match=f" {name} = "):
                next(go_on)


def test_no_batch_is_measured_with_another_s_noise(corpus):
    text, seen = Text(torch.tensor([0]), torch.arange(20), corpus.vocabulary), []

    def nll(ids, generator):
        seen.append(torch.rand((), generator=generator).item())
        return ids[:, 1:].double()

    for _ in range(2):
        evaluate(Stub(5, None), text, batch=1, nll=nll)
    assert len(set(seen[:4])) == 4 and seen[:4] == seen[4:]


def test_of_the_training_part_the_first_character_is_not_scored(corpus):
    text, seen = Text(torch.arange(23), torch.tensor([99]), corpus.vocabulary), []
    model = Stub(7, lambda ids: seen.append(ids) or ids[:, 1:].double())
    assert evaluate(model, text, part="train").characters == 22
    scored = [i for page in seen for row in page[:, 1:].tolist() for i in row]
    assert sorted(scored) == list(range(1, 23))


def test_a_signal_in_the_last_step_does_not_cost_the_last_validation(small):
    model, recipe = tiny(steps=2)
    asked = itertools.chain([0, 15], itertools.repeat(15))
    *_, last = train(model, small, recipe, stop=lambda: next(asked))
    assert last.interrupted == 15 and last.validation is not None


def test_what_two_processes_have_seen_of_the_noise_levels_is_added(small, monkeypatch):
    model, recipe = tiny("diffusion", steps=2, batch=4)
    summed = []
    monkeypatch.setattr(state, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(loop, "_loss_of", lambda model, *_: loop._Loss(model))
    monkeypatch.setattr(loop.dist, "all_reduce", lambda x: summed.append(x.clone()))
    list(train(model, small, recipe))
    assert len(summed) == 2 and all(x[0].sum() == 2 for x in summed)  # its rows, each once


def test_an_orthogonal_update_does_not_depend_on_the_size_of_the_gradient():
    g = torch.randn(2, 4, 6, generator=rng(0))
    torch.testing.assert_close(orthogonalise(1e-4 * g), orthogonalise(g), rtol=0, atol=4e-3)


def test_a_bound_that_processes_measure_in_shares_is_the_same_bound(small, monkeypatch):
    model, _ = tiny("diffusion")
    whole, parts = evaluate(model, small, batch=4), []
    monkeypatch.setattr(evaluation, "summed", lambda x: parts.append(x) or x)
    for rank in (0, 1):
        monkeypatch.setattr(evaluation, "rank_and_world", lambda rank=rank: (rank, 2))
        evaluate(model, small, batch=4, share=True)
    (a, _, n), (b, _, m) = parts
    assert (a + b) / (n + m) == pytest.approx(whole.nats_per_char, rel=1e-9)
    together = [sum(pair) for pair in zip(*parts, strict=True)]
    monkeypatch.setattr(evaluation, "summed", lambda _: together)
    shared = evaluate(model, small, batch=4, share=True)
    assert shared.standard_error == pytest.approx(whole.standard_error, rel=1e-9)


def test_metrics_of_which_nothing_was_saved_are_a_run_and_begin_anew_if_it_is(small, tmp_path):
    told = '{"step": 1, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(told)
    model, recipe = tiny(steps=1)
    with pytest.raises(RunError, match="holds another run"):
        next(train(model, small, recipe, run=tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == told
    assert list(train(model, small, recipe, run=tmp_path, overwrite=True))[-1].step == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_dropout_is_on_whatever_the_caller_does_between_two_steps(small):
    losses = []
    for between in (lambda model: None, lambda model: model.eval()):
        model, recipe = tiny(steps=4, dropout=0.5)
        losses.append([])
        for tick in train(model, small, recipe):
            losses[-1].append(tick.loss)
            between(model)
    assert losses[0] == losses[1]


def test_what_a_tick_says_of_a_step_does_not_depend_on_how_its_batch_is_cut(small):
    said = []
    for pieces in (1, 4):
        model, recipe = tiny(steps=1, batch=4, accumulate=pieces)
        said.append(next(train(model, small, recipe)))
    whole, cut = said
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.parts == pytest.approx(whole.parts, rel=1e-5)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
