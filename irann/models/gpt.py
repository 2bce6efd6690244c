"""nanoGPT: a decoder-only Transformer over characters, the baseline of this book.

Papers: Vaswani et al. 2017 (arXiv 1706.03762) for attention, Radford et al. 2019 (GPT-2) for the
block and its initialisation; the sizes and the spirit are those of Karpathy's nanoGPT, and so are
the names of the parameters. With its defaults the model computes exactly what transformers' GPT-2
computes with the exact GELU. `GPTConfig.fast` switches on what trains better at this size; each
ingredient is an option of its own:

| option                    | instead of       | why                                        |
|---------------------------|------------------|--------------------------------------------|
| positions="rotary"        | a learned table  | scores see distance                        |
| qk_norm=True              | bare q and k     | scores stay bounded: larger learning rates |
| activation="squared_relu" | GELU             | sparse as the ReLU, without its kink       |
| norm="plain", bias=False  | gains and biases | fewer parts                                |
| tied=False                | lm_head = wte    | reading and writing differ                 |
| init="fan_in"             | deviation 0.02   | blocks start as the identity               |
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float, Integer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..layers import (
    ACTIVATIONS,
    FAST,
    Block,
    KeyValue,
    check_heads,
    check_window,
    init_fan_in,
    init_gpt2,
    make_norm,
    rotary_table,
)
from ..lm import Ids, Reader, check_settings, evaluating
from ..settings import Checked, field


@dataclass(frozen=True)
class GPTConfig(Checked):
    """Sizes and options; the defaults are GPT-2's choices at a size for two CPU cores."""

    vocabulary: int = field(65, "different characters", low=1)
    window: int = field(256, "characters seen at once", low=1)
    layers: int = field(4, "Transformer blocks", low=1)
    heads: int = field(4, "attention heads of a block", low=1)
    width: int = field(128, "of the residual stream", low=1)
    inner: int | None = field(None, "width of the MLP; null: four times `width`", low=1, kind=int)
    dropout: float = field(0.0, "of the residual stream's updates", low=0.0, high=1.0)
    attention_dropout: float = field(0.0, "of attention weights", low=0.0, high=1.0)
    bias: bool = field(True, "biases in linear maps and norms")
    eps: float = field(1e-5, "of the norms", low=0.0)
    positions: str = field("learned", "how positions are told apart", choices=("learned", "rotary"))
    qk_norm: bool = field(False, "normalise queries and keys")
    activation: str = field("gelu", "of the MLP", choices=tuple(ACTIVATIONS))
    norm: str = field("layer", "the kind of norm", choices=("layer", "plain", "rms"))
    tied: bool = field(True, "one matrix for reading and writing characters")
    init: str = field("gpt2", "how weights begin", choices=("gpt2", "fan_in"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads, rotary=self.positions == "rotary")

    @classmethod
    def fast(cls, **sizes: Any) -> "GPTConfig":
        """The options of the table above, all at once."""
        return replace(cls(positions="rotary", tied=False, init="fan_in", **FAST), **sizes)


class GPT(Reader):
    """Characters to logits: embed, a stack of blocks, norm, head."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.window, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                inner=config.inner,
                norm=config.norm,
                eps=config.eps,
                qk_norm=config.qk_norm,
                activation=config.activation,
                bias=config.bias,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.layers)
        )
        self.ln_f = make_norm(config.norm, config.width, bias=config.bias, eps=config.eps)
        self.lm_head = (
            None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        )
        if config.init == "gpt2":
            init_gpt2(self, config.layers)
        else:
            init_fan_in(self)

    def read(
        self, ids: Ids, state: list[KeyValue] | None = None
    ) -> tuple[Float[Tensor, "b t v"], list[KeyValue]]:
        """Logits, and the KV cache of every block.

        What a position has computed does not change when more is read, because no position looks
        ahead; so only the new positions are computed, and they look back at the cached keys and
        values. Raises InputError when state and ids outgrow the window.
        """
        past = state or [None] * len(self.h)
        x, rotary = self.embed(ids, state[0][0].shape[2] if state else 0)
        caches = []
        for block, cache in zip(self.h, past, strict=True):
            x, cache = block(x, cache, rotary)
            caches.append(cache)
        head = self.wte if self.lm_head is None else self.lm_head
        return F.linear(self.ln_f(x), head.weight), caches

    def embed(
        self, ids: Ids, start: int = 0
    ) -> tuple[Float[Tensor, "b t d"], Complex[Tensor, "t pairs"] | None]:
        """The residual stream from position `start` on, and its rotary table if there is one."""
        end = check_window(self.config.window, start, ids.shape[1])
        x = self.wte(ids)
        if self.config.positions == "learned":
            return self.drop(x + self.wpe.weight[start:end]), None
        rotary = rotary_table(start, end, self.config.width // self.config.heads, like=x)
        return self.drop(x), rotary

    @torch.no_grad()
    def inspect(
        self, ids: Integer[Tensor, "1 t"], *, generator: Generator | None = None, **settings: Any
    ) -> dict[str, Tensor]:
        """`attention` (layers h t s): the attention weights of every layer and head."""
        check_settings(self, settings, sampling=False)
        ids = self.check_ids(ids)
        maps = []
        with evaluating(self, ids.numel()):
            x, rotary = self.embed(ids)
            block: Block
            for block in self.h:  # pyright: ignore[reportAssignmentType]
                maps.append(block.attn.attention_weights(block.ln_1(x), rotary)[0])
                x, _ = block(x, None, rotary)
        return {"attention": torch.stack(maps)}

    @classmethod
    def from_transformers(cls, source: Any) -> "GPT":
        """A `GPT2LMHeadModel`, or a name or folder for transformers -> the same model as ours.
        Raises InputError for another class, or a variant that would compute something else.
        """
        from .interop import gpt_from_transformers

        return gpt_from_transformers(source)

    def to_transformers(self) -> Any:
        """-> the same model as a `GPT2LMHeadModel`, which save_pretrained writes to a folder.
        Raises InputError for options that GPT-2 does not have.
        """
        from .interop import gpt_to_transformers

        return gpt_to_transformers(self)
