"""One process decides which version answers, and every gateway follows it: roll-out with several gateways.

The `rollout` deployment owns the `Rollout` of each model that was asked for by an alias. Gateways wait at it for the
next change, so that all of them have it at once, and hand on what an administrator asks of any of them. They also keep
the latest standings: a `rollout` that begins anew, because its process died, takes them over from whoever asks first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from dermray import redaction
from dermray.predict import ModelSource
from dermray.service.fleet.catalogue import Fleet, Served, Slot
from dermray.service.fleet.replica import ReplicaFleet, faults_are_refusals
from dermray.service.fleet.rollout import Outcome, Rollout, Rollouts, Standings, load_ontology
from dermray.service.settings import ServeConfig

logger = logging.getLogger("dermray.serve")
GATEWAY = "gateway"
# After a gateway found nobody to ask.
RETRY_S = 0.5


def followed(settings: ServeConfig, sources: Sequence[ModelSource]) -> dict[int, str]:
    """The aliases that are followed, by the number of their model."""
    uris = (settings.model, *settings.models)
    return {number: uris[number] for number, source in enumerate(sources) if source.alias is not None}


class RolloutReplica(Rollouts):
    """The `rollout` deployment: one process that looks at aliases, decides and records."""

    def __init__(self, sources: tuple[ModelSource, ...], settings: ServeConfig, *encoders: DeploymentHandle) -> None:
        from dermray.service.fleet.registry import MlflowRegistry

        redaction.install()
        registry = MlflowRegistry(settings)
        handles = encoders or [own_gateways()] * len(sources)
        super().__init__(
            {
                sources[number].name: Rollout(sources[number], ReplicaFleet(handles[number]), registry, uri)
                for number, uri in followed(settings, sources).items()
            },
            settings.rollout.poll_s,
        )


def own_gateways() -> DeploymentHandle:
    """The gateways of this application, which hold the models with `single_process`."""
    return serve.get_deployment_handle(GATEWAY, serve.get_replica_context().app_name)


class Follower:
    """What a gateway keeps of the standings, and how it comes to serve them."""

    def __init__(self, owner: DeploymentHandle, fleets: Mapping[str, Fleet]) -> None:
        self._owner = owner
        self._fleets = fleets
        self._known: Standings = {}
        self._slots: dict[str, Slot] = {}
        self._taking = asyncio.Lock()

    async def begin(self) -> Standings:
        """The standings at the start of this gateway."""
        with faults_are_refusals():
            self._known = await self._owner.standings.remote({})
        return self._known

    async def follow(self, slots: Mapping[str, Slot]) -> None:
        """Serve what the standings say from now on, by the slots of the models' names."""
        self._slots = dict(slots)
        while True:
            try:
                with faults_are_refusals():
                    standings = await self._owner.standings.remote(self._known)
                await self._take(standings)
            except Exception as error:
                # Whatever it is: a gateway that follows no more would answer with an old version for good.
                logger.warning("which version answers is not known just now: %s", error)
                await asyncio.sleep(RETRY_S)

    async def ask(self, method: str, name: str) -> Outcome:
        """Have `look` or `roll_back` done, and serve what came of it.

        Raises:
            Refusal: see `Rollout`; 503 when there is nobody to ask just now.
            DermRayError: see `Rollout`.
        """
        with faults_are_refusals():
            outcome, standings = await getattr(self._owner, method).remote(name, self._known)
        await self._take(standings)
        return outcome

    async def _take(self, standings: Standings) -> None:
        async with self._taking:
            for name, standing in standings.items():
                if standing.num_changes > self._known[name].num_changes:
                    source, slot = standing.current, self._slots[name]
                    if slot.current.source != source:
                        backend = await self._fleets[name].start(source)
                        slot.current = Served(backend, load_ontology(source), source)
                    self._known = self._known | {name: standing}


class AskedChanges:
    """The `Changes` of one model, asked of the process that owns them."""

    def __init__(self, follower: Follower, name: str) -> None:
        self._follower = follower
        self._name = name

    async def look(self, *, again: bool = False) -> Outcome:
        """See `Rollout.look`."""
        return await self._follower.ask("look", self._name)

    async def roll_back(self) -> Outcome:
        """See `Rollout.roll_back`."""
        return await self._follower.ask("roll_back", self._name)


def deployment(
    sources: tuple[ModelSource, ...], settings: ServeConfig, encoders: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """The `rollout` deployment, bound; None where no model follows an alias."""
    if not followed(settings, sources):
        return None
    rollout = serve.deployment(RolloutReplica, name="rollout").options(
        max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}, **options
    )
    return rollout.bind(sources, settings, *encoders)
