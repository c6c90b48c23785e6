"""`/v1/search`: what in the loaded index is nearest to a text or an image."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from dermray.service.fleet.catalogue import Served
from dermray.service.http import stray_images
from dermray.service.http.asking import ServiceDep, answer, new_router, vectors
from dermray.service.http.payload import check_text, decode_data_uri
from dermray.service.http.schemas import EXAMPLE_IMAGE, ErrorResponse, ModelIdentity, Request
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import Hit, VectorIndex

DEFAULT_HITS = 10
router = new_router()


class SearchRequest(Request):
    """A text or an image, and what to find near it in the index."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "psoriasis on the elbow", "k": 5},
                {"image": EXAMPLE_IMAGE, "target": "text"},
            ]
        }
    )

    query: str | None = Field(None, description="a text; or send image")
    image: str | None = Field(None, description="an image as a data URI; or send query")
    target: Literal["image", "text"] | None = Field(None, description="find images (also if empty), or captions")
    k: int | None = Field(None, ge=1, le=100, description=f"how many; empty: {DEFAULT_HITS}")
    model: str | None = Field(None, description="a name from /v1/models; it must be the model that made the index")


class SearchHit(BaseModel):
    """One neighbour."""

    sample_id: str
    score: float = Field(description="cosine with the query")
    caption: str | None = Field(description="the image's caption, or the text that was found")
    labels: list[str]
    thumbnail: str | None = Field(description="a small JPEG as a data URI, where the index keeps them")


class SearchResponse(BaseModel):
    """Neighbours, nearest first."""

    object: Literal["list"] = "list"
    data: list[SearchHit]
    index: str = Field(description="digest of the index")
    model: str
    model_info: ModelIdentity


def check_query(text: str, limits: LimitsConfig) -> None:
    """A text to search for.

    Raises:
        Refusal: 400, as `check_text`, and for an image in another dress.
    """
    stray_images.refuse(text, "query", advice="into the field image")
    check_text(text, "query", limits)


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
    images = [await asyncio.to_thread(decode_data_uri, body.image, "image")] if body.image is not None else []
    texts = [body.query] if body.query is not None else []
    for text in texts:
        await asyncio.to_thread(check_query, text, service.limits)
    embedded = await vectors(service, served, images, texts, lambda _: "image")
    vector = (embedded.images if images else embedded.texts)[0]
    hits = await asyncio.to_thread(index.search, vector, k, target)
    content = {"object": "list", "data": [_hit(one) for one in hits], "index": index.digest}
    return answer(content, served.model, embedded.timing, started_s)


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
