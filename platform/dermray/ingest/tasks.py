"""The Ray side of the loader: row groups read once into the object store, and tasks that decode rows of them.

Plain tasks rather than a Ray Data pipeline: the order of results is the order of the calls, a task can be handed parts
of several row groups, and nothing comes between two tasks. Ray repeats a task whose process or node is lost, and with
it the reading of row groups that were lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray import ObjectRef
from ray.exceptions import RayTaskError

from dermray.corpus.shards import ShardIndex
from dermray.errors import DermRayError
from dermray.ingest import decoding
from dermray.ingest.decoding import Decoded, Decoder
from dermray.ingest.plan import EpochPlan
from dermray.ingest.schedule import Chunk

# Row groups that one reading task fetches at the same time.
READS_PER_TASK = 8
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
    """

    def __init__(
        self,
        index: ShardIndex,
        decoder: Decoder,
        plan_of: Callable[[int], EpochPlan],
        *,
        rank: int,
        world_size: int,
        cpus_per_task: float,
    ) -> None:
        self._starts = index.starts
        self._plan_of = plan_of
        self._rank, self._world_size = rank, world_size
        # Both travel inside the functions: Ray sends a function to a process once, an argument with every call.
        options = ray.remote(num_cpus=cpus_per_task, max_retries=MAX_RETRIES, scheduling_strategy="DEFAULT")
        self._read = options(_reading(index))
        self._decode = options(_decoding(decoder))
        self._last_steps: dict[int, dict[int, int]] = {}
        self._held: dict[tuple[int, int], ObjectRef] = {}
        self._pending: set[ObjectRef] = set()

    def read(self, chunk: Chunk) -> None:
        """Have the row groups of a chunk read, but for those that are."""
        groups = [int(group) for group in np.unique(self._groups(chunk.samples.ravel()))]
        missing = [group for group in groups if (chunk.epoch, group) not in self._held]
        for start in range(0, len(missing), READS_PER_TASK):
            part = missing[start : start + READS_PER_TASK]
            refs = self._read.options(num_returns=len(part)).remote(part)
            for group, ref in zip(part, [refs] if len(part) == 1 else refs, strict=True):
                self._held[chunk.epoch, group] = ref

    def decode(self, chunk: Chunk) -> list[ObjectRef]:
        """Have a chunk decoded whose row groups are asked for; let go of those that no later step needs."""
        refs = [self._decode_unit(chunk.epoch, unit.ravel()) for unit in chunk.units]
        self._pending.update(refs)
        self._release(chunk)
        return refs

    def results(self, refs: Sequence[ObjectRef]) -> list[Decoded]:
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
        for ref in [*self._pending, *self._held.values()]:
            ray.cancel(ref)

    def _decode_unit(self, epoch: int, samples: npt.NDArray[np.int64]) -> ObjectRef:
        groups = self._groups(samples)
        used, group_of = np.unique(groups, return_inverse=True)
        held = [self._held[epoch, int(group)] for group in used]
        return self._decode.remote(epoch, samples, group_of, samples - self._starts[groups], *held)

    def _groups(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._starts, samples, side="right") - 1

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


def _reading(index: ShardIndex) -> Callable[..., object]:
    def read(groups: list[int]) -> pa.Buffer | list[pa.Buffer]:
        packed = decoding.read(index, groups)
        return packed[0] if len(packed) == 1 else packed

    return read


def _decoding(decoder: Decoder) -> Callable[..., Decoded]:
    def decode(
        epoch: int,
        samples: npt.NDArray[np.int64],
        group_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        *packed: pa.Buffer,
    ) -> Decoded:
        return decoder(epoch, samples, [decoding.unpacked(one) for one in packed], group_of, row_of)

    return decode
