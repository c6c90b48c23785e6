"""From an interruption in the driver to a checkpoint in the workers; and what becomes of a training that has not begun.

A controller of Ray Train starts the workers and watches them. It tells the driver's mailbox where it is and when it
starts workers, so that the driver can say what it waits for, and end it where no worker trains.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import UserCallback

from dermray import ray_private, redaction

POLL_INTERVAL_S = 0.5
# States of a controller, by Ray's names, in which it starts workers, for the first time or anew.
STARTING = frozenset({"SchedulingState", "RestartingState", "ReschedulingState", "ResizingState"})
MAX_REASON_CHARS = 300


def callbacks(channel: ActorHandle) -> list[Any]:
    """What lives in the controller of Ray Train and keeps the driver's mailbox informed."""
    return [TellController(channel), TellFailures(channel)]


class TellController(ray_private.CONTROLLER_CALLBACK.get()):  # type: ignore[misc]
    """Says where the controller is, and when it starts workers.

    No `UserCallback` besides: of one that is both, Ray calls the methods of a `UserCallback` only.
    """

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller is there; it logs what its workers raise."""
        redaction.install()
        self._channel.put_controller.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """It goes on to something else: waiting for places, starting workers, watching them, ending them."""
        name = type(current_state).__name__
        if name in STARTING and name != type(previous_state).__name__:
            self._channel.start_anew.remote()


class TellFailures(UserCallback):
    """Says which workers have failed, or are lost."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train has found them so."""
        rank, error = min(worker_exceptions.items())
        more = f" (and {len(worker_exceptions) - 1} more)" if len(worker_exceptions) > 1 else ""
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        self._channel.tell.remote(f"worker {rank}{more} failed or is lost: {type(error).__name__}: {reason}")


class StopPoll:
    """Asks the driver's mailbox now and then whether to stop, without waiting for the answer."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._answer: ray.ObjectRef | None = None
        self._asked_s = 0.0
        self._stop = False

    def __call__(self) -> bool:
        """Whether the last answer was yes."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = bool(ray.get(self._answer))
            self._answer = None
        if self._answer is None and time.monotonic() - self._asked_s >= POLL_INTERVAL_S:
            self._answer, self._asked_s = self._channel.stop_requested.remote(), time.monotonic()
        return self._stop
