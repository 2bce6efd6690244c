"""irann.layers and irann.models.gpt against transformers' GPT-2 and StableLM, on excited
weights.
"""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import excite, refuses, stablelm
from helpers import ids, rng
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from irann import zoo
from irann.core import attention as core
from irann.layers import ACTIVATIONS, MLP, Attention, apply_rotary, make_norm, rotary_table
from irann.models.gpt import GPT, GPTConfig
from irann.models.interop import RENAMED
from irann.settings import InputError

SHAPES = [
    dict(n_embd=48, n_head=3, n_positions=33, n_layer=3),
    dict(n_embd=16, n_head=1, n_positions=8, n_layer=1),
    dict(n_inner=20, n_embd=24, n_head=4, n_positions=16, n_layer=2),
]


def oracle(dtype=torch.float64, **options):
    config = GPT2Config(
        **{
            "vocab_size": 65,
            "activation_function": "gelu",
            "attn_implementation": "eager",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            **options,
        }
    )
    return excite(GPT2LMHeadModel(config)).to(dtype).eval()


def without_biases(theirs):
    """Their biases set to zero -> ours with none."""
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    whole = GPT.from_transformers(theirs)
    ours = GPT(replace(whole.config, bias=False)).to(whole.wte.weight).eval()
    weights = {name: p for name, p in whole.state_dict().items() if not name.endswith("bias")}
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("copied", [GPT.from_transformers, without_biases])
def test_logits_equal_transformers(options, dtype, tolerance, copied):
    theirs = oracle(dtype, **options)
    ours = copied(theirs)
    for t in (1, 2, options["n_positions"]):
        page = ids(3, 2 * t)[:, ::2]  # not contiguous
        with torch.no_grad():
            a, b = ours(page), theirs(page).logits
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=0)


def as_transformers(ours, page):
    """(b t) -> logits (b t v) of a GPT with `fast`'s options, computed by transformers."""
    theirs = stablelm(ours.h, ours.config.width, ours.config.heads)
    return theirs(inputs_embeds=ours.wte(page)).last_hidden_state @ ours.lm_head.weight.T


@pytest.mark.parametrize(
    "sizes",
    [dict(window=33, layers=3, heads=3, width=48), dict(window=8, layers=1, heads=1, width=16)],
)
@torch.no_grad()
def test_the_fast_options_all_at_once_equal_transformers(sizes):
    ours, page = excite(GPT(GPTConfig.fast(**sizes))).double().eval(), ids(3, sizes["window"])
    oracle = as_transformers(ours, page)
    torch.testing.assert_close(
        ours(page), oracle, atol=2e-6 * oracle.abs().max().item(), rtol=0
    )  # their angles are float32


@torch.no_grad()
def test_the_gpt_that_ships_equals_transformers(corpus):
    ours = zoo.load("gpt").double()
    page = corpus.val[None, : ours.config.window]
    oracle = as_transformers(ours, page)
    torch.testing.assert_close(ours(page), oracle, atol=1e-5 * oracle.abs().max().item(), rtol=0)


