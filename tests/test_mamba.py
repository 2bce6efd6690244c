"""irann.models.mamba against transformers and mambapy on excited weights, and against itself in
pieces.

Almost every test runs twice, with the native scan in C and without it.
"""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.utils.prune
import transformers
from conftest import refuses
from helpers import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from mambapy.mamba import MambaBlock as MambapyBlock
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import nn
from torch.nn import functional as F

from irann import zoo
from irann.models.mamba import Mamba, MambaConfig

pytestmark = pytest.mark.usefixtures("with_and_without_kernel")
SMALL = MambaConfig(vocabulary=11, window=16, layers=2, width=24, d_state=5)


@pytest.fixture(params=["kernel", "torch"])
def with_and_without_kernel(request, monkeypatch):
    monkeypatch.setenv("IRANN_KERNEL", "1" if request.param == "kernel" else "0")


@torch.no_grad()
def excite(model, seed=0):
    """Weights large enough that a wrong epsilon, a missing bias or a swapped B and C cannot
    hide.
    """
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "A_log" in name:
            p.uniform_(-1.5, 1.0)
        else:
            p.normal_(std=0.6 if p.ndim > 1 else 1.0)
            if "embed" in name or "conv" in name:
                p.mul_(
                    0.02 if "embed" in name else 1.0
                )  # small, so that the epsilon of the first norm counts
    return model.eval()


def theirs(**changes):
    sizes = dict(
        vocab_size=11,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return excite(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes | changes)))


def ids(b, t, v=11, seed=0):
    return torch.randint(v, (b, t), generator=rng(seed))


def close(ours, oracle, relative):
    assert ours.shape == oracle.shape and ours.dtype == oracle.dtype
    if ours.numel():
        assert float((ours - oracle).detach().abs().max()) <= relative * max(
            1, float(oracle.detach().abs().max())
        )


VARIANTS = [
    {},
    {"tie_word_embeddings": False, "use_bias": True},
    {"use_conv_bias": False, "state_size": 1, "conv_kernel": 2, "hidden_act": "tanh"},
    {
        "hidden_size": 33,
        "expand": 3,
        "time_step_rank": 7,
        "layer_norm_epsilon": 1e-3,
        "conv_kernel": 1,
        "hidden_act": "gelu_new",
    },
    {"hidden_act": "gelu", "num_hidden_layers": 1, "layer_norm_epsilon": 1.0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 32, 33, 257])
def test_logits_are_those_of_transformers(changes, t):
    oracle = theirs(**changes)
    ours = Mamba.from_transformers(oracle)
    with torch.no_grad():
        close(ours(ids(2, t)), oracle(ids(2, t)).logits, 5e-6)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_the_way_back_to_transformers(changes, tmp_path):
    ours = Mamba.from_transformers(theirs(**changes))
    back = ours.to_transformers()
    close(ours(ids(2, 33)), back(ids(2, 33)).logits, 5e-6)
    back.save_pretrained(tmp_path)
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
    close(again(ids(2, 33)).logits, back(ids(2, 33)).logits, 1e-6)


@torch.no_grad()
def test_the_mamba_that_ships_goes_to_transformers(corpus):
    """And writes there what it writes here: no character is a token that ends or pads a text."""
    ours = zoo.load("mamba")
    page = corpus.val[None, :100]
    theirs = ours.to_transformers()
    close(ours(page), theirs(page).logits, 1e-5)
    *_, last = ours.generate(page[:, :20], 60, temperature=0)
    assert 0 in last.ids[0, 20:]  # a line's end, character 0
    assert torch.equal(theirs.generate(page[:, :20], max_new_tokens=60, do_sample=False), last.ids)


