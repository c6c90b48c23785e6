"""Carries out an `EpochPlan`: Ray tasks read row groups and decode them, the training worker assembles batches.

Every training worker runs its own pipeline. Reading and decoding are tasks of their own: a row group is read once and
stays compressed in the object store until its last row is decoded, with those that were read beside it, and a decoding
task makes just the rows that the next steps need. So the first batch needs one batch to be decoded, memory holds
compressed windows and a few batches of pixels, and tasks run wherever the cluster has CPUs.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from ray import ObjectRef

from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.ingest.decoding import Decoded, Decoder
from dermray.ingest.memory import BatchMemory
from dermray.ingest.plan import EpochPlan
from dermray.ingest.schedule import Chunk, chunks
from dermray.ingest.settings import DataConfig
from dermray.ingest.tasks import RankTasks
from dermray.ingest.tokens import portable

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
        epoch: from 0; with the seed and `samples` it decides every random choice of the augmentation.
        samples: sample indices, int64 `[n]`.
        pixels: uint8 `[n, 3, S, S]`, RGB, to be left as they are: they may lie in Ray's object store. Page-locked where
            there is a CUDA device.
        tokens: int64 `[n, L]`.
    """

    step: int
    epoch: int
    samples: np.ndarray
    pixels: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Loader:
    """Batches of one rank from any step on.

    Args:
        corpus: URI of the corpus.
        manifest: the samples to train on (one split).
        settings: crops, captions and how much to decode ahead.
        image_size: side S of the square images, in pixels.
        tokenizer: makes the tokeniser; picklable, and cheap to call again.
        seed: of the run.
        global_batch_size: samples of one optimiser step over all ranks.
        rank: of this worker.
        world_size: number of workers.
        num_steps: total steps of the run; the last epoch may be cut.

    Raises:
        PlanError: the corpus and the global batch do not admit the world.
    """

    corpus: str
    manifest: Manifest
    settings: DataConfig
    image_size: int
    tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]]
    seed: int
    global_batch_size: int
    rank: int
    world_size: int
    num_steps: int
    _plans: dict[int, EpochPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        first = self._plan(0)
        first.streams_of(self.rank, self.world_size)  # refuses an inadmissible world before any work
        self.steps_per_epoch = len(first)
        self._index = ShardIndex.of(self.corpus, self.manifest)
        self._decoder = Decoder(self._index.corpus, self.settings, self.image_size, self.seed, portable(self.tokenizer))

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
        )
        memory = BatchMemory()
        decoded = self._decoded(tasks, start_step)
        made = (batch for chunk, units in decoded for batch in _assembled(chunk, units, memory))
        assembling = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            upcoming = assembling.submit(next, made, None)
            while (batch := upcoming.result()) is not None:
                upcoming = assembling.submit(next, made, None)
                yield batch
        finally:
            tasks.cancel()
            assembling.shutdown()

    def _decoded(self, tasks: RankTasks, start_step: int) -> Iterator[tuple[Chunk, list[Decoded]]]:
        """Chunks in order with what their tasks made; later ones are under way, and row groups of one more."""
        schedule = chunks(
            self._plan,
            rank=self.rank,
            world_size=self.world_size,
            start_step=start_step,
            end_step=self.num_steps,
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

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            while len(self._plans) >= MAX_PLANS:
                self._plans.pop(min(self._plans))
            self._plans[epoch] = EpochPlan(
                self.manifest, seed=self.seed, epoch=epoch, global_batch_size=self.global_batch_size
            )
        return self._plans[epoch]


def _assembled(chunk: Chunk, units: list[Decoded], memory: BatchMemory) -> Iterator[Batch]:
    """The batches of a chunk from what its tasks made."""
    step, made = chunk.first_step, iter(units)
    for block in chunk.blocks:
        samples = np.concatenate(block, axis=1)
        shape = (len(samples), -1)
        parts = list(islice(made, len(block)))
        pixels = [of_unit.reshape(*shape, *of_unit.shape[1:]) for of_unit, _ in parts]
        tokens = np.concatenate([of_unit.reshape(*shape, of_unit.shape[1]) for _, of_unit in parts], axis=1)
        for position in range(len(samples)):
            yield Batch(
                step=step,
                epoch=chunk.epoch,
                samples=samples[position],
                pixels=_joined([of_unit[position] for of_unit in pixels], memory).permute(0, 3, 1, 2),
                tokens=torch.from_numpy(tokens[position].astype(np.int64)),
            )
            step += 1


def _joined(parts: list[npt.NDArray[np.uint8]], memory: BatchMemory) -> torch.Tensor:
    """Parts of a batch as one tensor: one after the other in memory for batches, or a single one where it lies."""
    if len(parts) == 1 and not torch.cuda.is_available():
        return torch.from_numpy(parts[0])
    joined = memory.empty((sum(map(len, parts)), *parts[0].shape[1:]))
    np.concatenate(parts, out=joined.numpy())
    return joined
