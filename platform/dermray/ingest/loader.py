"""Carries out an `EpochPlan`: Ray tasks read row groups and decode them, the training worker assembles batches.

Every training worker runs its own pipeline. Reading and decoding are tasks of their own: a row group is read once and
stays compressed in the object store until its last row is decoded, with those that were read beside it, and a decoding
task makes just the rows that the next steps need. So the first batch needs one batch to be decoded, memory holds
compressed windows and a few batches of pixels, and tasks run wherever the cluster has CPUs.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray import ObjectRef

from dermray.errors import PlanError
from dermray.ingest.corpora import Corpora
from dermray.ingest.decoding import Decoder
from dermray.ingest.memory import BatchMemory
from dermray.ingest.plan import Counts, EpochPlan
from dermray.ingest.schedule import Chunk, chunks
from dermray.ingest.settings import DataConfig
from dermray.ingest.tasks import RankTasks
from dermray.ingest.views import Arrays, Views

# Batches that are decoded, or being decoded, beside the one in hand.
BATCHES_AHEAD = 2
# Plans that are remembered: tasks of the next epoch begin before those of the last are done.
MAX_PLANS = 3

# Ray's object store is for reading only, and so is a batch that lies there.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        step: global step, from 0 over all epochs.
        epoch: from 0; with the seed and `draws` it decides every random choice of the augmentation.
        draws: of the epoch's plan, int64 `[n]`: sample indices, where each sample is drawn once.
        arrays: by name `[n, *shape]`, as the objective's views declare them, to be left as they are: they may lie in
            Ray's object store. Page-locked where there is a CUDA device.
        samples: which one each is, int64 `[n]`, in an epoch that draws some more than once; None in others.
    """

    step: int
    epoch: int
    draws: np.ndarray
    arrays: Mapping[str, torch.Tensor]
    samples: np.ndarray | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """An array by its name."""
        return self.arrays[name]


@dataclass
class Loader:
    """Batches of one rank from any step on.

    Args:
        corpora: the samples to train on (one split of each corpus).
        settings: how much to decode ahead, and at what cost.
        views: what is made of samples.
        seed: of the run.
        global_batch_size: samples of one optimiser step over all ranks.
        rank: of this worker.
        world_size: number of workers.
        num_steps: total steps of the run; the last epoch may be cut.
        counts: epoch → how often each sample is drawn (`EpochPlan`), with the same sum each time; None: once each.
        items: samples of the item that begins with each that is drawn (`dermray.ingest.items`); None: one each.

    Raises:
        PlanError: the corpus and the global batch do not admit the world.
    """

    corpora: Corpora
    settings: DataConfig
    views: Views
    seed: int
    global_batch_size: int
    rank: int
    world_size: int
    num_steps: int
    counts: Counts | None = None
    items: npt.NDArray[np.int64] | None = None
    _num_draws: int | None = field(default=None, init=False, repr=False)
    _plans: dict[int, EpochPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        first = self._plan(0)
        first.streams_of(self.rank, self.world_size)  # refuses an inadmissible world before any work
        self.steps_per_epoch, self._num_draws = len(first), first.num_draws
        self._index = self.corpora.index(self.settings.verify, self.views.columns)
        self._decoder = Decoder(self._index.corpus, self.seed, self.views)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the rank's batches of steps `start_step … num_steps - 1` in order; one is assembled ahead.

        Raises:
            CorpusError: a shard is damaged or gone, or an image is.
        """
        tasks = RankTasks(
            self._index,
            self._decoder,
            self._plan,
            rank=self.rank,
            world_size=self.world_size,
            cpus_per_task=self.settings.cpus_per_task,
            items=self.items,
        )
        memory = BatchMemory()
        decoded = self._decoded(tasks, start_step)
        made = (
            batch for chunk, units in decoded for batch in _assembled(chunk, units, memory, self._plan(chunk.epoch))
        )
        assembling = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            upcoming = assembling.submit(next, made, None)
            while (batch := upcoming.result()) is not None:
                upcoming = assembling.submit(next, made, None)
                yield batch
        finally:
            tasks.cancel()
            assembling.shutdown()

    def _decoded(self, tasks: RankTasks, start_step: int) -> Iterator[tuple[Chunk, list[Arrays]]]:
        """Chunks in order with what their tasks made; later ones are under way, and row groups of one more."""
        schedule = chunks(
            self._plan,
            rank=self.rank,
            world_size=self.world_size,
            start_step=start_step,
            end_step=self.num_steps,
            shapes_of=self._shapes,
        )
        begun: deque[tuple[Chunk, list[ObjectRef]]] = deque()
        upcoming = next(schedule, None)
        if upcoming is not None:
            tasks.read(upcoming)
        while upcoming is not None or begun:
            while upcoming is not None and not self._suffices(begun):
                begun.append((upcoming, tasks.decode(upcoming)))
                upcoming = next(schedule, None)
                if upcoming is not None:
                    tasks.read(upcoming)
            chunk, refs = begun.popleft()
            yield chunk, tasks.results(refs)

    def _suffices(self, begun: deque[tuple[Chunk, list[ObjectRef]]]) -> bool:
        """Whether enough is under way behind the chunk that comes next."""
        behind = list(begun)[1:]
        num_steps = sum(chunk.num_steps for chunk, _ in behind)
        num_tasks = sum(len(refs) for _, refs in behind)
        return num_steps >= BATCHES_AHEAD and num_tasks >= self.settings.tasks_per_worker

    def _shapes(self, step: int) -> tuple[tuple[int, ...], ...]:
        return tuple(spec.shape for spec in self.views.specs(step).values())

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            while len(self._plans) >= MAX_PLANS:
                self._plans.pop(min(self._plans))
            plan = EpochPlan(
                self.corpora,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                counts=None if self.counts is None else self.counts(epoch),
            )
            if self._num_draws not in (None, plan.num_draws):
                raise PlanError(
                    f"the objective draws {plan.num_draws} samples in epoch {epoch} and {self._num_draws} in epoch 0; "
                    "all epochs must have the same number, or a step no longer says where a run is"
                )
            self._plans[epoch] = plan
        return self._plans[epoch]


def _assembled(chunk: Chunk, units: list[Arrays], memory: BatchMemory, plan: EpochPlan) -> Iterator[Batch]:
    """The batches of a chunk from what its tasks made."""
    step, made = chunk.first_step, iter(units)
    for block in chunk.blocks:
        draws = np.concatenate(block, axis=1)
        parts = list(islice(made, len(block)))
        shaped = {
            name: [part[name].reshape(len(draws), -1, *part[name].shape[1:]) for part in parts] for name in parts[0]
        }
        for position in range(len(draws)):
            yield Batch(
                step=step,
                epoch=chunk.epoch,
                draws=draws[position],
                arrays={
                    name: _joined(name, [of_unit[position] for of_unit in arrays], memory)
                    for name, arrays in shaped.items()
                },
                samples=draws[position] % plan.num_samples if plan.has_copies else None,
            )
            step += 1


def _joined(name: str, parts: list[npt.NDArray[Any]], memory: BatchMemory) -> torch.Tensor:
    """Parts of a batch as one tensor: one after the other in memory for batches, or a single one where it lies."""
    if len(parts) == 1 and not torch.cuda.is_available():
        return torch.from_numpy(parts[0])
    joined = memory.empty(name, (sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=joined.numpy())
    return joined
