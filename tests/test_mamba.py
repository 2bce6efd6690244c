"""irann.models.mamba against transformers and mambapy on excited weights, and against itself in pieces.

Every test runs twice, with the C kernel of the scan and without it.
"""

import dataclasses
import math

import pytest
import torch
import transformers
from mambapy.mamba import MambaBlock as MambapyBlock
from mambapy.mamba import MambaConfig as MambapyConfig
from torch.nn import functional as F

from irann.models.mamba import Mamba, MambaConfig, Memory

pytestmark = pytest.mark.usefixtures("with_and_without_kernel")
SMALL = MambaConfig(vocabulary=11, window=16, layers=2, width=24, state=5)


@pytest.fixture(params=["kernel", "torch"])
def with_and_without_kernel(request, monkeypatch):
    monkeypatch.setenv("IRANN_KERNEL", "1" if request.param == "kernel" else "0")


@torch.no_grad()
def excite(model, seed=0):
    """Weights large enough that a wrong epsilon, a missing bias or a swapped B and C cannot hide."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "A_log" in name or "log_A" in name:
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
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


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
        close(rounded.double(), exact, 5e-6)
        logits, state = double.read(ids(2, 20))
        rest, _ = double.read(ids(2, 40)[:, 20:], double.read(ids(2, 40)[:, :20])[1])
        close(rest, exact[:, 20:], 1e-12)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 33])
def test_a_block_is_that_of_mambapy(t):
    oracle = excite(MambapyBlock(MambapyConfig(d_model=24, n_layers=1, d_state=5)))
    ours = Mamba(SMALL).blocks[0].mixer
    names = {
        "widen": "in_proj",
        "convolution": "conv1d",
        "choose": "x_proj",
        "pace": "dt_proj",
        "out": "out_proj",
        "log_A": "A_log",
    }
    for name, weight in ours.state_dict().items():
        part, _, kind = name.partition(".")
        weight.copy_(oracle.state_dict()[f"{names.get(part, part)}.{kind}".rstrip(".")])
    x = torch.randn(2, t, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(ours(x)[0], oracle(x), 5e-6)


def chunks_of(sizes, model, page):
    state, logits = None, []
    for piece in page.split(sizes, 1):
        more, state = model.read(piece, state)
        logits.append(more)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("sizes", [[1] * 20, [3, 17], [1, 1, 1, 17], [4, 1, 9, 2, 4]], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"taps": 1}, {"taps": 2, "convolution_bias": False}, {"state": 1, "bias": True}],
    ids=str,
)
def test_any_chunking_reads_the_same(sizes, changes):
    model = excite(Mamba(dataclasses.replace(SMALL, **changes)).double())
    page = ids(3, 20)
    with torch.no_grad():
        whole, after = model.read(page)
        pieces, state = chunks_of(sizes, model, page)
    close(pieces, whole, 1e-11)
    for one, other in zip(state.layers, after.layers, strict=True):
        for mine, oracle in zip(one, other, strict=True):
            close(mine, oracle, 1e-11)


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


def test_reading_does_not_change_the_state_it_was_given():
    model = excite(Mamba(SMALL))
    with torch.no_grad():
        _, state = model.read(ids(1, 9))
        before = [Memory(*(part.clone() for part in memory)) for memory in state.layers]
        for t in (1, 5):
            first, _ = model.read(ids(1, t, seed=1), state)
            again, _ = model.read(ids(1, t, seed=1), state)
            assert torch.equal(first, again)
    for one, other in zip(state.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_future_is_not_seen():
    model = excite(Mamba(SMALL))
    page, other = ids(1, 20), ids(1, 20)
    other[:, 12:] = (other[:, 12:] + 1) % 11
    with torch.no_grad():
        assert torch.equal(model(page)[:, :12], model(other)[:, :12])
        assert not torch.equal(model(page)[:, 12:], model(other)[:, 12:])


def test_the_state_has_one_size_and_a_long_text_bounded_memory():
    """20,000 characters: were the whole text computed at once, one layer's states alone would be 20,000 x 48 x 5 numbers."""
    model = excite(Mamba(SMALL))
    sizes, seen = set(), []
    block = model.blocks[0]
    block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        for t in (1, 10, 20_000):
            logits, state = model.read(ids(1, t))
            assert logits.shape == (1, t, 11)
            sizes.add(
                sum(part.untyped_storage().nbytes() for memory in state.layers for part in memory)
            )
    assert len(sizes) == 1, "the state grows, or holds on to what it is a view of"
    assert max(seen) <= 2048


