"""The HTTP side of the service as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from dermray import redaction
from dermray.predict import ModelSource
from dermray.release.golden import Check
from dermray.service.fleet.catalogue import Catalogue, Fleet, Served, Slot
from dermray.service.fleet.ending import Draining, Ending
from dermray.service.fleet.following import AskedChanges, Follower, own_gateways
from dermray.service.fleet.ports import bound_address, require_first
from dermray.service.fleet.replica import LocalFleet, ReplicaFleet
from dermray.service.fleet.rollout import load_ontology
from dermray.service.http.auth import Access
from dermray.service.http.metrics import merged
from dermray.service.http.routes import create_app
from dermray.service.settings import ServeConfig
from dermray.vectors.index import VectorIndex

SCRAPE_TIMEOUT_S = 2.0


@serve.ingress()
class Gateway:
    """The HTTP side: one of several processes that speak for all encoder replicas, or have encoders inside."""

    # Ray Serve awaits an ingress's constructor, which mypy does not know of.
    async def __init__(  # type: ignore[misc]
        self,
        sources: tuple[ModelSource, ...],
        settings: ServeConfig,
        access: Access,
        rollout: DeploymentHandle | None,
        *encoders: DeploymentHandle,
    ) -> None:
        redaction.install()
        host, port = bound_address()
        access = access.listening_on(host)
        require_first(port)
        self._local = {} if encoders else {source.name: LocalFleet(settings) for source in sources}
        fleets: dict[str, Fleet] = dict(self._local) or {
            source.name: ReplicaFleet(handle) for source, handle in zip(sources, encoders, strict=True)
        }
        follower = Follower(rollout, fleets) if rollout is not None else None
        standings = await follower.begin() if follower is not None else {}
        current = [standings[source.name].current if source.name in standings else source for source in sources]
        slots = {source.name: await _slot(fleets[source.name], source) for source in current}
        catalogue = Catalogue(list(slots.values()))
        index = await asyncio.to_thread(VectorIndex.load, settings.index) if settings.index else None
        if index is not None:
            index.require_model(catalogue.default.model.digest, catalogue.default.model.preprocessing_digest)
        changes = {name: AskedChanges(follower, name) for name in standings} if follower is not None else {}
        # Kept, because the event loop itself keeps no hold on its tasks.
        self._following = asyncio.create_task(follower.follow(slots)) if follower is not None else None
        self._ending = Ending()
        self._app = create_app(
            catalogue, settings.limits, access=access, index=index, rollouts=changes, scrape=scrape_all_gateways
        )
        self._app.add_middleware(Draining, ending=self._ending)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once the constructor has run."""
        return self._app

    async def examine(self, source: ModelSource) -> list[Check]:
        """See `Engines.examine`; for the versions of encoders inside."""
        return await self._local[source.name].examine(source)

    async def scrape(self) -> tuple[str, bytes]:
        """The id of this replica, and its own counters as Prometheus text."""
        return serve.get_replica_context().replica_id.unique_id, self._app.state.service.render_metrics()

    async def finish(self, within_s: float) -> int:
        """Take no more requests, and wait for those that have begun; returns how many are left."""
        return await self._ending.finish(within_s)

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises or hangs."""
        for fleet in self._local.values():
            await fleet.check()


async def scrape_all_gateways() -> bytes:
    """The counters of every gateway as one Prometheus text, each with the label `gateway`; for use inside of one."""
    asked = own_gateways().broadcast("scrape")
    answers = await asked.results_async(timeout_s=SCRAPE_TIMEOUT_S, return_exceptions=True)
    # One that dies meanwhile takes its counters along, as every process that Prometheus looks at.
    return merged(dict(one for one in answers if not isinstance(one, BaseException)))


async def _slot(fleet: Fleet, source: ModelSource) -> Slot:
    return Slot(Served(await fleet.start(source), load_ontology(source), source))
