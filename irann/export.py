"""A trained model as a file that a page can run without Python: `irann export MODEL --out page.html`.

The forward passes are irann/live/engine.c, compiled to WebAssembly; the pieces around them are
irann/live/live.js. A page opened from a disk may neither fetch files nor load modules, so that all
travels in classic scripts: the engine, and each model's weights in half precision, as base64 beside
their SHA-256.
"""

import base64
import hashlib
import html
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lm import LanguageModel, vocabulary_of
from .models.diffusion import Diffusion
from .models.gpt import GPT
from .models.mamba import Mamba
from .models.recurrent import RecurrentDepth
from .models.thinker import Thinker
from .models.thinker_page import PageThinker
from .settings import InputError

LIVE = Path(__file__).parent / "live"
MAGIC = 0x316E7269  # "irn1"
# The whole numbers at the head of a file, in the order of engine.c's Config, after the magic one
CONFIG = (
    *("kind", "vocabulary", "window", "layers", "heads", "width", "inner", "prelude", "core"),
    *("rounds", "gained", "state", "conv", "rank", "channels", "neighbours", "levels", "bayes"),
    "conditioned",
)
KINDS = {GPT: "gpt", Thinker: "thinker", Mamba: "mamba"}
KINDS |= {Diffusion: "diffusion", PageThinker: "thinker-page"}
# What the engine computes; a model with other options is refused
GPT_OPTIONS = {
    "bias": False,
    "eps": 1e-5,
    "positions": "rotary",
    "qk_norm": True,
    "activation": "squared_relu",
    "norm": "plain",
}
MAMBA_OPTIONS = {"bias": False, "conv_bias": True, "activation": "silu", "eps": 1e-5}


def weights_file(model: LanguageModel) -> bytes:
    """-> what engine.c opens: whole numbers, for diffusion two tables of float64, then all
    parameters in half precision. Raises InputError for a model that the engine does not know.
    """
    kind = KINDS.get(type(model))
    if kind is None:
        raise InputError(f"a page can run {', '.join(KINDS.values())}; got {type(model).__name__}")
    numbers, tensors = LAYOUTS[type(model)](model)
    numbers |= {"kind": list(KINDS).index(type(model)), "vocabulary": model.config.vocabulary}
    numbers |= {"window": model.config.window, "width": model.config.width}
    parts = [struct.pack("<20i", MAGIC, *(int(numbers.get(name, 0)) for name in CONFIG))]
    if isinstance(model, Diffusion):
        p = model.level_probabilities()
        parts += [table.numpy().tobytes() for table in (model.schedule.alpha_bar, p.cumsum(0))]
    for name, tensor in tensors:
        halved = tensor.detach().cpu().half()
        if not halved.isfinite().all():
            raise InputError(f"{name} has numbers that half precision cannot hold")
        parts.append(halved.contiguous().numpy().tobytes())
    return b"".join(parts)


Layout = tuple[dict[str, Any], list[tuple[str, Tensor]]]


def _gpt(model: GPT) -> Layout:
    c = model.config
    _check_options(c, GPT_OPTIONS)
    inner = c.inner or 4 * c.width
    head = model.wte if model.lm_head is None else model.lm_head
    blocks = [pair for block in model.h for pair in _block(block)]
    numbers = {"layers": c.layers, "heads": c.heads, "inner": inner}
    return numbers, [("wte", model.wte.weight), *blocks, ("lm_head", head.weight)]


def _recurrent(model: RecurrentDepth) -> Layout:
    c = model.config
    numbers = {"layers": c.prelude + c.core, "heads": c.heads, "inner": 4 * c.width}
    numbers |= {"prelude": c.prelude, "core": c.core, "rounds": c.rounds, "gained": c.round_gains}
    tensors = [("wte", model.wte.weight)]
    tensors += [pair for block in (*model.prelude, *model.core) for pair in _block(block)]
    if model.gains is not None and model.halt_bias is not None:
        tensors += [("gains", model.gains), ("halt_bias", model.halt_bias)]
    tensors += [("halt_head", model.halt_head.weight), ("halt_head.bias", model.halt_head.bias)]
    return numbers, [*tensors, ("lm_head", model.lm_head.weight)]


def _mamba(model: Mamba) -> Layout:
    c = model.config
    _check_options(c, MAMBA_OPTIONS)
    first = next(model.blocks).mixer
    numbers = {"layers": c.layers, "inner": first.d_inner, "state": c.d_state}
    numbers |= {"conv": c.d_conv, "rank": first.dt_rank}
    if c.d_state % 4:
        raise InputError(f"a page runs a state of a multiple of 4; got d_state={c.d_state}")
    tensors = [("embeddings", model.embeddings.weight)]
    for block in model.blocks:
        m = block.mixer
        tensors += [("norm", block.norm.weight), ("in_proj", m.in_proj.weight)]
        tensors += [("conv1d", m.conv1d.weight), ("conv1d.bias", m.conv1d.bias)]
        tensors += [("x_proj", m.x_proj.weight), ("dt_proj", m.dt_proj.weight)]
        tensors += [("dt_proj.bias", m.dt_proj.bias), ("A_log", m.A_log), ("D", m.D)]
        tensors += [("out_proj", m.out_proj.weight)]
    head = model.embeddings if model.lm_head is None else model.lm_head
    return numbers, [*tensors, ("norm_f", model.norm_f.weight), ("lm_head", head.weight)]


def _diffusion(model: Diffusion) -> Layout:
    c = model.config
    numbers = {"layers": c.layers, "heads": c.heads, "inner": 4 * c.width}
    numbers |= {"channels": c.channels, "neighbours": c.neighbours, "levels": c.levels}
    numbers |= {"bayes": c.bayes, "conditioned": c.self_condition}
    first, _, second = model.time_embed
    tensors = [("word_embedding", model.word_embedding), ("input_proj", model.input_proj.weight)]
    tensors += [("time_embed.0", first.weight), ("time_embed.0.bias", first.bias)]
    tensors += [("time_embed.2", second.weight), ("time_embed.2.bias", second.bias)]
    tensors += [("clean_embed", model.clean_embed)]
    tensors += [pair for block in model.h for pair in _block(block)]
    return numbers, [*tensors, ("lm_head", model.lm_head.weight), ("bias", model.lm_head.bias)]


LAYOUTS: dict[type, Callable[[Any], Layout]] = {
    GPT: _gpt,
    Thinker: _recurrent,
    PageThinker: _recurrent,
    Mamba: _mamba,
    Diffusion: _diffusion,
}


def _block(block: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield "attn.c_attn", block.attn.c_attn.weight
    yield "attn.c_proj", block.attn.c_proj.weight
    yield "mlp.c_fc", block.mlp.c_fc.weight
    yield "mlp.c_proj", block.mlp.c_proj.weight


def _check_options(config: Any, known: dict[str, Any]) -> None:
    for name, value in known.items():
        if getattr(config, name) != value:
            raise InputError(
                f"a page runs models with {name}={value} only; this one has "
                f"{name}={getattr(config, name)}"
            )