@pytest.mark.parametrize("activation", sorted({*ACTIVATIONS, *RENAMED} - {*RENAMED.values()}))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_variants_of_gpt2(activation, tied, eps):
    theirs = oracle(
        activation_function=activation,
        tie_word_embeddings=tied,
        layer_norm_epsilon=eps,
        **SHAPES[1],
    )
    ours = GPT.from_transformers(theirs)
    assert (ours.lm_head is None) == tied
    with torch.no_grad():
        a, b = ours(ids(2, 8)), theirs(ids(2, 8)).logits
    torch.testing.assert_close(a, b, atol=1e-10 * max(1, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("options", [*SHAPES, dict(SHAPES[1], tie_word_embeddings=False)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_way_back_to_transformers(options, bias, tmp_path):
    ours = GPT.from_transformers(oracle(**options)) if bias else without_biases(oracle(**options))
    page = ids(2, options["n_positions"])
    theirs = ours.to_transformers()
    torch.testing.assert_close(theirs(page).logits, ours(page), atol=1e-10, rtol=1e-10)
    assert theirs.config.eos_token_id is theirs.config.bos_token_id is None
    assert theirs.generation_config.eos_token_id is theirs.generation_config.pad_token_id is None
    theirs.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(page).logits, ours(page), atol=1e-10, rtol=1e-10)


def test_what_gpt2_does_not_have_cannot_go_back():
    for name, only, own in (
        ("positions", "learned", "rotary"),
        ("qk_norm", False, True),
        ("norm", "layer", "rms"),
    ):
        model = GPT(GPTConfig(window=8, layers=1, heads=1, width=16, **{name: own}))
        with refuses(f"{name} {only!r} only; this model has {own!r}"):
            model.to_transformers()


@torch.no_grad()
def test_activations_go_back_by_the_names_they_have_there():
    for activation in ("gelu_tanh", "squared_relu", "relu"):
        config = GPTConfig(window=8, layers=1, heads=1, width=16, activation=activation)
        ours = excite(GPT(config)).double().eval()
        torch.testing.assert_close(ours.to_transformers()(ids(2, 8)).logits, ours(ids(2, 8)))


def gradients(model, page, target):
    """-> the gradients of the cross-entropy, by our names of the parameters."""
    logits = model(page) if isinstance(model, GPT) else model(page).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    for p in model.parameters():
        p.data = p.grad.clone()
    if isinstance(model, GPT):
        return dict(model.named_parameters())
    return dict(GPT.from_transformers(model).named_parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("copied", [GPT.from_transformers, without_biases])
def test_gradients_equal_transformers(dtype, tolerance, copied):
    """In float32 as near to the exact ones as theirs are: what rounding leaves differs by
    machine.
    """
    theirs = oracle(dtype, **SHAPES[0])
    ours, exact = copied(theirs), copy.deepcopy(theirs).double()
    page, target = ids(2, 33), ids(2, 33, seed=1)
    ours, theirs, exact = (gradients(m, page, target) for m in (ours, theirs, exact))
    for name, g in ours.items():
        wanted = exact[name]
        rounding = (theirs[name] - wanted).abs().max().item()
        allowed = max(tolerance * wanted.abs().max().item(), 2 * rounding)
        torch.testing.assert_close(g.double(), wanted, atol=allowed, rtol=0)


def test_a_name_or_a_folder_is_resolved_by_transformers(tmp_path):
    theirs = oracle(torch.float32, **SHAPES[1])
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        assert torch.equal(
            GPT.from_transformers(source)(ids(1, 8)), GPT.from_transformers(theirs)(ids(1, 8))
        )


def test_greedy_text_equals_transformers():
    theirs = oracle(**SHAPES[0])
    ours = GPT.from_transformers(theirs)
    prompt = ids(2, 5)
    expected = theirs.generate(
        prompt, max_new_tokens=28, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    *_, last = ours.generate(prompt, 28, temperature=0)
    assert torch.equal(last.ids, expected)


def test_a_folder_of_another_model_is_refused(tmp_path):
    config = MambaConfig(vocab_size=65, hidden_size=8, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="what can be copied is a GPT2LMHeadModel; got a mamba"):
        GPT.from_transformers(tmp_path)


def test_variants_that_compute_something_else_are_refused():
    for options in (
        {"activation_function": "gelu_10"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"embd_pdrop": 0.3},
        {"add_cross_attention": True},
    ):
        with pytest.raises(InputError, match="activation is one of|scaled|embd_pdrop"):
            GPT.from_transformers(oracle(**{**SHAPES[1], **options}))
    for relative in (torch.nn.Linear(2, 2), oracle(**SHAPES[1]).transformer):
        with pytest.raises(InputError, match="what can be copied is a GPT2LMHeadModel; got a"):
            GPT.from_transformers(relative)


def test_the_fused_attention_is_the_derived_one():
    for causal in (True, False):
        layer = excite(Attention(24, 3, causal=causal)).double()
        x = torch.randn(2, 9, 24, dtype=torch.float64, generator=rng(0))
        q, k, v = layer.project(x)
        derived = layer.c_proj(core.merge_heads(core.attention(q, k, v, causal=causal)))
        torch.testing.assert_close(layer(x)[0], derived, atol=1e-11, rtol=0)
        torch.testing.assert_close(
            layer.attention_weights(x) @ v,
            core.attention(q, k, v, causal=causal),
            atol=1e-11,
            rtol=0,
        )


@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "norm": "rms"}, {"positions": "rotary"}, {"fast": True}]
)
def test_chunks_equal_one_read(options):
    config = (
        GPTConfig.fast(window=17, layers=2, heads=3, width=48)
        if options.get("fast")
        else GPTConfig(window=17, layers=2, heads=3, width=48, **options)
    )
    model = excite(GPT(config), 0.3).double().eval()
    page = ids(2, 17)
    with torch.no_grad():
        whole, _ = model.read(page)
        for sizes in ([1] * 17, [3, 1, 13], [16, 1], [7, 10]):
            state, parts = None, []
            for piece in page.split(sizes, 1):
                logits, state = model.read(piece, state)
                parts.append(logits)
            torch.testing.assert_close(
                torch.cat(parts, 1), whole, atol=1e-10 * max(1, whole.abs().max().item()), rtol=0
            )
    with pytest.raises(ValueError, match="window holds 17 characters; got 18"):
        model(ids(1, 18))
    with pytest.raises(ValueError, match="window holds 17 characters; got 1 after 17"):
        model.read(page[:, :1], state)


def test_rotary_scores_see_distance_only():
    """Su et al. 2021, eq. 16: the score of q at m and k at n depends on m - n; and turning keeps
    lengths.
    """
    c, generator = 16, rng(0)
    q, k = (torch.randn(c, dtype=torch.float64, generator=generator) for _ in range(2))
    table = rotary_table(0, 50, c, like=q)
    turned_q, turned_k = apply_rotary(q.expand(50, c), table), apply_rotary(k.expand(50, c), table)
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-12, rtol=0)
    assert not torch.allclose(scores[10, 3], scores[3, 10])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(50), atol=1e-12, rtol=0)
    angle = 3 * 10_000.0 ** (-torch.arange(8).double() / 8)  # eq. 34, written out for position 3
    even, odd = (
        q[0::2] * angle.cos() - q[1::2] * angle.sin(),
        q[1::2] * angle.cos() + q[0::2] * angle.sin(),
    )
    torch.testing.assert_close(
        turned_q[3], torch.stack([even, odd], -1).flatten(), atol=1e-12, rtol=0
    )
    assert torch.equal(rotary_table(7, 9, c, like=q), table[7:9])
    with pytest.raises(InputError, match="pairs"):
        rotary_table(0, 4, 5, like=q)


