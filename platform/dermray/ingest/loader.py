"""Carries out an `EpochPlan`: Ray Data tasks read and decode windows, the training worker assembles batches.

Every training worker runs its own pipeline over its own streams. Tasks decode wherever the cluster has CPUs, their
results arrive in the order in which batches need them, and Ray Data's backpressure bounds what is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import ray.data
import torch
from ray.data import ExecutionResources
from ray.exceptions import RayTaskError

from dermray import images
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.errors import CorpusError, DermRayError, ImageError
from dermray.ingest import augment
from dermray.ingest.plan import EpochPlan
from dermray.ingest.settings import DataConfig

# Windows of one pipeline: enough to span many small epochs, few enough to list in a moment.
WINDOWS_PER_LEG = 2048


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        step: global step, from 0 over all epochs.
        epoch: from 0; with the seed and `samples` it decides every random choice of the augmentation.
        samples: sample indices, int64 `[n]`.
        pixels: uint8 `[n, 3, S, S]`, RGB.
        tokens: int64 `[n, L]`.
    """

    step: int
    epoch: int
    samples: np.ndarray
    pixels: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class WindowDecoder:
    """The task: a window's sample indices in, its cropped images and tokens out. Pickled once per pipeline.

    Attributes:
        tokenizer: makes the tokeniser; called once per process.
    """

    index: ShardIndex
    settings: DataConfig
    image_size: int
    seed: int
    tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]]

    def __call__(self, window: dict[str, Any]) -> dict[str, np.ndarray]:
        """One window → columns of equal length: stream, sample, pixels uint8 `[n, S, S, 3]`, tokens int32 `[n, L]`."""
        # Ray shares the cores out; OpenCV would take them all for each task.
        cv2.setNumThreads(1)
        epoch, stream, samples = int(window["epoch"][0]), int(window["stream"][0]), window["rows"][0]
        table = self.index.read(samples, ["image", "captions", "sample_id"])
        encoded = table["image"]
        captions = table["captions"].to_pylist()
        pixels = np.empty((len(samples), self.image_size, self.image_size, 3), dtype=np.uint8)
        texts = []
        for row, sample in enumerate(samples):
            random = augment.generator(self.seed, epoch, int(sample))
            try:
                image = images.decode(encoded[row].as_py())
            except ImageError as error:
                raise CorpusError(
                    f"{self.index.corpus}: the image of sample {table['sample_id'][row]} is damaged ({error}); "
                    "prepare the corpus again"
                ) from error
            pixels[row] = augment.crop_and_resize(
                image,
                random,
                size=self.image_size,
                scale=self.settings.crop_scale,
                horizontal_flip=self.settings.horizontal_flip,
            )
            texts.append(augment.choose_caption(captions[row], self.settings.captions, random))
        return {
            "stream": np.full(len(samples), stream, dtype=np.int32),
            "sample": np.asarray(samples, dtype=np.int64),
            "pixels": pixels,
            "tokens": self.tokenizer()(texts).numpy().astype(np.int32),
        }


