"""How a rank's share of the plan is cut into decoding tasks: small at first, then as large as is cheap to hand over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dermray.ingest.plan import EpochPlan

# Images of one decoding task: some 100 ms of work, and 19 MB of pixels at a side of 224.
UNIT_ROWS = 128
# Up to so many images a task makes whole batches, which nobody has to join from parts then.
WHOLE_BATCH_ROWS = 256
# Rows of a chunk from one stream: tasks that make parts of batches then take many rows of few row groups.
STREAM_ROWS = 16


@dataclass(frozen=True)
class Chunk:
    """Some consecutive batches of a rank, made by tasks side by side.

    Attributes:
        epoch: of all its steps.
        first_step: of the run.
        blocks: consecutive steps each; what each task of a block makes: draws of the plan, int64
            `[num_steps, num_columns]`. Columns side by side are the rank's batches.
    """

    epoch: int
    first_step: int
    blocks: tuple[tuple[np.ndarray, ...], ...]

    @property
    def num_steps(self) -> int:
        """Batches of the chunk."""
        return sum(len(block[0]) for block in self.blocks)

    @property
    def draws(self) -> np.ndarray:
        """All its draws, int64 `[num_steps, rank batch]`."""
        return np.concatenate([np.concatenate(block, axis=1) for block in self.blocks])


def chunk_steps(rank_batch_size: int, num_streams: int) -> int:
    """Steps of a chunk once a run is under way."""
    by_stream = -(-STREAM_ROWS * num_streams // rank_batch_size)
    by_unit = -(-UNIT_ROWS // rank_batch_size)
    return max(by_stream, by_unit)


def chunks(
    plan_of: Callable[[int], EpochPlan],
    *,
    rank: int,
    world_size: int,
    start_step: int,
    end_step: int,
    shapes_of: Callable[[int], object] = lambda _: None,
) -> Iterator[Chunk]:
    """Steps `start_step … end_step - 1` of a run in order; no chunk spans two epochs.

    The first chunk is one step, so that the first batch waits for nothing else; each next one is twice as long, up to
    `chunk_steps`. Steps of one block are alike in what `shapes_of` says of them.
    """
    length, step = 1, start_step
    while step < end_step:
        epoch, first = divmod(step, len(plan_of(0)))
        plan = plan_of(epoch)
        num_steps = min(length, len(plan) - first, end_step - step)
        rows = np.stack([plan.rank_batch(first + i, rank, world_size) for i in range(num_steps)])
        longest = chunk_steps(rows.shape[1], len(plan.streams_of(rank, world_size)))
        shapes = [shapes_of(step + i) for i in range(num_steps)]
        changes = [i for i in range(1, num_steps) if shapes[i] != shapes[i - 1]]
        alike = np.split(rows, changes)
        yield Chunk(epoch, step, tuple(block for part in alike for block in _blocks(part, at_once=length < longest)))
        step += num_steps
        length = min(2 * length, longest)


def _blocks(rows: np.ndarray, *, at_once: bool) -> tuple[tuple[np.ndarray, ...], ...]:
    """Draws `[num_steps, rank batch]` as blocks of units; `at_once`: the first batch is to come soon."""
    num_steps, batch_size = rows.shape
    if at_once or batch_size > WHOLE_BATCH_ROWS:
        columns = max(1, UNIT_ROWS // num_steps)
        return (tuple(np.split(rows, range(columns, batch_size, columns), axis=1)),)
    steps = max(1, UNIT_ROWS // batch_size)
    return tuple((block,) for block in np.split(rows, range(steps, num_steps, steps)))
