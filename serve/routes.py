"""The endpoints, over any `Backend`. `create_app` makes the whole application, so tests need no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import dermray
from dermray.corpus.ontology import Ontology
from dermray.serving import ServedModel
from serve import payload, uploads
from serve.admission import Admission
from serve.backend import Backend, Rejection, Timing
from serve.errors import Refusal, from_validation, respond, unavailable
from serve.metrics import Metrics
from serve.page import Page
from serve.schemas import (
    ClassifyResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelIdentity,
    ModelsResponse,
)
from serve.settings import LimitsConfig

PROBE_TIMEOUT_S = 10.0
DESCRIPTION = (
    "Embeddings and zero-shot classification of dermatology photographs. For research; not a medical device and not "
    "a diagnosis. Images are data URIs or multipart files: links are never fetched, and nothing sent here is kept."
)


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints share."""

    backend: Backend
    limits: LimitsConfig
    metrics: Metrics
    page: Page
    ontology: Ontology | None = None


async def _service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "unusable image, empty or overlong text, no or bad class list, wrong dimension",
        404: "no such model here",
        413: "body or list of inputs too large",
        422: "the body does not fit its schema; the message names the field",
        429: "the queue is full; try again after Retry-After seconds",
        503: "the model cannot answer now; try again after Retry-After seconds",
        504: "no answer within the time limit",
    }.items()
}
router = APIRouter()


def create_app(backend: Backend, limits: LimitsConfig, ontology: Ontology | None = None) -> FastAPI:
    """The whole HTTP application over `backend`."""
    metrics = Metrics(backend.model)
    app = FastAPI(
        title="DermRay",
        version=dermray.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = Service(backend, limits, metrics, Page.load(), ontology)
    app.include_router(router)
    app.add_exception_handler(HTTPException, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_middleware(Admission, model=backend.model, limits=limits, metrics=metrics)
    return app


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.state.error_code = getattr(error, "code", f"http_{error.status_code}")
    return respond(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _answer_refusal(request, from_validation(error))


@router.get("/", include_in_schema=False)
async def page(request: Request, service: ServiceDep) -> Response:
    """The web page."""
    return service.page.answer("index.html", request)


@router.get("/docs", include_in_schema=False)
async def reference(request: Request, service: ServiceDep) -> Response:
    """The API reference, drawn from `/openapi.json` without any outside resource."""
    return service.page.answer("docs.html", request)


@router.get("/assets/{name}", include_in_schema=False)
async def asset(name: str, request: Request, service: ServiceDep) -> Response:
    """A file of the web page."""
    return service.page.answer(f"assets/{name}", request)


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsResponse,
    responses=ERRORS,
    tags=["inference"],
    summary="Texts and images to unit vectors",
)
async def embeddings(body: EmbeddingsRequest, service: ServiceDep) -> Response:
    """OpenAI-compatible. One unusable image refuses its whole request, naming the input; others are not affected."""
    started_s = time.perf_counter()
    model = service.backend.model
    _require_model(body.model, model)
    if body.dimensions is not None and body.dimensions != model.embedding_dim:
        message = f"dimensions: this model makes vectors of {model.embedding_dim}, not {body.dimensions}"
        raise Refusal(400, message, code="unsupported_dimensions", param="dimensions")
    inputs = payload.split_inputs(body, service.limits)
    embedded = await service.backend.embed(inputs.images, inputs.texts)
    if embedded.rejections:
        raise _rejected(embedded.rejections[0], body, inputs.order)
    service.metrics.observe_items(len(inputs.images), len(inputs.texts), embedded.timing)
    vectors = [embedded.images[at] if is_image else embedded.texts[at] for is_image, at in inputs.order]
    num_tokens = len(inputs.texts) * model.context_length
    return _json(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": payload.encode_vector(vector, body.encoding_format),
                }
                for index, vector in enumerate(vectors)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "normalized": True,
            "model_info": _identity(model).model_dump(),
        },
        embedded.timing,
        started_s,
    )


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse,
    responses=ERRORS,
    tags=["inference"],
    summary="Rank classes for one image",
    openapi_extra=uploads.CLASSIFY_BODY,
)
async def classify(request: Request, service: ServiceDep) -> Response:
    """Zero-shot: the classes are texts. JSON with a data URI, or multipart with a file."""
    started_s = time.perf_counter()
    model = service.backend.model
    body, image = await uploads.read_classify(request, service.limits)
    _require_model(body.model, model)
    labels = payload.choose_labels(body, model.classes, service.ontology, service.limits)
    templates = payload.check_templates(body.templates, service.limits)
    classified = await service.backend.classify(image, labels, templates)
    if classified.rejection is not None:
        raise _unusable(classified.rejection, "image")
    service.metrics.observe_items(1, 0, classified.timing)
    ranking = [{**asdict(one), "path": _path(service.ontology, one.label)} for one in classified.ranking]
    return _json(
        {
            "object": "classification",
            "ranking": ranking,
            "model": model.name,
            "model_info": _identity(model).model_dump(),
            "logit_scale": model.logit_scale,
        },
        classified.timing,
        started_s,
    )


