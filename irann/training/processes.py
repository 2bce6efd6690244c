"""One process, or several training one model (torchrun): who am I, and what do all of us say."""

from typing import Any

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """-> the number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: Any) -> list[Any]:
    """-> every process's value, by rank."""
    _, world = rank_and_world()
    everyone = [value] * world
    if world > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def summed(values: list[float]) -> list[float]:
    """-> each value, added up over the processes."""
    return [sum(column) for column in zip(*gathered(values), strict=True)]
