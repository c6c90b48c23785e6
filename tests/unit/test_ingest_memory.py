"""Memory of batches: it is used again when nothing made of the tensor is left, and never before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dermray.ingest.memory import BatchMemory


def uint8(memory: BatchMemory, shape: tuple[int, ...]) -> torch.Tensor:
    return memory.empty("pixels", shape, np.dtype(np.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device torch's own allocator keeps the memory")
def test_memory_comes_again_once_the_last_view_is_gone() -> None:
    memory = BatchMemory()
    first = uint8(memory, (2, 3))
    address, view = first.data_ptr(), first.permute(1, 0)[1:]
    del first
    assert uint8(memory, (2, 3)).data_ptr() != address
    view.fill_(7)
    others = [uint8(memory, (2, 3)) for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    assert view.tolist() == [[7, 7], [7, 7]]
    del view
    assert uint8(memory, (3, 2)).data_ptr() == address


def test_another_size_gets_other_memory() -> None:
    memory = BatchMemory()
    uint8(memory, (4,))
    larger = uint8(memory, (5, 2))
    assert larger.shape == (5, 2)
    assert larger.dtype == torch.uint8
    larger.fill_(1)
    assert larger.sum() == 10
    scores = memory.empty("scores", (5, 2), np.dtype(np.float32))
    assert scores.shape == (5, 2)
    assert scores.dtype == torch.float32
