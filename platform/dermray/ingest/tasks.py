"""The Ray side of the loader: row groups read once into the object store, and tasks that decode rows of them.

Plain tasks rather than a Ray Data pipeline: the order of results is the order of the calls, a task can be handed parts
of several row groups, and nothing comes between two tasks. Ray repeats a task whose process or node is lost, and with
it the reading of row groups that were lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray import ObjectRef
from ray.exceptions import RayTaskError

from dermray.corpus.side_tables import RowGroupReader
from dermray.errors import DermRayError
from dermray.ingest import decoding
from dermray.ingest.decoding import Decoder
from dermray.ingest.plan import EpochPlan
from dermray.ingest.schedule import Chunk
from dermray.ingest.views import Arrays, ArraySpec

# Row groups that one reading task fetches at the same time and hands over together, and rows that these hold at most.
# Each object costs Ray a millisecond or two of processor time, and some more for each task that it goes to.
READS_PER_TASK = 16
ROWS_PER_READ = 1024
# How often a task is repeated whose process or node was lost.
MAX_RETRIES = 8


class RankTasks:
    """Reading and decoding for one rank, chunk by chunk in the order of its steps.

    Args:
        index: where samples lie.
        decoder: what a task does with them.
        plan_of: epoch → its plan.
        rank: of the training worker.
        world_size: number of training workers.
        cpus_per_task: logical CPUs that Ray reserves for a task.
        items: samples of the item that begins with each (`dermray.ingest.items`), `[num_samples]`; None: one each.
    """

    def __init__(
        self,
        index: RowGroupReader,
        decoder: Decoder,
        plan_of: Callable[[int], EpochPlan],
        *,
        rank: int,
        world_size: int,
        cpus_per_task: float,
        items: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._starts, self._items = index.starts, items
        self._plan_of = plan_of
        self._rank, self._world_size = rank, world_size
        # Both travel inside the functions: Ray sends a function to a process once, an argument with every call.
        options = ray.remote(num_cpus=cpus_per_task, max_retries=MAX_RETRIES, scheduling_strategy="DEFAULT")
        self._read = options(_reading(index, decoder.views.columns))
        self._decode = options(_decoding(decoder))
        self._last_steps: dict[int, dict[int, int]] = {}
        # Epoch and row group → what was read together, and its place there.
        self._held: dict[tuple[int, int], tuple[ObjectRef, int]] = {}
        self._pending: set[ObjectRef] = set()

    def read(self, chunk: Chunk) -> None:
        """Have the row groups of a chunk read, but for those that are.

        Side by side as the streams are: the windows of neighbours are used up at about the same time.
        """
        groups, first = np.unique(self._groups(chunk.draws.T.ravel()), return_index=True)
        missing = [group for group in groups[np.argsort(first)].tolist() if (chunk.epoch, group) not in self._held]
        for part in self._together(missing):
            ref = self._read.remote(part)
            self._held.update(((chunk.epoch, group), (ref, place)) for place, group in enumerate(part))

    def _together(self, groups: Sequence[int]) -> Iterator[list[int]]:
        """Row groups to be read by one task."""
        part: list[int] = []
        num_rows = 0
        for group in groups:
            size = int(self._starts[group + 1] - self._starts[group])
            if part and (len(part) == READS_PER_TASK or num_rows + size > ROWS_PER_READ):
                yield part
                part, num_rows = [], 0
            part.append(group)
            num_rows += size
        if part:
            yield part

    def decode(self, chunk: Chunk) -> list[ObjectRef]:
        """Have a chunk decoded whose row groups are asked for; let go of those that no later step needs."""
        refs, step = [], chunk.first_step
        for block in chunk.blocks:
            refs += [self._decode_unit(step, chunk.epoch, unit.ravel()) for unit in block]
            step += len(block[0])
        self._pending.update(refs)
        self._release(chunk)
        return refs

    def results(self, refs: Sequence[ObjectRef]) -> list[Arrays]:
        """What tasks have made, in the order given; waits for them.

        Raises:
            CorpusError: as the task raised it.
        """
        try:
            made = ray.get(list(refs))
        except RayTaskError as error:
            cause: BaseException = error
            while isinstance(cause, RayTaskError):
                cause = cause.cause
            raise cause if isinstance(cause, DermRayError) else error from None
        self._pending.difference_update(refs)
        return made

    def cancel(self) -> None:
        """Take back what has not begun."""
        for ref in {*self._pending, *(ref for ref, _ in self._held.values())}:
            ray.cancel(ref)

    def _decode_unit(self, step: int, epoch: int, draws: npt.NDArray[np.int64]) -> ObjectRef:
        groups = self._groups(draws)
        used, group_of = np.unique(groups, return_inverse=True)
        held = [self._held[epoch, int(group)] for group in used]
        bundles = list(dict.fromkeys(ref for ref, _ in held))
        places = [(bundles.index(ref), place) for ref, place in held]
        samples = draws % self._starts[-1]
        lengths = None if self._items is None else self._items[samples]
        where = (places, group_of, samples - self._starts[groups], lengths)
        return self._decode.remote(step, epoch, draws, *where, *bundles)

    def _groups(self, draws: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._starts, draws % self._starts[-1], side="right") - 1

    def _release(self, chunk: Chunk) -> None:
        """Drop the row groups whose last step is in the chunk, and of epochs before everything."""
        if chunk.epoch not in self._last_steps:
            uses = self._plan_of(chunk.epoch).rank_row_groups(self._rank, self._world_size)
            self._last_steps = {chunk.epoch: {use.group: use.last_step for use in uses}}
        last_steps = self._last_steps[chunk.epoch]
        end = chunk.first_step + chunk.num_steps - chunk.epoch * len(self._plan_of(chunk.epoch))
        for epoch, group in list(self._held):
            if epoch < chunk.epoch or (epoch == chunk.epoch and last_steps[group] < end):
                del self._held[epoch, group]


def _reading(index: RowGroupReader, columns: Sequence[str]) -> Callable[..., list[pa.Buffer]]:
    def read(groups: list[int]) -> list[pa.Buffer]:
        return decoding.read(index, groups, columns)

    return read


def _decoding(decoder: Decoder) -> Callable[..., Arrays]:
    # Ray has copied a task's results when the process begins the next one. Memory fresh from the system, as for pieces
    # of this size, would have to be cleared each time.
    memory: dict[str, npt.NDArray[np.uint8]] = {}

    def lent(name: str, spec: ArraySpec, num_samples: int) -> npt.NDArray[Any]:
        shape, dtype = (num_samples, *spec.shape), np.dtype(spec.dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in memory or memory[name].size < num_bytes:
            memory[name] = np.empty(num_bytes, dtype=np.uint8)
        return memory[name][:num_bytes].view(dtype).reshape(shape)

    def decode(
        step: int,
        epoch: int,
        draws: npt.NDArray[np.int64],
        places: list[tuple[int, int]],
        group_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64] | None,
        *bundles: list[pa.Buffer],
    ) -> Arrays:
        row_groups = [decoding.unpacked(bundles[bundle][place]) for bundle, place in places]
        out = {name: lent(name, spec, len(draws)) for name, spec in decoder.views.specs(step).items()}
        return decoder(step, epoch, draws, row_groups, group_of, row_of, lengths=lengths, out=out)

    return decode