def test_a_table_that_torch_func_made_is_not_kept():
    """A tensor of one of its levels breaks when it is used after that."""
    # of a size that nobody has asked for
    q = torch.randn(2, 38, dtype=torch.float64, generator=rng(0))

    def length(q):
        return apply_rotary(q, rotary_table(0, 2, 38, like=q)).square().sum()

    for _ in range(2):
        hessian = torch.func.jacrev(torch.func.grad(length))(q).view(76, 76)
        torch.testing.assert_close(hessian, 2 * torch.eye(76).double(), atol=1e-12, rtol=0)


def test_gpt2s_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=128, layers=8))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(
        0.02 / 4, rel=0.05
    )  # sqrt(2 * 8 layers) = 4
    assert not model.h[3].mlp.c_fc.bias.any()
    fast = GPT(GPTConfig.fast(width=128))
    assert fast.h[0].attn.c_attn.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not fast.h[0].attn.c_proj.weight.any() and not list(fast.ln_f.parameters())


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_dropout_reaches_the_input_both_halves_of_a_block_and_the_weights(positions):
    sizes = {"layers": 2, "width": 16, "heads": 2, "window": 8, "positions": positions}
    nothing = excite(
        GPT(GPTConfig(dropout=1.0, **sizes))
    )  # all is dropped, so that the residual stream stays at zero
    of_nothing = nothing.ln_f(torch.zeros(1, 8, 16)) @ nothing.wte.weight.T
    assert torch.equal(nothing(ids(1, 8)), of_nothing)
    assert not torch.allclose(nothing.eval()(ids(1, 8)), of_nothing)
    model = excite(GPT(GPTConfig(attention_dropout=0.5, **sizes)))
    assert not torch.allclose(model(ids(1, 8)), model.eval()(ids(1, 8)))
    assert torch.equal(model(ids(1, 8)), model(ids(1, 8)))  # nothing is drawn while it is used


