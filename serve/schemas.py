"""Requests and answers of the HTTP interface, as OpenAPI at `/docs` shows them.

`/v1/embeddings` follows OpenAI's request and response; `modality` is infinity's field, and lists that mix texts with
image data URIs are NV-CLIP's. Unknown fields are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A dark square on skin colour, 16 x 16 pixels, so that the examples are requests that can be sent as they are.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEXWqpRgOjAiEpLMAAAAFElEQV"
    "R42mNgQAXsD5gYGJARGgAAHSAA8hMsgPUAAAAASUVORK5CYII="
)


class Request(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid")


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

    input: str | list[str] = Field(description="one text or image, or a list of them")
    model: str | None = Field(None, description="a name from /v1/models; empty: the model served here")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: the vector's little-endian float32 bytes"
    )
    dimensions: int | None = Field(None, description="the model's own dimension, or empty")
    modality: Literal["text", "image"] | None = Field(
        None, description="what the inputs are; empty: a string that starts with data:image/ is an image"
    )
    user: str | None = Field(None, description="accepted for compatibility, neither used nor kept")


class ClassifyRequest(Request):
    """One image and the classes to rank for it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": EXAMPLE_IMAGE, "labels": ["melanoma", "melanocytic nevus", "basal cell carcinoma"]},
                {"image": EXAMPLE_IMAGE},
            ]
        }
    )

    image: str = Field(description="the image as a data URI: data:image/jpeg;base64,…")
    model: str | None = Field(None, description="a name from /v1/models; empty: the model served here")
    labels: list[str] | None = Field(None, description="classes to rank; empty: the model's own list")
    ontology: str | None = Field(
        None, description="rank the leaves below this node of the served ontology, instead of labels"
    )
    templates: list[str] | None = Field(None, description="prompts with {} for the class; empty: the published eight")


class ModelIdentity(BaseModel):
    """Which model answered. Vectors are comparable when both digests agree."""

    name: str
    version: str | None = Field(description="the registry's version; null for a model folder")
    alias: str | None = Field(description="the registry's alias it was asked for by")
    digest: str = Field(description="SHA-256 of the weights")
    preprocessing_digest: str = Field(description="SHA-256 of the steps from bytes to pixels")


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


class RankedLabel(BaseModel):
    """One candidate class. Probabilities of a ranking sum to 1 over the classes that were asked about."""

    label: str
    probability: Annotated[float, Field(ge=0, le=1)]
    logit: float = Field(description="the model's logit scale times the cosine of image and class")
    path: list[str] | None = Field(None, description="the class in the served ontology, from below the root")


class ClassifyResponse(BaseModel):
    """Classes, most probable first."""

    object: Literal["classification"] = "classification"
    ranking: list[RankedLabel]
    model: str
    model_info: ModelIdentity
    logit_scale: float


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["dermray"] = "dermray"
    names: list[str] = Field(description="every spelling that a request's model field may use")
    embedding_dim: int
    image_size: int
    context_length: int
    parameters: int
    logit_scale: float
    classes: list[str] = Field(description="ranked when a request names none; may be empty")
    model_info: ModelIdentity


class ModelsResponse(BaseModel):
    """What is served here."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """`ok`: the process answers. `ready`: the model has just answered too."""

    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    """What went wrong, for a person (`message`) and for a program (`code`)."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """OpenAI's error shape; every status from 400 up has it."""

    error: ErrorDetail
