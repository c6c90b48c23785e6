"""`serve run serve.app:build model=URI [key=value …]`, from the repository root.

`build` checks its arguments and finds the models before anything starts; then the deployments come up: `gateway`
(HTTP) and one `encoder` a model (replicated and batched), or `gateway` alone with `single_process=true`.
`serve/config.yaml` is the same for `serve deploy`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from dermray import storage
from dermray.errors import ConfigError, DermRayError
from dermray.index import VectorIndex
from dermray.serving import ModelSource, locate
from serve.auth import Access
from serve.catalogue import Catalogue, Fleet, Served, Slot
from serve.errors import RETRY_AFTER_S
from serve.replica import EncoderReplica, LocalFleet, ReplicaFleet
from serve.rollout import Rollout, load_ontology
from serve.routes import create_app
from serve.settings import ServeArgumentError, ServeConfig, parse_arguments

REGISTRY_PREFIX = "models:/"
MAX_GATEWAY_REQUESTS = 1024
# How soon a replica that died is replaced.
HEALTH_CHECK_PERIOD_S = 2.0


@serve.ingress()
class Gateway:
    """The HTTP side: one process that speaks for all encoder replicas, or one of several with encoders inside."""

    # Ray Serve awaits an ingress's constructor, which mypy does not know of.
    async def __init__(  # type: ignore[misc]
        self, sources: tuple[ModelSource, ...], settings: ServeConfig, access: Access, *encoders: DeploymentHandle
    ) -> None:
        access.require_safe_host(_bound_host())
        fleets: list[Fleet] = [ReplicaFleet(one) for one in encoders] or [LocalFleet(settings) for _ in sources]
        slots = [await _slot(fleet, source) for fleet, source in zip(fleets, sources, strict=True)]
        catalogue = Catalogue(slots)
        index = await asyncio.to_thread(VectorIndex.load, settings.index) if settings.index else None
        if index is not None:
            index.require_model(catalogue.default.model.digest, catalogue.default.model.preprocessing_digest)
        rollouts = _rollouts(settings, slots, fleets)
        every_s = settings.rollout.poll_s
        # Kept, because the event loop itself keeps no hold on its tasks.
        self._polls = [asyncio.create_task(one.poll(every_s)) for one in rollouts.values() if every_s]
        self._app = create_app(catalogue, settings.limits, access=access, index=index, rollouts=rollouts)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once the constructor has run."""
        return self._app


def build(args: dict[str, Any]) -> serve.Application:
    """The application from `key=value` arguments (`serve.settings.ServeConfig` lists them).

    Raises:
        ServeArgumentError: an argument is wrong or a model is not there, in one line.
    """
    settings = parse_arguments(args)
    try:
        # Read here and handed on as digests: a replica's environment may be another one.
        access = Access.load(settings.auth)
        sources = find_models(settings)
        _record(sources, settings)
    except DermRayError as error:
        raise ServeArgumentError(str(error)) from error
    return application(sources, settings, access)


def find_models(settings: ServeConfig) -> tuple[ModelSource, ...]:
    """Resolve `settings.model` and `settings.models`, the default first.

    Raises:
        DermRayError: one is not there, or two have one name.
    """
    sources = (find_model(settings), *(_find(uri, None, settings) for uri in settings.models))
    names = [source.name for source in sources]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"models: two models are called {repeated!r}; rename the first one with name=")
    return sources


def find_model(settings: ServeConfig) -> ModelSource:
    """Resolve `settings.model`, through the MLflow registry when it begins with `models:/`.

    Raises:
        DermRayError: no such model, version, alias or ontology.
    """
    source = _find(settings.model, settings.name, settings)
    if settings.labels is not None:
        source = replace(source, classes=settings.labels)
    if settings.ontology is not None:
        if not storage.exists(settings.ontology):
            raise ConfigError(f"ontology: {settings.ontology} does not exist")
        source = replace(source, ontology_uri=storage.normalise(settings.ontology))
    return source


def application(sources: tuple[ModelSource, ...], settings: ServeConfig, access: Access) -> serve.Application:
    """The deployments, bound together."""
    gateway = serve.deployment(Gateway, name="gateway")
    if settings.single_process:
        # The engine refuses before Ray would, in the shape of all refusals.
        options = _scaling(settings) | {"max_ongoing_requests": MAX_GATEWAY_REQUESTS}
        return gateway.options(ray_actor_options=_resources(settings), **options).bind(sources, settings, access)
    # A replica takes more requests than one batch holds, so that the next batch fills during a forward pass.
    max_ongoing = max(16, 2 * settings.max_batch_size)
    encoder = serve.deployment(EncoderReplica).options(
        max_ongoing_requests=max_ongoing,
        max_queued_requests=settings.limits.queued_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options=_resources(settings),
        **_scaling(settings),
    )
    encoders = [
        encoder.options(name="encoder" if number == 1 else f"encoder-{number}").bind(source, settings)
        for number, source in enumerate(sources, 1)
    ]
    return gateway.options(max_ongoing_requests=MAX_GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0}).bind(
        sources, settings, access, *encoders
    )


def _scaling(settings: ServeConfig) -> dict[str, Any]:
    """A fixed number of replicas, or more of them while each has more than a batch to do."""
    refusal = BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S)
    if settings.max_replicas is None:
        return {"num_replicas": settings.num_replicas, "backpressure_config": refusal}
    if settings.max_replicas < settings.num_replicas:
        raise ServeArgumentError("max_replicas: must not be below num_replicas")
    autoscaling = {
        "min_replicas": settings.num_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": settings.max_batch_size,
    }
    return {"autoscaling_config": autoscaling, "backpressure_config": refusal}


def _resources(settings: ServeConfig) -> dict[str, float]:
    return {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}


def _find(uri: str, name: str | None, settings: ServeConfig) -> ModelSource:
    if not uri.startswith(REGISTRY_PREFIX):
        return locate(uri, name=name)
    from serve.registry import MlflowRegistry

    return MlflowRegistry(settings).resolve(uri, name)


def _record(sources: tuple[ModelSource, ...], settings: ServeConfig) -> None:
    """Let MLflow know which of its versions go up."""
    registered = [source for source in sources if source.version is not None]
    if not registered:
        return
    from serve.registry import MlflowRegistry

    registry = MlflowRegistry(settings)
    for source in registered:
        registry.record_deployment(source)


async def _slot(fleet: Fleet, source: ModelSource) -> Slot:
    return Slot(Served(await fleet.start(source), load_ontology(source), source))


def _rollouts(settings: ServeConfig, slots: list[Slot], fleets: list[Fleet]) -> dict[str, Rollout]:
    """One for each model that was asked for by an alias, by the model's name."""
    uris = (settings.model, *settings.models)
    followed = [number for number, uri in enumerate(uris) if uri.startswith(REGISTRY_PREFIX) and "@" in uri]
    if not followed:
        return {}
    from serve.registry import MlflowRegistry

    registry = MlflowRegistry(settings)
    return {
        slots[number].current.model.name: Rollout(slots[number], fleets[number], registry, uris[number])
        for number in followed
    }


def _bound_host() -> str | None:
    """The address that Serve's HTTP side listens on; None when Ray does not say, which counts as everywhere."""
    try:
        # There is no public way to ask from inside a replica.
        from ray.serve.context import _get_global_client

        return str(_get_global_client().http_config.host)
    except (ImportError, AttributeError, RuntimeError):
        return None
