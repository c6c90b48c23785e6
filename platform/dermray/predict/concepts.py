"""Presence of clinical concepts in one image, by the prompts and the formula of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dermray.predict.concept_terms import Prompts

if TYPE_CHECKING:
    from dermray.vectors.encoder import Encoder


@dataclass(frozen=True, slots=True)
class ConceptScore:
    """How sure a concept is present, in (0, 1)."""

    concept: str
    score: float


def concept_names() -> tuple[str, ...]:
    """The concepts that have published terms, in their order."""
    return tuple(Prompts.load().terms)


def encode_concepts(encoder: Encoder, names: Sequence[str]) -> np.ndarray:
    """What `score_concepts` compares an image with, float32 `[C, 2, T, D]`: target and reference of C concepts.

    The target is the mean over a concept's terms: the score is linear in them.
    """
    prompts = Prompts.load()
    references = encoder.encode_texts(prompts.references)
    texts = [text for name in names for text in prompts.targets(name)]
    vectors, start, rows = encoder.encode_texts(texts), 0, []
    for name in names:
        num_terms = len(prompts.terms[name])
        stop = start + len(prompts.templates) * num_terms
        target = vectors[start:stop].reshape(len(prompts.templates), num_terms, -1).mean(axis=1)
        rows.append(np.stack([target, references]))
        start = stop
    return np.stack(rows)


def score_concepts(image_feature: np.ndarray, table: np.ndarray, names: Sequence[str]) -> list[ConceptScore]:
    """Presence of each concept in one image, surest first.

    Args:
        image_feature: float32 `[D]`, L2-normalised.
        table: what `encode_concepts` made of `names`.
        names: C concepts.
    """
    from dermray.evaluate.concepts import presence_scores

    scores = [
        float(presence_scores(image_feature[None], target[:, None], reference[:, None])[0])
        for target, reference in table
    ]
    order = np.argsort(-np.array(scores), kind="stable")
    return [ConceptScore(names[i], scores[i]) for i in order]
