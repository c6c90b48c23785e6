"""Moving features over the process group with gradients that are right for any world size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """`(rank, world size)` of the default process group; `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """All-gather along the first axis whose backward sums every rank's gradient for this rank's block."""

    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        return gather_rows(local)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return sum_own_rows(gradients[0])


def all_gather(local: Tensor) -> Tensor:
    """Rows of every rank in rank order: `[n, D]` → `[world_size * n, D]`, differentiable.

    The gradient of a rank's rows is the sum over ranks of the gradients of their losses, so after the usual averaging
    of parameter gradients over ranks a mean of rank losses has exactly the gradient of the global loss.
    """
    _, world_size = world()
    return local if world_size == 1 else _AllGather.apply(local)


def gather_rows(local: Tensor) -> Tensor:
    """As `all_gather`, of any dtype and without a gradient: `[n, …]` → `[world_size * n, …]`."""
    _, world_size = world()
    if world_size == 1:
        return local
    rows = local.new_empty(world_size * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(rows, local.contiguous())
    return rows


def sum_own_rows(rows: Tensor) -> Tensor:
    """Sum over ranks, of which each keeps its own block: `[world_size * n, …]` → `[n, …]`, without a gradient."""
    _, world_size = world()
    if world_size == 1:
        return rows
    own = rows.new_empty(rows.shape[0] // world_size, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


def log_sum_exp(local: Tensor) -> Tensor:
    """Elementwise log of the sum over ranks of `exp(local)`, without a gradient; finite on some rank."""
    _, world_size = world()
    if world_size == 1:
        return local
    peak = local.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    total = (local - peak).exp_()
    dist.all_reduce(total)
    return total.log_().add_(peak)


def pass_right(blocks: list[Tensor]) -> list[Tensor]:
    """One hop round the ring of ranks: send `blocks` to the next rank, return those of the rank before."""
    rank, world_size = world()
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    sent = [block.contiguous() for block in blocks]
    received = [torch.empty_like(block) for block in sent]
    # With two ranks both neighbours are the same one; tags keep the blocks apart.
    sends = [dist.P2POp(dist.isend, block, right, tag=tag) for tag, block in enumerate(sent)]
    receives = [dist.P2POp(dist.irecv, block, left, tag=tag) for tag, block in enumerate(received)]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    return received


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        return gather_rows(local[None]).mean(dim=0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def mean_over_ranks(local: Tensor) -> Tensor:
    """Mean over ranks, the same bits on every rank, of a loss whose gradients the ranks average: `[…]` → `[…]`.

    The gradient passes as if the rank's own value had been returned, for the ranks' average is taken of parameters.
    """
    return local if world()[1] == 1 else _MeanOverRanks.apply(local)
