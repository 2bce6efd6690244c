"""How to train: every number of it in one place, and the optimizers that follow from it."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..lm import LanguageModel
from ..settings import Checked, InputError, field
from .muon import Muon


@dataclass(frozen=True)
class Recipe(Checked):
    """How to train. `lr` is AdamW's; optimizer="muon" gives hidden matrices Muon, at `muon_lr`.

    By `seed` the command line draws the weights, too; in Python that is `irann.build(..., seed=)`.
    """

    steps: int = field(1000, "of the optimizer", low=1, high=2**62)
    batch: int = field(8, "windows of a step, over all processes", low=1, high=2**62)
    accumulate: int = field(1, "pieces that a step's batch is computed in", low=1, high=2**62)
    optimizer: str = field("adamw", "what makes updates of gradients", choices=("adamw", "muon"))
    lr: float = field(3e-3, "full learning rate of AdamW", low=0.0)
    beta1: float = field(0.9, "AdamW's memory of the gradient", low=0.0, below=1.0)
    beta2: float = field(0.99, "AdamW's memory of the gradient's square", low=0.0, below=1.0)
    muon_lr: float = field(0.02, "full learning rate of Muon", low=0.0)
    momentum: float = field(0.95, "Muon's memory of the gradient", low=0.0, below=1.0)
    weight_decay: float = field(0.1, "of matrices; times the learning rate", low=0.0)
    clip: float = field(1.0, "largest norm of the gradient; 0: any", low=0.0)
    warmup: int = field(20, "steps in which the learning rate rises", low=0, high=2**62)
    lr_schedule: str = field(
        "linear",
        "how the learning rate falls after the warm-up",
        choices=("linear", "cosine", "constant"),
    )
    final_lr_factor: float = field(
        0.0, "what the learning rate falls towards, over the full", low=0.0, high=1.0
    )
    ema_decay: float = field(
        0.0, "of the weights' exponential moving average; 0: none", low=0.0, high=1.0
    )
    evaluate_every: int = field(0, "steps; 0: only at the end", low=0, high=2**62)
    save_every: int = field(0, "steps; every evaluation saves, too", low=0, high=2**62)
    precision: str = field(
        "float32",
        "bfloat16: mixed, for processors with bfloat16 units",
        choices=("float32", "bfloat16"),
    )
    compile: bool = field(False, "torch.compile, for GPUs")
    seed: int = field(1337, "of weights, windows and noise", low=0, high=2**62)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.accumulate:
            raise InputError(
                f"a batch of {self.batch} cannot be computed in {self.accumulate} equal parts"
            )

    def lr_factor(self, step: int) -> float:
        """-> what a step (from 0) multiplies the full learning rate by: warm-up, then decay."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        remaining = {
            "linear": 1 - done,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
            "constant": 1.0,
        }
        return self.final_lr_factor + (1 - self.final_lr_factor) * remaining[self.lr_schedule]


def optimizers(model: LanguageModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of linear layers and AdamW for the others, and for heads:
    modules whose name ends with head, with all that is in them.

    Weight decay is for what has two axes or more (so for a thinker's gains by round and channel,
    too); vectors and what `model.no_decay` names go without. Frozen parameters are left out.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden: dict[int, list[nn.Parameter]] = {}
    if recipe.optimizer == "muon":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not in_head(name):
                weight = trained.pop(f"{name}.weight", None)
                if weight is not None:
                    hidden.setdefault(getattr(module, "stacked", 1), []).append(weight)
    decayed = [p for n, p in trained.items() if p.ndim >= 2 and not n.endswith(model.no_decay)]
    spared = [p for n, p in trained.items() if p.ndim < 2 or n.endswith(model.no_decay)]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    if groups:
        betas = (recipe.beta1, recipe.beta2)
        made.append(torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True))
    if hidden:
        stacks = [{"params": weights, "stacked": k} for k, weights in hidden.items()]
        options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        made.append(Muon(stacks, lr=recipe.muon_lr, **options))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def in_head(name: str) -> bool:
    return any(part.endswith("head") for part in name.split("."))
