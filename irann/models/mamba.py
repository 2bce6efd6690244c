"""Mamba: a left-to-right model whose whole past fits into a state of fixed size.

Paper: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv
2312.00752), section 3.4 and figure 3; the scan itself is `irann.core.scan`. With its defaults the
model computes exactly what transformers' `MambaForCausalLM` computes, and its parameters have the
names of that checkpoint. Every block is the same; there is no attention, no MLP and no embedding
of positions:

    norm -> in_proj -> conv1d -> SiLU -> x_proj, dt_proj -> scan -> gate -> out_proj -> add

| parameter | shape               | what it decides                               |
|-----------|---------------------|-----------------------------------------------|
| in_proj   | d -> 2 e            | the signal u and its gate                     |
| conv1d    | e, d_conv positions | what the last characters say together         |
| x_proj    | e -> dt_rank + 2 n  | step size, B what to write, C what to read    |
| dt_proj   | dt_rank -> e        | delta, each channel's step size; softplus > 0 |
| A_log     | e n                 | A = -exp(A_log): n rates of forgetting        |
| D         | e                   | what passes by the state                      |
| out_proj  | e -> d              | back into the residual stream                 |

Ours beside the paper: `init="fan_in"` and `tied=False`, as in this book's other models; dropout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..core.scan import selective_scan, step
from ..layers import ACTIVATIONS, StackedLinear, init_fan_in
from ..lm import READ_AT_ONCE, Ids, Reader, check_settings, evaluating
from ..settings import Checked, field


@dataclass(frozen=True)
class MambaConfig(Checked):
    """Sizes and options; the defaults are the paper's choices at a size for two CPU cores."""

    vocabulary: int = field(65, "different characters", low=1)
    window: int = field(256, "characters seen at once in training and evaluation", low=1)
    layers: int = field(4, "Mamba blocks", low=1)
    width: int = field(128, "of the residual stream", low=1)
    d_inner: int | None = field(None, "inner width, e; null: twice `width`", low=1, kind=int)
    d_state: int = field(16, "of the state space, n", low=1)
    d_conv: int = field(4, "positions that the convolution looks at", low=1)
    dt_rank: int | None = field(
        None, "of delta's map; null: a sixteenth of `width`, rounded up", low=1, kind=int
    )
    dropout: float = field(0.0, "of the residual stream's updates", low=0.0, high=1.0)
    bias: bool = field(False, "biases in in_proj and out_proj")
    conv_bias: bool = field(True, "a bias in the convolution")
    activation: str = field("silu", "after the convolution", choices=tuple(ACTIVATIONS))
    eps: float = field(1e-5, "of the norms", low=0.0)
    tied: bool = field(True, "one matrix for reading and writing characters")
    init: str = field("mamba", "how weights begin", choices=("mamba", "fan_in"))

    @classmethod
    def fast(cls, **sizes: Any) -> "MambaConfig":
        """The options that train better at this size, all at once."""
        return replace(cls(tied=False, init="fan_in"), **sizes)


class LayerState(NamedTuple):
    """All that a layer remembers, whatever was read."""

    conv_state: Float[Tensor, "b d_conv-1 e"]  # the inputs that the convolution still needs
    ssm_state: Float[Tensor, "b e n"]  # h of the recurrence
    delta: Float[Tensor, "b e"]  # the step size of the last character


Update = tuple[Float[Tensor, "b t d"], LayerState]


class Mixer(nn.Module):
    """The selective state space between its convolution and its gate."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.d_inner = config.d_inner or 2 * config.width
        self.dt_rank = config.dt_rank or math.ceil(config.width / 16)
        # delta, B, C in what x_proj gives
        self.split = [self.dt_rank, config.d_state, config.d_state]
        self.activation = ACTIVATIONS[config.activation]
        e = self.d_inner
        self.in_proj = StackedLinear(config.width, 2 * e, stacked=2, bias=config.bias)  # u, gate
        self.conv1d = nn.Conv1d(e, e, config.d_conv, groups=e, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, e)
        s4d_real = torch.arange(1.0, config.d_state + 1)  # A = -1, -2, ..., -n in every channel
        self.A_log = nn.Parameter(s4d_real.log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def init_dt(self) -> None:
        """delta starts log-uniform in [0.001, 0.1], as in the published code (the paper, section
        3.6, says uniform): some channels count single characters, some whole lines.
        """
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        delta = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_proj.bias.copy_(delta + (-torch.expm1(-delta)).log())  # softplus undone

    def forward(self, x: Float[Tensor, "b t d"], state: LayerState | None = None) -> Update:
        if state and x.shape[1] == 1 and not (self.training or torch.is_grad_enabled()):
            return self.step(x, state)
        u, gate, conv_state = self.convolve(x, state.conv_state if state else None)
        delta, B, C = self.select(u)
        ssm_state = state.ssm_state if state else None
        A = -torch.exp(self.A_log)
        y, ssm_state = selective_scan(u, delta, A, B, C, self.D, state=ssm_state)
        after = LayerState(conv_state, ssm_state, delta[:, -1].clone())
        return self.dropout(self.out_proj(y * F.silu(gate))), after

    def step(self, x: Float[Tensor, "b 1 d"], state: LayerState) -> Update:
        """`forward` for one more character, without gradients: its calls are most of its time."""
        u, gate = self.in_proj(x).chunk(2, -1)
        inputs = torch.cat([state.conv_state, u], 1)
        conv = self.conv1d
        u = (inputs * conv.weight.squeeze(1).T).sum(1)
        u = self.activation(u if conv.bias is None else u.add_(conv.bias))
        delta, B, C = self.select(u)
        A = torch.exp(self.A_log).neg_()
        y, ssm_state = step(u, delta, A, B, C, self.D, state.ssm_state)
        y = self.out_proj(y.unsqueeze(1).mul_(F.silu(gate)))
        return y, LayerState(inputs[:, 1:], ssm_state, delta)

    def convolve(
        self, x: Float[Tensor, "b t d"], conv_state: Float[Tensor, "b before e"] | None = None
    ) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b t e"], Float[Tensor, "b before e"]]:
        """u after its convolution, the gate, and the new conv_state."""
        u, gate = self.in_proj(x).chunk(2, -1)
        t = u.shape[1]
        weight = self.conv1d.weight.to(u.dtype)
        bias = self.conv1d.bias
        before = weight.shape[-1] - 1
        earlier = u.new_zeros(len(u), before, self.d_inner) if conv_state is None else conv_state
        inputs = torch.cat([earlier, u], 1)
        conv_state = inputs[:, t:].clone()  # a view would keep the whole text alive
        u = inputs.new_zeros(self.d_inner) if bias is None else bias.to(inputs.dtype)
        for k, w in enumerate(weight.squeeze(1).unbind(-1)):  # conv1d, without turning the text
            u = torch.addcmul(u, inputs[:, k : k + t], w)
        return self.activation(u), gate, conv_state

    def select(
        self, u: Float[Tensor, "b *t e"]
    ) -> tuple[Float[Tensor, "b *t e"], Float[Tensor, "b *t n"], Float[Tensor, "b *t n"]]:
        """delta, B and C, each character's own (algorithm 2)."""
        delta, B, C = self.x_proj(u).split_with_sizes(self.split, -1)
        delta = self.dt_proj(delta)
        if not torch.is_grad_enabled():  # a CPU takes ten times as long for steps below e^-28,
            delta = delta.clamp_(min=-28.0)  # which is already less than float32 can add to 1
        return F.softplus(delta), B, C


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.mixer = Mixer(config)

    def forward(self, x: Float[Tensor, "b t d"], state: LayerState | None = None) -> Update:
        y, after = self.mixer(self.norm(x), state)
        return x + y, after


