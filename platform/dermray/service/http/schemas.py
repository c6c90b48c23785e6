"""What requests and answers of the HTTP interface share, as OpenAPI at `/docs` shows them; each endpoint has its own.

Unknown fields are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A dark square on skin colour, 16 x 16 pixels, so that the examples are requests that can be sent as they are.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEXWqpRgOjAiEpLMAAAAFElEQV"
    "R42mNgQAXsD5gYGJARGgAAHSAA8hMsgPUAAAAASUVORK5CYII="
)
# The first item that is none ends the look at a list.
Texts = Annotated[list[str], Field(fail_fast=True)]


class Request(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid")


class ImageRequest(Request):
    """A request about one image; by multipart the file takes the place of the data URI."""

    image: str = Field(description="the image as a data URI: data:image/jpeg;base64,…")
    model: str | None = Field(None, description="a name from /v1/models; empty: the default model")


class ModelIdentity(BaseModel):
    """Which model answered. Vectors are comparable when both digests agree."""

    name: str
    version: str | None = Field(description="the registry's version; null for a model folder")
    alias: str | None = Field(description="the registry's alias it was asked for by")
    digest: str = Field(description="SHA-256 of the weights")
    preprocessing_digest: str = Field(description="SHA-256 of the steps from bytes to pixels")


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
    logit_scale: float | None = Field(description="null of a model that takes no texts")
    kind: str = Field(description="clip, image_encoder, or one that an installed package brings")
    answers: list[Literal["images", "texts", "predictions"]] = Field(
        description="vectors of images, vectors of texts (and so classes, concepts, search by words), /v1/predict"
    )
    classes: list[str] = Field(description="ranked when a request names none; may be empty")
    model_info: ModelIdentity
    can_search: bool = Field(description="an index made by this model is loaded")


class ModelsResponse(BaseModel):
    """What is served here."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class RolloutCheck(BaseModel):
    """One thing that a version had to show."""

    name: str
    passed: bool
    detail: str


class RolloutResponse(BaseModel):
    """What a look at the alias, or a roll-back, led to."""

    event: Literal["unchanged", "followed", "refused", "rolled_back"]
    version: str | None = Field(description="the version that answers now")
    previous: str | None = Field(description="the version that a roll-back returns to")
    checks: list[RolloutCheck]


class Health(BaseModel):
    """`ok`: the process answers. `ready`: the model has just answered too."""

    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    """What went wrong, for a person (`message`) and for a program (`code`)."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """OpenAI's error shape; every status from 400 up has it."""

    error: ErrorDetail
