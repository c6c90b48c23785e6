"""Concept annotation: is a papule, a scale, a pigment network in the image? As MONET (Kim et al., 2024) asks it.

Each of T templates is filled with each of a concept's K terms and paired with a reference sentence that names no
concept. The cosines of an image with the terms are averaged, a softmax against the reference gives a probability a
template, and the mean over templates is the concept's score. A concept's area under the ROC curve compares the scores
with the marks on the images; `mean_auroc` is the plain mean over concepts. Marks and scores are paired by name, in
lower case; the published code pairs them by position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.samples import Samples
from dermray.evaluate.statistics import metrics
from dermray.evaluate.statistics.bootstrap import Distribution, Metric, Seed, resample_weights
from dermray.predict.concept_terms import Prompts
from dermray.predict.concepts import TEMPERATURE, presence_scores

# The formula lies in `dermray.predict.concepts`; others import it from here.
__all__ = [
    "GOOD_AUROC",
    "TEMPERATURE",
    "Prompts",
    "area_distributions",
    "concepts_of",
    "group_scores",
    "marks_of",
    "mean_auroc",
    "presence_scores",
]

GOOD_AUROC = 0.7


def mean_auroc(
    scores: np.ndarray, marks: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> tuple[Metric, list[Metric]]:
    """Area under the ROC curve of each concept and their mean.

    Whole images are resampled, all concepts together; a resample in which a concept has no or only marked images is
    left out of that concept's interval and of that resample's mean.

    Args:
        scores: `[N, C]`.
        marks: `[N, C]`, 0 or 1; each column must hold both.
        bootstrap: resamples behind the 95 % intervals; 0 leaves them out.
        seed: of the bootstrap.

    Returns:
        `(mean, one for each concept)`.

    Raises:
        EvaluationError: shapes that do not fit, scores that are not finite, or a concept marked on no or on all images.
    """
    mean, each = area_distributions(scores, marks, bootstrap=bootstrap, seed=seed)
    return mean.metric(), [one.metric() for one in each]


def area_distributions(
    scores: np.ndarray, marks: np.ndarray, *, bootstrap: int, seed: Seed
) -> tuple[Distribution, list[Distribution]]:
    """As `mean_auroc`, with the values on each resample: those of two models on the same images are paired."""
    if scores.shape != marks.shape or scores.ndim != 2 or 0 in scores.shape:
        raise EvaluationError(f"scores {list(scores.shape)} and marks {list(marks.shape)} must both be [N, C]")
    if not np.isfinite(scores).all():
        raise EvaluationError("concept scores are not finite; look for NaN in the model's weights")
    areas = [metrics.BinaryArea(scores[:, column], marks[:, column] > 0) for column in range(scores.shape[1])]
    points = np.array([area(np.ones((len(scores), 1)))[0] for area in areas])
    chunks = [
        np.stack([area(weights) for area in areas])
        for weights in resample_weights(np.zeros(len(scores), dtype=np.int64), bootstrap, seed)
    ]
    resampled = np.concatenate(chunks, axis=1) if chunks else np.empty((len(areas), 0))
    defined = (~np.isnan(resampled)).sum(axis=0)
    means = np.divide(np.nansum(resampled, axis=0), defined, out=np.full(len(defined), np.nan), where=defined > 0)
    each = [Distribution(float(point), row) for point, row in zip(points, resampled, strict=True)]
    return Distribution(float(points.mean()), means), each


def group_scores(scores: np.ndarray, marks: np.ndarray, *, bootstrap: int, seed: Seed) -> dict[str, Distribution]:
    """The mean area over the concepts that are marked on some images of a group and not on others, if there are any."""
    both = (marks.min(axis=0) == 0) & (marks.max(axis=0) == 1)
    if not both.any():
        return {}
    mean, _ = area_distributions(scores[:, both], marks[:, both], bootstrap=bootstrap, seed=seed)
    return {"mean_auroc": mean}


def concepts_of(samples: Samples) -> tuple[list[str], list[str]]:
    """The concepts to score, in lower case, and those that the published terms do not know.

    Raises:
        EvaluationError: none has terms.
    """
    marked = {_plain(name) for names in samples.concepts for name in names}
    terms = Prompts.load().terms
    looked_for = [_plain(name) for name in samples.concept_names]
    wanted = looked_for or [name for name in terms if name in marked] + sorted(marked - set(terms))
    known = [name for name in wanted if name in terms]
    if not known:
        raise EvaluationError("none of the concepts marked on the images has published terms; nothing to ask for")
    return known, [name for name in wanted if name not in terms]


def marks_of(samples: Samples, names: Sequence[str]) -> np.ndarray:
    """Which concepts are marked on which images, int64 `[N, C]`; "atypical pigment network" marks "pigment network"."""
    marks = np.zeros((len(samples), len(names)), dtype=np.int64)
    for row, marked in enumerate(samples.concepts):
        for concept in marked:
            text = _plain(concept)
            for column, name in enumerate(names):
                if text == name or text.endswith(f" {name}"):
                    marks[row, column] = 1
    return marks


def _plain(concept: str) -> str:
    return concept.strip().lower().replace("_", " ")
