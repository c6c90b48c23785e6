"""`serve run serve.app:build model=URI [key=value …]`, from the repository root.

`build` checks its arguments and finds the model before anything starts; then two deployments come up: `gateway`
(HTTP) and `encoder` (the model, replicated and batched). `serve/config.yaml` is the same for `serve deploy`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from dermray import storage
from dermray.corpus.ontology import Ontology
from dermray.errors import ConfigError, DermRayError
from dermray.serving import ModelSource, locate
from serve.replica import EncoderReplica, ReplicaBackend
from serve.routes import create_app
from serve.settings import ServeArgumentError, ServeConfig, parse_arguments

REGISTRY_PREFIX = "models:/"
MAX_GATEWAY_REQUESTS = 1024


@serve.ingress()
class Gateway:
    """The HTTP side: one process that speaks for all encoder replicas."""

    # Ray Serve awaits an ingress's constructor, which mypy does not know of.
    async def __init__(  # type: ignore[misc]
        self, source: ModelSource, settings: ServeConfig, encoder: DeploymentHandle
    ) -> None:
        self._backend = await ReplicaBackend.connect(encoder)
        self._limits = settings.limits
        self._ontology = Ontology.load(source.ontology_uri) if source.ontology_uri else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once the constructor has run."""
        return create_app(self._backend, self._limits, self._ontology)


def build(args: dict[str, Any]) -> serve.Application:
    """The application from `key=value` arguments (`serve.settings.ServeConfig` lists them).

    Raises:
        ServeArgumentError: an argument is wrong or the model is not there, in one line.
    """
    settings = parse_arguments(args)
    try:
        source = find_model(settings)
    except DermRayError as error:
        raise ServeArgumentError(str(error)) from error
    return application(source, settings)


def find_model(settings: ServeConfig) -> ModelSource:
    """Resolve `settings.model`, through the MLflow registry when it begins with `models:/`.

    Raises:
        DermRayError: no such model, version, alias or ontology.
    """
    if settings.model.startswith(REGISTRY_PREFIX):
        source = _from_registry(settings)
    else:
        source = locate(settings.model, name=settings.name)
    if settings.labels is not None:
        source = replace(source, classes=settings.labels)
    if settings.ontology is not None:
        if not storage.exists(settings.ontology):
            raise ConfigError(f"ontology: {settings.ontology} does not exist")
        source = replace(source, ontology_uri=storage.normalise(settings.ontology))
    return source


def application(source: ModelSource, settings: ServeConfig) -> serve.Application:
    """The two deployments, bound together."""
    # A replica takes more requests than one batch holds, so that the next batch fills during a forward pass.
    max_ongoing = max(16, 2 * settings.max_batch_size)
    encoder = serve.deployment(EncoderReplica, name="encoder").options(
        num_replicas=settings.num_replicas,
        max_ongoing_requests=max_ongoing,
        max_queued_requests=settings.limits.queued_requests,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    gateway = serve.deployment(Gateway, name="gateway").options(
        max_ongoing_requests=MAX_GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(source, settings, encoder.bind(source, settings))


def _from_registry(settings: ServeConfig) -> ModelSource:
    from dermray import tracking

    resolved = tracking.resolve_model(settings.model, settings.tracking)
    return locate(
        resolved.folder_uri,
        name=settings.name or resolved.name,
        version=resolved.version,
        alias=resolved.alias,
    )
