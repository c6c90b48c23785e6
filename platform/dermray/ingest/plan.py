"""The order of samples as a pure function: (manifest, seed, epoch, global batch) → global batches.

Row groups are permuted for the epoch and laid end to end; the rows are cut into `num_streams` canonical streams of
equal length. Each stream shuffles its rows inside windows of a few row groups. Global batch `s` is the `s`-th slice of
every stream, in stream order. A rank owns consecutive whole streams, so any world size that divides the number of
streams sees the same global batches, and a run resumes from `step` alone. At most `global_batch_size - 1` samples of
an epoch (other ones each epoch) are left over and dropped. Two neighbouring streams may share the row group at their
seam; every other row group is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dermray.corpus.manifest import Manifest
from dermray.errors import PlanError

MAX_STREAMS = 64
WINDOW_ROW_GROUPS = 2


@dataclass(frozen=True)
class Window:
    """A run of consecutive rows of one stream, in the order in which batches take them.

    Attributes:
        stream: number of the stream.
        start: position of the first row within the stream.
        rows: sample indices in order, int64 `[num_rows]`.
    """

    stream: int
    start: int
    rows: np.ndarray


class EpochPlan:
    """The global batches of one epoch over a manifest.

    Args:
        manifest: the samples to go through; pass `manifest.select("train")` to train on one split.
        seed: of the run.
        epoch: from 0.
        global_batch_size: samples of one optimiser step over all ranks.
        num_streams: canonical streams; by default the largest divisor of `global_batch_size` that is at most 64
            and at most the number of row groups. It fixes the order: keep it when the world size changes.

    Raises:
        PlanError: the corpus holds fewer samples than one global batch, or an argument is out of range.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        epoch: int,
        global_batch_size: int,
        num_streams: int | None = None,
    ) -> None:
        if global_batch_size < 1 or epoch < 0:
            raise PlanError(f"global_batch_size {global_batch_size} must be positive and epoch {epoch} not negative")
        self._sizes = manifest.row_group_sizes()
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        num_samples = int(self._starts[-1])
        if num_samples < global_batch_size:
            raise PlanError(
                f"the corpus has {num_samples} samples, fewer than one global batch of {global_batch_size}; "
                "lower the global batch size or add data"
            )
        self.seed = seed
        self.epoch = epoch
        self.global_batch_size = global_batch_size
        self.num_streams = num_streams or _default_num_streams(global_batch_size, len(self._sizes))
        if global_batch_size % self.num_streams:
            raise PlanError(f"num_streams {self.num_streams} does not divide the global batch size {global_batch_size}")
        self._num_steps = num_samples // global_batch_size
        self._rows_per_step = global_batch_size // self.num_streams
        self._rows_per_stream = self._num_steps * self._rows_per_step
        self._group_order = self._generator(0).permutation(len(self._sizes))
        self._order_ends = np.cumsum(self._sizes[self._group_order])
        self._stream_rows = lru_cache(maxsize=MAX_STREAMS)(self._compute_stream_rows)

    def __len__(self) -> int:
        """Number of steps."""
        return self._num_steps

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The world sizes that see the same global batches: the divisors of the number of streams, ascending."""
        return tuple(w for w in range(1, self.num_streams + 1) if self.num_streams % w == 0)

    def batch(self, step: int) -> np.ndarray:
        """Sample indices of global batch `step`, int64 `[global_batch_size]`.

        Raises:
            PlanError: there is no such step.
        """
        return self._slice(step, 0, self.num_streams)

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """The part of global batch `step` that `rank` computes, int64 `[global_batch_size / world_size]`.

        Raises:
            PlanError: there is no such step or rank, or the plan does not admit the world size.
        """
        first, last = self._streams_of(rank, world_size)
        return self._slice(step, first, last)

    def rank_windows(self, rank: int, world_size: int, *, start_step: int = 0) -> list[Window]:
        """The windows `rank` has to read from `start_step` on, in the order in which batches need them.

        The first window of each stream is cut so that its rows begin at `start_step`.

        Raises:
            PlanError: as in `rank_batch`.
        """
        first, last = self._streams_of(rank, world_size)
        skip = start_step * self._rows_per_step
        windows = []
        for stream in range(first, last):
            rows = self._stream_rows(stream)
            for begin, end in self._window_bounds(stream):
                if end > skip:
                    begin = max(begin, skip)
                    windows.append(Window(stream, begin, rows[begin:end]))
        return sorted(windows, key=lambda w: (w.start // self._rows_per_step, w.stream))

    @property
    def rows_per_step(self) -> int:
        """Rows that every stream gives to each global batch."""
        return self._rows_per_step

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams that `rank` owns."""
        return range(*self._streams_of(rank, world_size))

    def _slice(self, step: int, first: int, last: int) -> np.ndarray:
        if not 0 <= step < self._num_steps:
            raise PlanError(f"step {step} is outside the epoch's {self._num_steps} steps")
        begin = step * self._rows_per_step
        return np.concatenate(
            [self._stream_rows(stream)[begin : begin + self._rows_per_step] for stream in range(first, last)]
        )

    def _streams_of(self, rank: int, world_size: int) -> tuple[int, int]:
        if world_size not in self.world_sizes:
            raise PlanError(
                f"{world_size} workers cannot share {self.num_streams} streams evenly; this corpus and global batch "
                f"admit {', '.join(map(str, self.world_sizes))} workers. Change num_workers or the global batch "
                "size, or prepare the corpus with smaller row groups"
            )
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank} is outside a world of {world_size}")
        per_rank = self.num_streams // world_size
        return rank * per_rank, (rank + 1) * per_rank

    def _pieces(self, stream: int) -> list[tuple[int, int, int]]:
        """`(row group, first row, end row)` of the stream before shuffling; rows count inside the row group."""
        begin, end = stream * self._rows_per_stream, (stream + 1) * self._rows_per_stream
        first = int(np.searchsorted(self._order_ends, begin, side="right"))
        pieces = []
        for position in range(first, len(self._group_order)):
            group = int(self._group_order[position])
            group_end = int(self._order_ends[position])
            group_begin = group_end - int(self._sizes[group])
            if group_begin >= end:
                break
            pieces.append((group, max(begin - group_begin, 0), min(end, group_end) - group_begin))
        return pieces

    def _window_bounds(self, stream: int) -> list[tuple[int, int]]:
        lengths = [end - begin for _, begin, end in self._pieces(stream)]
        ends = np.cumsum([sum(lengths[i : i + WINDOW_ROW_GROUPS]) for i in range(0, len(lengths), WINDOW_ROW_GROUPS)])
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def _compute_stream_rows(self, stream: int) -> np.ndarray:
        in_order = np.concatenate(
            [self._starts[group] + self._group_rows(group)[begin:end] for group, begin, end in self._pieces(stream)]
        )
        generator = self._generator(1, stream)
        for begin, end in self._window_bounds(stream):
            in_order[begin:end] = generator.permutation(in_order[begin:end])
        return in_order.astype(np.int64)

    def _group_rows(self, group: int) -> np.ndarray:
        """Rows of a group in the epoch's order, so that a seam parts other rows each epoch."""
        return self._generator(2, group).permutation(int(self._sizes[group]))

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *purpose])


def _default_num_streams(global_batch_size: int, num_row_groups: int) -> int:
    limit = min(MAX_STREAMS, global_batch_size, num_row_groups)
    return max(v for v in range(1, limit + 1) if global_batch_size % v == 0)
