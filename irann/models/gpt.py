"""nanoGPT: a decoder-only Transformer over characters, the baseline of this book.

Papers: Vaswani et al. 2017 (arXiv 1706.03762) for attention, Radford et al. 2019 (GPT-2) for the block and its
initialisation; the sizes and the spirit are those of Karpathy's nanoGPT. With its defaults the model computes exactly
what transformers' GPT-2 computes with the exact GELU. `GPTConfig.fast` switches on what trains better at this size; each
ingredient is an option of its own:

| option                      | instead of            | why                                                              |
|-----------------------------|-----------------------|------------------------------------------------------------------|
| positions="rotary"          | a learned table       | scores see distance, so nothing is learned twice for each place  |
| qk_norm=True                | bare q and k          | scores stay bounded, so the learning rate may be larger          |
| activation="squared_relu"   | GELU                  | sparser and sharper at equal cost                                |
| norm="plain", bias=False    | gains and biases      | fewer parts, nothing lost                                        |
| tied=False                  | head = embedding      | 65 characters cost nothing; reading and writing differ           |
| init="fan_in"               | deviation 0.02        | signals keep their size; each block starts as the identity       |
"""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import RENAMED, Block, init_fan_in, init_gpt2, make_norm, rotary_table
from ..lm import Reader, check_heads, check_sizes


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options; the defaults are GPT-2's choices at a size for two CPU cores."""

    vocabulary: int = 65
    window: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    inner: int | None = None  # of the MLP; None: four times the width
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bias: bool = True
    eps: float = 1e-5
    positions: str = "learned"
    qk_norm: bool = False
    activation: str = "gelu"
    norm: str = "layer"
    tied: bool = True
    init: str = "gpt2"

    def __post_init__(self):
        check_sizes(self, "vocabulary", "window", "layers", "heads", "width")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f"positions is one of learned, rotary; got {self.positions!r}")
        if self.init not in ("gpt2", "fan_in"):
            raise ValueError(f"init is one of gpt2, fan_in; got {self.init!r}")
        check_heads(self.width, self.heads, rotary=self.positions == "rotary")

    @classmethod
    def fast(cls, **sizes) -> "GPTConfig":
        """The options of the table above, all at once."""
        modern = cls(positions="rotary", qk_norm=True, activation="squared_relu", norm="plain", bias=False, tied=False, init="fan_in")
        return replace(modern, **sizes)


class GPT(Reader):
    """Characters to logits: embed, a stack of blocks, norm, head."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        c = config
        self.embed = nn.Embedding(c.vocabulary, c.width)
        if c.positions == "learned":
            self.place = nn.Embedding(c.window, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            Block(
                c.width,
                c.heads,
                inner=c.inner,
                norm=c.norm,
                eps=c.eps,
                qk_norm=c.qk_norm,
                activation=c.activation,
                bias=c.bias,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
            )
            for _ in range(c.layers)
        )
        self.norm = make_norm(c.norm, c.width, bias=c.bias, eps=c.eps)
        self.head = None if c.tied else nn.Linear(c.width, c.vocabulary, bias=False)
        if c.init == "gpt2":
            init_gpt2(self, c.layers)
        else:
            init_fan_in(self)

    def read(self, ids: Tensor, state=None):
        """(b t), state -> (b t v), state: the state is each block's keys and values of all that was read.

        What a place has computed does not change when more is read, because no place looks ahead; so only the new places
        are computed, and they look back at the remembered keys. Raises ValueError when state and ids outgrow the window.
        """
        past = state or [None] * len(self.blocks)
        x, turn = self.enter(ids, past[0][0].shape[2] if state else 0)
        state = []
        for block, kv in zip(self.blocks, past, strict=True):
            x, kv = block(x, kv, turn)
            state.append(kv)
        return F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight), state

    def enter(self, ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """(b t) at places from `start` on -> the residual stream (b t d), and the rotary table of these places if there is one."""
        end = start + ids.shape[1]
        if end > self.config.window:
            raise ValueError(f"the window holds {self.config.window} characters; got {ids.shape[1]} after {start}: read the last ones only")
        x = self.embed(ids)
        if self.config.positions == "learned":
            return self.dropout(x + self.place.weight[start:end]), None
        table = rotary_table(self.config.window, self.config.width // self.config.heads, x.dtype, x.device)
        return self.dropout(x), table[start:end]

    @torch.no_grad()
    def inside(self, ids: Tensor) -> dict[str, Tensor]:
        """(1 t) -> `attention` (layers h t s): where each place looks, in every layer and head."""
        x, turn = self.enter(self.check_ids(ids))
        maps = []
        for block in self.blocks:
            maps.append(block.attention.look(block.norm_attention(x), turn)[0])
            x, _ = block(x, None, turn)
        return {"attention": torch.stack(maps)}

    @classmethod
    def from_transformers(cls, source) -> "GPT":
        """A `GPT2LMHeadModel`, or a name or folder that transformers resolves -> the same model in this book's form.

        GPT-2 keeps its linear maps transposed (`Conv1D`). Raises ValueError for a variant that would compute something else.
        """
        if isinstance(source, (str, os.PathLike)):
            from transformers import GPT2LMHeadModel

            source = GPT2LMHeadModel.from_pretrained(source)
        hf = source.config
        if not hf.scale_attn_weights or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention:
            raise ValueError("only plain GPT-2 attention can be copied: scaled by 1/sqrt(c) in every layer, without cross-attention")
        model = cls(
            GPTConfig(
                vocabulary=hf.vocab_size,
                window=hf.n_positions,
                layers=hf.n_layer,
                heads=hf.n_head,
                width=hf.n_embd,
                inner=hf.n_inner,
                dropout=hf.resid_pdrop,
                attention_dropout=hf.attn_pdrop,
                eps=hf.layer_norm_epsilon,
                activation=RENAMED.get(hf.activation_function, hf.activation_function),
                tied=source.lm_head.weight is source.transformer.wte.weight,
            )
        ).to(source.lm_head.weight)

        theirs = source.state_dict()
        names = {"embed": "transformer.wte", "place": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
        inside = {
            "norm_attention": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "norm_mlp": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.out": "mlp.c_proj",
        }
        for i in range(hf.n_layer):
            names |= {f"blocks.{i}.{ours}": f"transformer.h.{i}.{their}" for ours, their in inside.items()}
        with torch.no_grad():
            for name, weight in model.named_parameters():
                module, kind = name.rsplit(".", 1)
                their = theirs[f"{names[module]}.{kind}"]
                weight.copy_(their.T if "c_" in names[module] and kind == "weight" else their)
        return model.train(source.training)
