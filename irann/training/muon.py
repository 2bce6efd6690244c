"""Muon: momentum whose every step is made orthogonal, for the matrices inside a network.

Jordan et al. 2024, "Muon: an optimizer for hidden layers", with the step size of Liu et al. 2025
(arXiv 2502.16982, eq. 4), which gives an update the size that AdamW's would have. torch has a Muon
too; it works in bfloat16, which CPUs without bfloat16 units do thirty times slower, and one matrix
after the other. This one works in float32, on all matrices of one shape at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """(k m n) -> (k m n): nearly the closest matrices with all singular values one, by a quintic
    Newton-Schulz iteration.

    The coefficients rise steeply at zero rather than converge: singular values end between 0.7 and
    1.2 (Jordan et al.).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, each matrix's update orthogonalised; decoupled weight decay.

    A parameter group may say `stacked`: how many matrices lie on top of each other in each of its
    parameters (a fused q, k and v is three). Each is orthogonalised on its own.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights. A closure computes the gradients first -> its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                stacked = group["stacked"]
                for weight, part in zip(p.chunk(stacked), update.chunk(stacked), strict=True):
                    by_shape.setdefault(part.shape, []).append((weight, part))
            for shape, pairs in by_shape.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                weights, parts = zip(*pairs)
                for weight, update in zip(weights, orthogonalise(torch.stack(parts)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)
        return loss
