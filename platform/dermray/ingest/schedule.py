"""How a rank's share of the plan is cut into decoding tasks: small at first, then as large as is cheap to hand over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dermray.ingest.plan import EpochPlan

# Images of one decoding task: some 100 ms of work, and 19 MB of pixels at a side of 224.
UNIT_ROWS = 128
# Rows that a task takes from one stream, so that it is handed few row groups.
STREAM_ROWS = 16


@dataclass(frozen=True)
class Chunk:
    """Some consecutive batches of a rank, made by tasks side by side.

    Attributes:
        epoch: of all its steps.
        first_step: of the run.
        units: what each task makes: sample indices, int64 `[num_steps, num_columns]`. Columns side by side are the
            rank's batches.
    """

    epoch: int
    first_step: int
    units: tuple[np.ndarray, ...]

    @property
    def num_steps(self) -> int:
        """Batches of the chunk."""
        return len(self.units[0])

    @property
    def samples(self) -> np.ndarray:
        """All its sample indices, int64 `[num_steps, rank batch]`."""
        return np.concatenate(self.units, axis=1)


def chunk_steps(rank_batch_size: int, num_streams: int) -> int:
    """Steps of a chunk once a run is under way."""
    by_stream = -(-STREAM_ROWS * num_streams // rank_batch_size)
    by_unit = -(-UNIT_ROWS // rank_batch_size)
    return max(by_stream, by_unit)


def chunks(
    plan_of: Callable[[int], EpochPlan], *, rank: int, world_size: int, start_step: int, end_step: int
) -> Iterator[Chunk]:
    """Steps `start_step … end_step - 1` of a run in order; no chunk spans two epochs.

    The first chunk is one step, so that the first batch waits for nothing else; each next one is twice as long, up to
    `chunk_steps`.
    """
    length, step = 1, start_step
    while step < end_step:
        epoch, first = divmod(step, len(plan_of(0)))
        plan = plan_of(epoch)
        num_steps = min(length, len(plan) - first, end_step - step)
        rows = np.stack([plan.rank_batch(first + i, rank, world_size) for i in range(num_steps)])
        columns = max(1, UNIT_ROWS // num_steps)
        cuts = range(columns, rows.shape[1], columns)
        yield Chunk(epoch, step, tuple(np.split(rows, list(cuts), axis=1)))
        step += num_steps
        length = min(2 * length, chunk_steps(rows.shape[1], len(plan.streams_of(rank, world_size))))
