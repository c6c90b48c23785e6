"""The loop: batches in, optimiser steps, records and checkpoints out. One step is one readable function."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dermray.errors import CheckpointError, NonFiniteError
from dermray.ingest.loader import Batch
from dermray.losses.gather import gather_rows, world
from dermray.train import numerics, speed
from dermray.train.agreement import Agreement, Position
from dermray.train.ema import Ema
from dermray.train.objectives.contract import Figure, Objective
from dermray.train.optimiser import LR_FACTOR, scheduled
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig


@dataclass
class Trainer:
    """Everything one rank needs to take steps.

    Attributes:
        model: the plain module, whose parameters are saved.
        wrapped: the same module inside DDP, or itself when the rank is alone.
        step: optimiser steps taken so far, those left out included.
        metrics: figures of the last logged step; in checkpoints too, so that a run killed at its end has them.
        ema: the average of the parameters, if `train.ema_decay` asks for one.
        num_hosts: machines that the ranks are on.
        schedule: `(step, num_steps)` → learning rate; None: as `optim` says, in a run of one epoch.
        figures: of the objective since the last logged step.
        left_out: float32 `[2]` on the device: steps left out in a row up to now, and in all.
    """

    config: PretrainConfig
    objective: Objective
    model: nn.Module
    wrapped: nn.Module
    optimiser: torch.optim.Optimizer
    device: torch.device
    num_steps: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    ema: Ema | None = None
    num_hosts: int = 1
    schedule: Callable[[int, int], float] | None = None
    figures: FigureMeans = field(init=False)
    left_out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.left_out = torch.zeros(2, device=self.device)
        self.figures = FigureMeans()
        if self.config.train.ema_decay is not None:
            self.ema = Ema(self.model, self.config.train.ema_decay)

    def train_step(self, batch: Batch) -> dict[str, Figure]:
        """One optimiser step; returns the rank's loss, the learning rate and the norm of the gradient.

        A gradient that is not finite leaves parameters, moments and average as they are. Gradients are equal on all
        ranks, so that they agree on it; nothing waits for the device.
        """
        rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group[LR_FACTOR]
        _seed(self.config.seed, self.step)
        autocast = functools.partial(numerics.autocast, self.config.train, self.device)
        outcome = self.objective.backward(self.wrapped, batch, self.device, autocast)
        self.figures.add(outcome.figures)
        norm = self._clip()
        skipped = (~torch.isfinite(norm)).float()
        self.optimiser.found_inf = skipped  # type: ignore[attr-defined]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.after_step(self.model, 1 - skipped)
        if self.ema is not None:
            self.ema.update(1 - skipped)
        self.left_out = torch.stack([(self.left_out[0] + 1) * skipped, self.left_out[1] + skipped])
        self.step += 1
        return {"loss": Figure(outcome.loss), "lr": Figure(rate, "max"), "grad_norm": Figure(norm, "max")}

    def _learning_rate(self) -> float:
        schedule = self.schedule or scheduled(self.config.optim, self.num_steps)
        return schedule(self.step, self.num_steps)

    def _clip(self) -> Tensor:
        """The norm of the gradient before it is clipped, if it is."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        limit = self.config.train.grad_clip_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model is what will be exported: its average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        of_objective = self.objective.state()
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "metrics": self.metrics,
            "left_out": self.left_out,
            **({} if self.ema is None else {"ema": self.ema.averages}),
            **({"objective": of_objective} if of_objective else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, under the optimiser's settings of this configuration.

        Raises:
            CheckpointError: it does not fit the model.
        """
        settings = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimiser.param_groups
        ]
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.objective.restore(state.get("objective", {}))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(f"the checkpoint does not fit the model: {message}") from error
        # The state has those it was made with, which resume=force and population-based training change.
        for group, own in zip(self.optimiser.param_groups, settings, strict=True):
            group.update(own)
        self.step = int(state["step"])
        self.metrics = dict(state["metrics"])
        self.left_out = state["left_out"].to(self.device)
        if self.ema is not None:
            averages = state.get("ema") or {name: p.detach() for name, p in self.model.named_parameters()}
            self.ema.restore(averages)


def run(
    trainer: Trainer,
    batches: Iterator[Batch],
    *,
    on_record: Callable[[StepRecord], None],
    on_checkpoint: Callable[[Trainer, dict[str, float]], None],
    on_validation: Callable[[Trainer], dict[str, float]],
    stop_requested: Callable[[], bool] = lambda: False,
    until_step: int | None = None,
) -> bool:
    """Take steps until `trainer.num_steps`, or until some rank is asked to stop.

    Args:
        batches: this rank's batches from `trainer.step` on.
        on_record: gets the figures of every logged step (on every rank; figures are global).
        on_checkpoint: is called when a checkpoint is due, with the scores of a validation at that step, and at the end.
        on_validation: is called at the validation cadence, if there is one, and at the end; returns held-out scores.
        stop_requested: asked after every step; when true anywhere, the run ends with a checkpoint at a next step.
        until_step: pause after so many steps, with a validation and a checkpoint as at the end.

    Returns:
        True when the run was stopped before its last step.

    Raises:
        NonFiniteError: too many steps in a row had gradients that are not finite, or weights are not.
        CollectiveError: other ranks did not come.
    """
    train = trainer.config.train
    position = Position(train.collective_timeout_s)
    agreement = Agreement(num_flags=2, timeout_s=train.collective_timeout_s)
    clock = _Clock(train.checkpoint_every_minutes)
    watch = speed.Stopwatch(trainer.step, train.global_batch_size, trainer.device)
    stop = False
    end = trainer.num_steps if until_step is None else min(until_step, trainer.num_steps)
    while trainer.step < end and not stop:
        position.note(trainer.step + 1, "waiting for a batch")
        batch = next(batches)
        watch.batch_came()
        with position.at(trainer.step + 1, "in the forward and backward pass"):
            logs = trainer.train_step(batch)
        watch.step_done()
        with position.at(trainer.step, "exchanging figures and flags"):
            stop, clock_due = agreement.exchange(stop_requested(), clock.due())
            last = trainer.step == end
            due = _due(trainer, stop=stop, last=last, clock=clock_due)
            if due.log or due.checkpoint:
                agreement.wait()
                means = _over_ranks(logs, trainer.device)
                _require_finite(trainer, torch.as_tensor(logs["loss"].value))
            if due.log:
                figures = _figures(trainer, means, watch)
                trainer.metrics = figures
                on_record(StepRecord(trainer.step, trainer.num_steps, figures, speed.verdict(figures)))
        scores: dict[str, float] = {}
        with watch.paused() if due.validation or due.checkpoint else nullcontext():
            with position.at(trainer.step, "in validation"):
                if due.validation:
                    with trainer.averaged():
                        scores = on_validation(trainer)
                    trainer.metrics = {**trainer.metrics, **scores}
                    verdict = trainer.objective.verdict(scores)
                    on_record(StepRecord(trainer.step, trainer.num_steps, scores, verdict))
            if due.checkpoint:
                on_checkpoint(trainer, scores)
                clock.reset()
    agreement.close()
    return trainer.step < trainer.num_steps


@dataclass(frozen=True)
class _Due:
    log: bool
    validation: bool
    checkpoint: bool


def _due(trainer: Trainer, *, stop: bool, last: bool, clock: bool) -> _Due:
    """What is to be done after this step; equal on all ranks. A run that is to stop has no time for validation."""
    train, validate_every = trainer.config.train, trainer.config.validation.every_steps
    validation = validate_every is not None and (trainer.step % validate_every == 0 or last) and not (stop and not last)
    return _Due(
        log=trainer.step % train.log_every_steps == 0 or last,
        validation=validation,
        checkpoint=trainer.step % train.checkpoint_cadence(trainer.num_steps) == 0
        or last
        or stop
        or clock
        or (validation and train.keep_best is not None),
    )


class _Clock:
    """Says once that the last checkpoint is too old; on rank 0, whose clock counts for all."""

    def __init__(self, minutes: float | None) -> None:
        self._interval_s = minutes * 60 if minutes is not None and world()[0] == 0 else None
        self.reset()

    def reset(self) -> None:
        self._since = time.monotonic()

    def due(self) -> bool:
        if self._interval_s is None or time.monotonic() - self._since < self._interval_s:
            return False
        self.reset()
        return True


def _seed(seed: int, step: int) -> None:
    """What a model draws (dropout) is a function of the step and the rank, so a resumed run draws the same."""
    rank, _ = world()
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class FigureMeans:
    """Means of an objective's figures over the steps since they were last taken; nothing waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Figure] = {}
        self._num_steps = 0

    def add(self, figures: Mapping[str, Figure]) -> None:
        """The figures of one more step."""
        before = self._sums
        self._sums = {
            name: Figure(figure.value + before[name].value if name in before else figure.value, figure.join)
            for name, figure in figures.items()
        }
        self._num_steps += 1

    def take(self) -> dict[str, Figure]:
        """The means, with how each is joined over ranks; the next step begins anew."""
        taken = {name: Figure(total.value / self._num_steps, total.join) for name, total in self._sums.items()}
        self._sums, self._num_steps = {}, 0
        return taken


def _over_ranks(figures: Mapping[str, Figure], device: torch.device) -> dict[str, float]:
    """Every figure joined over ranks as it says."""
    if not figures:
        return {}
    values = [figure.value for figure in figures.values()]
    own = torch.stack([torch.as_tensor(value, dtype=torch.float32).to(device) for value in values])
    rows = gather_rows(own[None]).cpu()
    joined = {"mean": rows.mean(dim=0), "max": rows.max(dim=0).values, "sum": rows.sum(dim=0)}
    return {name: joined[figure.join][at].item() for at, (name, figure) in enumerate(figures.items())}


def _highest(values: Mapping[str, float]) -> dict[str, Figure]:
    return {name: Figure(value, "max") for name, value in values.items()}


def _figures(trainer: Trainer, means: dict[str, float], watch: speed.Stopwatch) -> dict[str, float]:
    """All that is told about a logged step: of the ranks' waits and memory the highest."""
    lap = watch.lap(trainer.step)
    lap["communication_share"] = min(1.0, speed.exposed_communication_s(trainer.wrapped) / lap["step_time_s"])
    figures = {
        **means,
        **trainer.objective.report(trainer.model),
        **_over_ranks(
            {**_highest({**lap, **speed.memory_gb(trainer.device)}), **trainer.figures.take()}, trainer.device
        ),
        "skipped_steps": trainer.left_out[1].item(),
        "num_workers": float(world()[1]),
        "num_hosts": float(trainer.num_hosts),
    }
    of_sample = trainer.objective.flops(figures)
    if of_sample is not None:
        num_samples = trainer.config.train.global_batch_size / world()[1]
        achieved = num_samples * of_sample / figures["step_time_s"]
        figures["model_tflops_per_s"] = achieved / 1e12
        peak = speed.peak_flops(trainer.device)
        if peak is not None:
            figures["mfu"] = achieved / peak
    return figures


def _require_finite(trainer: Trainer, loss: Tensor) -> None:
    """Refuse to go on, and to write a checkpoint, where numbers are lost.

    Raises:
        NonFiniteError: on all ranks alike.
    """
    in_a_row, limit = int(trainer.left_out[0].item()), trainer.config.train.max_skipped_steps
    losses = gather_rows(loss.detach().float().to(trainer.device)[None]).cpu()
    if in_a_row > limit:
        ranks = [rank for rank, value in enumerate(losses.tolist()) if not np.isfinite(value)]
        raise NonFiniteError(
            f"steps {trainer.step - in_a_row + 1} to {trainer.step} had gradients that are not finite, more than "
            f"train.max_skipped_steps={limit} in a row; the loss of step {trainer.step} is {losses.mean().item():g} "
            f"(not finite on ranks {ranks}); lower optim.lr or look at the data of these steps"
        )
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters()):
        raise NonFiniteError(
            f"the weights hold values that are not finite at step {trainer.step}; go back to the last checkpoint with "
            "a lower optim.lr"
        )
