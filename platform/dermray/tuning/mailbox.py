"""Between a sweep's driver and its trials. Its process lives as long as the sweep and loads next to nothing."""

from __future__ import annotations

import ray
from ray import ObjectRef
from ray.actor import ActorHandle


@ray.remote(num_cpus=0)
class Mailbox:
    """What the trials are to do, where their trainers are, why they failed."""

    def __init__(self) -> None:
        self._begun: dict[str, list[ObjectRef]] = {}
        self._controllers: dict[str, ActorHandle] = {}
        self._reasons: dict[str, str] = {}
        self._stopped: set[str] = set()

    def put_trial(self, name: str, trial: list[ObjectRef]) -> None:
        """The driver begins a trial: a reference to it and to its record, which only the trial's process opens."""
        self._begun[name] = trial

    def trial(self, name: str) -> list[ObjectRef]:
        """What the driver put for a trial."""
        return self._begun[name]

    def put_controller(self, name: str, controller: ActorHandle) -> None:
        """The controller of a trial's trainer says where it is."""
        self._controllers[name] = controller

    def take_controller(self, name: str) -> ActorHandle | None:
        """The controller of a trial, which is forgotten here; None if it never reported."""
        return self._controllers.pop(name, None)

    def put_stop(self, name: str) -> None:
        """The driver is about to end a trial's trainer, because the trial was stopped."""
        self._stopped.add(name)

    def is_stopped(self, name: str) -> bool:
        """A trial whose trainer failed asks whether that was meant."""
        return name in self._stopped

    def put_reason(self, name: str, reason: str) -> None:
        """A trial says why it fails."""
        self._reasons[name] = reason

    def take_reason(self, name: str) -> str | None:
        """Why a trial failed; None if it could not say."""
        return self._reasons.pop(name, None)
