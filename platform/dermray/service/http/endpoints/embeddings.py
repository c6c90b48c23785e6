"""`/v1/embeddings`: OpenAI's request and response. `modality` is infinity's field, lists that mix are NV-CLIP's."""

from __future__ import annotations

import asyncio
import base64
import functools
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dermray.service.http import stray_images
from dermray.service.http.asking import ServiceDep, answer, new_router, vectors
from dermray.service.http.payload import IMAGE_PREFIX, check_text, decode_data_uri
from dermray.service.http.schemas import EXAMPLE_IMAGE, ModelIdentity, Request
from dermray.service.refusals import Refusal, too_large
from dermray.service.settings import LimitsConfig

router = new_router()


def _texts(value: Any) -> Any:
    """Pass a text or a list of texts, and say of anything else what it is, in one error whatever its size."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("no_text", "send a text or an image, or a list of them")
    wrong = next((position for position, one in enumerate(value) if not isinstance(one, str)), None)
    if wrong is None:
        return value
    one = value[wrong][0] if isinstance(value[wrong], list) and value[wrong] else value[wrong]
    if isinstance(one, int) and not isinstance(one, bool):
        raise PydanticCustomError(
            "token_numbers",
            "token numbers mean nothing to this model: send texts (LangChain: check_embedding_ctx_length=False)",
        )
    raise PydanticCustomError("no_text", "item {position} is no text", {"position": wrong})


class EmbeddingsRequest(Request):
    """Texts, images as data URIs, or both in one list."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "a skin image of melanoma"},
                {"input": ["psoriasis on the elbow", "acne"], "encoding_format": "base64"},
                {"input": [EXAMPLE_IMAGE], "modality": "image"},
            ]
        }
    )

    input: Annotated[str | list[str], BeforeValidator(_texts)] = Field(
        description="one text or image, or a list of them"
    )
    model: str | None = Field(None, description="a name from /v1/models; empty: the model served here")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="empty: float; base64: the vector's little-endian float32 bytes"
    )
    dimensions: int | None = Field(None, description="the model's own dimension, or empty")
    modality: Literal["text", "image"] | None = Field(
        None, description="what the inputs are; empty: an image if it starts with data:image/, else words"
    )
    user: str | None = Field(None, description="accepted for compatibility, neither used nor kept")


class Embedding(BaseModel):
    """One vector, L2-normalised."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Positions that the text tower computed: its context length for each text, none for images."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """OpenAI's embeddings response, and who made it."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    normalized: Literal[True] = True
    model_info: ModelIdentity


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of an embeddings request by kind; `order` holds (is image, position in its kind) per input."""

    images: list[bytes]
    texts: list[str]
    order: list[tuple[bool, int]]


def split_inputs(request: EmbeddingsRequest, limits: LimitsConfig) -> Inputs:
    """Tell images from texts and check each.

    Raises:
        Refusal: 400 or 413, naming the input at fault.
    """
    values = [request.input] if isinstance(request.input, str) else request.input
    if not values:
        raise Refusal(400, "input: send at least one text or image", code="empty_input", param="input")
    if len(values) > limits.items:
        raise too_large(f"input: {len(values)} items in one request", f"{limits.items} items")
    inputs = Inputs([], [], [])
    for index, value in enumerate(values):
        param = "input" if isinstance(request.input, str) else f"input.{index}"
        is_image = request.modality == "image" or (
            request.modality is None and value[: len(IMAGE_PREFIX)].lower() == IMAGE_PREFIX
        )
        if is_image:
            inputs.order.append((True, len(inputs.images)))
            inputs.images.append(decode_data_uri(value, param))
        else:
            if request.modality is None:
                stray_images.refuse(value, param)
            check_text(value, param, limits)
            inputs.order.append((False, len(inputs.texts)))
            inputs.texts.append(value)
    return inputs


def encode_vector(vector: np.ndarray, encoding_format: str | None) -> list[float] | str:
    """A vector as JSON numbers, or as the base64 of its little-endian float32 bytes."""
    if encoding_format == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
    return [float(value) for value in vector]


@router.post("/embeddings", response_model=EmbeddingsResponse, summary="Texts and images to unit vectors")
async def embeddings(body: EmbeddingsRequest, service: ServiceDep) -> Response:
    """OpenAI-compatible. One unusable image refuses its whole request, naming the input; others are not affected."""
    started_s = time.perf_counter()
    served = service.catalogue.find(body.model)
    model = served.model
    if body.dimensions is not None and body.dimensions != model.embedding_dim:
        message = f"dimensions: this model makes vectors of {model.embedding_dim}, not {body.dimensions}"
        raise Refusal(400, message, code="unsupported_dimensions", param="dimensions")
    inputs = await asyncio.to_thread(split_inputs, body, service.limits)
    if inputs.images:
        served.require("images")
    if inputs.texts:
        served.require("texts")
    embedded = await vectors(service, served, inputs.images, inputs.texts, functools.partial(_field, body, inputs))
    ordered = [embedded.images[at] if is_image else embedded.texts[at] for is_image, at in inputs.order]
    num_tokens = len(inputs.texts) * model.context_length
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode_vector(vector, body.encoding_format)}
            for index, vector in enumerate(ordered)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "normalized": True,
    }
    return answer(content, model, embedded.timing, started_s)


def _field(body: EmbeddingsRequest, inputs: Inputs, image: int) -> str:
    """Where an image of `inputs` stood in the request."""
    return "input" if isinstance(body.input, str) else f"input.{inputs.order.index((True, image))}"
