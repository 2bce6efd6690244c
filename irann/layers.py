"""What models of this book share: one Transformer block, its attention, its norms, rotary positions, activations.

The block is GPT-2's (Radford et al. 2019): norm, attention, add; norm, MLP, add. Its options are the ingredients that
later work found to train faster; each is named here with its source, and each is off by default.
"""

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .core.attention import causal_mask, merge_heads, weights

ACTIVATIONS = {
    "gelu": F.gelu,  # GPT-2 as nanoGPT has it: the exact one, with erf
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2 as first published
    "squared_relu": lambda x: F.relu(x) * x,  # So et al. 2021, "Primer" (arXiv 2109.08668)
    # others that a model of transformers may have, under its names
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
RENAMED = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "squared_relu"}  # transformers' names for ours


def make_norm(kind: str, width: int, *, bias: bool = True, eps: float = 1e-5) -> nn.Module:
    """A norm over the last axis: `layer` with gain (and bias), `plain` LayerNorm without either, or `rms` with gain."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    if kind == "plain":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps)
    raise ValueError(f"norm is one of layer, plain, rms; got {kind!r}")


@lru_cache(maxsize=32)
def rotary_table(t: int, c: int, dtype=torch.float32, device=None, base: float = 10_000.0) -> Tensor:
    """-> (t c/2) of complex: the turn of each pair of channels at each place, as a number on the unit circle.

    Su et al. 2021 (arXiv 2104.09864), eq. 12 to 15: pair j turns by place * base^(-2j/c). Computed in float64, then cast;
    `dtype` is that of the real parts. Raises ValueError for an odd c.
    """
    if c % 2:
        raise ValueError(f"rotary positions turn channels in pairs; a head of {c} channels has one left over")
    with torch.inference_mode(False):  # the table is kept, and whoever asked first may be in inference mode
        angle = torch.arange(t).double()[:, None] * base ** (-torch.arange(0, c, 2).double() / c)
        return torch.polar(torch.ones_like(angle), angle).to(device, torch.promote_types(dtype, torch.complex64))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """(... t c), (t c/2) -> (... t c): turn every pair of neighbouring channels by its place's angle.

    A pair is a complex number, a turn one multiplication (same paper, eq. 12); the score of a turned q and a turned k then
    depends on their distance alone.
    """
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over (b t d), with the keys and values of what was read before.

    The mean itself is torch's fused form of `core.attention.attention`; a test holds the two equal.
    """

    def __init__(self, width: int, heads: int, *, causal=True, qk_norm=False, bias=True, dropout=0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be cut into {heads} equal heads")
        self.heads, self.causal, self.qk_norm, self.dropout = heads, causal, qk_norm, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.qkv.stacked = 3  # three matrices on top of each other; Muon treats each on its own
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None, turn: Tensor | None = None):
        """(b t d), past k and v (b h s c), turn (t c/2) -> (b t d), k and v of past and present.

        QK-norm brings each q and k to mean zero and unit variance (Dehghani et al. 2023, arXiv 2302.05442), so that scores
        cannot blow up.
        """
        q, k, v = self.project(x, turn)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        t, s = q.shape[2], k.shape[2]
        mask = causal_mask(t, s, x.device) if self.causal and 1 < t < s else None  # one new place may look at everything
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal and t == s > 1
        )
        return self.out(merge_heads(y)), (k, v)

    def project(self, x: Tensor, turn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(b t d) -> q, k, v (b h t c), normed and turned as the options say."""
        qkv = rearrange(self.qkv(x), "b t (three h c) -> three b h t c", three=3, h=self.heads)
        qk, v = qkv.split([2, 1])  # q and k go through norm and turn together
        if self.qk_norm:
            qk = F.layer_norm(qk, (qk.shape[-1],))
        if turn is not None:
            qk = rotate(qk, turn)
        return *qk.unbind(), v.squeeze(0)

    def look(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """(b t d) -> (b h t s): the weights that `forward` averages with, to look at."""
        q, k, _ = self.project(x, turn)
        return weights(q, k, causal=self.causal)


class MLP(nn.Module):
    """(b t d) -> (b t d): widen, bend, narrow; each place on its own."""

    def __init__(self, width: int, *, inner: int | None = None, activation="gelu", bias=True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.activation = activation
        self.up = nn.Linear(width, inner or 4 * width, bias=bias)
        self.out = nn.Linear(inner or 4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b t d) -> (b t d)"""
        return self.out(ACTIVATIONS[self.activation](self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): the pre-norm block of GPT-2."""

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
        self.norm_attention = make_norm(norm, width, bias=bias, eps=eps)
        self.attention = Attention(width, heads, causal=causal, qk_norm=qk_norm, bias=bias, dropout=attention_dropout)
        self.norm_mlp = make_norm(norm, width, bias=bias, eps=eps)
        self.mlp = MLP(width, inner=inner, activation=activation, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past=None, turn: Tensor | None = None, gains: Tensor | None = None):
        """(b t d) -> (b t d), and the keys and values for next time. `gains` (2 d) scale what attention and MLP see."""
        y, past = self.attention(scale(self.norm_attention(x), gains, 0), past, turn)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(scale(self.norm_mlp(x), gains, 1))), past


def scale(x: Tensor, gains: Tensor | None, i: int) -> Tensor:
    """(... d), (2 d) or None -> (... d): by the i-th gain, if there are any."""
    return x if gains is None else x * gains[i]


def leading(true: Tensor) -> int:
    """(b t) of bool -> how many places from the left are True in every row."""
    return int(true.all(0).long().cumprod(0).sum())


def init_gpt2(model: nn.Module, layers: int) -> None:
    """Normal with deviation 0.02, biases zero; what adds to the residual stream is smaller by sqrt(2 layers) (GPT-2, section 2.3)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = name.endswith(".out")
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def init_fan_in(model: nn.Module) -> None:
    """Normal with deviation 1/sqrt(fan in); what adds to the residual stream starts at zero, so each block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(".out"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
