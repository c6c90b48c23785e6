"""Rows dealt to their shards: each shard's together and in its order, whatever order the table has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.raw.spill import MAX_HELD_BYTES, Spill, Spilled, let_go

# Rows that are put in the order of their shards at once: to do so shard by shard takes twice the time.
ROWS_AT_ONCE = 8192
# What is held of a table that is gone through again and again, over what one in memory may come to: each time takes a
# millisecond a block of the table, and planning has held more by then.
TIMES_HELD = 2


@dataclass(frozen=True)
class Dealt:
    """The rows of a shard, as they lie on the disk."""

    spilled: Spilled
    number: int
    num_rows: int

    def read(self) -> pa.Table:
        """These rows; those of shards that were read before leave memory."""
        let_go()
        return self.spilled.block(self.number)


def deal(
    table: pa.Table, places: np.ndarray, shards: Sequence[range], *, max_held_bytes: int = MAX_HELD_BYTES
) -> list[pa.Table] | list[Dealt]:
    """The rows of each shard by the places of their images, those of one image in table order.

    Args:
        table: all rows, with a column `image`.
        places: the place of each row's image in the corpus, int32 `[N]`.
        shards: of each the places of its images; end to end from 0.
        max_held_bytes: what a table in memory may come to; the shards of a larger one are written to a temporary file.

    Raises:
        AssertionError: two images have one place: they have one hash by chance, and another seed parts them.
        StorageError: the disk is full or fails.
    """
    order = np.argsort(places, kind="stable")
    bounds = [*np.searchsorted(places, [shard.start for shard in shards], sorter=order).tolist(), len(order)]
    if table.nbytes <= max_held_bytes:
        # Each has memory of its own: what is sent of a table that is part of another is all of that.
        dealt = _dealt(table, order, bounds, max_held_bytes, 1)
        return [_checked(rows, shard) for rows, shard in zip(dealt, shards, strict=True)]
    spill = Spill(table.schema)
    for rows, shard in zip(
        _dealt(table, order, bounds, TIMES_HELD * max_held_bytes, ROWS_AT_ONCE), shards, strict=True
    ):
        spill.append(_checked(rows, shard))
    spilled = spill.done()
    return [Dealt(spilled, number, bounds[number + 1] - bounds[number]) for number in range(len(shards))]


def _checked(rows: pa.Table, shard: range) -> pa.Table:
    num_images = pc.count_distinct(rows["image"]).as_py()
    if num_images != len(shard):
        raise AssertionError(f"{num_images:,} images at {len(shard):,} places: two have one hash; choose another seed")
    return rows


def _dealt(
    table: pa.Table, order: np.ndarray, bounds: Sequence[int], max_bytes: int, at_once: int
) -> Iterator[pa.Table]:
    """The rows of each shard. The table is gone through once for as many shards as come to `max_bytes`.

    Args:
        bounds: where in `order` the shards begin, and its end.
        at_once: rows that are put in their order together, those of one shard at least.
    """
    batches = table.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    max_rows = max(1, int(max_bytes / max(1, table.nbytes) * table.num_rows))
    for first, last in _together(bounds, 0, len(bounds) - 1, max_rows):
        rows = np.sort(order[bounds[first] : bounds[last]])
        held = _taken(batches, starts, rows)
        for begin, end in _together(bounds, first, last, at_once):
            some = held.take(pa.array(np.searchsorted(rows, order[bounds[begin] : bounds[end]])))
            for shard in range(begin, end):
                yield some.slice(bounds[shard] - bounds[begin], bounds[shard + 1] - bounds[shard])


def _together(bounds: Sequence[int], first: int, last: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Shards from `first` to before `last` in groups of at most `max_rows` rows, or of one."""
    while first < last:
        end = max(first + 1, int(np.searchsorted(bounds, bounds[first] + max_rows, side="right")) - 1)
        yield first, min(end, last)
        first = end


def _taken(batches: Sequence[pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Some rows of a table, in its order, from its batches and the number of the first row of each."""
    cuts = np.searchsorted(rows, starts)
    parts = []
    for batch, start, begin, end in zip(batches, starts, cuts, cuts[1:], strict=False):
        if begin < end:
            parts.append(batch.take(pa.array(rows[begin:end] - start)))
            let_go()
    return pa.Table.from_batches(parts).combine_chunks()
