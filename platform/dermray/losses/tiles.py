"""What losses over pairs share: the walk over tiles of a similarity matrix, full precision, and duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Side of a tile in samples. On a CPU two float32 tiles of this size stay in the last-level cache; a GPU needs more
# work a kernel. Measured by benchmarks/loss.py.
CPU_TILE_SIZE = 1024
GPU_TILE_SIZE = 4096


def full_precision(device: torch.device) -> torch.autocast:
    """Within it nothing is cast down: at a logit scale of 100 a bfloat16 logit is off by up to 0.25."""
    return torch.autocast(device.type, enabled=False)


def promoted(image_features: Tensor, text_features: Tensor, *scalars: Tensor | float) -> tuple[Tensor, ...]:
    """Features and scalars in one dtype, float32 at least; scalars have no axes. Gradients keep the given dtypes."""
    dtype, device = torch.promote_types(image_features.dtype, torch.float32), image_features.device
    without_axes = (torch.as_tensor(each, dtype=dtype, device=device).reshape(()) for each in scalars)
    return image_features.to(dtype), text_features.to(dtype), *without_axes


def duplicates(row_labels: Tensor, column_labels: Tensor, offset: int) -> Tensor:
    """Which pairs are neither positives nor negatives: bool `[R, C]`.

    Args:
        row_labels: int64 `[R]`, or `[R, K]` for K kinds of equality.
        column_labels: int64 `[C]` or `[C, K]`; a pair is a duplicate if any of its K labels are equal.
        offset: first row's position in the global batch minus first column's; the pair of a sample with itself is
            never a duplicate.
    """
    rows, columns = (labels.reshape(len(labels), -1) for labels in (row_labels, column_labels))
    same = rows[:, 0, None] == columns[None, :, 0]
    for kind in range(1, rows.shape[1]):
        same |= rows[:, kind, None] == columns[None, :, kind]
    same.diagonal(offset).fill_(False)
    return same


@dataclass(frozen=True)
class Tile:
    """One block of a similarity matrix `scale * rows @ columns.T`.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        logits: `[R, C]` in a buffer that the next tile overwrites.
        positives: the view of `logits` that holds the pairs of samples with themselves; often empty.
        positive_rows: the rows of the matrix on which they lie.
    """

    rows: slice
    columns: slice
    logits: Tensor
    positives: Tensor
    positive_rows: slice


class TiledMatrix:
    """The matrix `scaled_rows @ columns.T` that exists one tile at a time; duplicates in it are -inf."""

    def __init__(
        self,
        scaled_rows: Tensor,
        columns: Tensor,
        *,
        first_row: int,
        tile_size: int | None,
        row_labels: Tensor | None = None,
        column_labels: Tensor | None = None,
    ) -> None:
        """Describe the matrix; nothing is computed yet.

        Args:
            scaled_rows: `[n, D]`.
            columns: `[N, D]`.
            first_row: the column of which row 0 is the partner.
            tile_size: side of a tile; empty: what suits the device.
            row_labels: see `duplicates`; empty: there are none.
            column_labels: the same for the columns.
        """
        self._scaled_rows, self._columns, self._first_row = scaled_rows, columns, first_row
        self._row_labels, self._column_labels = row_labels, column_labels
        self._tile_size = tile_size or (CPU_TILE_SIZE if columns.device.type == "cpu" else GPU_TILE_SIZE)

    def buffer(self) -> Tensor:
        """Room for the largest tile, flat."""
        height, width = (min(self._tile_size, len(each)) for each in (self._scaled_rows, self._columns))
        return self._columns.new_empty(height * width)

    def __iter__(self) -> Iterator[Tile]:
        """Tiles row by row."""
        buffer = self.buffer()
        for first_row in range(0, len(self._scaled_rows), self._tile_size):
            scaled = self._scaled_rows[first_row : first_row + self._tile_size]
            for first_column in range(0, len(self._columns), self._tile_size):
                columns = self._columns[first_column : first_column + self._tile_size]
                logits = room(buffer, len(scaled), len(columns))
                torch.mm(scaled, columns.T, out=logits)
                yield self._tile(logits, first_row, first_column)

    def _tile(self, logits: Tensor, first_row: int, first_column: int) -> Tile:
        rows = slice(first_row, first_row + logits.shape[0])
        columns = slice(first_column, first_column + logits.shape[1])
        offset = self._first_row + first_row - first_column
        if self._row_labels is not None and self._column_labels is not None:
            same = duplicates(self._row_labels[rows], self._column_labels[columns], offset)
            logits.masked_fill_(same, -torch.inf)
        positives = logits.diagonal(offset)
        first_positive = rows.start + max(0, -offset)
        return Tile(rows, columns, logits, positives, slice(first_positive, first_positive + len(positives)))


def room(buffer: Tensor, height: int, width: int) -> Tensor:
    """The beginning of a flat buffer as `[height, width]`."""
    return buffer[: height * width].view(height, width)