def test_of_an_empty_text_there_is_nothing_to_inspect():
    assert zoo.load("mamba").inspect(ids(1, 0))["delta"].shape == (0,)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_slopes_are_those_of_transformers(changes):
    oracle = theirs(**changes).train()
    ours = Mamba.from_transformers(oracle)
    page = ids(2, 33)
    ours.loss(page)[0].backward()
    F.cross_entropy(oracle(page[:, :-1]).logits.flatten(0, 1), page[:, 1:].flatten()).backward()
    for p in oracle.parameters():
        p.data = p.grad
    expected = dict(
        Mamba.from_transformers(oracle).named_parameters()
    )  # their slopes under our names
    for name, p in ours.named_parameters():
        slope = expected[name].detach()
        assert float((p.grad - slope).abs().max()) <= 1e-5 * float(slope.abs().max()), name


def test_a_name_or_a_folder_is_resolved_by_transformers(tmp_path):
    oracle = theirs()
    oracle.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        with torch.no_grad():
            assert torch.equal(
                Mamba.from_transformers(source)(ids(1, 9)),
                Mamba.from_transformers(oracle)(ids(1, 9)),
            )


def test_a_double_model_computes_in_double():
    """No oracle computes Mamba in float64, so: ours in float64 is what ours in float32 rounds."""
    single = Mamba.from_transformers(theirs())
    double = Mamba.from_transformers(theirs().double())
    with torch.no_grad():
        exact, rounded = double(ids(2, 40)), single(ids(2, 40))
        assert exact.dtype == torch.float64
        assert {p.dtype for p in double.to_transformers().parameters()} == {torch.float64}
        close(rounded.double(), exact, 5e-6)
        logits, state = double.read(ids(2, 20))
        rest, _ = double.read(ids(2, 40)[:, 20:], double.read(ids(2, 40)[:, :20])[1])
        close(rest, exact[:, 20:], 1e-12)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 33])
def test_a_block_is_that_of_mambapy(t):
    oracle = excite(MambapyBlock(MambapyConfig(d_model=24, n_layers=1, d_state=5)))
    ours = Mamba(SMALL).layers[0].mixer
    ours.load_state_dict(oracle.state_dict())
    x = torch.randn(2, t, 24, generator=rng(1))
    with torch.no_grad():
        close(ours(x)[0], oracle(x), 5e-6)


def chunks_of(sizes, model, page):
    state, logits = None, []
    for piece in page.split(sizes, 1):
        more, state = model.read(piece, state)
        logits.append(more)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_conv": 1, "activation": "tanh"},
        {"d_conv": 2, "conv_bias": False},
        {"d_state": 1, "bias": True},
    ],
    ids=str,
)
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 9) | st.just(1), min_size=1, max_size=12))
def test_any_chunking_reads_the_same(changes, sizes):
    model = excite(Mamba(dataclasses.replace(SMALL, **changes)).double())
    sizes = [*sizes, 1]
    page = ids(2, sum(sizes))
    with torch.no_grad():
        logits, after = model.read(page)
        pieces, state = chunks_of(sizes, model, page)
    close(pieces, logits, 1e-11)
    for mine, oracle in zip(state, after, strict=True):
        for part, other in zip(mine, oracle, strict=True):
            close(part, other, 1e-11)


def test_one_character_at_a_time_has_slopes_too():
    model = excite(Mamba(SMALL).double())
    page = ids(2, 7)
    grads = []
    for sizes in ([7], [1] * 7):
        model.zero_grad()
        chunks_of(sizes, model, page)[0].sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for mine, oracle in zip(*grads, strict=True):
        close(mine, oracle, 1e-10)


def test_the_state_has_one_size_and_a_long_text_bounded_memory():
    """20,000 characters: were the whole text computed at once, one layer's states alone would be
    20,000 x 48 x 5 numbers.
    """
    model = excite(Mamba(SMALL))
    sizes, seen = set(), []
    block = model.layers[0]
    block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        for t in (1, 10, 20_000):
            logits, state = model.read(ids(1, t))
            assert logits.shape == (1, t, 11)
            sizes.add(sum(part.untyped_storage().nbytes() for memory in state for part in memory))
    assert len(sizes) == 1, "the state grows, or holds on to what it is a view of"
    assert max(seen) <= 2048


