"""What an objective sees of samples: named arrays with declared dtype and shape, made in the loader's tasks.

The loader carries any arrays and knows none by name. An objective brings a `Views`; nothing here needs torch, so that a
worker process is ready in a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dermray.errors import CorpusError, ImageError

# By name: `[n, *shape]` of n items.
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """One named array of a batch.

    Attributes:
        dtype: NumPy's name of it.
        shape: of one item; a batch of n has `[n, *shape]`.
    """

    dtype: str
    shape: tuple[int, ...]

    def empty(self, num_items: int) -> npt.NDArray[Any]:
        """New memory for so many items; the content is undefined."""
        return np.empty((num_items, *self.shape), dtype=self.dtype)


class Row:
    """One row of the corpus, whose columns are read when they are asked for."""

    __slots__ = ("_columns", "_corpus", "_index")

    def __init__(self, columns: Mapping[str, pa.Array], index: int, corpus: str) -> None:
        self._columns, self._index, self._corpus = columns, index, corpus

    def __getitem__(self, column: str) -> Any:
        """The value of a column, as Python has it."""
        return self._columns[column][self._index].as_py()

    def damaged(self, error: ImageError) -> CorpusError:
        """What to raise when the row's image cannot be read."""
        return CorpusError(
            f"{self._corpus}: the image of sample {self['sample_id']} is damaged ({error}); prepare the corpus again"
        )


@dataclass(frozen=True, slots=True)
class Item:
    """What one entry of a batch is made of.

    Attributes:
        rows: of the corpus: one, or those of a group side by side.
        random: seeded by run, epoch and draw of the plan; choices are the same whoever makes the item.
    """

    rows: Sequence[Row]
    random: np.random.Generator


class Views(Protocol):
    """Items → arrays. Picklable, without torch, and pure: nothing but the item and the step decides what is made."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the corpus: what rows shall have; `sample_id` they always have.

        Those of a side table are `sides.TABLE.COLUMN`, such as `sides.masks.mask`, None where it says nothing.
        """
        ...

    def specs(self, step: int) -> Mapping[str, ArraySpec]:
        """The arrays of a global step: names and dtypes are always the same, shapes may depend on the step alone."""
        ...

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        """Fill contiguous arrays, one entry an item, that are declared as in `specs`.

        Raises:
            CorpusError: what a row holds cannot be used; it names the sample.
        """
        ...
