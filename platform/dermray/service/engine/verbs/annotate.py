"""How sure is each clinical concept present in an image? The published terms and formula of concept annotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dermray.predict import ConceptScore, encode_concepts, score_concepts
from dermray.predict.concept_terms import Prompts
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.verb import Verb
from dermray.service.engine.verbs.embed import embed

if TYPE_CHECKING:
    from dermray.service.engine.engine import Engine

# Stands in a classifier's key before the templates of concepts, whose rows are other ones than those of classes.
_CONCEPTS = "published concept prompts"


@dataclass(frozen=True, slots=True)
class Annotated:
    """The concepts of one image, surest first; or why the image was rejected."""

    concepts: tuple[ConceptScore, ...]
    timing: Timing
    rejection: Rejection | None = None


async def annotate(engine: Engine, image: bytes, concepts: Sequence[str]) -> Annotated:
    """Presence of concepts, all of which have published terms, in one encoded image."""
    embedded = await embed(engine, [image], [])
    if embedded.rejections:
        return Annotated((), embedded.timing, embedded.rejections[0])
    templates = (_CONCEPTS, *Prompts.load().templates)
    table, timing = await engine.table(
        concepts, templates, lambda names: encode_concepts(engine.encoder, names), embedded.timing
    )
    return Annotated(tuple(score_concepts(embedded.images[0], table, concepts)), timing)


ANNOTATE = Verb(annotate, needs=("images", "texts"))
