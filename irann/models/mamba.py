"""Mamba: a left-to-right model whose whole past fits into a state of fixed size.

Paper: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3.4
and figure 3; the scan itself is `irann.core.scan`. With its defaults the model computes exactly what transformers'
`MambaForCausalLM` computes. Every block is the same, there is no attention, no MLP and no notion of position:

    norm -> widen -> short convolution -> SiLU -> selective scan -> gate -> narrow -> add

| part        | shape              | what it decides                                                              |
|-------------|--------------------|------------------------------------------------------------------------------|
| widen       | d -> 2 e           | the signal and its gate                                                      |
| convolution | e, 4 places        | what the last few characters say together                                    |
| choose      | e -> rank + 2 n    | from each character: how fast to forget, B what to write, C what to read     |
| pace        | rank -> e          | delta, the step size of each channel; softplus keeps it positive             |
| log_A       | e n                | A = -exp(log_A): each channel forgets at n different rates                   |
| D           | e                  | what passes by the state                                                     |
| out         | e -> d             | back into the stream                                                         |

Ours beside the paper: `init="fan_in"` and `tied=False`, as in this book's other models; dropout.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.scan import selective_scan, step
from ..layers import ACTIVATIONS, init_fan_in, make_norm
from ..lm import PIECE, Reader
from ..settings import Checked, field


@dataclass(frozen=True)
class MambaConfig(Checked):
    """Sizes and options; the defaults are the paper's choices at a size for two CPU cores."""

    vocabulary: int = field(65, "different characters", low=1)
    window: int = field(256, "characters seen at once; matters in training only", low=1)
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
    def fast(cls, **sizes) -> "MambaConfig":
        """The options that train better at this size, all at once."""
        return replace(cls(tied=False, init="fan_in"), **sizes)


class Memory(NamedTuple):
    """All that a layer remembers, whatever was read: the inputs its convolution still needs, its state, its last pace."""

    tail: Tensor  # (b taps-1 e)
    h: Tensor  # (b e n)
    delta: Tensor  # (b e)


class State(NamedTuple):
    """What `read` hands on: each layer's memory and, once single characters are read, each layer's weights laid out for that."""

    layers: list[Memory]
    ready: list[tuple] | None