def test_a_long_prompt_is_read_whole():
    model = excite(Mamba(SMALL))
    assert model.max_context is None
    prompt = ids(1, 5000)
    changed = prompt.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    draft = list(model.generate(prompt, 3, temperature=0))[-1]
    assert draft.forgotten == 0 and draft.settled == 5003
    with torch.no_grad():
        whole, _ = model.read(prompt)
        first, state = model.read(prompt[:, :3000])
        rest, _ = model.read(prompt[:, 3000:], state)
    close(torch.cat([first, rest], 1), whole, 5e-6)
    assert draft.ids[0, 5000] == whole[0, -1].argmax()


def test_inspection_shows_what_reading_one_by_one_notes():
    model = excite(Mamba(SMALL).double())
    deltas, state = [], None
    with torch.no_grad():
        for piece in ids(1, 9).split(1, 1):
            _, state = model.read(piece, state)
            deltas += model.notes(state)["delta"]
    close(model.inspect(ids(1, 9))["delta"], torch.tensor(deltas, dtype=torch.float64), 1e-12)
    assert min(deltas) > 0 and model.notes(None) == {}


def test_it_starts_as_the_paper_says():
    torch.manual_seed(0)
    mixer = Mamba(MambaConfig(width=128)).layers[0].mixer
    torch.testing.assert_close(-mixer.A_log.exp()[7], -torch.arange(1.0, 17))
    assert (
        MambaConfig().eps == 1e-5
        and mixer.dt_rank == 8
        and mixer.d_inner == 256
        and (mixer.D == 1).all()
    )
    delta = F.softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < delta.min() < 1.5e-3 and 0.07 < delta.max() < 0.101
    assert math.isclose(delta.log().median().item(), math.log(0.01), abs_tol=0.4)
    assert mixer.dt_proj.weight.abs().max() <= 8**-0.5
    assert Mamba(MambaConfig.fast()).layers[0].mixer.out_proj.weight.count_nonzero() == 0
    assert 0.9e-3 < F.softplus(Mamba(MambaConfig.fast()).layers[0].mixer.dt_proj.bias).min() < 0.1


@pytest.mark.parametrize("with_and_without_kernel", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, tied=False, init="fan_in", dropout=0.1)],
    ids=["paper", "fast"],
)
def test_every_parameter_learns(config):
    torch.manual_seed(0)
    model = Mamba(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # from zero, the out projections have a slope first, what lies before them second
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss, parts = model.loss(ids(2, 17))
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert torch.equal(parts["nats_per_char"], loss.detach())


def test_dropout_reaches_the_input_and_every_block():
    model = excite(
        Mamba(dataclasses.replace(SMALL, bias=True, dropout=1.0))
    )  # all is dropped: nothing is added to the stream
    assert model(ids(1, 9)).any() and not model.train()(ids(1, 9)).any()
    with torch.no_grad():
        assert not chunks_of([5, 1, 1], model, ids(1, 7))[0].any()


def test_what_cannot_be_copied_is_named():
    with refuses("a multiple of the width; this model has 25 and 24"):
        Mamba(dataclasses.replace(SMALL, d_inner=25)).to_transformers()
    with refuses("activation"):
        Mamba.from_transformers(theirs(hidden_act="gelu_10"))
    small = dict(vocab_size=11, hidden_size=24, num_hidden_layers=1, state_size=5)
    relative = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**small))
    with refuses("MambaForCausalLM; got a FalconMambaForCausalLM"):
        Mamba.from_transformers(relative)


def test_the_note_and_the_text_of_a_row_are_its_own():
    model = excite(Mamba(SMALL).double())
    page = ids(3, 7)
    *_, together = model.generate(page, 6, temperature=0)
    assert len(together.note["delta"]) == 3
    for i in range(3):
        *_, alone = model.generate(page[i : i + 1], 6, temperature=0)
        assert torch.equal(alone.ids[0], together.ids[i])
        assert alone.note["delta"] == pytest.approx(together.note["delta"][i : i + 1], rel=1e-12)


def set_data(model, other):
    for p, new in zip(model.parameters(), other.parameters(), strict=True):
        p.data = new.data


