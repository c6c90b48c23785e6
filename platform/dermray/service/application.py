"""The builder behind `serve run serve.app:build model=URI [key=value …]`, and the deployments that it binds together.

`build` checks its arguments and finds the models before anything starts; then the deployments come up: `gateway`
(HTTP, two of them) and one `encoder` a model (replicated and batched), or `gateway` alone with `single_process=true`;
and `rollout`, where a model follows an alias.
With `serve/config.yaml`, `serve deploy` calls it too.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig

from dermray import storage
from dermray.errors import ConfigError, DermRayError
from dermray.predict import ModelSource, locate
from dermray.progress import busy
from dermray.service.engine.engine import max_ongoing
from dermray.service.fleet import command, following
from dermray.service.fleet.following import GATEWAY
from dermray.service.fleet.replica import EncoderReplica
from dermray.service.gateway import Gateway
from dermray.service.http.auth import Access
from dermray.service.http.origins import Origins
from dermray.service.refusals import RETRY_AFTER_S
from dermray.service.settings import ServeArgumentError, ServeConfig, parse_arguments

REGISTRY_PREFIX = "models:/"
MAX_GATEWAY_REQUESTS = 1024
# How soon a replica that died is seen, and how long one may take to say that it is there. Serve asks three times before
# it replaces one that hangs.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 5.0
# Beyond the time that a request may take, before a replica that is to go is killed.
GRACE_S = 5.0
GRACEFUL_LOOK_S = 0.2


def build(args: dict[str, Any]) -> serve.Application:
    """The application from `key=value` arguments (`dermray.service.settings.ServeConfig` lists them).

    Raises:
        ServeArgumentError: an argument is wrong or a model is not there, in one line.
    """
    settings = parse_arguments(args)
    # Not on stdout, where `serve build` writes its YAML.
    say = functools.partial(print, file=sys.stderr, flush=True)
    say(f"dermray: looking for {settings.model} …")
    try:
        command.attend(settings, GATEWAY)
        # Read here and handed on as digests: a replica's environment may be another one.
        access = Access.load(settings.auth, Origins(settings.allowed_hosts, settings.cors))
        with busy(f"dermray: looking for {settings.model}", say):
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
    encoder = serve.deployment(EncoderReplica).options(
        max_ongoing_requests=max_ongoing(settings),
        # Each gateway has a queue of its own.
        max_queued_requests=-(-settings.limits.queued_requests // settings.num_gateways),
        ray_actor_options=_resources(settings),
        **_health(settings),
        **_scaling(settings),
    )
    encoders = [
        encoder.options(name="encoder" if number == 1 else f"encoder-{number}").bind(source, settings)
        for number, source in enumerate(() if settings.single_process else sources, 1)
    ]
    # The engine, or the encoders, refuse before Ray would, in the shape of all refusals.
    gateway = serve.deployment(Gateway, name=GATEWAY).options(
        max_ongoing_requests=MAX_GATEWAY_REQUESTS, **_health(settings)
    )
    if settings.single_process:
        gateway = gateway.options(ray_actor_options=_resources(settings), **_scaling(settings))
    else:
        gateway = gateway.options(ray_actor_options={"num_cpus": 0}, num_replicas=settings.num_gateways)
    rollout = following.deployment(sources, settings, encoders, _health(settings))
    return gateway.bind(sources, settings, access, rollout, *encoders)


def _health(settings: ServeConfig) -> dict[str, Any]:
    """How soon a replica is missed, and how long one that is to go may finish what it has begun."""
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": settings.limits.request_timeout_s + GRACE_S,
        "graceful_shutdown_wait_loop_s": GRACEFUL_LOOK_S,
        # A line a request is in the log file of Serve's proxy; figures are in /metrics.
        "logging_config": {"enable_access_log": False},
    }


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
    from dermray.service.fleet.registry import MlflowRegistry

    return MlflowRegistry(settings).resolve(uri, name)


def _record(sources: tuple[ModelSource, ...], settings: ServeConfig) -> None:
    """Let MLflow know which of its versions go up."""
    registered = [source for source in sources if source.version is not None]
    if not registered:
        return
    from dermray.service.fleet.registry import MlflowRegistry

    registry = MlflowRegistry(settings)
    for source in registered:
        registry.record_deployment(source)
