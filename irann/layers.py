"""What models here share: one Transformer block, attention, norms, rotary positions, activations.

The block is GPT-2's (Radford et al. 2019), with the names of its checkpoints: norm, attention, add;
norm, MLP, add. Its options are the ingredients that later work found to train faster, most with
their source; each is off by default.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .core.attention import attention_weights, causal_mask, merge_heads
from .settings import InputError

KeyValue = tuple[Float[Tensor, "b h _ c"], Float[Tensor, "b h _ c"]]  # one layer's KV cache
# the options of a block that train better at this size
FAST: dict[str, Any] = dict(norm="plain", qk_norm=True, activation="squared_relu", bias=False)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU as GPT-2 first published it; nanoGPT's, and ours, is the exact one."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, "Primer", arXiv 2109.08668)."""
    return F.relu(x) * x


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
    # others that transformers' GPT-2 and Mamba have
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def make_norm(kind: str, width: int, *, bias: bool = True, eps: float = 1e-5) -> nn.Module:
    """A norm over the last axis: `layer` (Ba et al. 2016) with gain (and bias), `plain`
    without, `rms` (Zhang and Sennrich 2019) with a gain.
    """
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    if kind == "plain":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps)
    raise InputError(f"norm is one of layer, plain, rms; got {kind!r}")


def rotary_table(start: int, end: int, c: int, *, like: Tensor) -> Complex[Tensor, "t pairs"]:
    """The rotation of each pair of channels at positions start..end, as unit complex numbers.

    Su et al. 2021 (arXiv 2104.09864), eqs. 12 to 15: pair j turns by position * 10000^(-2j/c).
    Computed in float64, then cast to the precision and device of `like`. Raises InputError for an
    odd c.
    """
    if c % 2:
        raise InputError(
            f"rotary positions turn channels in pairs; a head of {c} channels has one left over"
        )
    dtype = torch.promote_types(like.dtype, torch.complex64)
    # While a text is written each character asks for one more row, so whole tables are kept, of a
    # power of two rows. For autograd, a compiler or a tensor subclass a table is made anew: a kept
    # one must not enter their graph.
    plain = type(like) in (Tensor, nn.Parameter) and not torch.is_grad_enabled()
    if plain and not torch.compiler.is_compiling():
        return _kept_table(1 << (end - 1).bit_length(), c, dtype, like.device)[start:end]
    return _table(start, end, c, dtype, like.device)


def _table(start, end, c, dtype, device):
    made_on = "cpu" if device.type == "mps" else device  # MPS has no float64
    frequency = 10_000.0 ** (-torch.arange(0, c, 2, dtype=torch.float64, device=made_on) / c)
    angle = torch.arange(start, end, dtype=torch.float64, device=made_on)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(device, dtype)


@lru_cache(maxsize=8)
def _kept_table(end, c, dtype, device):
    with torch.inference_mode(False):  # whoever asks first may be in inference mode, others not
        return _table(0, end, c, dtype, device)


