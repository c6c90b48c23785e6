"""What the endpoints that ask a model share, over any `Backend`; those about one image share their whole body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Protocol, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from dermray.predict import ServedModel
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.verb import Verb
from dermray.service.engine.verbs.embed import Embedded
from dermray.service.fleet.catalogue import Catalogue, Served
from dermray.service.fleet.rollout import Changes
from dermray.service.http import uploads
from dermray.service.http.admission import model_headers
from dermray.service.http.bodies import QuestionRoute
from dermray.service.http.metrics import Metrics
from dermray.service.http.page import Page
from dermray.service.http.schemas import ErrorResponse, ImageRequest, ModelIdentity
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import VectorIndex


class OfImage(Protocol):
    """What a model says of one image, or why that was rejected."""

    @property
    def rejection(self) -> Rejection | None:
        """Why it cannot be used."""

    @property
    def timing(self) -> Timing:
        """Where the time went."""


RequestT = TypeVar("RequestT", bound=ImageRequest)
SaidT = TypeVar("SaidT", bound=OfImage)


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints share."""

    catalogue: Catalogue
    limits: LimitsConfig
    metrics: Metrics
    page: Page
    index: VectorIndex | None = None
    rollouts: dict[str, Changes] = field(default_factory=dict)
    scrape: Callable[[], Awaitable[bytes]] | None = None

    def render_metrics(self) -> bytes:
        """What this process has counted."""
        return self.metrics.render(served.model for served in self.catalogue.served)


async def _service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "unusable image, empty or overlong text, no or bad class list, wrong dimension",
        401: "no or an unknown token",
        403: "a page of another site may not ask",
        404: "no such model here",
        413: "body or list of inputs too large",
        415: "neither JSON nor a form",
        421: "the Host header names no host of this service",
        422: "the body does not fit its schema, or the model answers no such question; the message says which",
        429: "the queue is full; try again after Retry-After seconds",
        503: "the model cannot answer now; try again after Retry-After seconds",
        504: "no answer within the time limit",
    }.items()
}


def new_router() -> APIRouter:
    """A router below /v1 for routes that ask a model."""
    return APIRouter(prefix="/v1", route_class=QuestionRoute, responses=ERRORS, tags=["inference"])


@dataclass(frozen=True, slots=True)
class ImageEndpoint(Generic[RequestT, SaidT]):
    """A verb about one image over HTTP: its route, and what it says and hears there.

    Attributes:
        name: of the route, `/v1/NAME`.
        summary: one line of the OpenAPI document.
        description: and the text below it.
        verb: what the model is asked; takes the image, and then `question`.
        request: the fields beside the image.
        response: the whole answer.
        question: what the verb takes beside the image. Raises `Refusal`; called off the event loop, for what texts of
            others cost.
        content: what the answer says beside its model; called off the event loop.
    """

    name: str
    summary: str
    description: str
    verb: Verb[Any, SaidT]
    request: type[RequestT]
    response: type[BaseModel]
    question: Callable[[RequestT, Served, LimitsConfig], tuple[Any, ...]]
    content: Callable[[SaidT, Served], dict[str, Any]]

    def router(self) -> APIRouter:
        """Its route: JSON with a data URI, or multipart with a file."""

        async def handle(request: Request, service: ServiceDep) -> Response:
            return await self._answer(request, service)

        router = new_router()
        router.add_api_route(
            f"/{self.name}",
            handle,
            methods=["POST"],
            name=self.name,
            summary=self.summary,
            description=self.description,
            response_model=self.response,
            openapi_extra=uploads.body_schema(self.request),
        )
        return router

    async def _answer(self, request: Request, service: Service) -> Response:
        started_s = time.perf_counter()
        body, image = await uploads.read(request, self.request, service.limits)
        served = service.catalogue.find(body.model)
        served.require(*self.verb.needs)
        question = await asyncio.to_thread(self.question, body, served, service.limits)
        said: SaidT = await getattr(served.backend, self.verb.name)(image, *question)
        if said.rejection is not None:
            raise _unusable(said.rejection, "image")
        service.metrics.observe_items(served.model, 1, 0, said.timing)
        content = await asyncio.to_thread(self.content, said, served)
        return answer(content, served.model, said.timing, started_s)


def identity(model: ServedModel) -> ModelIdentity:
    """Which model answers, as every answer says it."""
    return ModelIdentity(
        name=model.name,
        version=model.version,
        alias=model.alias,
        digest=model.digest,
        preprocessing_digest=model.preprocessing_digest,
    )


async def vectors(
    service: Service, served: Served, images: Sequence[bytes], texts: Sequence[str], field_of: Callable[[int], str]
) -> Embedded:
    """Vectors of images and texts, counted; `field_of` names the field that held an image, by its position.

    Raises:
        Refusal: 400, an image cannot be used.
    """
    embedded = await served.backend.embed(images, texts)
    if embedded.rejections:
        rejection = embedded.rejections[0]
        raise _unusable(rejection, field_of(rejection.index))
    service.metrics.observe_items(served.model, len(images), len(texts), embedded.timing)
    return embedded


def _unusable(rejection: Rejection, param: str) -> Refusal:
    return Refusal(400, f"{param}: {rejection.message}", code=rejection.reason, param=param)


def answer(content: dict[str, Any], model: ServedModel, timing: Timing, started_s: float) -> JSONResponse:
    """An answer with the identity of its model, and its stages as `Server-Timing`."""
    stages = {
        "decode": timing.decode_s,
        "queue": timing.queue_s,
        "forward": timing.forward_s,
        "classifier": timing.classifier_s,
        "total": time.perf_counter() - started_s,
    }
    header = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in stages.items())
    body = content | {"model": model.name, "model_info": identity(model).model_dump()}
    return JSONResponse(body, headers={"Server-Timing": header, **model_headers(model)})
