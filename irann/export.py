"""A trained model as a page that runs without Python: `irann export MODEL --out page.html`.

The forward passes are irann/live/engine.c, compiled to WebAssembly; the pieces around them are
irann/live/live.js. A page opened from a disk may neither fetch files nor load modules, so that all
travels in classic scripts: the engine, and each model's weights in half precision, as base64 beside
their SHA-256.
"""

import base64
import hashlib
import html
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import shakespeare, zoo
from .layers import FAST
from .lm import LanguageModel, vocabulary_of
from .models.diffusion import Diffusion
from .models.gpt import GPT
from .models.mamba import Mamba
from .models.recurrent import RecurrentDepth
from .models.thinker import Thinker
from .models.thinker_page import PageThinker
from .settings import InputError
from .text import Text

LIVE = Path(__file__).parent / "live"
MAGIC = 0x326E7269  # "irn2"
MOST_LAYERS = 64  # engine.c's
# The whole numbers at the head of a file after the magic one, in the order of engine.c's Config, by
# their names in the models' configs
CONFIG = (
    "kind vocabulary window layers heads width inner prelude core rounds round_gains d_state "
    "d_conv dt_rank channels neighbours levels bayes self_condition halt_width unused"
).split()
# What the engine computes; a model with other options is refused
GPT_OPTIONS = {"positions": "rotary", "eps": 1e-5} | FAST
MAMBA_OPTIONS = {"bias": False, "conv_bias": True, "activation": "silu", "eps": 1e-5}


def weights_file(model: LanguageModel) -> bytes:
    """-> what engine.c opens: whole numbers, for diffusion two tables of float64, then all
    parameters in half precision. Raises InputError for a model that the engine does not know, or
    whose weights are not those of its config.
    """
    _, layout = _kind(model)
    zoo.check_weights(model)
    own, names = layout(model)
    numbers = {name: getattr(model.config, name, 0) for name in CONFIG}
    numbers |= {"kind": list(KINDS).index(type(model)), "inner": 4 * model.config.width} | own
    if numbers["layers"] > MOST_LAYERS:
        raise InputError(f"a page runs at most {MOST_LAYERS} layers; got {numbers['layers']}")
    parts = [struct.pack(f"<{len(CONFIG) + 1}i", MAGIC, *(int(numbers[name]) for name in CONFIG))]
    if isinstance(model, Diffusion):
        p = model.level_probabilities()
        parts += [table.numpy().tobytes() for table in (model.schedule.alpha_bar, p.cumsum(0))]
    weights = dict(model.named_parameters())
    for name in names:
        halved = weights[name].detach().cpu().half()
        if not halved.isfinite().all():
            raise InputError(f"{name} has numbers that half precision cannot hold")
        parts.append(halved.contiguous().numpy().tobytes())
    return b"".join(parts)


# The whole numbers that a model's config lacks, and its parameters by name in the order of engine.c
Layout = tuple[dict[str, Any], list[str]]
BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
MAMBA_BLOCK = (
    "norm.weight mixer.in_proj.weight mixer.conv1d.weight mixer.conv1d.bias mixer.x_proj.weight "
    "mixer.dt_proj.weight mixer.dt_proj.bias mixer.A_log mixer.D mixer.out_proj.weight"
).split()


def _gpt(model: GPT) -> Layout:
    config = model.config
    _check_options(config, GPT_OPTIONS)
    head = "wte" if model.lm_head is None else "lm_head"
    own = {"inner": config.inner or 4 * config.width}
    return own, ["wte.weight", *_blocks("h", config.layers), f"{head}.weight"]


def _recurrent(model: RecurrentDepth) -> Layout:
    config = model.config
    names = ["wte.weight", *_blocks("prelude", config.prelude), *_blocks("core", config.core)]
    names += ["gains", "halt_bias"] if config.round_gains else []
    names += [name for name, _ in model.named_parameters() if name.startswith("halt_head.")]
    return {"layers": config.prelude + config.core}, [*names, "lm_head.weight"]


def _mamba(model: Mamba) -> Layout:
    config = model.config
    _check_options(config, MAMBA_OPTIONS)
    if config.d_state % 4:
        raise InputError(f"a page runs a state of a multiple of 4; got d_state={config.d_state}")
    names = [f"layers.{i}.{name}" for i in range(config.layers) for name in MAMBA_BLOCK]
    head = "embeddings" if model.lm_head is None else "lm_head"
    first = next(model.blocks).mixer
    own = {"inner": first.d_inner, "dt_rank": first.dt_rank}
    return own, ["embeddings.weight", *names, "norm_f.weight", f"{head}.weight"]


def _diffusion(model: Diffusion) -> Layout:
    names = ["word_embedding", "input_proj.weight", "time_embed.0.weight", "time_embed.0.bias"]
    names += ["time_embed.2.weight", "time_embed.2.bias", "clean_embed"]
    names += _blocks("h", model.config.layers)
    return {}, [*names, "lm_head.weight", "lm_head.bias"]


def _blocks(part: str, layers: int) -> list[str]:
    return [f"{part}.{i}.{name}.weight" for i in range(layers) for name in BLOCK]


# The models by their names in live.js, and in its order
KINDS: dict[type, tuple[str, Callable[[Any], Layout]]] = {
    GPT: ("gpt", _gpt),
    Thinker: ("thinker", _recurrent),
    Mamba: ("mamba", _mamba),
    Diffusion: ("diffusion", _diffusion),
    PageThinker: ("thinker-page", _recurrent),
}


