"""Models of transformers in our form, and back: with the same parameter names, nearly a copy."""

import os
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..settings import InputError
from .gpt import GPT, GPTConfig
from .mamba import Mamba, MambaConfig

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # in GPT-2
RENAMED = {  # activations
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "squared_relu",
}
# Ours have no tokens with a meaning of their own; theirs, by default, end a text at character 0
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2_NAMES = {  # of the settings, ours and theirs
    "vocabulary": "vocab_size",
    "window": "n_positions",
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "inner": "n_inner",
    "dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "eps": "layer_norm_epsilon",
}
MAMBA_NAMES = {
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "eps": "layer_norm_epsilon",
}


def gpt_from_transformers(source: Any) -> GPT:
    """See `GPT.from_transformers`."""
    from transformers import GPT2LMHeadModel

    theirs = _resolved(source, GPT2LMHeadModel)
    hf = theirs.config
    if not hf.scale_attn_weights or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention:
        raise InputError(
            "only plain GPT-2 attention can be copied: scaled by 1/sqrt(c) in every layer, "
            "without cross-attention"
        )
    if hf.embd_pdrop != hf.resid_pdrop:
        raise InputError(
            "one dropout serves the whole residual stream here; got embd_pdrop "
            f"{hf.embd_pdrop} and resid_pdrop {hf.resid_pdrop}: set both to the same number first"
        )
    config = GPTConfig(
        **{our_name: getattr(hf, their_name) for our_name, their_name in GPT2_NAMES.items()},
        activation=_activation(hf.activation_function),
        tied=theirs.lm_head.weight is theirs.transformer.wte.weight,
    )
    ours = GPT(config).to(theirs.lm_head.weight)
    _copy(ours, theirs)
    return ours.train(theirs.training)


def mamba_from_transformers(source: Any, *, window: int = 1024) -> Mamba:
    """See `Mamba.from_transformers`."""
    from transformers import MambaForCausalLM

    theirs = _resolved(source, MambaForCausalLM)
    hf = theirs.config
    config = MambaConfig(
        **{our_name: getattr(hf, their_name) for our_name, their_name in MAMBA_NAMES.items()},
        window=window,
        d_inner=hf.intermediate_size,
        dt_rank=int(hf.time_step_rank),
        activation=_activation(hf.hidden_act),
        tied=theirs.lm_head.weight is theirs.backbone.embeddings.weight,
    )
    ours = Mamba(config).to(theirs.lm_head.weight)
    _copy(ours, theirs)
    return ours.train(theirs.training)


def gpt_to_transformers(ours: GPT) -> Any:
    """See `GPT.to_transformers`. Biases that ours does not have are zeros there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = ours.config
    for name, plain in {"positions": "learned", "qk_norm": False, "norm": "layer"}.items():
        if getattr(config, name) != plain:
            raise InputError(
                f"GPT-2 of transformers has {name} {plain!r} only; this model has "
                f"{getattr(config, name)!r}"
            )
    their_config = GPT2Config(
        **{their_name: getattr(config, our_name) for our_name, their_name in GPT2_NAMES.items()},
        embd_pdrop=config.dropout,
        activation_function=_their_activation(config.activation),
        tie_word_embeddings=config.tied,
        **NO_TOKENS,
    )
    theirs: Any = GPT2LMHeadModel(their_config)
    theirs.to(ours.wte.weight)
    _copy(ours, theirs, back=True)
    return theirs.train(ours.training)


def mamba_to_transformers(ours: Mamba) -> Any:
    """See `Mamba.to_transformers`. Theirs knows neither a window nor dropout."""
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    config = ours.config
    d_inner, dt_rank = next(ours.blocks).mixer.dt_proj.weight.shape
    if d_inner % config.width:
        raise InputError(
            f"their inner width is a multiple of the width; this model has {d_inner} and "
            f"{config.width}"
        )
    their_config = TheirConfig(
        **{their_name: getattr(config, our_name) for our_name, their_name in MAMBA_NAMES.items()},
        expand=d_inner // config.width,
        time_step_rank=dt_rank,
        hidden_act=_their_activation(config.activation),
        tie_word_embeddings=config.tied,
        **NO_TOKENS,
    )
    theirs: Any = MambaForCausalLM(their_config)
    theirs.to(ours.embeddings.weight)
    _copy(ours, theirs, back=True)
    return theirs.train(ours.training)


def _activation(name: str) -> str:
    """-> our name of an activation of transformers."""
    return RENAMED.get(name, name)


def _their_activation(name: str) -> str:
    """-> the name of transformers of an activation of ours."""
    return next((theirs for theirs, known in RENAMED.items() if known == name), name)


def _resolved(source: Any, kind: Any) -> Any:
    """-> a model of exactly this kind: of a relative, a copy would silently lose parts."""
    from transformers import AutoConfig

    model_type = kind.config_class.model_type
    if isinstance(source, str | os.PathLike):
        found = AutoConfig.from_pretrained(source).model_type
        if found == model_type:
            return kind.from_pretrained(source)
    elif isinstance(source, kind) and source.config.model_type == model_type:
        return source
    else:
        found = type(source).__name__
    raise InputError(f"what can be copied is a {kind.__name__}; got a {found}")


@torch.no_grad()
def _copy(ours: nn.Module, theirs: Any, *, back: bool = False) -> None:
    """Copy all parameters of theirs to ours by name, or `back`: a bias that ours lacks is zero.

    Raises InputError where something else stands in a part's place.
    """
    for name, parameter in theirs.named_parameters():
        if name.endswith(TRANSPOSED):
            parameter = parameter.T
        name = name.removeprefix(f"{theirs.base_model_prefix}.")
        try:
            mine = attrgetter(name)(ours)  # the weight in use, pruned or parametrized too
        except AttributeError:
            raise InputError(
                f"there is no {name} to copy: something stands in its place, such as an adapter; "
                "merge it into the weights first"
            ) from None
        if not back:
            mine.copy_(parameter)
        elif mine is None:
            parameter.zero_()
        else:
            parameter.copy_(mine)
