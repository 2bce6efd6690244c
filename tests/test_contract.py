"""The contract of every model in the zoo, in every mode of writing. A new model passes this file
unchanged, as one more that is in the zoo for its sake shows.
"""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
from conftest import PROGRAMS, excite, refuses
from helpers import apart, ids, objective, rng
from programs.sixth import SIXTH
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import irann
from irann import lm, zoo
from irann.lm import Reader
from irann.settings import InputError
from irann.training import evaluate, train

OURS = list(zoo.MODELS)
MODELS = zoo.MODELS | {"recurrent": SIXTH}
FORMS = {name: (name, {}) for name in MODELS} | {
    "thinker that ships": ("thinker", zoo.DEEP | zoo.HALTING)
}
NAMES = list(FORMS)
READERS = [form for form, (name, _) in FORMS.items() if issubclass(MODELS[name].model, Reader)]
STRAIGHT = [form for form in READERS if "stop" not in MODELS[FORMS[form][0]].model.settings]
MODES = [
    (form, settings)
    for form in NAMES
    for settings in ({}, {"temperature": 2.0, "top_k": 20, "top_p": 0.9})
]
for form, (name, _) in FORMS.items():
    for setting, described in MODELS[name].model.settings.items():
        MODES += [
            (form, {setting: value})
            for value in described.choices or (described.low, min(described.high, 20))
            if value != described.default
        ]
        if setting == "keep":
            MODES.append((form, {"keep": 0.08, "steps": 16}))  # a page ends where its last row does
in_every_mode = pytest.mark.parametrize("name, settings", MODES, ids=str)
BAD = [
    ("temperature", -1),
    ("temperature", float("nan")),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_p", 1.1),
    ("top_p", float("nan")),
]


@pytest.fixture(autouse=True)
def sixth(monkeypatch):
    """One more model is in the zoo."""
    monkeypatch.setitem(zoo.MODELS, "recurrent", SIXTH)


def recipe(form, **changes):
    """-> the model's name, and the smallest config and recipe of a form."""
    name, own = FORMS[form]
    return name, *zoo.recipe(name, "tiny", **own, **changes)


def tiny(form, seed=1337, **changes):
    name, config, _ = recipe(form, **changes)
    return zoo.build(name, config, seed=seed)


