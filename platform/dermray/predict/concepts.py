"""Presence of clinical concepts in images, by the published prompts and formula: see `dermray.evaluate.concepts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dermray.errors import EvaluationError
from dermray.predict.concept_terms import Prompts

# Reports are compared by scores that were saved, without torch.
if TYPE_CHECKING:
    import torch

    from dermray.vectors.encoder import Encoder

# The published temperature: logits are cosines times exp(4.5944).
TEMPERATURE = 1.0 / math.exp(4.5944)
_BLOCK_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class ConceptScore:
    """How sure a concept is present, in (0, 1)."""

    concept: str
    score: float


def presence_scores(image_features: Any, target: Any, reference: Any, temperature: float = TEMPERATURE) -> Any:
    """How sure a concept is present in each image.

    Args:
        image_features: `[N, D]`, numpy or torch, L2-normalised.
        target: `[T, K, D]`, L2-normalised: T templates filled with K terms of the concept.
        reference: `[T, 1, D]`, L2-normalised: the sentence without the concept that belongs to each template.
        temperature: cosines are divided by it before the softmax.

    Returns:
        `[N]` in (0, 1), numpy or torch as the images are, and in their precision.

    Raises:
        EvaluationError: shapes that do not fit, no prompts, a temperature of 0 or below, or values that are not finite.
    """
    import torch

    images = torch.as_tensor(image_features).detach()
    targets, references = (torch.as_tensor(one).detach().to(images.device).double() for one in (target, reference))
    _check(images, targets, references, temperature)
    # Linear in the terms: the mean of the cosines is the cosine with the mean.
    difference = targets.mean(dim=1) - references[:, 0]
    present = torch.empty(len(images), dtype=torch.float64, device=images.device)
    rows = max(1, _BLOCK_SCORES // len(difference))
    for start in range(0, len(images), rows):
        logits = images[start : start + rows].double() @ difference.T / temperature
        present[start : start + rows] = torch.sigmoid(logits).mean(dim=1)
    present = present.to(images.dtype)
    return present if isinstance(image_features, torch.Tensor) else present.numpy()


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
    scores = [
        float(presence_scores(image_feature[None], target[:, None], reference[:, None])[0])
        for target, reference in table
    ]
    order = np.argsort(-np.array(scores), kind="stable")
    return [ConceptScore(names[i], scores[i]) for i in order]


def _check(images: torch.Tensor, targets: torch.Tensor, references: torch.Tensor, temperature: float) -> None:
    shapes = [list(one.shape) for one in (images, targets, references)]
    if images.ndim != 2 or targets.ndim != 3 or references.shape != (len(targets), 1, images.shape[-1]):
        raise EvaluationError(
            f"presence scores take images [N, D], targets [T, K, D] and references [T, 1, D], not {shapes}"
        )
    if targets.shape[2] != images.shape[1] or 0 in targets.shape[:2]:
        raise EvaluationError(f"targets {shapes[1]} must hold at least one prompt of the images' width {shapes[0][1]}")
    if not temperature > 0:
        raise EvaluationError(f"the temperature must be above 0, not {temperature}")
    for kind, one in (("image", images), ("target", targets), ("reference", references)):
        if not one.isfinite().all():
            raise EvaluationError(f"the {kind} features are not finite; look for NaN in the model's weights")
