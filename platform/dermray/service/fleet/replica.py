"""Encoder replicas: engines behind a Serve handle, several versions side by side while one follows another."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from dermray import redaction
from dermray.errors import DermRayError, ModelError
from dermray.predict import ModelSource, ServedModel
from dermray.release.golden import Check
from dermray.service.engine.backend import VERBS, Backend
from dermray.service.engine.engine import Engine
from dermray.service.engine.verb import Verb
from dermray.service.refusals import Refusal, unavailable
from dermray.service.settings import ServeConfig

# The version that answers, the one before it (for a roll-back), and one more while it is examined.
MAX_VERSIONS = 3
# An engine that has answered nobody for so long is asked by the health check, and by a readiness probe.
QUIET_S = 10.0
FRESH_S = 2.0


class Engines:
    """The loaded versions of one model, the latest used kept. Loads off the event loop, each version once."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self._loaded: OrderedDict[ModelSource, Engine] = OrderedDict()
        self._loading = asyncio.Lock()

    async def of(self, source: ModelSource) -> Engine:
        """The engine of a version, loaded when it is not yet there.

        Raises:
            ModelError: it cannot be loaded.
        """
        engine = self._loaded.get(source)
        if engine is None:
            async with self._loading:
                engine = self._loaded.get(source)
                if engine is None:
                    engine = await asyncio.to_thread(Engine, source, self._settings)
                    self._loaded[source] = engine
                    while len(self._loaded) > MAX_VERSIONS:
                        self._loaded.popitem(last=False)
        if source in self._loaded:
            self._loaded.move_to_end(source)
        return engine

    async def examine(self, source: ModelSource) -> list[Check]:
        """What a version shows before it is served; one that cannot be loaded has failed."""
        try:
            engine = await self.of(source)
            return await asyncio.to_thread(engine.examine)
        except ModelError as error:
            return [Check("loads", False, str(error))]

    async def check(self) -> None:
        """Ask every loaded version that has not answered lately; returns soon, whatever they have to do.

        Raises:
            ModelError: one gives no usable answer, or none for as long as a request may take.
        """
        await asyncio.gather(*(engine.check_soon(QUIET_S) for engine in list(self._loaded.values())))


class EncoderReplica:
    """One process with a copy of the model: what a Serve handle reaches."""

    async def __init__(self, source: ModelSource, settings: ServeConfig) -> None:  # type: ignore[misc]
        redaction.install()
        self._engines = Engines(settings)
        await self._engines.of(source)

    async def describe(self, source: ModelSource) -> ServedModel:
        """The identity of a loaded version."""
        return (await self._engines.of(source)).model

    async def ask(self, source: ModelSource, verb: str, *question: Any) -> Any:
        """See `Backend.ask`; verbs go by their names between processes."""
        return await (await self._engines.of(source)).ask(VERBS[verb], *question)

    async def probe(self, source: ModelSource) -> None:
        """See `Backend.probe`."""
        await (await self._engines.of(source)).check(FRESH_S)

    async def examine(self, source: ModelSource) -> list[Check]:
        """See `Engines.examine`."""
        return await self._engines.examine(source)

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises or hangs."""
        await self._engines.check()


@contextlib.contextmanager
def faults_are_refusals() -> Iterator[None]:
    """What a handle may raise, as the 429 or 503 that it means, or as the error of ours that it carries."""
    try:
        yield
    except BackPressureError:
        message = "too many requests are waiting for the model"
        raise Refusal(429, message, code="queue_full", retry=True) from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
        raise unavailable("the model is restarting") from None
    except RayTaskError as error:
        if isinstance(error.cause, ModelError):
            raise unavailable("the model gives no usable answer") from error
        if isinstance(error.cause, (Refusal, DermRayError)):
            raise error.cause from None
        raise


class ReplicaBackend(Backend):
    """The `Backend` that asks encoder replicas through a Serve handle, and turns their faults into refusals."""

    def __init__(self, handle: DeploymentHandle, source: ModelSource, model: ServedModel) -> None:
        self._handle = handle
        self._source = source
        self._model = model

    @property
    def model(self) -> ServedModel:
        """See `Backend.model`."""
        return self._model

    async def ask(self, verb: Verb[Any, Any], *question: Any) -> Any:
        """See `Backend.ask`."""
        return await self._call("ask", verb.name, *question)

    async def probe(self) -> None:
        """See `Backend.probe`."""
        await self._call("probe")

    async def _call(self, method: str, *arguments: Any) -> Any:
        with faults_are_refusals():
            response = getattr(self._handle, method).remote(self._source, *arguments)
            try:
                return await response
            except asyncio.CancelledError:
                # The client has left or its time is over; the replica would not hear of it by itself.
                response.cancel()
                raise


class ReplicaFleet:
    """Where versions run: every replica of an encoder deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def start(self, source: ModelSource) -> Backend:
        """Have a version loaded and return what answers with it."""
        with faults_are_refusals():
            return ReplicaBackend(self._handle, source, await self._handle.describe.remote(source))

    async def examine(self, source: ModelSource) -> list[Check]:
        """Have every replica load and examine a version.

        Raises:
            Refusal: 503 when a replica dies meanwhile, or there is none just now.
        """
        with faults_are_refusals():
            reports = await self._handle.broadcast("examine", source).results_async()
        if not reports:
            raise unavailable("the model is restarting")
        return [check for report in reports for check in report]


class LocalFleet:
    """Where versions run: this process."""

    def __init__(self, settings: ServeConfig) -> None:
        self._engines = Engines(settings)

    async def start(self, source: ModelSource) -> Backend:
        """Load a version and return what answers with it."""
        return LocalBackend(await self._engines.of(source))

    async def examine(self, source: ModelSource) -> list[Check]:
        """Load and examine a version."""
        return await self._engines.examine(source)

    async def check(self) -> None:
        """See `Engines.check`."""
        await self._engines.check()


@contextlib.contextmanager
def _damage_is_unavailable() -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise unavailable("the model gives no usable answer") from error


class LocalBackend(Backend):
    """The `Backend` of an engine in this process; its damaged answers become refusals."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def model(self) -> ServedModel:
        """See `Backend.model`."""
        return self._engine.model

    async def ask(self, verb: Verb[Any, Any], *question: Any) -> Any:
        """See `Backend.ask`."""
        with _damage_is_unavailable():
            return await self._engine.ask(verb, *question)

    async def probe(self) -> None:
        """See `Backend.probe`."""
        with _damage_is_unavailable():
            await self._engine.check(FRESH_S)
