"""irann.settings: one description of a value, for sizes, recipes, writing, the command line and the
chat.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import refuses
from hypothesis import given
from hypothesis import strategies as st

from irann import zoo
from irann.layers import check_heads
from irann.lm import SEED
from irann.models.diffusion import DiffusionConfig
from irann.settings import Checked, InputError, Setting, field
from irann.training import Recipe

STEPS = Setting(100, "steps", low=1, high=500)


@pytest.mark.parametrize(
    "wrong",
    [
        *(0, 501, 2.5, float("nan"), float("inf"), True, None, "20", [3], torch.ones(2)),
        *(np.bool_(True), torch.tensor(True), torch.tensor(1j)),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_named_with_the_range(wrong):
    with pytest.raises(InputError, match="steps is a whole number from 1 to 500; got"):
        STEPS.check("steps", wrong)


def test_a_text_is_any_string():
    assert Setting("ROMEO", "a name").check("reader", "HAMLET") == "HAMLET"
    with refuses("reader is a text; got 3"):
        Setting("ROMEO", "a name").check("reader", 3)


def test_values_come_out_in_the_setting_s_type():
    for value in (20, 20.0, np.int64(20), torch.tensor(20), torch.tensor(20.0)):
        checked = STEPS.check("steps", value)
        assert checked == 20 and type(checked) is int
    assert type(Setting(0.5, "a fraction").check("x", 1)) is float
    for seed in (2**53 + 1, 2**62):  # larger than what a float can tell apart
        assert SEED.check("seed", seed) == SEED.read("seed", str(seed)) == seed


@pytest.mark.parametrize(
    "setting, text, value",
    [
        (STEPS, "20", 20),
        (STEPS, " 2e2 ", 200),
        (Setting(0.1, ""), "1e-3", 1e-3),
        (Setting(False, ""), "Yes", True),
        (Setting(True, ""), "0", False),
        (Setting(True, ""), "no", False),
        (Setting(True, ""), " FALSE", False),
        (Setting(False, ""), "1", True),
        (Setting(False, ""), "true", True),
        (Setting("a", "", choices=("a", "b")), "b", "b"),
        (Setting(None, "", low=1, kind=int), "null", None),
        (Setting(None, "", low=1, kind=int), "7", 7),
    ],
)
def test_a_text_is_read_as_the_value_it_spells(setting, text, value):
    read = setting.read("x", text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "setting, text, words",
    [
        (STEPS, "many", "x is a whole number from 1 to 500; got 'many'"),
        (STEPS, "none", "x is a whole number from 1 to 500; got None"),
        (Setting(False, ""), "maybe", "x is true or false; got 'maybe'"),
        (Setting("a", "", choices=("a", "b")), "c", "x is one of a, b; got 'c'"),
        (Setting(None, "", low=1, kind=int), "0", "x is a whole number from 1 up, or null; got 0"),
        (Setting(0.5, "", above=0.0, below=1.0), "1", "x is a number above 0 to below 1; got 1"),
        (Setting(0.5, "", above=0.0, below=1.0), "0", "x is a number above 0 to below 1; got 0"),
        (Setting(0.5, ""), "nan", "x is a number; got nan"),
        (Setting(1, "", high=5000), "5001", "x is a whole number to 5,000; got 5001"),
    ],
)
def test_a_text_that_is_no_such_value_is_refused_in_the_same_words(setting, text, words):
    with refuses(words):
        setting.read("x", text)


@pytest.mark.parametrize("value", [0, 1, 1.0, np.bool_(True), torch.tensor(True), "true", None])
def test_true_and_false_are_themselves_alone(value):
    """1 equals True, and would stay a 1 in a config that is compared and stored."""
    with refuses("x is true or false; got "):
        Setting(True, "").check("x", value)
    with refuses("x is one of "):
        Setting("1", "", choices=("1", "2")).check("x", 1)


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none()))
def test_whatever_comes_is_in_range_or_refused(value):
    for read in (STEPS.check, STEPS.read):
        try:
            number = read("steps", value)
        except InputError:
            continue
        assert type(number) is int and 1 <= number <= 500


@dataclass(frozen=True)
class Sizes(Checked):
    layers: int = field(4, "blocks", low=1)
    rate: float = field(0.1, "a rate", low=0.0, high=1.0)
    inner: int | None = field(None, "a width", low=1, kind=int)


def test_a_checked_dataclass_holds_its_fields_to_their_settings():
    sizes = Sizes(layers=np.int64(2), rate=1)
    assert sizes == Sizes(2, 1.0, None) and type(sizes.layers) is int and type(sizes.rate) is float
    assert list(Sizes.settings()) == ["layers", "rate", "inner"]
    for change in ({"layers": 0}, {"rate": float("nan")}, {"inner": 0}, {"layers": True}):
        with refuses(f"{next(iter(change))} is a"):
            replace(sizes, **change)


def test_heads_share_a_width_equally_and_in_pairs_where_rotary():
    check_heads(48, 3, rotary=True)
    check_heads(9, 3, rotary=False)
    with pytest.raises(InputError, match="a width of 10 cannot be cut into 3 equal heads"):
        check_heads(10, 3, rotary=False)
    with pytest.raises(InputError, match="3 heads of a width of 9 have 3 channels each"):
        check_heads(9, 3, rotary=True)


def test_a_large_number_is_repeated_as_it_was_typed_and_a_huge_one_by_its_bits():
    for digits, said in ((39, "1" + "0" * 39), (40, "a number of 133 bits")):
        with pytest.raises(InputError) as refused:
            STEPS.check("steps", 10**digits)
        assert str(refused.value).endswith(f"got {said}")


@pytest.mark.parametrize("digits", [40, 5000])
def test_a_number_far_below_zero_is_told_by_its_bits_too(digits):
    bits = (10**digits).bit_length()
    with refuses(f"steps is a whole number from 1 to 500; got a number of {bits:,} bits"):
        STEPS.check("steps", -(10**digits))  # Python spells none of more than 4,300 digits


@pytest.mark.parametrize("name", ["gpt", "thinker", "diffusion"])
def test_a_config_refuses_heads_that_its_width_cannot_be_cut_into(name):
    config = zoo.recipe(name, "tiny")[0]
    with pytest.raises(InputError, match="a width of 32 cannot be cut into 3 equal heads"):
        replace(config, width=32, heads=3)
    with pytest.raises(InputError, match="2 heads of a width of 30 have 15 channels each"):
        replace(config, width=30, heads=2)  # all of these turn pairs of channels


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_that_no_float_can_hold_is_refused_like_any_other(digits):
    for setting in (STEPS, Setting(3e-3, "", low=0.0), Setting(1, "", low=1)):
        huge = 10**digits
        if setting.type is float or setting is STEPS:
            with pytest.raises(InputError, match="x is a.* number from"):
                setting.check("x", huge)
            with pytest.raises(InputError, match="x is a.* number from"):
                setting.read("x", "1" + "0" * digits)
        else:
            assert setting.check("x", huge) == huge


FROM_ZERO = "prelude halt_width neighbours warmup evaluate_every save_every seed".split()
LEAST = dict.fromkeys(FROM_ZERO, 0) | {"channels": 2, "levels": 50}  # of all other numbers one
FRACTIONS = ("dropout", "attention_dropout", "final_lr_factor", "ema_decay")
BELOW_ONE = ("beta1", "beta2", "momentum", "prior")


@pytest.mark.parametrize("kind", [Recipe, *(type(zoo.recipe(name)[0]) for name in zoo.MODELS)])
def test_every_value_of_a_config_or_a_recipe_has_its_range(kind, unchecked):
    def refused(name, *values):
        for value in values:
            with pytest.raises(InputError, match=f"^{name} is (a |one of|true or)"):
                kind(**{name: value})

    for name, setting in kind.settings().items():
        if setting.default is not None:
            refused(name, None)
        if setting.type is str:  # one of its choices
            refused(name, "no such thing", 3)
        elif setting.type is bool:
            refused(name, 3.7, 1)
        elif setting.type is int:
            least = 2 if (kind, name) == (DiffusionConfig, "vocabulary") else LEAST.get(name, 1)
            assert setting.check(name, least) == least
            refused(name, least - 1, least + 0.5, math.inf, math.nan, True, "3")
            assert setting.check(name, 2**62) == 2**62
            if kind is Recipe:  # what torch's generators can take
                refused(name, 2**63)
        elif setting.type is float:
            refused(name, -1e-6, math.inf, math.nan, "3e-3", *[0.0] * (name == "prior"))
            refused(name, *[1 + 1e-6] * (name in FRACTIONS), *[1.0] * (name in BELOW_ONE))
            for value in (1e-9, 0.99, *[1.0] * (name not in BELOW_ONE)):
                assert setting.check(name, value) == value


def test_defaults_are_those_of_the_papers():
    """Ours beside transformers' (GPT-2, Mamba), PonderNet's beta and Muon's as published."""
    from transformers import GPT2Config
    from transformers import MambaConfig as TheirMamba

    configs = {name: type(zoo.recipe(name)[0])() for name in zoo.MODELS}
    gpt, mamba, theirs = configs["gpt"], configs["mamba"], TheirMamba()
    assert gpt.eps == GPT2Config().layer_norm_epsilon
    assert (mamba.d_state, mamba.d_conv) == (theirs.state_size, theirs.conv_kernel)
    assert mamba.eps == theirs.layer_norm_epsilon
    assert configs["thinker"].prior_weight == 0.01
    assert (Recipe().muon_lr, Recipe().momentum) == (0.02, 0.95)


def test_what_is_built_without_a_size_has_the_sizes_that_the_reference_names():
    """Parameters of each model by its class's defaults, counted by hand from its shapes."""
    v, d, inner, t = 65, 128, 512, 256
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * inner + inner + d)
    config = type(zoo.recipe("gpt")[0])()
    assert (config.layers, config.heads, config.window, config.width) == (4, 4, t, d)
    assert zoo.build("gpt", config).num_parameters == v * d + t * d + 4 * block + 2 * d
    for name in zoo.MODELS:
        config = type(zoo.recipe(name)[0])()
        window = 256 if name in ("gpt", "mamba") else 128
        assert (config.window, config.width, config.dropout) == (window, 128, 0), name
