"""Between a sweep's driver and its trials. Its process lives as long as the sweep and loads next to nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

Figures = dict[str, Any]


class Box:
    """What the trials are to do, how far they are, where their trainers are, why they failed."""

    def __init__(self) -> None:
        self._begun: dict[str, list[ObjectRef]] = {}
        self._validations: dict[str, asyncio.Queue[Figures | None]] = {}
        self._steps: dict[str, int] = {}
        self._controllers: dict[str, ActorHandle] = {}
        self._reasons: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._interrupted = False

    async def put_trial(self, name: str, trial: list[ObjectRef]) -> None:
        """The driver begins a trial: a reference to it and to its record, which only the trial's process opens."""
        self._begun[name] = trial

    async def trial(self, name: str) -> list[ObjectRef]:
        """What the driver put for a trial."""
        return self._begun[name]

    async def open(self, name: str) -> None:
        """A trial's process begins to train; whoever waits for validations of an earlier process gets none of these."""
        self._validations[name] = asyncio.Queue(maxsize=1)

    async def put_validation(self, name: str, figures: Figures, controller: ActorHandle | None) -> None:
        """The controller of a trial's trainer hands in a validation and says where it is.

        It waits while the one before is not taken, so that a trial does not train far beyond what its scheduler has
        seen; a stopped trial's validations are nobody's.
        """
        if controller is not None:
            self._controllers[name] = controller
        await self._put(name, figures)

    async def close(self, name: str) -> None:
        """A trial has ended its training: there are no more validations than those handed in."""
        await self._put(name, None)

    async def take_validation(self, name: str) -> Figures | None:
        """A trial's process takes the next validation, as soon as there is one; None: there are no more."""
        return await self._validations[name].get()

    async def _put(self, name: str, figures: Figures | None) -> None:
        if name not in self._stopped:
            await self._validations[name].put(figures)

    async def put_step(self, name: str, step: int) -> None:
        """A trial says how far its training is."""
        self._steps[name] = step

    async def steps(self) -> dict[str, int]:
        """The driver asks how far trials are; those that have not said so are left out."""
        return dict(self._steps)

    async def take_controller(self, name: str) -> ActorHandle | None:
        """The controller of a trial, which is forgotten here; None if it never reported."""
        return self._controllers.pop(name, None)

    async def put_stop(self, name: str) -> None:
        """The driver is about to end a trial's trainer, because the trial was stopped: none of its puts may wait."""
        self._stopped.add(name)
        waiting = self._validations.get(name)
        while waiting is not None and not waiting.empty():
            waiting.get_nowait()

    async def is_stopped(self, name: str) -> bool:
        """A trial whose trainer failed asks whether that was meant."""
        return name in self._stopped

    async def put_reason(self, name: str, reason: str) -> None:
        """A trial says why it fails."""
        self._reasons[name] = reason

    async def take_reason(self, name: str) -> str | None:
        """Why a trial failed; None if it could not say."""
        return self._reasons.pop(name, None)

    async def interrupt(self) -> None:
        """The driver was asked to end: trials are to write a checkpoint and end too."""
        self._interrupted = True

    async def is_interrupted(self) -> bool:
        """A trial asks whether the sweep is to end."""
        return self._interrupted


Mailbox = ray.remote(num_cpus=0)(Box)
