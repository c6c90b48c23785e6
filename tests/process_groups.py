"""Functions run by several real gloo processes, whose answers come back to the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[[int, int], Any], world_sizes: tuple[int, ...], folder: Path
) -> dict[int, list[dict[str, Any]]]:
    """What `function(rank, world_size)` returned on each rank of each world: a dictionary of tensors and numbers.

    Processes are slow to start, so the worlds follow each other in the same ones.

    Args:
        function: importable by name; runs inside a process group, with one thread.
        folder: empty, for the rendezvous and the answers.
    """
    mp.spawn(_rank, args=(function, world_sizes, str(folder)), nprocs=max(world_sizes))
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for size in world_sizes
    }


def _rank(rank: int, function: Callable[[int, int], Any], world_sizes: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    for size in (size for size in world_sizes if rank < size):
        dist.init_process_group("gloo", init_method=f"file://{folder}/world-{size}", rank=rank, world_size=size)
        torch.save(function(rank, size), f"{folder}/{size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
