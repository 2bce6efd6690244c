"""What tests of several files make and do."""

import torch


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(b: int, t: int, v: int = 65, seed: int = 0) -> torch.Tensor:
    return torch.randint(v, (b, t), generator=rng(seed))