def _kind(model: LanguageModel) -> tuple[str, Callable[[Any], Layout]]:
    if type(model) not in KINDS:
        known = ", ".join(name for name, _ in KINDS.values())
        raise InputError(f"a page can run {known}; got {type(model).__name__}")
    return KINDS[type(model)]


def _check_options(config: Any, known: dict[str, Any]) -> None:
    other = [name for name, value in known.items() if getattr(config, name) != value]
    if other:
        runs = ", ".join(f"{name}={known[name]}" for name in other)
        has = ", ".join(f"{name}={getattr(config, name)}" for name in other)
        raise InputError(f"a page runs models with {runs} only; this one was trained with {has}")


# ----------------------------------------------------------------- what live.js reads, and a page

PIECES = {  # a title, and the models that the piece can be about
    "cost": ("What each character costs", ("gpt", "thinker", "mamba")),
    "attention": ("Attention on your line, and the next character", ("gpt",)),
    "rounds": ("Rounds of thinking for each character", ("thinker",)),
    "denoise": ("Text out of noise", ("diffusion",)),
    "gaps": ("Gaps, filled from both sides", ("thinker-page", "diffusion")),
    "forget": ("What the state still remembers", ("mamba",)),
    "write": ("All models write at once", ("gpt", "thinker", "thinker-page", "diffusion", "mamba")),
    "chat": ("Talk with a model", ("gpt", "thinker", "mamba")),
}
RUNS = "Here a model runs in the page, in a browser that has JavaScript and WebAssembly"


def engine_script() -> str:
    """-> the JavaScript that hands engine.wasm to live.js."""
    return f'irannLive.engine = "{_base64((LIVE / "engine.wasm").read_bytes())}";\n'


def model_script(model: LanguageModel, name: str) -> str:
    """-> the JavaScript that hands a model to live.js: characters, weights and their SHA-256.

    Raises InputError as `weights_file` does, and for a vocabulary of another size.
    """
    data = weights_file(model)
    characters = vocabulary_of(model).characters
    about = {"characters": characters}
    about["sha256"] = hashlib.sha256(data).hexdigest()
    if isinstance(model, Diffusion):
        about["page"] = model.config.page
    about["data"] = _base64(data)
    return f"irannLive.models[{_json(name)}] = {_json(about)};\n"


def counts_script(text: Text) -> str:
    """-> the JavaScript that hands the counts of pairs of characters in the training part."""
    v = len(text.vocabulary)
    pairs = torch.bincount(text.train[:-1] * v + text.train[1:], minlength=v * v).view(v, v)
    counts = {"characters": text.vocabulary.characters, "pairs": pairs.tolist()}
    return f"irannLive.counts = {_json(counts)};\n"


def box(piece: str, models: Sequence[str] = (), *, alone: bool = False, plain: bool = False) -> str:
    """-> the HTML of a live piece before its script begins: a picture, and what it takes.

    `alone`, as in an exported page, it has no picture, and no counts.js beside it. A `plain` model
    has read no plays, and goes on with what is said.
    """
    title, about = PIECES[piece]
    data = {"piece": piece, "models": " ".join(models or about), "title": title}
    if plain:
        data["plain"] = "yes"
    still = ""
    words = f"{RUNS}."
    if not alone:
        data["counts"] = "yes"
        picture = f'role="img" aria-label="A picture of the live piece: {title.lower()}."'
        still = f'<div class="irann-still irann-still-{piece}" {picture}></div>'
        words = f"{RUNS}; without them there is only a picture of it."
    marks = " ".join(f'data-{name}="{value}"' for name, value in data.items())
    return f'<div class="irann-live" {marks}>{still}<p>{words}</p></div>'


def page(model: LanguageModel) -> str:
    """-> one HTML file in which the model is live: what is to be seen of it, and what it writes."""
    name, _ = _kind(model)
    model_js = model_script(model, name)
    titles = {piece: title for piece, (title, models) in PIECES.items() if name in models}
    titles["write"] = "It writes"
    about = sorted(titles, key=lambda piece: piece != "write")
    title = f"A {name} that runs in this page"
    plain = vocabulary_of(model).characters != shakespeare.CHARACTERS
    parts = [
        f"<h2>{titles[piece]}</h2>{box(piece, [name], alone=True, plain=plain)}" for piece in about
    ]
    scripts = ["window.irannLive = { models: {}, engine: null, counts: null };"]
    scripts += [engine_script(), model_js, (LIVE / "live.js").read_text(encoding="utf-8")]
    card = f"{model.num_parameters:,} parameters, {len(vocabulary_of(model))} characters"
    nats = (model.card or {}).get("validation")
    if nats is not None:
        bound = "" if model.exact else "at most "
        card += f", {bound}{nats:.3f} nats per character of text that it was not trained on"
    return PAGE.format(
        title=html.escape(title),
        card=html.escape(card),
        style=(LIVE / "live.css").read_text(encoding="utf-8"),
        parts="\n".join(parts),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 46em; margin: 1em auto; padding: 0 1em; }}
@media (prefers-color-scheme: dark) {{
  body {{ --most: 0.45; background: #14181e; color: #ced6dd; }}
}}
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{card}. Everything is in this file: it asks nothing of any network.</p>
{parts}
</main>
{scripts}
</body>
</html>
"""


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json(value: Any) -> str:
    """-> JSON that ends no script: no sign of HTML stands in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
