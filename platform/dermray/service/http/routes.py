"""The whole HTTP application: models, health, administration and the page here; `endpoints` ask the models.

`create_app` works over any `Backend`, so tests need no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

import dermray
from dermray.errors import DermRayError
from dermray.service.fleet.catalogue import Catalogue, Served
from dermray.service.fleet.rollout import Changes, Outcome
from dermray.service.http import endpoints
from dermray.service.http.admission import Admission
from dermray.service.http.asking import ERRORS, Service, ServiceDep, identity
from dermray.service.http.auth import Access, Audience, GuardedRoute, OpenRoute, UserRoute, authorise
from dermray.service.http.metrics import Metrics
from dermray.service.http.page import Page
from dermray.service.http.schemas import ErrorResponse, Health, ModelCard, ModelsResponse, RolloutCheck, RolloutResponse
from dermray.service.refusals import Refusal, from_validation, respond, unavailable
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import VectorIndex

PROBE_TIMEOUT_S = 3.0
DESCRIPTION = (
    "Embeddings, zero-shot classification, concepts and search for dermatology photographs. For research; not a "
    "medical device and not a diagnosis. Images are data URIs or multipart files: links are never fetched, and nothing "
    "sent here is kept."
)
CHANGES: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (401, 404, 503)},
    403: {"model": ErrorResponse, "description": "the token may ask, but not administer"},
}
READABLE_HEADERS = [
    "Retry-After",
    "Server-Timing",
    "X-DermRay-Model",
    "X-DermRay-Model-Alias",
    "X-DermRay-Model-Digest",
    "X-DermRay-Model-Version",
    "X-DermRay-Preprocessing-Digest",
]
open_routes = APIRouter(route_class=OpenRoute)
user_routes = APIRouter(route_class=UserRoute)
administration = APIRouter(prefix="/v1/admin", route_class=GuardedRoute, responses=CHANGES, tags=["administration"])


def create_app(
    catalogue: Catalogue,
    limits: LimitsConfig,
    *,
    access: Access | None = None,
    index: VectorIndex | None = None,
    rollouts: Mapping[str, Changes] | None = None,
    scrape: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The whole HTTP application over the models of `catalogue`."""
    metrics = Metrics()
    app = FastAPI(
        title="DermRay",
        version=dermray.__version__,
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    access = access or Access()
    app.state.access = access
    app.state.service = Service(catalogue, limits, metrics, Page.load(), index, dict(rollouts or {}), scrape)
    for router in (open_routes, user_routes, administration, *endpoints.ROUTERS):
        app.include_router(router)
    app.router.default = _nothing_here
    app.add_exception_handler(HTTPException, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_middleware(Admission, catalogue=catalogue, limits=limits, access=access, metrics=metrics)
    if access.origins.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=READABLE_HEADERS,
        )
    return app


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    """No route has the path; who may not ask is not told so."""
    authorise(scope, Audience.USERS)
    raise HTTPException(404)


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.state.error_code = getattr(error, "code", f"http_{error.status_code}")
    return respond(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _answer_refusal(request, from_validation(error))


@open_routes.get("/", include_in_schema=False)
async def page(request: Request, service: ServiceDep) -> Response:
    """The web page."""
    return service.page.answer("index.html", request)


@open_routes.get("/docs", include_in_schema=False)
async def reference(request: Request, service: ServiceDep) -> Response:
    """The API reference, drawn from `/openapi.json` without any outside resource."""
    return service.page.answer("docs.html", request)


@open_routes.get("/openapi.json", include_in_schema=False)
async def specification(request: Request) -> JSONResponse:
    """The OpenAPI document, with the prefix that the service is mounted under."""
    document = request.app.openapi()
    prefix = request.scope.get("root_path", "").rstrip("/")
    return JSONResponse(document | {"servers": [{"url": prefix}]} if prefix else document)


@open_routes.get("/assets/{name}", include_in_schema=False)
async def asset(name: str, request: Request, service: ServiceDep) -> Response:
    """A file of the web page."""
    return service.page.answer(f"assets/{name}", request)


@user_routes.get(
    "/v1/models",
    response_model=ModelsResponse,
    responses={401: ERRORS[401]},
    tags=["models"],
    summary="What is served here?",
)
async def models(service: ServiceDep) -> ModelsResponse:
    """Each model's name, version, alias, digests, sizes and class list; the first one is the default."""
    return ModelsResponse(data=[_card(served, service.index) for served in service.catalogue.served])


@administration.post(
    "/models/{name}/refresh",
    response_model=RolloutResponse,
    summary="Look at the registry's alias now, and follow it when the version passes",
)
async def refresh(name: str, service: ServiceDep) -> RolloutResponse:
    """For an administrator's token. Also tries a version again that was refused.

    No request is dropped, whatever comes of it.
    """
    try:
        return _outcome(await _rollout(service, name).look(again=True))
    except DermRayError as error:
        raise unavailable(f"the registry cannot be asked: {error}") from error


@administration.post(
    "/models/{name}/rollback",
    response_model=RolloutResponse,
    responses={409: {"model": ErrorResponse, "description": "no earlier version is known"}},
    summary="Let the version before answer again",
)
async def rollback(name: str, service: ServiceDep) -> RolloutResponse:
    """For an administrator's token. Moves the registry's alias back too, so that it stays.

    Takes effect at once, or, after a restart, once the version that answered before it has been loaded and examined.
    """
    try:
        return _outcome(await _rollout(service, name).roll_back())
    except DermRayError as error:
        raise unavailable(f"/v1/models tells which version answers; the registry failed: {error}") from error


@open_routes.get("/healthz", response_model=Health, tags=["health"], summary="Is the process up?")
async def healthz() -> Health:
    """Answers without asking a model."""
    return Health(status="ok")


@open_routes.get(
    "/readyz",
    response_model=Health,
    responses={503: ERRORS[503]},
    tags=["health"],
    summary="Do the models answer?",
)
async def readyz(service: ServiceDep) -> Health:
    """Sends a question of our own through every model."""
    probes = (served.backend.probe() for served in service.catalogue.served)
    try:
        await asyncio.wait_for(asyncio.gather(*probes), PROBE_TIMEOUT_S)
    except TimeoutError:
        raise unavailable(f"a model did not answer within {PROBE_TIMEOUT_S:g} s") from None
    return Health(status="ready")


@user_routes.get(
    "/metrics",
    responses={401: ERRORS[401]},
    tags=["health"],
    summary="Counters for Prometheus",
    response_class=Response,
)
async def metrics(service: ServiceDep) -> Response:
    """Requests, failures by code, latencies, stages inside the encoders, batch sizes."""
    text = await service.scrape() if service.scrape is not None else service.render_metrics()
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _card(served: Served, index: VectorIndex | None) -> ModelCard:
    model = served.model
    return ModelCard(
        id=model.name,
        names=sorted(model.names),
        embedding_dim=model.embedding_dim,
        image_size=model.image_size,
        context_length=model.context_length,
        parameters=model.parameters,
        logit_scale=model.logit_scale,
        kind=model.kind,
        answers=sorted(model.answers),
        classes=list(model.classes),
        model_info=identity(model),
        can_search=index is not None and index.fits(model.digest, model.preprocessing_digest),
    )


def _rollout(service: Service, name: str) -> Changes:
    rollout = service.rollouts.get(name)
    if rollout is None:
        message = f"{name[:80]!r} does not follow an alias of the registry"
        raise Refusal(404, message.encode("utf-8", "replace").decode(), code="model_not_found", param="name")
    return rollout


def _outcome(outcome: Outcome) -> RolloutResponse:
    return RolloutResponse(
        event=outcome.event,
        version=outcome.version,
        previous=outcome.previous,
        checks=[RolloutCheck(**asdict(check)) for check in outcome.checks],
    )