@router.get("/v1/models", response_model=ModelsResponse, tags=["models"], summary="What is served here?")
async def models(service: ServiceDep) -> ModelsResponse:
    """The model's name, version, alias, digests, sizes and class list."""
    model = service.backend.model
    card = ModelCard(
        id=model.name,
        names=sorted(model.names),
        embedding_dim=model.embedding_dim,
        image_size=model.image_size,
        context_length=model.context_length,
        parameters=model.parameters,
        logit_scale=model.logit_scale,
        classes=list(model.classes),
        model_info=_identity(model),
    )
    return ModelsResponse(data=[card])


@router.get("/healthz", response_model=Health, tags=["health"], summary="Is the process up?")
async def healthz() -> Health:
    """Answers without asking the model."""
    return Health(status="ok")


@router.get(
    "/readyz",
    response_model=Health,
    responses={503: ERRORS[503]},
    tags=["health"],
    summary="Does the model answer?",
)
async def readyz(service: ServiceDep) -> Health:
    """Sends a question of our own through the model."""
    try:
        await asyncio.wait_for(service.backend.probe(), PROBE_TIMEOUT_S)
    except TimeoutError:
        raise unavailable(f"the model did not answer within {PROBE_TIMEOUT_S:g} s") from None
    return Health(status="ready")


@router.get("/metrics", tags=["health"], summary="Counters for Prometheus", response_class=Response)
async def metrics(service: ServiceDep) -> Response:
    """Requests, failures by code, latencies, stages inside the encoders, batch sizes."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _require_model(asked: str | None, model: ServedModel) -> None:
    if asked and asked not in model.names:
        message = f"model: {asked[:80]!r} is not served here; ask for {model.name!r} or leave the field out"
        raise Refusal(404, message, code="model_not_found", param="model")


def _rejected(rejection: Rejection, body: EmbeddingsRequest, order: Sequence[tuple[bool, int]]) -> Refusal:
    position = order.index((True, rejection.index))
    return _unusable(rejection, "input" if isinstance(body.input, str) else f"input.{position}")


def _unusable(rejection: Rejection, param: str) -> Refusal:
    return Refusal(400, f"{param}: {rejection.message}", code=rejection.reason, param=param)


def _identity(model: ServedModel) -> ModelIdentity:
    return ModelIdentity(
        name=model.name,
        version=model.version,
        alias=model.alias,
        digest=model.digest,
        preprocessing_digest=model.preprocessing_digest,
    )


def _path(ontology: Ontology | None, label: str) -> list[str] | None:
    node = ontology.resolve(label) if ontology is not None else None
    return ontology.path(node) if ontology is not None and node is not None else None


def _json(content: dict[str, Any], timing: Timing, started_s: float) -> JSONResponse:
    stages = {
        "decode": timing.decode_s,
        "queue": timing.queue_s,
        "forward": timing.forward_s,
        "classifier": timing.classifier_s,
        "total": time.perf_counter() - started_s,
    }
    header = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in stages.items())
    return JSONResponse(content, headers={"Server-Timing": header})
