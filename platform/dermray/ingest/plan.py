"""The order of samples as a pure function: (manifest, seed, epoch, global batch) → global batches.

Row groups are permuted for the epoch and laid end to end; the rows are cut into canonical streams. Each stream shuffles
its rows inside windows of a few row groups. Global batch `s` is the `s`-th slice of every stream, in stream order. A
rank owns consecutive whole streams: streams begin and end wherever the part of a rank does in any admitted world, so
all these worlds see the same global batches, and a run resumes from `step` alone. At most `global_batch_size - 1`
samples of an epoch (other ones each epoch) are left over and dropped.

Two neighbouring streams may share the row group at their seam. Every second stream goes through its row groups
backwards, so that both need the shared one at about the same time, at the epoch's beginning or at its end: a rank
reads it once. Only where a seam parts two ranks do both read it.

A sample may be drawn several times in an epoch, or not at all: weights of classes and corpora, shares of the labels and
samples that an objective cannot use are all such counts. Row groups of which nothing is drawn are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from dermray.errors import PlanError

# Epoch → how often each sample is drawn, integers `[num_samples]`.
Counts = Callable[[int], np.ndarray]
MAX_STREAMS = 64
WINDOW_ROW_GROUPS = 2
# Of an epoch by counts: a rank holds 8 bytes for each of its draws.
MAX_DRAWS = 1 << 32


class RowGroups(Protocol):
    """Samples in row groups: a `Manifest` of one corpus, or what several corpora are together."""

    def row_group_sizes(self) -> np.ndarray:
        """Samples of every row group in order, int64 `[num_row_groups]`."""
        ...


@dataclass(frozen=True)
class RowGroupUse:
    """The steps of an epoch in which a rank may need rows of a row group.

    Attributes:
        group: number of the row group in manifest order.
        first_step: the window that holds its rows opens here.
        last_step: and is used up here.
    """

    group: int
    first_step: int
    last_step: int


class EpochPlan:
    """The global batches of one epoch over a manifest.

    Args:
        manifest: the samples to go through; pass `manifest.select("train")` to train on one split.
        seed: of the run.
        epoch: from 0.
        global_batch_size: samples of one optimiser step over all ranks. With the manifest it fixes the streams.
        counts: how often each sample is drawn in the epoch, non-negative integers `[num_samples]`; None: once each.

    A draw is a number: of copy k, from 0, of sample i it is `i + k * num_samples`. So it is the sample's index where
    each is drawn once, and copies of a sample are told apart, for another crop each.

    Raises:
        PlanError: fewer draws than one global batch, or an argument is out of range.
    """

    def __init__(
        self, manifest: RowGroups, *, seed: int, epoch: int, global_batch_size: int, counts: np.ndarray | None = None
    ) -> None:
        if global_batch_size < 1 or epoch < 0:
            raise PlanError(f"global_batch_size {global_batch_size} must be positive and epoch {epoch} not negative")
        self._starts = np.concatenate([[0], np.cumsum(manifest.row_group_sizes())])
        self.num_samples = int(self._starts[-1])
        self._counts = None if counts is None else checked_counts(counts, self.num_samples)
        # Draws of each row group.
        self._sizes = manifest.row_group_sizes()
        if self._counts is not None:
            before = np.concatenate([[0], np.cumsum(self._counts)])
            self._sizes = np.diff(before[self._starts])
        self.num_draws = int(self._sizes.sum())
        if self.num_draws < global_batch_size:
            has = "the corpus has" if counts is None else "an epoch draws"
            raise PlanError(
                f"{has} {self.num_draws} samples, fewer than one global batch of {global_batch_size}; "
                "lower the global batch size or add data"
            )
        self.seed = seed
        self.epoch = epoch
        self.global_batch_size = global_batch_size
        self._num_steps = self.num_draws // global_batch_size
        self._world_sizes, self._cuts = _streams(global_batch_size, len(self._sizes))
        self._stream_rows = lru_cache(maxsize=MAX_STREAMS)(self._compute_stream_rows)
        # Streams side by side share row groups, all of them one where all draws are of it.
        self._group_rows = lru_cache(maxsize=WINDOW_ROW_GROUPS)(self._compute_group_rows)

    def __len__(self) -> int:
        """Number of steps."""
        return self._num_steps

    @property
    def has_copies(self) -> bool:
        """Whether a sample is drawn more than once, and may meet itself in a batch."""
        return self._counts is not None and bool((self._counts > 1).any())

    @property
    def num_samples_used(self) -> int:
        """Draws that are in a global batch, as the streams have them."""
        return self._num_steps * sum(self._width(stream) for stream in range(self.num_streams))

    @property
    def num_streams(self) -> int:
        """Canonical streams, the same in every world."""
        return len(self._cuts) - 1

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The world sizes that see the same global batches, ascending.

        Divisors of the global batch size, from 1 up: none with more ranks than there are row groups, and as many as
        `MAX_STREAMS` streams serve.
        """
        return self._world_sizes

    def batch(self, step: int) -> np.ndarray:
        """Draws of global batch `step`, int64 `[global_batch_size]`: sample indices where each is drawn once.

        Raises:
            PlanError: there is no such step.
        """
        return self._slice(step, range(self.num_streams))

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """The part of global batch `step` that `rank` computes, int64 `[global_batch_size / world_size]`.

        Raises:
            PlanError: there is no such step or rank, or the plan does not admit the world size.
        """
        return self._slice(step, self.streams_of(rank, world_size))

    def rank_row_groups(self, rank: int, world_size: int) -> list[RowGroupUse]:
        """What `rank` reads for the epoch: every row group once, in the order in which steps need them.

        Raises:
            PlanError: as in `rank_batch`.
        """
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for stream in self.streams_of(rank, world_size):
            width = self._width(stream)
            for begin, end, groups in self._windows(stream):
                for group in groups:
                    first[group] = min(first.get(group, begin // width), begin // width)
                    last[group] = max(last.get(group, 0), (end - 1) // width)
        uses = [RowGroupUse(group, first[group], last[group]) for group in first]
        return sorted(uses, key=lambda use: use.first_step)

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams that `rank` owns.

        Raises:
            PlanError: there is no such rank, or the plan does not admit the world size.
        """
        if world_size not in self._world_sizes:
            raise PlanError(self._refusal(world_size))
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank} is outside a world of {world_size}")
        part = self.global_batch_size // world_size
        first, last = np.searchsorted(self._cuts, [rank * part, (rank + 1) * part])
        return range(int(first), int(last))

    def _refusal(self, world_size: int) -> str:
        admitted = f"this corpus and global batch admit {', '.join(map(str, self._world_sizes))} workers"
        if self.global_batch_size % world_size == 0 and world_size > len(self._sizes):
            return (
                f"{world_size} workers need at least {world_size} row groups, the corpus has {len(self._sizes)}; "
                f"{admitted}. Use fewer workers, or prepare the corpus with smaller row groups"
            )
        return (
            f"{world_size} workers cannot share {self.num_streams} streams evenly; {admitted}. "
            "Change num_workers or the global batch size"
        )

    def _slice(self, step: int, streams: range) -> np.ndarray:
        if not 0 <= step < self._num_steps:
            raise PlanError(f"step {step} is outside the epoch's {self._num_steps} steps")
        parts = []
        for stream in streams:
            width = self._width(stream)
            parts.append(self._stream_rows(stream)[step * width : (step + 1) * width])
        return np.concatenate(parts)

    def _width(self, stream: int) -> int:
        """Rows that a stream gives to each global batch."""
        return int(self._cuts[stream + 1] - self._cuts[stream])

    @cached_property
    def _group_order(self) -> np.ndarray:
        return self._generator(0).permutation(len(self._sizes))

    @cached_property
    def _order_ends(self) -> np.ndarray:
        return np.cumsum(self._sizes[self._group_order])

    def _pieces(self, stream: int) -> list[tuple[int, int, int]]:
        """`(row group, first row, end row)` of the stream before shuffling; rows count inside the row group."""
        begin, end = (int(cut) * self._num_steps for cut in self._cuts[stream : stream + 2])
        first = int(np.searchsorted(self._order_ends, begin, side="right"))
        pieces = []
        for position in range(first, len(self._group_order)):
            group = int(self._group_order[position])
            group_end = int(self._order_ends[position])
            group_begin = group_end - int(self._sizes[group])
            if group_begin >= end:
                break
            if group_begin == group_end:
                continue
            pieces.append((group, max(begin - group_begin, 0), min(end, group_end) - group_begin))
        return pieces[::-1] if stream % 2 else pieces

    def _windows(self, stream: int) -> list[tuple[int, int, list[int]]]:
        """`(first row, end row, row groups)` of each window; rows count inside the stream."""
        windows, begin = [], 0
        pieces = self._pieces(stream)
        for position in range(0, len(pieces), WINDOW_ROW_GROUPS):
            inside = pieces[position : position + WINDOW_ROW_GROUPS]
            end = begin + sum(last - first for _, first, last in inside)
            windows.append((begin, end, [group for group, _, _ in inside]))
            begin = end
        return windows

    def _compute_stream_rows(self, stream: int) -> np.ndarray:
        in_order = np.concatenate(
            [self._starts[group] + self._group_rows(group)[begin:end] for group, begin, end in self._pieces(stream)]
        )
        generator = self._generator(1, stream)
        for begin, end, _ in self._windows(stream):
            in_order[begin:end] = generator.permutation(in_order[begin:end])
        return in_order.astype(np.int64)

    def _compute_group_rows(self, group: int) -> np.ndarray:
        """Draws of a group, less its first sample, in the epoch's order, so that a seam parts other ones each epoch."""
        generator = self._generator(2, group)
        if self._counts is None:
            return generator.permutation(int(self._sizes[group]))
        counts = self._counts[self._starts[group] : self._starts[group + 1]]
        # Row 1 drawn twice, row 2 once, of 10 samples: copies [0, 1, 0] of rows [1, 1, 2] are the draws [1, 11, 2].
        rows = np.repeat(np.arange(len(counts)), counts)
        copies = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return generator.permutation(rows + copies * self.num_samples)

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *purpose])


def checked_counts(counts: np.ndarray, num_samples: int) -> np.ndarray:
    """What says how often each sample is drawn, as int64 `[num_samples]`.

    Raises:
        PlanError: it is no array of so many integers from 0 on, or they are too many draws.
    """
    if not isinstance(counts, np.ndarray):
        raise PlanError(
            f"counts must be an array of {num_samples} integers, one a sample, not a {type(counts).__name__}"
        )
    if counts.shape != (num_samples,) or counts.dtype.kind not in "iu" or (num_samples and int(counts.min()) < 0):
        raise PlanError(
            f"counts must be {num_samples} integers from 0 on, one a sample, not {counts.dtype} {list(counts.shape)}"
        )
    # In floating point: what is added up here may lie beyond 64 bits.
    if (total := float(counts.sum(dtype=np.float64))) > MAX_DRAWS:
        raise PlanError(f"counts add up to {total:,.0f} draws of an epoch, and at most {MAX_DRAWS:,} are planned")
    return counts.astype(np.int64)


def _streams(global_batch_size: int, num_row_groups: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The admitted world sizes, and where streams cut a global batch: ascending from 0 to its size."""
    admitted = []
    cuts = {0, global_batch_size}
    for world_size in range(1, min(global_batch_size, num_row_groups, MAX_STREAMS) + 1):
        if global_batch_size % world_size:
            continue
        with_these = cuts | set(range(0, global_batch_size, global_batch_size // world_size))
        if len(with_these) <= MAX_STREAMS + 1:
            admitted.append(world_size)
            cuts = with_these
    return tuple(admitted), _halved(sorted(cuts), min(MAX_STREAMS, num_row_groups))


def _halved(cuts: list[int], num_streams: int) -> np.ndarray:
    """Halve the widest streams until there are so many: a batch mixes more row groups."""
    while len(cuts) <= num_streams:
        widths = np.diff(cuts)
        widest = int(widths.argmax())
        if widths[widest] < 2:
            break
        cuts.insert(widest + 1, cuts[widest] + int(widths[widest]) // 2)
    return np.array(cuts, dtype=np.int64)