def apply_rotary(
    x: Float[Tensor, "*batch t c"], rotary: Complex[Tensor, "t pairs"]
) -> Float[Tensor, "*batch t c"]:
    """Turn every pair of neighbouring channels by its position's angle.

    A pair is a complex number, and turning it one multiplication (same paper, eq. 12); the score of
    a rotated query and a rotated key then depends on their distance alone.
    """
    pairs = torch.view_as_complex(x.to(rotary.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


def check_heads(width: int, heads: int, *, rotary: bool) -> None:
    """Raises InputError if width does not split into heads, or, if rotary, heads of even width."""
    if width % heads:
        raise InputError(f"a width of {width} cannot be cut into {heads} equal heads")
    if rotary and width // heads % 2:
        raise InputError(
            f"rotary positions turn channels in pairs; {heads} heads of a width of {width} "
            f"have {width // heads} channels each"
        )


def check_window(window: int, start: int, t: int) -> int:
    """-> where t characters after `start` others end. Raises InputError for more than fit."""
    if start + t > window:
        raise InputError(
            f"the window holds {window} characters; got {t} after {start}: read the last ones only"
        )
    return start + t


class StackedLinear(nn.Linear):
    """Several matrices on top of each other, for one product; Muon treats each on its own."""

    def __init__(self, inputs: int, outputs: int, *, stacked: int, bias: bool = True):
        super().__init__(inputs, outputs, bias=bias)
        self.stacked = stacked


class Attention(nn.Module):
    """Multi-head attention, with the KV cache of what was read before.

    The weighted mean itself is torch's fused form of `core.attention.attention`; a test holds the
    two equal.
    """

    def __init__(
        self, width: int, heads: int, *, causal=True, qk_norm=False, bias=True, dropout=0.0
    ):
        super().__init__()
        check_heads(width, heads, rotary=False)
        self.heads = heads
        self.causal = causal
        self.qk_norm = qk_norm
        self.dropout = dropout
        self.c_attn = StackedLinear(width, 3 * width, stacked=3, bias=bias)  # q, k, v
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: KeyValue | None = None,
        rotary: Complex[Tensor, "t pairs"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], KeyValue]:
        """The residual stream's update, and keys and values of past and present."""
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k = torch.cat([cache[0], k], 2)
            v = torch.cat([cache[1], v], 2)
        t, s = q.shape[2], k.shape[2]
        masked = self.causal and 1 < t < s  # a single new position may look at everything
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            causal_mask(t, s, x.device) if masked else None,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and t == s > 1,
        )
        return self.c_proj(merge_heads(y)), (k, v)

    def project(
        self, x: Float[Tensor, "b t d"], rotary: Complex[Tensor, "t pairs"] | None = None
    ) -> tuple[Float[Tensor, "b h t c"], Float[Tensor, "b h t c"], Float[Tensor, "b h t c"]]:
        """Queries, keys and values, normed and rotated as the options say.

        QK-norm brings each query and key to mean zero and unit variance, so that scores cannot blow
        up (Dehghani et al. 2023, arXiv 2302.05442).
        """
        qkv = rearrange(self.c_attn(x), "b t (three h c) -> three b h t c", three=3, h=self.heads)
        qk, v = qkv.split([2, 1])  # both go through norm and rotation together
        if self.qk_norm:
            qk = F.layer_norm(qk, (qk.shape[-1],))
        if rotary is not None:
            qk = apply_rotary(qk, rotary)
        return qk[0], qk[1], v[0]

    def attention_weights(
        self, x: Float[Tensor, "b t d"], rotary: Complex[Tensor, "t pairs"] | None = None
    ) -> Float[Tensor, "b h t s"]:
        """What `forward` averages the values with, to look at."""
        q, k, _ = self.project(x, rotary)
        return attention_weights(q, k, causal=self.causal)


class MLP(nn.Module):
    """Two linear maps with an activation between them; each position on its own."""

    def __init__(self, width: int, *, inner: int | None = None, activation="gelu", bias=True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"activation is one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.activation = activation
        self.c_fc = nn.Linear(width, inner or 4 * width, bias=bias)
        self.c_proj = nn.Linear(inner or 4 * width, width, bias=bias)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)): the pre-norm block of GPT-2."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = True,
        inner: int | None = None,
        norm: str = "layer",
        eps: float = 1e-5,
        qk_norm: bool = False,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.ln_1 = make_norm(norm, width, bias=bias, eps=eps)
        self.attn = Attention(
            width, heads, causal=causal, qk_norm=qk_norm, bias=bias, dropout=attention_dropout
        )
        self.ln_2 = make_norm(norm, width, bias=bias, eps=eps)
        self.mlp = MLP(width, inner=inner, activation=activation, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: KeyValue | None = None,
        rotary: Complex[Tensor, "t pairs"] | None = None,
        gains: Float[Tensor, "2 d"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], KeyValue]:
        """The residual stream, and the KV cache. `gains` scale what attention and MLP see."""
        y, keys_values = self.attn(scale(self.ln_1(x), gains, 0), cache, rotary)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(scale(self.ln_2(x), gains, 1))), keys_values


def scale(
    x: Float[Tensor, "*batch d"], gains: Float[Tensor, "2 d"] | None, i: int
) -> Float[Tensor, "*batch d"]:
    """x times the i-th gain, if there are any."""
    return x if gains is None else x * gains[i]


def init_gpt2(model: nn.Module, layers: int) -> None:
    """Normal with deviation 0.02, over sqrt(2 layers) for what adds to the residual; biases zero.

    Source: GPT-2 (Radford et al. 2019), section 2.3.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith("c_proj")
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def init_fan_in(model: nn.Module) -> None:
    """Normal with deviation 1/sqrt(fan in), but blocks start as the identity: they add zero.

    Embeddings have deviation one, biases are zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(("c_proj", "out_proj")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
