"""Memory of batches: it is used again when nothing made of the tensor is left, and never before."""

from __future__ import annotations

import pytest
import torch

from dermray.ingest.memory import BatchMemory


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device torch's own allocator keeps the memory")
def test_memory_comes_again_once_the_last_view_is_gone() -> None:
    memory = BatchMemory()
    first = memory.empty((2, 3))
    address, view = first.data_ptr(), first.permute(1, 0)[1:]
    del first
    assert memory.empty((2, 3)).data_ptr() != address
    view.fill_(7)
    others = [memory.empty((2, 3)) for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    assert view.tolist() == [[7, 7], [7, 7]]
    del view
    assert memory.empty((3, 2)).data_ptr() == address


def test_another_size_gets_other_memory() -> None:
    memory = BatchMemory()
    memory.empty((4,))
    larger = memory.empty((5, 2))
    assert larger.shape == (5, 2)
    assert larger.dtype == torch.uint8
    larger.fill_(1)
    assert larger.sum() == 10