@pytest.mark.parametrize("make", [GPTConfig, GPTConfig.fast])
def test_inspect_shows_the_attention_weights_that_were_used(make):
    model, seen = excite(GPT(make(layers=2, width=16, heads=2, window=8))).double().eval(), []
    for block in model.h:
        block.attn.register_forward_hook(
            lambda layer, given, out: seen.append((layer, *given, out[0]))
        )
    maps = model.inspect(ids(1, 8))["attention"]
    assert maps.shape == (2, 2, 8, 8)
    for weights, (layer, x, _, turn, out) in zip(maps, seen, strict=True):
        ours = layer.c_proj(core.merge_heads(weights[None] @ layer.project(x, turn)[2]))
        torch.testing.assert_close(ours, out, atol=1e-10 * max(1, out.abs().max().item()), rtol=0)


def test_a_width_that_its_heads_cannot_share_is_named():
    with pytest.raises(ValueError, match="width of 10"):
        GPTConfig(width=10, heads=3)


def test_parts_that_there_are_not_are_refused_by_their_names():
    with pytest.raises(InputError, match="activation is one of .*gelu.*; got 'sine'"):
        MLP(8, activation="sine")
    with pytest.raises(InputError, match="norm is one of layer, plain, rms; got 'batch'"):
        make_norm("batch", 8)


def test_dropout_goes_over_to_transformers_and_back():
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.3}  # no default of theirs
    ours = GPT.from_transformers(oracle(**SHAPES[1] | dropout))
    assert (ours.config.dropout, ours.config.attention_dropout) == (0.2, 0.3)
    back = ours.to_transformers().config
    assert (back.resid_pdrop, back.embd_pdrop, back.attn_pdrop) == (0.2, 0.2, 0.3)


def test_embeddings_of_fan_in_have_deviation_one():
    for name in ("gpt", "thinker"):
        model = zoo.build(name, zoo.recipe(name, "demo")[0])
        assert model.wte.weight.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_goes_over_to_transformers_and_back(training):
    """Else a model that is ready to write would answer with dropout."""
    ours = GPT.from_transformers(oracle(**SHAPES[1]).train(training))
    assert ours.training == training and ours.to_transformers().training == training


def test_norms_by_hand():
    x = torch.randn(3, 8, generator=rng(0))
    apart = x - x.mean(-1, keepdim=True)
    plain, rms = (z / (z.square().mean(-1, keepdim=True) + 0.5).sqrt() for z in (apart, x))
    for norm, wanted, learned in (
        (make_norm("layer", 8, eps=0.5), plain, ["weight", "bias"]),
        (make_norm("layer", 8, eps=0.5, bias=False), plain, ["weight"]),
        (make_norm("plain", 8, eps=0.5), plain, []),
        (make_norm("rms", 8, eps=0.5), rms, ["weight"]),
    ):
        torch.testing.assert_close(norm(x), wanted)
        assert [name for name, _ in norm.named_parameters()] == learned


def test_a_piece_is_masked_on_the_device_it_lies_on():
    layer, x = Attention(8, 2), torch.randn(1, 5, 8, generator=rng(0))
    _, cache = layer(x[:, :2])
    with torch.device("meta"):
        found, _ = layer(x[:, 2:], cache)
    torch.testing.assert_close(found, layer(x)[0][:, 2:])


def test_what_is_asked_for_goes_before_what_is_fast():
    fast = GPTConfig.fast(norm="rms", tied=True, width=64)
    assert (fast.norm, fast.tied, fast.width, fast.positions) == ("rms", True, 64, "rotary")
