"""What a trial tells Tune. The controller of its trainer loads this, so it imports nothing of models or training."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import Checkpoint, UserCallback

# The keys under which Tune is given a trial's name, which part of it a process trains, and its validations.
NAME = "trial"
LEG = "leg"
VALIDATION = "validation"
STEP = "step"


class ReportValidation(UserCallback):
    """Hands a trainer's validations to the sweep's mailbox, numbered from 1, so that a repeated one is known as such.

    The trial's process takes them there and tells Tune. Ray's own callback has that process ask a queue five times a
    second, and each answer that there is nothing is a failed task in Ray's dashboard.
    """

    def __init__(self, name: str, every_steps: int, mailbox: ActorHandle) -> None:
        self._name = name
        self._every_steps = every_steps
        self._mailbox = mailbox

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called by the trainer's controller for each report of the workers; rank 0 has the figures."""
        here = ray.get_runtime_context().current_actor
        numbered = {**metrics[0], VALIDATION: validation_of(metrics[0][STEP], self._every_steps)}
        ray.get(self._mailbox.put_validation.remote(self._name, numbered, here))


def validation_of(step: int, every_steps: int) -> int:
    """Number of the validation at `step`, from 1: what rungs are counted in. The last one may come early."""
    return -(-step // every_steps)
