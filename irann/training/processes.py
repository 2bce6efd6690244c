"""One process, or several that train one model together (torchrun): who am I, and what do all of us say."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """-> the number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(values: list[float], device: torch.device) -> list[float]:
    """-> each value, added up over the processes."""
    if rank_and_world()[1] == 1:
        return values
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def add_up(tensors: list[Tensor]) -> None:
    """Add each tensor up over the processes, in place."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(value: int, device: torch.device) -> int:
    """-> the largest value of any process, so that all do the same."""
    if rank_and_world()[1] == 1:
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def gathered(value: dict) -> list[dict]:
    """-> every process's value, by rank."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    everyone: list = [None] * world
    dist.all_gather_object(everyone, value)
    return everyone
