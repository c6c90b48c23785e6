"""`/v1/concepts`: how sure each clinical concept is present in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermray.predict import concept_names
from dermray.service.engine.verbs.annotate import ANNOTATE
from dermray.service.http.asking import ImageEndpoint
from dermray.service.http.schemas import EXAMPLE_IMAGE, ImageRequest, ModelIdentity, Texts
from dermray.service.refusals import Refusal


class ConceptsRequest(ImageRequest):
    """One image and the clinical concepts to look for in it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": EXAMPLE_IMAGE, "concepts": ["plaque", "scale", "erythema"]}]}
    )

    concepts: Texts | None = Field(None, description="concepts with published terms; empty: all of them")


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


def choose_concepts(given: Sequence[str] | None) -> tuple[str, ...]:
    """The concepts to score, in the published spelling; all that have terms when none are given.

    Raises:
        Refusal: 400 for an unknown, repeated or missing one.
    """
    known = concept_names()
    if given is None:
        return known
    names = [name.strip().lower().replace("_", " ") for name in given]
    if not names:
        raise Refusal(400, "concepts: send at least one concept", code="empty_input", param="concepts")
    for index, name in enumerate(names):
        param = f"concepts.{index}"
        if name not in known:
            message = f"{param}: {name[:80]!r} has no published terms; there are: {', '.join(known)}"
            raise Refusal(400, message.encode("utf-8", "replace").decode(), code="unknown_concept", param=param)
        if name in names[:index]:
            raise Refusal(400, f"{param}: {name!r} is listed twice", code="duplicate_label", param=param)
    return tuple(names)


router = ImageEndpoint(
    name="concepts",
    summary="How sure is each clinical concept present in one image?",
    description="The published terms and formula of concept annotation (MONET). JSON with a data URI, or multipart.",
    verb=ANNOTATE,
    request=ConceptsRequest,
    response=ConceptsResponse,
    question=lambda body, served, limits: (choose_concepts(body.concepts),),
    content=lambda said, served: {"object": "concepts", "concepts": [asdict(one) for one in said.concepts]},
).router()
