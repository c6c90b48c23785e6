"""Memory of batches, used again once nobody holds the batch that had it.

A batch of pixels is some tens of megabytes. Memory fresh from the system has to be cleared page by page, which takes
longer than filling it.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BatchMemory:
    """Makes tensors; page-locked ones where there is a CUDA device, so that copies to it run beside its work.

    One thread makes them; they may be let go anywhere.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[npt.NDArray[np.uint8]]] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """In memory that no living tensor has; the content is undefined.

        Args:
            name: of the array; what had another size under this name is given back to the system.
        """
        size = math.prod(shape) * dtype.itemsize
        if torch.cuda.is_available():
            # torch's allocator keeps freed memory, and waits for the copies that still read it.
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            return pinned.view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
        free = self._free.setdefault(name, [])
        while free and free[-1].size != size:
            free.pop()
        block = free.pop() if free else np.empty(size, dtype=np.uint8)
        shaped = block.view(dtype).reshape(shape)
        # The tensor holds `shaped`, and whatever is made of the tensor holds its storage.
        weakref.finalize(shaped, free.append, block).atexit = False
        return torch.from_numpy(shaped)