@dataclass
class Loader:
    """Batches of one rank from any step on.

    Args:
        corpus: URI of the corpus.
        manifest: the samples to train on (one split).
        decoder settings: see `WindowDecoder`.
        num_steps: total steps of the run; the last epoch may be cut.
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
    _plans: dict[int, EpochPlan] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        first = self._plan(0)
        first.streams_of(self.rank, self.world_size)  # refuses an inadmissible world before any work
        self.steps_per_epoch = len(first)
        self._decoder = WindowDecoder(
            ShardIndex.of(self.corpus, self.manifest), self.settings, self.image_size, self.seed, self.tokenizer
        )

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the rank's batches of steps `start_step … num_steps - 1` in order."""
        step = start_step
        while step < self.num_steps:
            end = self._leg_end(step)
            yield from self._leg(step, end)
            step = end

    def _leg(self, start_step: int, end_step: int) -> Iterator[Batch]:
        plan = self._plan(start_step // self.steps_per_epoch)
        waiting = {stream: _Stream() for stream in plan.streams_of(self.rank, self.world_size)}
        rows = plan.rows_per_step
        step = start_step
        for block in self._blocks(start_step, end_step):
            for stream in np.unique(block["stream"]):
                chosen = block["stream"] == stream
                part = {key: block[key] if chosen.all() else block[key][chosen] for key in _Stream.COLUMNS}
                waiting[int(stream)].push(part)
            while step < end_step and all(stream.num_rows >= rows for stream in waiting.values()):
                yield _assemble(step, step // self.steps_per_epoch, [stream.take(rows) for stream in waiting.values()])
                step += 1
        if step < end_step:
            raise CorpusError(f"the input ended at step {step} of {end_step}; the corpus is shorter than its manifest")

    def _blocks(self, start_step: int, end_step: int) -> Iterator[dict[str, np.ndarray]]:
        """What the tasks return, in order; an error of ours that ended a task is raised as it is."""
        pipeline = self._pipeline(start_step, end_step)
        try:
            yield from pipeline.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        except RayTaskError as error:
            if isinstance(error.cause, DermRayError):
                # Ray appends lines of advice to the message of an error that ends a task.
                error.cause.args = (str(error.cause).partition("\n")[0],)
                raise error.cause from error
            raise

    def _pipeline(self, start_step: int, end_step: int) -> ray.data.Dataset:
        windows = list(self._windows(start_step, end_step))
        dataset = ray.data.from_items(windows, override_num_blocks=len(windows))
        # Of this pipeline alone: other pipelines of the process keep their settings.
        context = dataset.context
        context.raise_original_map_exception = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        tasks_cpu = self.settings.tasks_per_worker * self.settings.cpus_per_task
        context.execution_options.resource_limits = ExecutionResources(cpu=tasks_cpu)
        return dataset.map_batches(
            self._decoder.__call__, batch_size=1, batch_format="numpy", num_cpus=self.settings.cpus_per_task
        )

    def _windows(self, start_step: int, end_step: int) -> Iterator[dict[str, Any]]:
        for epoch in range(start_step // self.steps_per_epoch, -(-end_step // self.steps_per_epoch)):
            first = epoch * self.steps_per_epoch
            skip = max(start_step - first, 0)
            plan = self._plan(epoch)
            for window in plan.rank_windows(self.rank, self.world_size, start_step=skip):
                if first + window.start // plan.rows_per_step < end_step:
                    yield {"epoch": epoch, "stream": window.stream, "rows": window.rows.tolist()}

    def _leg_end(self, step: int) -> int:
        epoch = step // self.steps_per_epoch
        per_epoch = len(self._plan(epoch).rank_windows(self.rank, self.world_size))
        epochs = max(1, WINDOWS_PER_LEG // per_epoch)
        return min((epoch + epochs) * self.steps_per_epoch, self.num_steps)

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            while len(self._plans) > 1:
                self._plans.pop(min(self._plans))
            self._plans[epoch] = EpochPlan(
                self.manifest, seed=self.seed, epoch=epoch, global_batch_size=self.global_batch_size
            )
        return self._plans[epoch]


class _Stream:
    """Rows of one stream that have arrived and not been taken."""

    COLUMNS = ("sample", "pixels", "tokens")

    def __init__(self) -> None:
        self.num_rows = 0
        self._parts: deque[dict[str, np.ndarray]] = deque()

    def push(self, part: dict[str, np.ndarray]) -> None:
        self._parts.append(part)
        self.num_rows += len(part["sample"])

    def take(self, rows: int) -> dict[str, np.ndarray]:
        taken = []
        self.num_rows -= rows
        while rows:
            part = self._parts.popleft()
            length = len(part["sample"])
            if length > rows:
                self._parts.appendleft({key: value[rows:] for key, value in part.items()})
                part = {key: value[:rows] for key, value in part.items()}
                length = rows
            taken.append(part)
            rows -= length
        return {key: np.concatenate([part[key] for part in taken]) for key in self.COLUMNS}


def _assemble(step: int, epoch: int, parts: list[dict[str, np.ndarray]]) -> Batch:
    pixels = np.concatenate([part["pixels"] for part in parts])
    return Batch(
        step=step,
        epoch=epoch,
        samples=np.concatenate([part["sample"] for part in parts]),
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        tokens=torch.from_numpy(np.concatenate([part["tokens"] for part in parts]).astype(np.int64)),
    )
