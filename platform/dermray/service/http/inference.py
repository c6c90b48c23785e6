"""The endpoints that ask a model, over any `Backend`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from dermray.corpus.ontology import Ontology
from dermray.index import Hit, VectorIndex
from dermray.service.engine.backend import Annotated as AnnotatedImage
from dermray.service.engine.backend import Classified, Predicted, Rejection, Timing
from dermray.service.fleet.catalogue import Catalogue, Served
from dermray.service.fleet.rollout import Changes
from dermray.service.http import payload, uploads
from dermray.service.http.admission import model_headers
from dermray.service.http.bodies import QuestionRoute
from dermray.service.http.metrics import Metrics
from dermray.service.http.page import Page
from dermray.service.http.schemas import (
    DEFAULT_HITS,
    ClassifyRequest,
    ClassifyResponse,
    ConceptsRequest,
    ConceptsResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    ModelIdentity,
    PredictRequest,
    PredictResponse,
    SearchRequest,
    SearchResponse,
)
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig
from dermray.serving import RankedClass, ServedModel, roll_up

OfImageT = TypeVar("OfImageT", Classified, AnnotatedImage, Predicted)


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
router = APIRouter(prefix="/v1", route_class=QuestionRoute, responses=ERRORS, tags=["inference"])


@router.post("/embeddings", response_model=EmbeddingsResponse, summary="Texts and images to unit vectors")
async def embeddings(body: EmbeddingsRequest, service: ServiceDep) -> Response:
    """OpenAI-compatible. One unusable image refuses its whole request, naming the input; others are not affected."""
    started_s = time.perf_counter()
    served = service.catalogue.find(body.model)
    model = served.model
    if body.dimensions is not None and body.dimensions != model.embedding_dim:
        message = f"dimensions: this model makes vectors of {model.embedding_dim}, not {body.dimensions}"
        raise Refusal(400, message, code="unsupported_dimensions", param="dimensions")
    inputs = await asyncio.to_thread(payload.split_inputs, body, service.limits)
    if inputs.images:
        served.require("images")
    if inputs.texts:
        served.require("texts")
    embedded = await served.backend.embed(inputs.images, inputs.texts)
    if embedded.rejections:
        raise _rejected(embedded.rejections[0], body, inputs.order)
    service.metrics.observe_items(model, len(inputs.images), len(inputs.texts), embedded.timing)
    vectors = [embedded.images[at] if is_image else embedded.texts[at] for is_image, at in inputs.order]
    num_tokens = len(inputs.texts) * model.context_length
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": payload.encode_vector(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "normalized": True,
    }
    return _answer(content, model, embedded.timing, started_s)


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    summary="Rank classes for one image",
    openapi_extra=uploads.body_schema(ClassifyRequest),
)
async def classify(request: Request, service: ServiceDep) -> Response:
    """Zero-shot: the classes are texts. JSON with a data URI, or multipart with a file."""
    started_s = time.perf_counter()
    body, image = await uploads.read(request, ClassifyRequest, service.limits)
    served = service.catalogue.find(body.model)
    served.require("images", "texts")
    own_classes, tree = served.model.classes, served.ontology
    # What texts of others cost is computed beside the event loop, here and below.
    labels = await asyncio.to_thread(payload.choose_labels, body, own_classes, tree, service.limits)
    templates = await asyncio.to_thread(payload.choose_templates, body, service.limits)
    classified = _usable(service, served, await served.backend.classify(image, labels, templates))
    content = await asyncio.to_thread(_classification, classified.ranking, tree)
    content["logit_scale"] = served.model.logit_scale
    return _answer(content, served.model, classified.timing, started_s)


@router.post(
    "/concepts",
    response_model=ConceptsResponse,
    summary="How sure is each clinical concept present in one image?",
    openapi_extra=uploads.body_schema(ConceptsRequest),
)
async def concepts(request: Request, service: ServiceDep) -> Response:
    """The published terms and formula of concept annotation (MONET). JSON with a data URI, or multipart."""
    started_s = time.perf_counter()
    body, image = await uploads.read(request, ConceptsRequest, service.limits)
    served = service.catalogue.find(body.model)
    served.require("images", "texts")
    asked = await asyncio.to_thread(payload.choose_concepts, body.concepts)
    annotated = _usable(service, served, await served.backend.annotate(image, asked))
    content = {"object": "concepts", "concepts": [asdict(one) for one in annotated.concepts]}
    return _answer(content, served.model, annotated.timing, started_s)


@router.post(
    "/predict",
    response_model=PredictResponse,
    summary="What a model predicts of one image by itself",
    openapi_extra=uploads.body_schema(PredictRequest),
)
async def predict(request: Request, service: ServiceDep) -> Response:
    """Of models whose kind predicts; what each array means, the kind says. JSON with a data URI, or multipart."""
    started_s = time.perf_counter()
    body, image = await uploads.read(request, PredictRequest, service.limits)
    served = service.catalogue.find(body.model)
    served.require("predictions")
    predicted = _usable(service, served, await served.backend.predict(image))
    values = await asyncio.to_thread(lambda: {name: one.tolist() for name, one in predicted.values.items()})
    return _answer({"object": "prediction", "prediction": values}, served.model, predicted.timing, started_s)


@router.post(
    "/search",
    response_model=SearchResponse,
    responses={409: {"model": ErrorResponse, "description": "the index was made by another model"}},
    summary="What in the index is nearest to a text or an image?",
)
async def search(body: SearchRequest, service: ServiceDep) -> Response:
    """Text to images, image to images, and either to captions, over the loaded index."""
    started_s = time.perf_counter()
    served = service.catalogue.find(body.model)
    target, k = body.target or "image", body.k or DEFAULT_HITS
    index = _usable_index(service.index, served, target)
    if (body.query is None) == (body.image is None):
        raise Refusal(400, "send query or image, one of them", code="conflict", param="query")
    served.require("texts" if body.image is None else "images")
    images = [await asyncio.to_thread(payload.decode_data_uri, body.image, "image")] if body.image is not None else []
    texts = [body.query] if body.query is not None else []
    for text in texts:
        await asyncio.to_thread(payload.check_query, text, service.limits)
    embedded = await served.backend.embed(images, texts)
    if embedded.rejections:
        raise _unusable(embedded.rejections[0], "image")
    service.metrics.observe_items(served.model, len(images), len(texts), embedded.timing)
    vector = (embedded.images if images else embedded.texts)[0]
    hits = await asyncio.to_thread(index.search, vector, k, target)
    content = {"object": "list", "data": [_hit(one) for one in hits], "index": index.digest}
    return _answer(content, served.model, embedded.timing, started_s)


def identity(model: ServedModel) -> ModelIdentity:
    """Which model answers, as every answer says it."""
    return ModelIdentity(
        name=model.name,
        version=model.version,
        alias=model.alias,
        digest=model.digest,
        preprocessing_digest=model.preprocessing_digest,
    )


def _usable(service: Service, served: Served, said: OfImageT) -> OfImageT:
    """What a model said of one image, counted.

    Raises:
        Refusal: 400, the image cannot be used.
    """
    if said.rejection is not None:
        raise _unusable(said.rejection, "image")
    service.metrics.observe_items(served.model, 1, 0, said.timing)
    return said


def _usable_index(index: VectorIndex | None, served: Served, target: str) -> VectorIndex:
    if index is None:
        raise Refusal(400, "no index is loaded here: start the service with index=FOLDER", code="no_index")
    model = served.model
    if not index.fits(model.digest, model.preprocessing_digest):
        message = (
            f"the index was made by a model of weights {index.model_digest[:12]}, not by {model.name} "
            f"({model.digest[:12]}): run jobs/embed.py and jobs/index.py with this model"
        )
        raise Refusal(409, message, code="index_of_another_model")
    if target == "text" and not index.num_texts:
        raise Refusal(400, "this index holds no captions", code="no_index", param="target")
    return index


def _hit(hit: Hit) -> dict[str, Any]:
    thumbnail = None
    if hit.thumbnail is not None:
        thumbnail = "data:image/jpeg;base64," + base64.b64encode(hit.thumbnail).decode("ascii")
    return {
        "sample_id": hit.sample_id,
        "score": hit.score,
        "caption": hit.caption,
        "labels": list(hit.labels),
        "thumbnail": thumbnail,
    }


def _rejected(rejection: Rejection, body: EmbeddingsRequest, order: Sequence[tuple[bool, int]]) -> Refusal:
    position = order.index((True, rejection.index))
    return _unusable(rejection, "input" if isinstance(body.input, str) else f"input.{position}")


def _unusable(rejection: Rejection, param: str) -> Refusal:
    return Refusal(400, f"{param}: {rejection.message}", code=rejection.reason, param=param)


def _classification(ranking: Sequence[RankedClass], tree: Ontology | None) -> dict[str, Any]:
    """A ranking as it is answered, with what the tree says of its classes."""
    return {
        "object": "classification",
        "ranking": [
            {"label": one.label, "probability": one.probability, "logit": one.logit, "path": _path(tree, one.label)}
            for one in ranking
        ],
        "hierarchy": [asdict(node) for node in roll_up(ranking, tree)] if tree is not None else [],
    }


def _path(ontology: Ontology | None, label: str) -> list[str] | None:
    node = ontology.resolve(label) if ontology is not None else None
    return ontology.path(node) if ontology is not None and node is not None else None


def _answer(content: dict[str, Any], model: ServedModel, timing: Timing, started_s: float) -> JSONResponse:
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