class Mamba(Reader):
    """Characters to logits: embed, a stack of blocks, norm, head."""

    no_decay = ("A_log", ".D")

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocabulary, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_f = nn.RMSNorm(config.width, eps=config.eps)
        self.lm_head = (
            None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        )
        if config.init == "fan_in":
            init_fan_in(self)
        else:
            nn.init.normal_(self.embeddings.weight, std=0.02)
        for block in self.blocks:
            block.mixer.init_dt()
            if config.init == "mamba":  # as the published code, after GPT-2
                with torch.no_grad():
                    block.mixer.out_proj.weight /= math.sqrt(config.layers)

    @property
    def blocks(self) -> Iterator[Block]:
        return iter(self.layers)  # pyright: ignore[reportReturnType]

    @property
    def max_context(self) -> None:
        """The state never fills up."""

    def read(
        self, ids: Ids, state: list[LayerState] | None = None
    ) -> tuple[Float[Tensor, "b t v"], list[LayerState] | None]:
        """Logits, and each layer's state, of the same size after any number of characters.

        Without gradients a long text is read in pieces, so that only its logits grow with it.
        """
        if ids.shape[1] == 0:
            return self.embeddings.weight.new_zeros(len(ids), 0, self.config.vocabulary), state
        if not torch.is_grad_enabled() and ids.shape[1] > READ_AT_ONCE:
            logits = []
            for piece in ids.split(READ_AT_ONCE, 1):
                more, state = self.read(piece, state)
                logits.append(more)
            return torch.cat(logits, 1), state
        x = self.drop(self.embeddings(ids))
        after = []
        for block, layer in zip(self.blocks, state or [None] * len(self.layers), strict=True):
            x, layer = block(x, layer)
            after.append(layer)
        head = self.embeddings if self.lm_head is None else self.lm_head
        return F.linear(self.norm_f(x), head.weight), after

    def notes(self, state: list[LayerState] | None) -> dict:
        """Each row's mean step size at its last character: near 0 it was let pass."""
        if state is None:
            return {}
        delta = torch.stack([layer.delta for layer in state])
        return {"delta": delta.mean((0, 2)).tolist()}

    @torch.no_grad()
    def inspect(
        self, ids: Integer[Tensor, "1 t"], *, generator: Generator | None = None, **settings: Any
    ) -> dict[str, Tensor]:
        """`delta` (t): the mean step size of each character, how much of the state it rewrites."""
        check_settings(self, settings, sampling=False)
        x = self.embeddings(self.check_ids(ids))
        if not x.shape[1]:
            return {"delta": x.new_zeros(0)}
        deltas = []
        with evaluating(self, ids.numel()):
            for block in self.blocks:
                delta, _, _ = block.mixer.select(block.mixer.convolve(block.norm(x))[0])
                deltas.append(delta[0].mean(-1))
                x, _ = block(x)
        return {"delta": torch.stack(deltas).mean(0)}

    @classmethod
    def from_transformers(cls, source: Any, *, window: int = 1024) -> "Mamba":
        """A `MambaForCausalLM`, or a name or folder for transformers -> the same model as ours.

        Its config knows no window; `window` is the length in which ours is then evaluated and
        trained. Raises InputError for another class, or an activation that is not one of ours.
        """
        from .interop import mamba_from_transformers

        return mamba_from_transformers(source, window=window)

    def to_transformers(self) -> Any:
        """-> the same model as a `MambaForCausalLM`, which save_pretrained writes to a folder.
        Raises InputError for an inner width that is no multiple of the width.
        """
        from .interop import mamba_to_transformers

        return mamba_to_transformers(self)
