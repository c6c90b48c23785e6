"""The loop: batches in, optimiser steps, records and checkpoints out. One step is one readable function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dermray.errors import DermRayError
from dermray.ingest.loader import Batch
from dermray.losses.gather import world
from dermray.train.optimiser import learning_rate
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from dermray.train.task import Task


@dataclass
class Trainer:
    """Everything one rank needs to take steps.

    Attributes:
        model: the plain module, whose parameters are saved.
        wrapped: the same module inside DDP, or itself when the rank is alone.
        step: optimiser steps taken so far.
        metrics: figures of the last logged step; in checkpoints too, so that a run killed at its end has them.
    """

    config: PretrainConfig
    task: Task
    model: nn.Module
    wrapped: nn.Module
    optimiser: torch.optim.Optimizer
    device: torch.device
    num_steps: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; returns the rank's loss and, where clipping is on, the gradient norm."""
        optim = self.config.optim
        rate = learning_rate(self.step, peak=optim.lr, warmup_steps=optim.warmup_steps, num_steps=self.num_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        _seed(self.config.seed, self.step)
        loss = self.task.backward(self.wrapped, batch, self.device, self._autocast)
        logs = {"loss": loss, "lr": torch.tensor(rate)}
        if self.config.train.grad_clip_norm is not None:
            logs["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.task.after_step(self.model)
        self.step += 1
        return logs

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.train.precision
        if precision == "bf16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "metrics": self.metrics,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = int(state["step"])
        self.metrics = dict(state["metrics"])


def run(
    trainer: Trainer,
    batches: Iterator[Batch],
    *,
    on_record: Callable[[StepRecord], None],
    on_checkpoint: Callable[[Trainer], None],
    on_validation: Callable[[Trainer], dict[str, float]],
) -> None:
    """Take steps until `trainer.num_steps`.

    Args:
        batches: this rank's batches from `trainer.step` on.
        on_record: gets the figures of every logged step (on every rank; figures are global).
        on_checkpoint: is called when a checkpoint is due, and once at the end.
        on_validation: is called at the validation cadence, if there is one, and at the end; returns held-out scores.

    Raises:
        DermRayError: the loss is not finite.
    """
    train, validate_every = trainer.config.train, trainer.config.validation.every_steps
    watch = _Stopwatch(trainer.step, train.global_batch_size)
    while trainer.step < trainer.num_steps:
        with watch.waiting():
            batch = next(batches)
        logs = trainer.train_step(batch)
        last = trainer.step == trainer.num_steps
        log_due = trainer.step % train.log_every_steps == 0 or last
        checkpoint_due = trainer.step % train.checkpoint_every_steps == 0 or last
        if log_due or checkpoint_due:
            means = _global_mean(logs)
            _require_finite(means["loss"], trainer.step)
        if log_due:
            figures = {**means, **trainer.task.report(trainer.model), **watch.lap(trainer.step)}
            trainer.metrics = figures
            on_record(StepRecord(trainer.step, trainer.num_steps, figures))
        if validate_every and (trainer.step % validate_every == 0 or last):
            with watch.paused():
                scores = on_validation(trainer)
            trainer.metrics = {**trainer.metrics, **scores}
            on_record(StepRecord(trainer.step, trainer.num_steps, scores))
        if checkpoint_due:
            with watch.paused():
                on_checkpoint(trainer)


def _seed(seed: int, step: int) -> None:
    """What a model draws (dropout) is a function of the step and the rank, so a resumed run draws the same."""
    rank, _ = world()
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _global_mean(logs: dict[str, Tensor]) -> dict[str, float]:
    _, world_size = world()
    values = torch.stack([value.float().cpu() for value in logs.values()])
    if world_size > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values)
        values = values.cpu() / world_size
    return dict(zip(logs, values.tolist(), strict=True))


def _require_finite(loss: float, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise DermRayError(f"the loss became {loss} at step {step}; lower optim.lr or look at the data of this step")


class _Stopwatch:
    """Throughput and data wait between two logged steps and overall; without the first batch and checkpoints."""

    def __init__(self, first_step: int, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._first_step = self._step = first_step
        self._trained_s = 0.0
        self._begun: float | None = None
        self._waited_s = 0.0
        self._paused_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        entered = time.perf_counter()
        yield
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
        else:
            self._waited_s += now - entered

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        entered = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - entered

    def lap(self, step: int) -> dict[str, float]:
        """Figures since the last lap."""
        assert self._begun is not None
        now = time.perf_counter()
        elapsed = max(now - self._begun - self._paused_s, 1e-9)
        self._trained_s += elapsed
        num_steps = step - self._step
        figures = {
            "samples_per_s": num_steps * self._global_batch_size / elapsed,
            "mean_samples_per_s": (step - self._first_step) * self._global_batch_size / self._trained_s,
            "step_time_s": elapsed / num_steps,
            "data_wait_share": min(self._waited_s / elapsed, 1.0),
        }
        self._begun, self._step, self._waited_s, self._paused_s = now, step, 0.0, 0.0
        return figures
