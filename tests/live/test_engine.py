"""The engine of the live pages against PyTorch, as WebAssembly and built natively."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import excite
from helpers import book_module, rng, threads

from irann import zoo
from irann.bench.engine import Engine, Native, Wasm, module
from irann.export import (
    CONFIG,
    LIVE,
    MOST_LAYERS,
    PIECES,
    box,
    counts_script,
    model_script,
    weights_file,
)
from irann.export import page as exported
from irann.lm import LanguageModel
from irann.settings import InputError
from irann.text import Text, Vocabulary

ROOT = Path(__file__).parents[2]
PROMPT = "ROMEO:\nWhat light"
HOSTS = [
    Wasm,
    pytest.param(
        Native, marks=pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
    ),
]


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param()


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def tiny(name, seed=0, std=0.4, **changes):
    """A small model with excited weights, as half precision holds them."""
    config, _ = zoo.recipe(name, "tiny", **{"vocabulary": 13} | changes)
    model = excite(zoo.build(name, config, seed=seed), std, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def some_ids(n, seed=0, vocabulary=13):
    return torch.randint(vocabulary, (n,), generator=rng(seed)).tolist()


# ----------------------------------------------------------------------------------------- the file


def test_the_engine_is_what_its_source_compiles_to(tmp_path):
    book_module("live/build.py").build(tmp_path / "engine.wasm")
    same = (tmp_path / "engine.wasm").read_bytes() == (LIVE / "engine.wasm").read_bytes()
    assert same, "engine.c has changed: python book/live/build.py"


def test_the_engine_is_small_and_asks_its_host_for_nothing():
    assert (LIVE / "engine.wasm").stat().st_size <= 64 * 1024
    assert module()[1].imports == []


@pytest.mark.parametrize("name", zoo.shipped())
def test_a_file_of_weights_is_at_most_four_megabytes(name):
    assert len(weights_file(zoo.load(name))) <= 4e6


def test_hashes(host):
    for n in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
        data = bytes(i * 7 % 256 for i in range(n))
        at = host.call("room", n)
        host.write(at, data)
        assert host.read(host.call("sha256", n), 32) == hashlib.sha256(data).digest(), n


def test_what_is_no_model_is_refused(host):
    data = weights_file(tiny("gpt"))
    assert Engine(host, data=b"").refused == Engine(host, data=data[:40]).refused == 1
    assert Engine(host, data=b"x" + data[1:]).refused == 1
    assert Engine(host, data=data[:-2]).refused == Engine(host, data=data + b"ab").refused == 2
    numbers = (
        ("kind", 5),
        ("vocabulary", 0),
        ("layers", MOST_LAYERS + 1),
        ("heads", 0),
        ("heads", 32),
    )
    for name, value in numbers:
        at = 4 + 4 * CONFIG.index(name)
        other = data[:at] + value.to_bytes(4, "little") + data[at + 4 :]
        assert Engine(host, data=other).refused == 1, name
    assert Engine(host, data=data).refused == 0
    with pytest.raises(InputError, match="cannot open this model .code 1."):
        Engine(host, data=b"").start([1])


@pytest.mark.parametrize("name", ["gpt", "thinker", "mamba"])
def test_two_models_in_two_hosts_are_two_and_a_new_text_begins_anew(host, name):
    first, second = (Engine(one, tiny(name, seed)) for seed, one in enumerate((host, type(host)())))
    first.start([1, 2])
    before = first.logits()
    second.start([1, 2])
    assert not np.array_equal(second.logits(), before)
    first.start([3, 4, 5])
    first.start([1, 2])
    assert np.array_equal(first.logits(), before)


def test_a_page_s_script_says_what_the_model_is():
    model = tiny("diffusion")
    model.vocabulary = Vocabulary("\nabcdefghijkl")
    assert model.config.page < model.config.window
    call, told = model_script(model, "mine").split(" = ", 1)
    told = json.loads(told.removesuffix(";\n"))
    data = base64.b64decode(told.pop("data"))
    assert call == 'irannLive.models["mine"]' and data == weights_file(model)
    sha256 = hashlib.sha256(data).hexdigest()
    assert told == {"characters": "\nabcdefghijkl", "sha256": sha256, "page": model.config.page}
    levels = model.config.levels  # for the page, after 22 whole numbers
    alpha_bar, below = np.frombuffer(data, np.float64, 2 * levels, offset=88).reshape(2, levels)
    assert alpha_bar.tolist() == model.schedule.alpha_bar.tolist()
    assert below.tolist() == model.level_probabilities().cumsum(0).tolist()


def test_pairs_are_counted_as_they_stand():
    text = Text.of("abracadabrab", split=0.9)  # its first ten characters train: abracadabr
    call, told = counts_script(text).split(" = ", 1)
    told = json.loads(told.removesuffix(";\n"))
    assert call == "irannLive.counts"
    counted = {
        a + b: told["pairs"][i][j]
        for i, a in enumerate(told["characters"])
        for j, b in enumerate(told["characters"])
    }
    wanted = {"ab": 2, "br": 2, "ra": 1, "ac": 1, "ca": 1, "ad": 1, "da": 1}
    assert {pair: n for pair, n in counted.items() if n} == wanted


def test_options_that_the_engine_lacks_are_named():
    with pytest.raises(InputError, match="positions=rotary, activation=squared_relu only; .*=gelu"):
        weights_file(tiny("gpt", positions="learned", activation="gelu"))
    with pytest.raises(InputError, match="at most 64 layers; got 65"):
        weights_file(tiny("mamba", layers=65))
    with pytest.raises(InputError, match="activation=silu"):
        weights_file(tiny("mamba", activation="relu"))
    with pytest.raises(InputError, match="a multiple of 4; got d_state=6"):
        weights_file(tiny("mamba", d_state=6))
    longer = tiny("gpt")
    longer.h.append(tiny("gpt").h[0])
    with pytest.raises(InputError, match=r"has other weights, see h\.2\."):
        weights_file(longer)
    with pytest.raises(InputError, match="run gpt, thinker, mamba, .*-page; got LanguageModel"):
        exported(LanguageModel(tiny("gpt").config))
    with pytest.raises(InputError, match="half precision"):
        model = tiny("gpt")
        model.wte.weight.data[0, 0] = 1e6
        weights_file(model)


# -------------------------------------------------------------------------------- from left to right


# a window of 256 is passed, and re-read, once; mamba has none
@pytest.mark.parametrize("name, n", [("gpt", 300), ("thinker", 300), ("mamba", 150)])
def test_a_long_text_is_pytorchs_to_the_letter(name, n, unchecked):
    model = zoo.load(name)
    ids = model.vocabulary.encode(PROMPT)
    *_, draft = model.generate(ids[None], n, temperature=0)
    written = Engine(Wasm(), model).write(ids.tolist(), n)
    assert model.vocabulary.decode(written) == model.vocabulary.decode(draft.ids[0, len(ids) :])


READERS = {
    "gpt": {},
    "gpt, odd sizes": {"width": 22, "heads": 1, "inner": 33, "window": 9, "tied": True},
    "gpt, a window of one": {"window": 1},
    "thinker": {},
    "thinker, one round": {"rounds": 1},
    "thinker, gains and a prelude": {"round_gains": True, "prelude": 2, "core": 2, "rounds": 5},
    "mamba": {},
    "mamba, other sizes": {"d_state": 8, "d_conv": 3, "dt_rank": 3, "d_inner": 38, "tied": True},
    "mamba, more state than width": {"width": 16, "d_inner": 24, "d_state": 64},
}


@pytest.mark.parametrize("case", READERS)
def test_logits_of_excited_weights(host, case):
    """Every position of a text, beyond the window too, where its last half is read anew."""
    model = tiny(case.partition(",")[0], **READERS[case])
    engine = Engine(host, model)
    ids = some_ids(model.config.window + 9)
    start = 5
    logits, state, held = None, None, 0
    engine.start(ids[:start])
    largest = 0.0
    with torch.no_grad():
        for end in range(start, len(ids)):
            new = ids[:start] if end == start else ids[end - 1 : end]
            if model.max_context and held + len(new) > model.max_context:
                again = max(1, model.max_context // 2)
                new, state, held = ids[end - again : end], None, 0
            logits, state = model.read(torch.tensor([new]), state)
            held += len(new)
            largest = max(largest, float(logits.abs().max()))
            np.testing.assert_allclose(engine.logits(), logits[0, -1], atol=1e-3, rtol=1e-4)
            engine.call("push", ids[end])
    assert largest > 2  # excited


@torch.no_grad()
@pytest.mark.parametrize("std", [3e-5, 1.2])
@pytest.mark.parametrize("name", ["gpt", "mamba"])
def test_weights_that_are_nearly_nothing_and_very_large(host, name, std):
    """Below half precision's normal numbers, where the norms' eps counts; and far out in SiLU."""
    model, ids = tiny(name, std=std), some_ids(12)
    engine = Engine(host, model)
    engine.start(ids)
    logits, _ = model.read(torch.tensor([ids]))
    largest = float(logits.abs().max())
    np.testing.assert_allclose(engine.logits(), logits[0, -1], atol=1e-3 * largest, rtol=0)


@pytest.mark.parametrize("name", [*zoo.MODELS])
def test_a_host_opens_one_model_after_another(host, name):
    """Of a larger one before it, with gains and another rule of stopping, nothing is left."""
    model, prompt = tiny(name), some_ids(6)

    def written(engine):
        v = model.config.vocabulary
        if name == "diffusion":
            noise = partial(torch.ones, 1, 6, model.config.channels)
            return list(engine.denoise(prompt, [0, 1] * 3, 3, 1.0, 0.0, noise))
        if name == "thinker-page":
            return list(engine.refine(prompt, [0, 1] * 3, 3, 0.0, partial(torch.ones, 6, v)))
        engine.start(prompt)
        return engine.logits().tolist()

    alone = written(Engine(type(host)(), model))
    for other in zoo.MODELS:
        more = {"rounds": 9, "round_gains": True, "core": 2} if "thinker" in other else {}
        engine = Engine(host, tiny(other, window=40, **more))
        engine.call("set_rule", 1.0, 0)
        engine.begin(prompt, [0, 1] * 3) if "-" in other else engine.start(prompt)
        assert written(Engine(host, model)) == alone, other


@torch.no_grad()
def test_as_many_layers_as_there_can_be(host):
    model, ids = tiny("mamba", std=0.2, layers=MOST_LAYERS), some_ids(5)
    engine = Engine(host, model)
    engine.start(ids)
    logits, _ = model.read(torch.tensor([ids]))
    np.testing.assert_allclose(engine.logits(), logits[0, -1], atol=1e-3, rtol=1e-4)


# of the last rules one after the other, some stop at once, others wake all that have stopped
CHANGING = [(0.0, 0), (0.3, 0), (1.0, 3), (0.7, 2), (1.0, 0), (0.5, 0), (0.0, 0)]


@torch.no_grad()
@pytest.mark.parametrize("rules", [*([rule] for rule in CHANGING[:4]), CHANGING], ids=str)
@pytest.mark.parametrize("gains", [False, True])
def test_rounds_of_the_thinker(host, rules, gains):
    """As many as PyTorch takes, after which all is as if no earlier position had ever stopped."""
    model = tiny("thinker", std=0.3, rounds=5, round_gains=gains, halt_width=7 if gains else 0)
    if gains:
        model.halt_bias.copy_(torch.tensor([-1, 1, -2, 2, 0]))
    if rules == [(0.0, 0)]:
        *_, bias = model.halt_head.parameters()
        bias.fill_(-1000)  # it would never stop
    engine = Engine(host, model)
    ids = torch.tensor([some_ids(30)])
    every, _, _ = model.every_round(ids)
    engine.start(ids[0, :3].tolist())
    _, state = model.read(ids[:, :3])
    for i in range(3, 30):
        threshold, rounds = rules[i % len(rules)]
        engine.call("set_rule", threshold, rounds)
        engine.call("push", int(ids[0, i]))
        _, state = model.read(ids[:, i : i + 1], state, threshold=threshold, rounds=rounds)
        taken = engine.call("get_rounds")
        assert taken == state.rounds[0, -1]
        assert abs(engine.call("get_halted") - state.halted[0, -1]) < 1e-4
        wanted = every[0, i, :, taken - 1]
        np.testing.assert_allclose(engine.logits(), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("more", [0, 1, 20])
def test_a_prompt_that_the_window_cannot_hold_loses_its_beginning(host, more):
    model = tiny("gpt")
    ids = some_ids(model.config.window + more)
    *_, draft = model.generate(torch.tensor([ids]), 30, temperature=0)
    assert Engine(host, model).write(ids, 30) == draft.ids[0, len(ids) :].tolist()


@pytest.mark.parametrize("temperature", [0.8, 0.02])
def test_the_same_noise_draws_the_same_text(temperature):
    """torch.multinomial divides by exponential numbers and takes the largest."""
    model = zoo.load("gpt")
    ids = model.vocabulary.encode(PROMPT)
    generator, other = (rng(3) for _ in range(2))
    *_, draft = model.generate(ids[None], 40, temperature=temperature, generator=generator)
    engine = Engine(Wasm(), model)
    drawn = engine.write(
        ids.tolist(), 40, temperature, lambda: torch.empty(65).exponential_(1, generator=other)
    )
    assert drawn == draft.ids[0, len(ids) :].tolist()


def test_attention_is_what_inspect_shows(host):
    model = tiny("gpt")
    engine, ids, t = Engine(host, model), some_ids(12), model.config.window + 1
    shown = model.inspect(torch.tensor([ids]))["attention"]
    engine.start(ids)
    layers, heads = shown.shape[:2]
    rows = engine.floats("get_attention", layers, heads, t)[:, :, : len(ids)]
    np.testing.assert_allclose(rows, shown[:, :, -1], atol=1e-5)


def test_what_mamba_remembers(host):
    model = tiny("mamba", std=0.2)
    engine, ids, before = Engine(host, model), some_ids(9), some_ids(12, seed=1)
    engine.start(before)
    engine.call("remembered", len(before))
    engine.start(ids)
    kept = engine.floats("remembered", model.config.layers, len(ids), arguments=(len(ids),))
    x = model.embeddings(torch.tensor([ids]))
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            delta = block.mixer.select(block.mixer.convolve(block.norm(x))[0])[0][0]
            later = delta.flip(0).cumsum(0).flip(0) - delta  # the sum over later positions
            A = -torch.exp(block.mixer.A_log)
            fraction = torch.exp(later[..., None] * A).mean((1, 2))
            np.testing.assert_allclose(kept[layer], fraction, atol=1e-5)
            x, _ = block(x)
    steps = model.inspect(torch.tensor([ids]))["delta"]
    for i in range(len(ids)):
        assert math.isclose(engine.call("step_size", i), steps[i], rel_tol=1e-4)


# -------------------------------------------------------------------------------------- whole pages


DENOISERS = [{}, {"bayes": False}, {"self_condition": False}, {"vocabulary": 300, "width": 16}]


@pytest.mark.parametrize("options", DENOISERS, ids=str)
def test_the_denoiser_of_excited_weights(host, options):
    model = tiny("diffusion", std=0.3, **options)
    torch.nn.init.zeros_(model.word_embedding.data[2])  # no point of the sphere
    v, channels = model.config.vocabulary, model.config.channels
    engine, generator = Engine(host, model), rng(1)
    for t in (model.config.window + 1, 21, 1):  # page after page
        ids, mask = some_ids(t, vocabulary=v), torch.rand(t, generator=generator) < 0.7
        x = torch.randn(t, channels, generator=generator)
        engine.begin(ids, mask)
        engine.put("get_noisy", x)
        alpha_bar = model.schedule.alpha_bar
        guess = None
        for tau in (150, 60, 10):  # from the second time on with the guess before
            engine.call("see_through", float(alpha_bar[tau - 1]))
            with torch.no_grad():
                page = torch.tensor([ids]), mask[None], guess
                logits = model(x[None], torch.tensor([tau]), *page)
            found = engine.floats("get_logits", t, v)
            np.testing.assert_allclose(found, logits[0], atol=1e-3, rtol=1e-4)
            engine.call("keep_guess", 1.0)
            guess = logits.softmax(-1)
    points = engine.floats("get_embeddings", v, channels)
    np.testing.assert_allclose(points, model.embeddings.detach(), atol=1e-5)


@pytest.mark.parametrize(
    "eta, temperature, steps", [(1.0, 1.0, 12), (0.0, 0.0, 12), (0.5, 0.2, 12), (1.0, 1.0, 2)]
)
def test_the_same_noise_settles_the_same_page(eta, temperature, steps):
    """A prompt, a gap, and text after it; drafts and what has settled, step by step."""
    model = zoo.load("diffusion")
    text = "KING HENRY:\nWhat says the noble lord of this matter, my friend?\n"
    ids, mask = model.vocabulary.encode(text), torch.zeros(len(text), dtype=torch.bool)
    mask[16:44] = True
    numbers, settings = rng(5), {"eta": eta, "temperature": temperature}
    drafts = list(model.infill(ids[None], mask, steps=steps, generator=numbers, **settings))[1:]
    noise = rng(5)
    normal = partial(torch.randn, 1, len(ids), model.config.channels, generator=noise)
    pages = list(Engine(Wasm(), model).denoise(ids, mask, steps, eta, temperature, normal))
    assert pages == [(draft.settled, draft.ids[0].tolist()) for draft in drafts]


CASES = ["thinker-page", "tiny", "tiny with gains", "tiny, prelude of 2", "tiny, halts by motion"]
CASES += ["tiny, halts by doubt"]


@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_refines_the_same_page(case):
    if case == "thinker-page":
        model, t, start = zoo.load(case), 50, 10
    else:
        more = {"round_gains": "gains" in case, "prelude": 2 if "prelude" in case else 1}
        more["halt_width"] = 7 if "gains" in case else 0
        more["rounds"] = 8 if "halts" in case else 3
        model, t, start = tiny("thinker-page", std=0.3, **more), 20, 4
    if "motion" in case:
        with torch.no_grad():
            model.halt_head.weight.zero_()[0, model.config.width] = -150
            model.halt_head.bias.fill_(15)
    if "doubt" in case:
        with torch.no_grad():
            model.halt_head.weight.zero_()[0, -1] = -20
            model.halt_head.bias.fill_(36)
    v = model.config.vocabulary
    ids = torch.tensor(some_ids(t, vocabulary=v))
    mask = torch.arange(t) >= start
    generator, noise = (rng(2) for _ in range(2))
    prompt = ids[None, :start]
    settings = {"temperature": 0.8, "threshold": 0.6}
    drafts = list(model.generate(prompt, t - start, generator=generator, steps=7, **settings))[1:]
    engine = Engine(Wasm(), model)
    engine.call("set_rule", 0.6, 0)
    full = model.config.window + 1  # the largest page, which leaves nothing behind
    list(engine.refine([1] * full, [1] * full, 2, 0.0, partial(torch.ones, full, v)))
    rounds = 0
    pages = engine.refine(
        ids, mask, 7, 0.8, lambda: torch.empty(t, v).exponential_(1, generator=noise)
    )
    for (masked, page), draft in zip(pages, drafts, strict=True):
        rounds += engine.call("get_rounds")
        assert (masked, rounds) == (draft.note["masked"], draft.note["rounds"])
        assert page == draft.ids[0].tolist()


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
def test_the_engine_keeps_to_its_own_memory(tmp_path):
    """Whatever a model's sizes, and the model before it: texts and pages of the largest size."""
    models = [tiny(case.partition(",")[0], **READERS[case]) for case in READERS]
    models += [tiny("mamba", layers=MOST_LAYERS), tiny("gpt", vocabulary=300, width=16)]
    models += [tiny("diffusion", **options) for options in DENOISERS]
    models += [tiny("thinker-page", prelude=2, round_gains=True, vocabulary=300, width=16)]
    files = [tmp_path / str(i) for i in range(len(models))]
    for file, model in zip(files, models, strict=True):
        file.write_bytes(weights_file(model))
    program, source = tmp_path / "memory", Path(__file__).parents[1] / "programs" / "memory.c"
    options = ["-fsanitize=address", "-g", "-O1", f"-I{LIVE}", "-o", program]
    built = subprocess.run(["cc", source, *options, "-lm"], capture_output=True, timeout=60)
    if built.returncode:
        pytest.skip("this compiler has no address sanitizer")
    told = subprocess.run(
        [program, *files, *files[::-1]], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr[:2000]


def test_every_function_of_the_engine_is_tested_here_or_used_by_the_page():
    source = (LIVE / "engine.c").read_text()
    used = Path(__file__).read_text() + (LIVE / "live.js").read_text()
    for name in re.findall(r"^EXPORT [\w *]*?(\w+)\(", source, re.M):
        assert name in used, name


GPT_HAS_NOT = {"bias": True, "eps": 1e-2, "positions": "learned", "qk_norm": False}
GPT_HAS_NOT |= {"activation": "gelu", "norm": "rms"}
MAMBA_HAS_NOT = {"bias": True, "conv_bias": False, "activation": "relu", "eps": 1e-2}


@pytest.mark.parametrize("name, lacks", [("gpt", GPT_HAS_NOT), ("mamba", MAMBA_HAS_NOT)])
def test_no_option_that_the_engine_lacks_is_let_pass(name, lacks):
    for option, value in lacks.items():
        config, _ = zoo.recipe(name, "tiny", vocabulary=13, **{option: value})
        with pytest.raises(InputError, match=f"with {option}=.* only"):
            weights_file(zoo.build(name, config))


@pytest.mark.parametrize("vocabulary", [Vocabulary("abc"), Vocabulary("abcdefghijklmn")])
def test_a_vocabulary_of_another_size_is_refused(vocabulary):
    model = tiny("gpt")
    model.vocabulary = vocabulary
    with pytest.raises(InputError, match=f"made for 13 characters, its .* {len(vocabulary)}"):
        exported(model)


@pytest.mark.parametrize("name", zoo.shipped())
def test_an_exported_page_calls_a_bound_a_bound(name):
    model = zoo.load(name)
    nats = f"{model.card['validation']:.3f} nats per character"
    page = exported(model)
    assert (f"at most {nats}" in page) == (not model.exact) and nats in page
    assert "data-plain" not in page  # it has read plays


def test_an_exported_page_writes_first_and_its_signs_end_no_script():
    model = tiny("gpt")
    model.vocabulary = Vocabulary("\n</script>&abc")
    page = exported(model)
    pieces = re.findall(r'data-piece="(\w+)" data-models="(\S+)"', page)
    assert pieces == [(piece, "gpt") for piece in ("write", "cost", "attention", "chat")]
    assert "only a picture" not in page and 'class="irann-still' not in page
    assert page.count("a browser that has JavaScript and WebAssembly.</p>") == len(pieces)
    assert page.count('data-plain="yes"') == len(pieces)  # of a text of its own
    assert "data-counts" not in page and page.index("<h2>It writes</h2>") < page.index("cost")
    assert page.count("</script>") == page.count("<script>") == 4
    assert '"characters":"\\n&/\\u003c>abciprst"' in page
    assert f"{model.num_parameters:,} parameters, 13 characters. Everything" in page
    assert page.count("A gpt that runs in this page</") == 2  # the title, and the heading


def test_a_piece_says_before_its_script_begins_what_it_is():
    live = box("gaps")
    assert 'data-piece="gaps" data-models="thinker-page diffusion"' in live
    assert f'data-title="{PIECES["gaps"][0]}" data-counts="yes"' in live
    assert 'aria-label="A picture of the live piece: gaps, filled from both sides."' in live
    assert "without them there is only a picture" in live
