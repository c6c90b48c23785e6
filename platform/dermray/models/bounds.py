"""What a folder's configuration asks for, held against the weights beside it before it costs memory or time.

A configuration of a few bytes may describe 200,000 layers. Each parameter is counted as its module is put together, so
that what the weights can never fill ends there, whatever the library that builds it calls its sizes.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from dermray.errors import ModelError

# Ids in a vocabulary, positions: the largest that are published have a quarter of a million, some a million.
MAX_NUMBER = 1 << 24
# What a library makes lists of before it builds anything: layers, texts, and labels (ImageNet-21k has 21,843).
MAX_PARTS = 100_000
NAMES_OF_PARTS = ("layer", "depth", "block", "stage", "label", "class", "length")
# One tensor of the weights may fill three of the model (queries, keys, values), and a head or a pooler be left out.
PARTS_PER_TENSOR, MORE_PARTS = 4, 256
VALUES_PER_VALUE, MORE_VALUES = 2, 1 << 23

M = TypeVar("M")


def require_sizes(config: Mapping[str, Any], *, source: str) -> None:
    """Refuse numbers of a configuration, JSON values, that no model has.

    Args:
        source: what to call it in an error.

    Raises:
        ModelError: one is too large; names its key.
    """
    for key, value in config.items():
        limit = MAX_PARTS if any(name in key.lower() for name in NAMES_OF_PARTS) else MAX_NUMBER
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and abs(one) > limit:
                raise ModelError(f"{source} has {key[:40]}={str(one)[:20]}; at most {limit:,} can be")
            if isinstance(one, Mapping):
                require_sizes(one, source=source)


@dataclass(frozen=True, slots=True)
class Size:
    """How many tensors weights have, and how many values are in them."""

    tensors: int
    values: int

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Size:
        """Of a state dict; a value that stands for many, as a stride of 0 has it, counts once."""
        values: Counter[int] = Counter()
        stored: dict[int, int] = {}
        for tensor in state.values():
            storage = tensor.untyped_storage()
            values[storage.data_ptr()] += tensor.numel()
            stored[storage.data_ptr()] = storage.nbytes()
        return cls(len(state), sum(min(values[place], stored[place]) for place in values))

    @classmethod
    def of_file(cls, file: Path) -> Size:
        """Of a safetensors file, of which the header alone is read."""
        with safetensors.safe_open(file, framework="pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 -- no mapping
        return cls(len(shapes), sum(map(math.prod, shapes)))


def outlined(build: Callable[[], M], size: Size) -> M | None:
    """A model without memory for its values; None where it cannot be built so, which building it as usual will tell.

    Raises:
        ModelError: it has many times more than weights of that size can fill.
    """
    with contextlib.suppress(RuntimeError, TypeError, ValueError), torch.device("meta"), filled_by(size):
        return build()
    return None


@contextlib.contextmanager
def filled_by(size: Size) -> Iterator[None]:
    """Within the block this thread puts no model together that has many times more than weights of a size can fill.

    Raises:
        ModelError: it was about to.
    """
    builder = threading.get_ident()
    most_tensors = PARTS_PER_TENSOR * size.tensors + MORE_PARTS
    most_values = VALUES_PER_VALUE * size.values + MORE_VALUES
    tensors = values = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, values
        if tensor is None or threading.get_ident() != builder:
            return
        tensors, values = tensors + 1, values + tensor.numel()
        if tensors > most_tensors or values > most_values:
            raise ModelError(
                "the weights do not fit the architecture: the configuration describes many times more than their "
                f"{size.tensors:,} tensors of {size.values:,} values"
            )

    with contextlib.ExitStack() as stack:
        stack.enter_context(hooks.register_module_parameter_registration_hook(count))
        stack.enter_context(hooks.register_module_buffer_registration_hook(count))
        yield
