"""Collecting features over the process group with gradients that are right for any world size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """`(rank, world size)` of the default process group; `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """All-gather along the first axis whose backward sums every rank's gradient for this rank's block."""

    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        rank, world_size = world()
        context.rows = (rank * local.shape[0], (rank + 1) * local.shape[0])
        blocks = [torch.empty_like(local) for _ in range(world_size)]
        dist.all_gather(blocks, local.contiguous())
        return torch.cat(blocks)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter; the sum of all and a slice is the same.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first, last = context.rows
        return total[first:last]


def all_gather(local: Tensor) -> Tensor:
    """Rows of every rank in rank order: `[n, D]` → `[world_size * n, D]`, differentiable.

    The gradient of a rank's rows is the sum over ranks of the gradients of their losses, so after the usual averaging
    of parameter gradients over ranks a mean of rank losses has exactly the gradient of the global loss.
    """
    _, world_size = world()
    return local if world_size == 1 else _AllGather.apply(local)
