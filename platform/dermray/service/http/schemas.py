"""Requests and answers of the HTTP interface, as OpenAPI at `/docs` shows them.

`/v1/embeddings` follows OpenAI's request and response; `modality` is infinity's field, and lists that mix texts with
image data URIs are NV-CLIP's. Unknown fields are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# A dark square on skin colour, 16 x 16 pixels, so that the examples are requests that can be sent as they are.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEXWqpRgOjAiEpLMAAAAFElEQV"
    "R42mNgQAXsD5gYGJARGgAAHSAA8hMsgPUAAAAASUVORK5CYII="
)
DEFAULT_HITS = 10


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


# The first item that is none ends the look at a list.
Texts = Annotated[list[str], Field(fail_fast=True)]


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


class ImageRequest(Request):
    """A request about one image; by multipart the file takes the place of the data URI."""

    image: str = Field(description="the image as a data URI: data:image/jpeg;base64,…")
    model: str | None = Field(None, description="a name from /v1/models; empty: the default model")


class ClassifyRequest(ImageRequest):
    """One image and the classes to rank for it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": EXAMPLE_IMAGE, "labels": ["melanoma", "melanocytic nevus", "basal cell carcinoma"]},
                {"image": EXAMPLE_IMAGE, "benchmark": "derm1m/ham10000"},
            ]
        }
    )

    labels: Texts | None = Field(None, description="classes to rank; empty: the model's own list")
    benchmark: str | None = Field(
        None, description="rank the classes of this published benchmark, by its prompts if it has any"
    )
    ontology: str | None = Field(
        None, description="rank the leaves below this node of the served ontology, instead of labels"
    )
    templates: Texts | None = Field(None, description="prompts with {} for the class; empty: the published eight")


class ConceptsRequest(ImageRequest):
    """One image and the clinical concepts to look for in it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": EXAMPLE_IMAGE, "concepts": ["plaque", "scale", "erythema"]}]}
    )

    concepts: Texts | None = Field(None, description="concepts with published terms; empty: all of them")


class PredictRequest(ImageRequest):
    """One image for a model that predicts by itself."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": EXAMPLE_IMAGE}]})


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
    path: Texts | None = Field(
        None, description="what is above the class on all its paths in the served ontology, and its node last"
    )


class RolledUpNode(BaseModel):
    """A node above ranked classes, with the sum of their probabilities."""

    node: str
    level: int = Field(description="1 right under the root")
    path: list[str]
    probability: Annotated[float, Field(ge=0, le=1)]


class ClassifyResponse(BaseModel):
    """Classes, most probable first, and the same rolled up the disease tree."""

    object: Literal["classification"] = "classification"
    ranking: list[RankedLabel]
    hierarchy: list[RolledUpNode] = Field(description="upper levels first; empty when no ontology knows the classes")
    model: str
    model_info: ModelIdentity
    logit_scale: float


class ConceptPresence(BaseModel):
    """One concept."""

    concept: str
    score: Annotated[float, Field(ge=0, le=1, description="presence, by the published prompts and temperature")]


class ConceptsResponse(BaseModel):
    """Concepts, surest first. Each stands alone: scores do not sum to 1."""

    object: Literal["concepts"] = "concepts"
    concepts: list[ConceptPresence]
    model: str
    model_info: ModelIdentity


class PredictResponse(BaseModel):
    """What a model of a kind that predicts says of one image."""

    object: Literal["prediction"] = "prediction"
    prediction: dict[str, Any] = Field(description="numbers, or nested lists of them, by name; the model's kind says")
    model: str
    model_info: ModelIdentity


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