def few(model, **settings):
    """-> settings, with few steps for a model that has steps and is asked for no number of them."""
    return {"steps": 4} | settings if "steps" in model.settings else settings


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_every_parameter_learns(name):
    model = excite(tiny(name), 0.1)
    torch.manual_seed(0)
    loss, parts = model.loss(ids(4, model.config.window + 1))
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    assert ("nats_per_char" in parts) == model.exact
    assert all(not torch.as_tensor(value).requires_grad for value in parts.values())
    asleep = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not asleep


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_active_in_training_only(name):
    losses = {}
    for p in (0.0, 0.5):
        model = excite(tiny(name, dropout=p), 0.2)
        assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {p}
        draws = model.draw(ids(8, 33), generator=rng())
        for mode in (True, False):
            torch.manual_seed(0)
            losses[p, mode] = model.train(mode).loss(ids(8, 33), draws)[0].item()
    assert losses[0.0, True] != losses[0.5, True] and losses[0.0, False] == losses[0.5, False]


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_can_be_memorised(name, small, unchecked):
    model = tiny(name)
    batch = small.train[: 2 * (model.config.window + 1)].view(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(150):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # the best table of pairs of this very batch has 1.0; noise and masks keep asking anew
    least = 0.1 if model.exact else 0.5 * losses[0]
    assert sum(losses[-10:]) / 10 < least


@in_every_mode
def test_drafts_keep_the_prompt_and_what_is_settled(name, settings):
    model, prompt = tiny(name), ids(2, 5)
    before, settled = None, 0
    for draft in model.generate(prompt, 40, generator=rng(), **few(model, **settings)):
        assert torch.equal(draft.ids[:, :5], prompt)
        assert settled <= draft.settled <= draft.ids.shape[1]
        if before is not None:
            assert torch.equal(draft.ids[:, :settled], before[:, :settled])
        before, settled = draft.ids.clone(), draft.settled
    assert before.shape == (2, 45) and settled == 45


@in_every_mode
def test_same_seed_same_text(name, settings):
    model, prompt = tiny(name), ids(1, 3)

    def write(seed):
        *_, last = model.generate(prompt, 12, generator=rng(seed), **few(model, **settings))
        return last.ids

    first = write(1)
    assert torch.equal(write(1), first) and not torch.equal(write(2), first)


@pytest.mark.parametrize("name", NAMES)
def test_writing_leaves_training_and_the_global_generator_alone(name):
    model = excite(tiny(name, dropout=0.5), 0.3).train()
    next(model.children()).eval()  # as one that is not to learn
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    stream = model.generate(ids(1, 3), 20, generator=rng(), **few(model))
    next(stream), next(stream)
    assert model.training
    *_, last = stream
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.rand(3), expected)
    *_, sober = model.eval().generate(ids(1, 3), 20, generator=rng(), **few(model))
    assert torch.equal(last.ids, sober.ids) and not model.training


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_any_length(name):
    model = tiny(name)
    for t in (
        0,
        1,
        model.config.window - 1,
        model.config.window,
        model.config.window + 1,
        3 * model.config.window,
    ):
        prompt = ids(1, t)
        *_, last = model.generate(prompt, 3, generator=rng(), **few(model))
        assert last.ids.shape[1] == max(t, 1) + 3 and torch.equal(last.ids[:, :t], prompt)
    *_, last = model.generate(ids(1, 4), 0, generator=rng())
    assert torch.equal(last.ids, ids(1, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting, value", BAD)
def test_settings_out_of_range_are_named(name, setting, value):
    with refuses(setting):
        list(tiny(name).generate(ids(1, 3), 2, **{setting: value}))


@pytest.mark.parametrize("name", NAMES)
def test_own_settings_are_checked_and_characters_too(name):
    model = tiny(name)
    with pytest.raises(ValueError, match="length"):
        list(model.generate(ids(1, 3), -1))
    with pytest.raises(ValueError, match="ids"):
        list(model.generate(torch.full((1, 3), 65), 2))
    for setting, described in model.settings.items():
        assert described.check(setting, described.default) == described.default
        wrong = "no such thing" if described.choices else float("nan")
        with pytest.raises(InputError, match=setting):
            lm.check_settings(model, {setting: wrong})
        with refuses(setting):
            list(model.generate(ids(1, 3), 2, **{setting: wrong}))


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_drawn_no_temperature_is_taken(name):
    model = tiny(name)
    asked = [model.inspect]
    asked += [model.nll] if model.exact else []
    asked += [model.read] if isinstance(model, lm.Reader) and model.settings else []
    for ask in asked:
        with refuses("has no setting 'temperature' for reading"):
            ask(ids(1, 3), temperature=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_none_means_the_default(name, small):
    model = tiny(name).eval()
    model.vocabulary = small.vocabulary
    for setting in ("temperature", "top_k", "top_p", *model.settings):
        others = {} if setting == "steps" else few(model)
        wanted = lm.generate(model, "the", 3, seed=0, **others)
        assert lm.generate(model, "the", 3, seed=0, **others, **{setting: None}) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_nll_is_one_number_per_character(name):
    model = tiny(name).eval()
    with torch.no_grad():
        nats = model.nll(ids(2, 17), generator=rng())
        again = model.nll(ids(2, 17), generator=rng())
    assert nats.shape == (2, 16) and nats.isfinite().all() and torch.equal(nats, again)


@pytest.mark.parametrize("name", NAMES)
def test_characters_may_be_whole_numbers_of_any_kind(name):
    model, wanted = excite(tiny(name), 0.1).eval(), ids(2, 33)
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(
            model.nll(wanted.to(kind), generator=rng()), model.nll(wanted, generator=rng())
        )
        torch.manual_seed(0)
        loss, _ = model.loss(wanted.to(kind))
        torch.manual_seed(0)
        assert torch.equal(loss, model.loss(wanted)[0])
        *_, last = model.generate(wanted[:, :5].to(kind), 3, generator=rng(), **few(model))
        assert last.ids.dtype == torch.long and last.ids.shape == (2, 8)
    shows = type(model).inspect is not lm.LanguageModel.inspect
    for ask in (
        model.loss,
        model.nll,
        *[model.inspect] * shows,
        *[model] * isinstance(model, Reader),
    ):
        with pytest.raises(ValueError, match="ids lie in 0..64; got 0..65"):
            ask(torch.tensor([[0] * 32 + [65]]))
    assert model.nll(wanted[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_longer_than_the_window_is_refused_or_read_on(name):
    model = tiny(name).eval()
    room = model.config.window + 1
    model.loss(ids(1, room))
    long = ids(1, room + 1)
    if isinstance(model, Reader) and model.max_context is None:  # a state that never fills up
        assert model.loss(long)[0].isfinite() and model.nll(long).shape == (1, room)
        return
    with refuses("window holds"):
        model.loss(long)
    if isinstance(model, Reader):
        with refuses("window holds"):
            model.nll(long, generator=rng())
        return
    try:  # a page at once: a long text is cut, or refused
        assert model.nll(long, generator=rng()).shape == (1, room)
    except InputError as error:
        assert "window holds" in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_may_be_asked_for_its_inside_in_the_same_way(name):
    model = tiny(name).eval()
    text = ids(1, 20)
    shown = model.inspect(text, generator=rng(), **dict.fromkeys(model.settings))
    for what, tensor in model.inspect(text, generator=rng()).items():
        assert torch.equal(shown[what], tensor), what
    if shown:
        with refuses("no setting 'colour'"):
            model.inspect(text, colour="red")


@pytest.mark.parametrize("name", NAMES)
def test_the_inside_of_a_model_in_training_is_shown_without_dropout(name):
    model = excite(tiny(name, dropout=0.5), 0.3).eval()
    wanted = model.inspect(ids(1, 20), generator=rng())
    for what, tensor in model.train().inspect(ids(1, 20), generator=rng()).items():
        assert torch.equal(tensor, wanted[what]), what
    assert model.training


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_in_inference_mode_does_not_forbid_training_later(name):
    model = tiny(name)
    with torch.inference_mode():
        model.loss(ids(2, 33))
    model.loss(ids(2, 33))[0].backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_does_not_depend_on_how_a_batch_is_cut_or_ordered(name, seed):
    start = excite(tiny(name), 0.2, seed=seed).double().train()
    batch = ids(8, start.config.window + 1, seed=seed)
    draws = start.draw(batch, generator=rng(seed))
    whole = objective(copy.deepcopy(start), batch, draws, [torch.arange(8)])
    shuffled = torch.randperm(8, generator=rng(seed))
    for rows in (shuffled.chunk(1), torch.arange(8).chunk(2), shuffled.chunk(8)):
        model = copy.deepcopy(start)
        pieces = objective(model, batch, draws, rows)
        assert pieces.keys() == whole.keys()
        for part, value in whole.items():
            least = 1e-11 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(pieces[part], value, atol=least, rtol=1e-9, msg=part)
        one = copy.deepcopy(start)
        objective(one, batch, draws, [torch.arange(8)])
        for (n, ours), theirs in zip(model.named_buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=n)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_loss_draws_comes_from_the_generator_it_is_given(name):
    start = excite(tiny(name, dropout=0.0), 0.2).train()
    batch = ids(4, start.config.window + 1)
    losses = []
    for outer in (1, 2):  # the global generator, which must not matter
        model = copy.deepcopy(start)
        torch.manual_seed(outer)
        draws = model.draw(batch, generator=rng(5))
        losses.append(model.loss(batch, draws)[0].item())
    assert losses[0] == losses[1]


@in_every_mode
def test_a_row_s_text_does_not_depend_on_its_neighbours(name, settings):
    model = excite(tiny(name), 0.3).double().eval()

    def first_row(neighbour):
        prompt = torch.cat([ids(1, 5), ids(1, 5, seed=neighbour)])
        n = 40 if "keep" in settings else 12  # more pages than one
        *_, last = model.generate(prompt, n, generator=rng(2), **few(model, **settings))
        return last.ids[0]

    assert all(torch.equal(first_row(1), first_row(neighbour)) for neighbour in (2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_belongs_to_its_receiver(name):
    model = tiny(name)

    def drafts():
        return model.generate(ids(1, 3), 20, generator=rng(), **few(model))

    undisturbed = [draft.ids.clone() for draft in drafts()]
    for draft, wanted in zip(drafts(), undisturbed, strict=True):
        assert torch.equal(draft.ids, wanted)
        draft.ids.zero_()


def test_compiled_they_compute_the_same():
    assert apart(PROGRAMS / "compile.py").stdout.count("\n") == len(OURS)


def test_two_processes_are_one_and_what_one_of_them_wants_both_do(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    said = apart(*torchrun, PROGRAMS / "two_processes.py", tmp_path).stdout
    assert said.count("as one") == 2


class Fixed(torch.nn.Module):
    """A model that decides when to stop, with as many rounds for every text."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.read(ids, stop="fixed")[0]


@pytest.mark.parametrize("name", READERS)
def test_exported_it_computes_the_same_and_others_of_its_kind_as_before(name, unchecked):
    model, other, page = tiny(name).eval(), tiny(name).eval(), ids(1, 12)
    if name not in STRAIGHT:  # its rounds depend on the text
        with pytest.raises(InputError, match="export cannot follow it"):
            torch.export.export(model, (page,))
        model, other = Fixed(model), Fixed(other)
    exported = torch.export.export(model, (page,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(page), model(page), atol=1e-5, rtol=1e-5)
        assert torch.equal(other(page), model(page))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_no_character_is_refused(name):
    for b, t in ((2, 1), (2, 0), (0, 5)):
        with refuses(rf"from \(1, 2\) on; got ids of shape \({b}, {t}\)"):
            tiny(name).loss(ids(b, t))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_write_score_and_are_kept(name, kind, small, tmp_path):
    model = excite(tiny(name), 0.1).eval().to(kind)
    *_, last = model.generate(ids(1, 5), 4, generator=rng(), **few(model))
    nats = model.nll(ids(2, 33), generator=rng())
    assert model.loss(ids(2, 33))[0].dtype == torch.promote_types(kind, torch.float32)
    assert last.ids.shape == (1, 9) and nats.isfinite().all()
    if model.exact:
        assert nats.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    model.vocabulary = small.vocabulary
    again = irann.load(irann.save(model, tmp_path / "mine")).state_dict()
    for n, tensor in model.state_dict().items():
        assert again[n].dtype == tensor.dtype and torch.equal(again[n], tensor), n


@pytest.mark.parametrize("name", NAMES)
def test_another_default_device_changes_nothing(name, small):
    model = tiny(name).eval()
    model.vocabulary = small.vocabulary
    some, generator = ids(2, 33), rng()
    how = few(model, seed=0)
    wanted = lm.generate(model, "the", 3, **how), model.nll(some, generator=rng())
    with torch.device("meta"):
        found = lm.generate(model, "the", 3, **how), model.nll(some, generator=generator)
        model.loss(some)[0].backward()
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_loses_little_and_nothing_in_the_parts(name):
    parts_of = {}
    for mixed in (False, True):
        model = excite(tiny(name), 0.2)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss, parts = model.loss(ids(4, 33))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        parts_of[mixed] = {"loss": loss.detach()} | parts
    for part, exactly in parts_of[False].items():
        assert parts_of[True][part].dtype == torch.float32, part
        torch.testing.assert_close(
            parts_of[True][part],
            exactly,
            rtol=0.02,
            atol=2e-3,
            msg=lambda text, part=part: f"{part}: {text}",
        )


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_and_filled_by_assignment_it_is_the_same_model(name):
    model = excite(tiny(name), 0.2).eval()
    with torch.device("meta"):
        other = tiny(name).eval()
    assert {p.device.type for p in other.parameters()} == {"meta"}
    state = model.state_dict() | {
        n: b for n, b in model.named_buffers() if n not in model.state_dict()
    }
    other.load_state_dict(state, assign=True, strict=False)
    wanted = model.nll(ids(2, 17), generator=rng())
    for n, b in other.named_buffers():  # what no checkpoint keeps
        if b.is_meta:
            module, _, leaf = n.rpartition(".")
            other.get_submodule(module)._buffers[leaf] = model.get_buffer(n).clone()
    assert torch.equal(other.nll(ids(2, 17), generator=rng()), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_give_the_same(name, small, tmp_path):
    model, (_, config, plan) = tiny(name), recipe(name, steps=2)
    list(train(model, small, plan, run=tmp_path / "run"))
    loaded = zoo.load(tmp_path / "run")
    assert (
        type(loaded) is type(model)
        and loaded.config == config
        and loaded.vocabulary == small.vocabulary
    )
    for (n, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(ours, theirs), n
    assert evaluate(model, small) == evaluate(loaded, small)


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_bitwise(name, small, tmp_path, unchecked):
    *_, plan = recipe(name, steps=7, evaluate_every=3)
    text = dataclasses.replace(small, val=small.val[:66])
    straight = tiny(name)
    losses = [tick.loss for tick in train(straight, text, plan)]

    first = tiny(name)
    stream = train(first, text, plan, run=tmp_path / "run")
    sitting = []
    for tick in stream:
        # draws from the global generator, which must not matter
        list(first.generate(text.val[None, :4], 3, **few(first)))
        sitting.append(tick.loss)
        if tick.step == 4:
            break
    stream.close()
    second = tiny(name, seed=99)
    sitting += [tick.loss for tick in train(second, text, plan, run=tmp_path / "run", resume=True)]
    assert sitting == losses
    for (n, ours), theirs in zip(straight.state_dict().items(), second.state_dict().values()):
        assert torch.equal(ours, theirs), n


@pytest.mark.parametrize("name", READERS)
def test_any_chunking_of_read_equals_one_read(name):
    model = excite(tiny(name), 0.3).double().eval()
    page = ids(2, model.config.window)
    with torch.no_grad():
        whole, _ = model.read(page)
        for sizes in (
            [1] * page.shape[1],
            [5, 1, 1, 9],
            [page.shape[1] - 1, 1],
            [1, page.shape[1] - 1],
        ):
            state, logits, at = None, [], 0
            for size in (*sizes, page.shape[1] - sum(sizes)):
                out, state = model.read(page[:, at : at + size], state)
                logits.append(out)
                at += size
            torch.testing.assert_close(
                torch.cat(logits, 1), whole, atol=1e-10 * max(1, whole.abs().max()), rtol=0
            )
        torch.testing.assert_close(model(page), whole, atol=0, rtol=0)


@pytest.mark.parametrize("name", READERS)
def test_a_state_can_be_continued_twice(name):
    model = excite(tiny(name), 0.3).double().eval()
    with torch.no_grad():
        for t in (1, 4):
            _, state = model.read(ids(1, 6))
            one, _ = model.read(ids(1, t, seed=1), state)
            model.read(ids(1, t, seed=2), state)
            again, _ = model.read(ids(1, t, seed=1), state)
            assert torch.equal(one, again)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_each_row_has_a_gradient_of_its_own_under_vmap(name):
    model = excite(tiny(name), 0.2).eval()
    weights = dict(model.named_parameters())
    model.forward = model.loss  # what functional_call calls

    def of_row(weights, row):
        return functional_call(model, weights, (row[None], {"rounds": 3}))[0]

    rows = ids(2, 9)
    both = vmap(grad(of_row), (None, 0))(weights, rows)
    alone = grad(of_row)(weights, rows[1])
    of_row(weights, rows[1]).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(both[n][1], alone[n], msg=n)
        torch.testing.assert_close(alone[n], p.grad, atol=1e-5, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", STRAIGHT)
def test_shapes_can_be_asked_on_meta(name):
    assert tiny(name).to("meta")(ids(2, 9).to("meta")).shape == (2, 9, 65)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_does_not_make_a_gpu_wait(name, monkeypatch):
    """On meta, where nothing can be read: nobody asks, but for ids that come without draws."""

    class Asked(TorchDispatchMode):
        times = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._local_scalar_dense.default:
                self.times += args[0].is_meta
            return op(*args, **kwargs or {})

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    # Which rows are self-conditioned has to be known, so that only those are computed.
    model = tiny(name, **{"self_condition": False} if name == "diffusion" else {})
    batch = ids(4, model.config.window + 1)
    draws = model.draw(batch, generator=rng())
    draws |= {"carried": True} if "carried" in draws else {}
    draws = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in draws.items()}
    model = model.to("meta")
    batch = batch.to("meta")
    with Asked() as asked:
        model.loss(batch, draws)[0].backward()
    assert asked.times == 0
    with asked:
        model.check_ids(batch)
    assert asked.times == 1


@pytest.mark.parametrize("name", READERS)
def test_the_future_never_moves_past_logits(name):
    model = excite(tiny(name), 0.3).double().eval()
    page = ids(2, model.config.window)
    changed = page.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 65
    with torch.no_grad():
        assert torch.equal(model(page)[:, :11], model(changed)[:, :11])
        assert not torch.equal(model(page)[:, 11:], model(changed)[:, 11:])


@pytest.mark.parametrize("name", READERS)
def test_greedy_text_is_the_likeliest_character_each_time(name):
    model = excite(tiny(name), 0.3).double().eval()
    *_, last = model.generate(ids(2, 4), 8, temperature=0)
    with torch.no_grad():
        for t in range(4, 12):
            assert torch.equal(model(last.ids[:, :t])[:, -1].argmax(-1), last.ids[:, t])