def test_a_long_prompt_is_read_whole():
    model = excite(Mamba(SMALL))
    assert model.memory is None
    prompt = ids(1, 5000)
    changed = prompt.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    draft = list(model.generate(prompt, 3, temperature=0))[-1]
    assert "forgotten" not in draft.note and draft.settled == 5003
    with torch.no_grad():
        whole, _ = model.read(prompt)
        first, state = model.read(prompt[:, :3000])
        rest, _ = model.read(prompt[:, 3000:], state)
    close(torch.cat([first, rest], 1), whole, 5e-6)
    assert draft.ids[0, 5000] == whole[0, -1].argmax()


def test_writing_is_reading_over_and_over():
    model = excite(Mamba(SMALL))
    page = ids(2, 4)
    draft = list(model.generate(page, 12, temperature=0))[-1]
    with torch.no_grad():
        for _ in range(12):
            page = torch.cat([page, model(page)[:, -1:].argmax(-1)], 1)
    assert torch.equal(draft.ids, page)


def test_the_inside_is_what_reading_one_by_one_notes():
    model = excite(Mamba(SMALL).double())
    paces, state = [], None
    with torch.no_grad():
        for piece in ids(1, 9).split(1, 1):
            _, state = model.read(piece, state)
            paces.append(model.notes(state)["delta"])
    close(model.inspect(ids(1, 9))["delta"], torch.tensor(paces, dtype=torch.float64), 1e-12)
    assert min(paces) > 0


def test_it_starts_as_the_paper_says():
    torch.manual_seed(0)
    mixer = Mamba(MambaConfig(width=128)).blocks[0].mixer
    torch.testing.assert_close(-mixer.log_A.exp()[7], -torch.arange(1.0, 17))
    assert (
        MambaConfig().eps == 1e-5
        and mixer.rank == 8
        and mixer.inner == 256
        and (mixer.D == 1).all()
    )
    delta = F.softplus(mixer.pace.bias)
    assert 0.9e-3 < delta.min() < 1.5e-3 and 0.07 < delta.max() < 0.101
    assert math.isclose(delta.log().median().item(), math.log(0.01), abs_tol=0.4)
    assert mixer.pace.weight.abs().max() <= 8**-0.5
    assert Mamba(MambaConfig.fast()).blocks[0].mixer.out.weight.count_nonzero() == 0
    assert 0.9e-3 < F.softplus(Mamba(MambaConfig.fast()).blocks[0].mixer.pace.bias).min() < 0.1
    assert mixer.log_A.no_decay and mixer.D.no_decay


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, tied=False, init="fan_in", dropout=0.1)],
    ids=["paper", "fast"],
)
def test_every_parameter_learns_and_a_page_can_be_memorised(config):
    torch.manual_seed(0)
    model, page = Mamba(config), ids(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(
        2
    ):  # from zero, the out projections have a slope first, what lies before them second
        optimizer.step()
        optimizer.zero_grad()
        loss, parts = model.loss(page)
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert torch.equal(parts["nats_per_char"], loss.detach())
    for _ in range(150):
        optimizer.step()
        optimizer.zero_grad()
        model.loss(page)[0].backward()
    assert model.eval().loss(page)[0] < 0.1


def test_dropout_reaches_the_input_and_every_block():
    model = excite(
        Mamba(dataclasses.replace(SMALL, bias=True, dropout=1.0))
    )  # all is dropped: nothing is added to the stream
    assert model(ids(1, 9)).any() and not model.train()(ids(1, 9)).any()


def test_sizes_out_of_range_are_named():
    for change, words in (
        ({"width": 0}, "width"),
        ({"init": "magic"}, "init is one of"),
        ({"activation": "sine"}, "activation is one of"),
    ):
        with pytest.raises(ValueError, match=words):
            MambaConfig(**change)
    with pytest.raises(ValueError, match="activation"):
        Mamba.from_transformers(theirs(hidden_act="gelu_10"))