class Mixer(nn.Module):
    """The selective state space between its gate and its convolution."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        c = config
        self.inner, self.state, self.rank = (
            c.d_inner or 2 * c.width,
            c.d_state,
            c.dt_rank or math.ceil(c.width / 16),
        )
        self.activation = ACTIVATIONS[c.activation]
        self.in_proj = nn.Linear(c.width, 2 * self.inner, bias=c.bias)
        self.in_proj.stacked = 2  # two matrices on top of each other; Muon treats each on its own
        self.conv1d = nn.Conv1d(
            self.inner, self.inner, c.d_conv, groups=self.inner, bias=c.conv_bias
        )
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(
            torch.arange(1.0, c.d_state + 1).log().repeat(self.inner, 1)
        )  # A = -1, -2, ..., -n: S4D-real
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, c.width, bias=c.bias)

    @torch.no_grad()
    def init_dt(self, low: float = 1e-3, high: float = 0.1):
        """delta starts log-uniform in [low, high] (section 3.6): some channels count single characters, some whole lines."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        delta = torch.empty_like(self.dt_proj.bias).uniform_(math.log(low), math.log(high)).exp()
        self.dt_proj.bias.copy_(delta + (-torch.expm1(-delta)).log())  # softplus undone

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(b t d) -> (b t d), and what to remember."""
        x, gate, tail = self.enter(x, memory and memory.tail)
        delta, B, C = self.select(x)
        y, h = selective_scan(
            x, delta, -torch.exp(self.A_log), B, C, self.D, state=memory and memory.h
        )
        return self.out_proj(y * F.silu(gate)), Memory(tail, h, delta[:, -1].clone())

    def enter(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(b t d), (b taps-1 e) -> (b t e), (b t e), (b taps-1 e): the signal after its convolution, its gate, the new tail."""
        x, gate = self.in_proj(x).chunk(2, -1)
        before = self.conv1d.kernel_size[0] - 1
        x = torch.cat([x.new_zeros(len(x), before, self.inner) if tail is None else tail, x], 1)
        tail = x[
            :, x.shape[1] - before :
        ].clone()  # a copy, or the view would keep the whole text alive
        return self.activation(self.conv1d(x.mT).mT), gate, tail

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(... e) -> (... e), (... n), (... n): delta, B and C, each character's own."""
        delta, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        return F.softplus(self.dt_proj(delta)), B, C


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = make_norm("rms", config.width, eps=config.eps)
        self.mixer = Mixer(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(b t d) -> (b t d), and what to remember."""
        y, memory = self.mixer(self.norm(x), memory)
        return x + self.dropout(y), memory

    def ready(self) -> tuple:
        """-> the weights as `write` wants them: what is the same for every character is computed once."""
        m = self.mixer
        cuts = [m.rank, m.state, m.state]
        shape, gain, eps = self.norm.normalized_shape, self.norm.weight, self.norm.eps
        linear = [(part.weight, part.bias) for part in (m.in_proj, m.x_proj, m.dt_proj, m.out_proj)]
        taps, bias = m.conv1d.weight.squeeze(1).T.contiguous(), m.conv1d.bias
        return shape, gain, eps, *linear, taps, bias, m.activation, cuts, -torch.exp(m.A_log), m.D


def write(ready: tuple, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """(b d) -> (b d), and the memory: `Block.forward` for one character, in as few calls as it takes."""
    shape, gain, eps, widen, choose, pace, out, taps, bias, activation, cuts, A, D = ready
    u, gate = F.linear(F.rms_norm(x, shape, gain, eps), *widen).chunk(2, -1)
    seen = torch.cat([memory.tail, u.unsqueeze(1)], 1)
    u = (seen * taps).sum(1)
    u = activation(u if bias is None else u + bias)
    delta, B, C = F.linear(u, *choose).split(cuts, -1)
    delta = F.softplus(F.linear(delta, *pace))
    inputs = u, delta, A, B, C, D
    if memory.h.dtype != x.dtype:  # half precision keeps its state in float32
        inputs = (v.to(memory.h.dtype) for v in inputs)
    y, h = step(*inputs, memory.h)
    return x + F.linear(y.to(x.dtype) * F.silu(gate), *out), Memory(seen[:, 1:], h, delta)


class Mamba(Reader):
    """Characters to logits: embed, a stack of blocks, norm, head."""

    max_context = None  # the state never fills up
    no_decay = ("A_log", ".D")

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocabulary, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_f = make_norm("rms", config.width, eps=config.eps)
        self.lm_head = (
            None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        )
        if config.init == "fan_in":
            init_fan_in(self)
        else:
            nn.init.normal_(self.embeddings.weight, std=0.02)
        for block in self.layers:
            block.mixer.init_dt()
            if config.init == "mamba":
                with torch.no_grad():
                    block.mixer.out_proj.weight /= math.sqrt(
                        config.layers
                    )  # as the published code, after GPT-2

    def read(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(b t), state -> (b t v), state: each block's `Memory`, of the same size after any number of characters.

        Without gradients a long text is read in pieces, so that only its logits grow with it.
        """
        if ids.shape[1] > PIECE and not torch.is_grad_enabled():
            logits = []
            for piece in ids.split(PIECE, 1):
                more, state = self.read(piece, state)
                logits.append(more)
            return torch.cat(logits, 1), state
        if ids.shape[1] == 0:
            return self.embeddings.weight.new_zeros(len(ids), 0, self.config.vocabulary), state
        before, ready, after = *(state or ([None] * len(self.layers), None)), []
        if state and ids.shape[1] == 1 and not self.training:
            ready = ready or [block.ready() for block in self.layers]
            x = self.embeddings(ids[:, 0])
            for weights, memory in zip(ready, before, strict=True):
                x, memory = write(weights, x, memory)
                after.append(memory)
            x = x.unsqueeze(1)
        else:
            x = self.drop(self.embeddings(ids))
            for block, memory in zip(self.layers, before, strict=True):
                x, memory = block(x, memory)
                after.append(memory)
        return F.linear(
            self.norm_f(x), self.embeddings.weight if self.lm_head is None else self.lm_head.weight
        ), State(after, ready)

    def notes(self, state: State) -> dict:
        """The mean pace at the last character: near 0 it was let pass, large it was written and older things made room."""
        return (
            {"delta": torch.stack([memory.delta for memory in state.layers]).mean().item()}
            if state
            else {}
        )

    @torch.no_grad()
    def inspect(self, ids: Tensor) -> dict[str, Tensor]:
        """(1 t) -> `delta` (t): the mean pace at each character, how much of the state it rewrites."""
        x, paces = self.embeddings(self.check_ids(ids)), []
        for block in self.layers:
            signal, _, _ = block.mixer.enter(block.norm(x))
            paces.append(block.mixer.select(signal)[0][0].mean(-1))
            x, _ = block(x)
        return {"delta": torch.stack(paces).mean(0)}

    @classmethod
    def from_transformers(cls, source: Any, *, window: int = 1024) -> "Mamba":
        """A `MambaForCausalLM`, or a name or folder that transformers resolves -> the same model in this book's form.

        Its config knows no window; `window` is the length in which ours is then evaluated and trained.
        """
        from .interop import mamba_from_transformers

        return mamba_from_transformers(source, window=window)