def fused_step(model, other):
    model.loss(ids(2, 9))[0].backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize("change", [fused_step, set_data])
@torch.no_grad()
def test_a_state_goes_on_with_the_weights_that_the_model_has_now(change):
    """As a copy that never wrote with the old ones; a fused optimizer counts no version."""
    model = excite(Mamba(SMALL).double())
    _, state = model.read(ids(1, 5))
    _, state = model.read(ids(1, 1), state)
    with torch.enable_grad():
        change(model, excite(Mamba(SMALL).double(), seed=1))
    close(model.read(ids(1, 1), state)[0], copy.deepcopy(model).read(ids(1, 1), state)[0], 0)


class Adapted(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) + x.mean(-1, keepdim=True)


def adapt(mixer):
    mixer.x_proj = Adapted(mixer.x_proj)


def hook(mixer):
    mixer.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))


def normed(mixer):
    nn.utils.parametrizations.weight_norm(mixer.in_proj).parametrizations.weight.original0.data *= 2


def pruned(mixer):
    nn.utils.prune.random_unstructured(mixer.out_proj, "weight", 0.5)


@pytest.mark.parametrize("change", [adapt, hook, normed, pruned])
@torch.no_grad()
def test_what_is_put_around_a_part_is_there_in_writing_too(change):
    model = excite(Mamba(SMALL).double())
    page = ids(1, 9)
    before = model(page)
    change(model.layers[0].mixer)
    assert not torch.allclose(model(page), before, atol=1e-3)
    close(chunks_of([5, 1, 1, 1, 1], model, page)[0], model(page), 1e-11)


@torch.no_grad()
def test_weights_go_to_transformers_as_they_count_or_not_at_all():
    model = excite(Mamba(SMALL))
    for change in (normed, pruned):
        change(model.layers[0].mixer)
        close(model.to_transformers()(ids(1, 9)).logits, model(ids(1, 9)), 5e-6)
    adapt(model.layers[0].mixer)
    with refuses("no layers.0.mixer.x_proj.weight to copy"):
        model.to_transformers()


def test_copies_learn_as_the_original_and_workers_can_have_one():
    model = Mamba(dataclasses.replace(SMALL, activation="squared_relu"))
    spared = {name for name, _ in model.named_parameters() if name.endswith(model.no_decay)}
    assert spared == {f"layers.{i}.mixer.{part}" for i in range(2) for part in ("A_log", "D")}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin).no_decay == model.no_decay
        assert torch.equal(twin(ids(1, 5)), model(ids(1, 5)))


def test_what_the_blocks_add_to_the_residual_stream_begins_small_as_published():
    torch.manual_seed(0)
    model = Mamba(MambaConfig(layers=9, width=32))
    for block in model.blocks:
        largest = block.mixer.out_proj.weight.abs().max() * math.sqrt(64)  # d_inner
        assert 0.3 < largest < 1 / 3 + 1e-6  # torch's default, uniform up to 1, over sqrt(layers)


def test_published_weights_begin_as_the_published_code_has_them():
    """Embeddings of deviation 0.02, outputs divided by the root of the number of layers."""
    config = dict(vocabulary=65, width=64, layers=4)
    ours = zoo.build("mamba", MambaConfig(**config))
    assert abs(ours.embeddings.weight.std().item() / 0.02 - 1) < 0.05
    bound = 128**-0.5 / 2  # of a linear layer by torch's default, by two
    largest = max(block.mixer.out_proj.weight.abs().max().item() for block in ours.blocks)
    assert 0.95 * bound < largest <= bound


def test_the_window_is_the_one_that_is_asked_for():
    assert Mamba.from_transformers(theirs(), window=48).config.window == 48
    assert Mamba.from_transformers(theirs()).config.window == 1024


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_goes_over_to_transformers_and_back(training):
    ours = Mamba.from_transformers(theirs().train(training))
    assert ours.training == training and ours.to_transformers().training == training


def test_what_is_asked_for_goes_before_what_is_fast():
    assert MambaConfig.fast(tied=True, width=16) == MambaConfig(tied=True, init="fan_in", width=16)
