"""Memory of batches, used again once nobody holds the batch that had it.

A batch of pixels is some tens of megabytes. Memory fresh from the system has to be cleared page by page, which takes
longer than filling it.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BatchMemory:
    """Makes uint8 tensors; page-locked ones where there is a CUDA device, so that copies to it run beside its work.

    One thread makes them; they may be let go anywhere.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """uint8 of a shape, in memory that no living tensor has; the content is undefined."""
        if torch.cuda.is_available():
            # torch's allocator keeps freed memory, and waits for the copies that still read it.
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        while self._free and self._free[-1].size != size:
            self._free.pop()
        block = self._free.pop() if self._free else np.empty(size, dtype=np.uint8)
        shaped = block.reshape(shape)
        # The tensor holds `shaped`, and whatever is made of the tensor holds its storage.
        weakref.finalize(shaped, self._free.append, block).atexit = False
        return torch.from_numpy(shaped)
