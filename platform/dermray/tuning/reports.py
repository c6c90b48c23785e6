"""What a trial tells Tune. The controller of its trainer loads this, so it imports nothing of models or training."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

# The keys under which Tune is given a trial's name, which part of it a process trains, and its validations.
NAME = "trial"
LEG = "leg"
VALIDATION = "validation"
STEP = "step"


class ReportValidation(TuneReportCallback):
    """Passes a trainer's validations on to Tune, numbered from 1, so that a repeated one is known as such."""

    def __init__(self, name: str, every_steps: int, mailbox: ActorHandle) -> None:
        super().__init__()
        self._name = name
        self._every_steps = every_steps
        self._mailbox = mailbox
        self._entered = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called by the trainer's controller for each report of the workers; rank 0 has the figures."""
        if not self._entered:
            here = ray.get_runtime_context().current_actor
            ray.get(self._mailbox.put_controller.remote(self._name, here))
            self._entered = True
        numbered = {**metrics[0], VALIDATION: validation_of(metrics[0][STEP], self._every_steps)}
        super().after_report(run_context, [numbered], checkpoint)


def validation_of(step: int, every_steps: int) -> int:
    """Number of the validation at `step`, from 1: what rungs are counted in. The last one may come early."""
    return -(-step // every_steps)
