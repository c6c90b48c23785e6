"""A diagnosis from concepts alone, which of them carry it, and what becomes of it without them (DermFM-Zero, MONET).

Activations are those of a sparse autoencoder (`dermray.audit.sparse`) or any other scores of concepts, `[N, E]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dermray.errors import EvaluationError

_ALPHA = 0.001


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A logistic regression on concepts: a unit's importance is its signed weight, float64 `[E]`."""

    weights: np.ndarray
    intercept: float

    @classmethod
    def fit(cls, activations: Any, labels: Any, *, seed: int = 42) -> Bottleneck:
        """By stochastic gradient descent with an L1 penalty of 0.001, as published; the activations as they are.

        Args:
            activations: `[N, E]`.
            labels: `[N]`, 0 and 1.
            seed: of the order of the steps.

        Raises:
            EvaluationError: arrays of other shapes, activations that are not finite, or labels that are not both.
        """
        from sklearn.linear_model import SGDClassifier

        inputs, targets = np.asarray(activations), np.asarray(labels)
        if inputs.ndim != 2 or targets.shape != (len(inputs),) or not np.isfinite(inputs).all():
            raise EvaluationError(
                f"a concept bottleneck needs finite activations [N, E] and labels [N], not {list(inputs.shape)} and "
                f"{list(targets.shape)}"
            )
        if set(np.unique(targets).tolist()) != {0, 1}:
            raise EvaluationError("a concept bottleneck tells 0 from 1, and needs samples of both")
        fitted = SGDClassifier(loss="log_loss", penalty="l1", alpha=_ALPHA, random_state=seed).fit(inputs, targets)
        return cls(fitted.coef_[0].astype(np.float64), float(fitted.intercept_[0]))

    def probabilities(self, activations: Any) -> np.ndarray:
        """Of label 1, float64 `[N]`, from `[N, E]`."""
        from scipy.special import expit

        return expit(np.asarray(activations, dtype=np.float64) @ self.weights + self.intercept)

    def strongest(self, count: int) -> np.ndarray:
        """The units of the largest absolute weights, descending, int64 `[count]`; of equal ones the first."""
        return np.argsort(-np.abs(self.weights), kind="stable")[:count]


@dataclass(frozen=True, eq=False)
class MatchedUnits:
    """Units that stand for a concept, those of the largest absolute weight first.

    Attributes:
        units: int64 `[K]`.
        similarity: cosine of each unit's direction with the concept, float64 `[K]`.
        rank: place of each one's absolute weight among all units, from 0, int64 `[K]`.
    """

    units: np.ndarray
    similarity: np.ndarray
    rank: np.ndarray


def match(concept: Any, directions: Any, bottleneck: Bottleneck, *, count: int) -> MatchedUnits:
    """The units whose direction is nearest to a concept's text, among those that have a weight in the diagnosis.

    Published code solves an assignment for it, whose answer is this. Directions `[[1, 0, 1], [0, 1, 0]]`, the concept
    `[1, 0]`, weights `[0, 3, 2]` and one unit: the third, as the first has no weight.

    Args:
        concept: unit vector of a text in the space of the images, `[D]`.
        directions: `[D, E]`, columns of length 1 (`SparseAutoencoder.decoder_weight`).
        bottleneck: whose weights count.
        count: units at most.

    Raises:
        EvaluationError: arrays that do not fit together.
    """
    text, columns = np.asarray(concept, dtype=np.float64), np.asarray(directions, dtype=np.float64)
    if columns.shape != (*text.shape, len(bottleneck.weights)):
        raise EvaluationError(
            f"directions {list(columns.shape)} must be [D, E] of the concept {list(text.shape)} and of "
            f"{len(bottleneck.weights)} weights"
        )
    similarity = text @ columns
    candidates = np.flatnonzero(bottleneck.weights)
    chosen = candidates[np.argsort(-similarity[candidates], kind="stable")[:count]]
    places = np.argsort(bottleneck.strongest(len(bottleneck.weights)))
    units = chosen[np.argsort(places[chosen])]
    return MatchedUnits(units, similarity[units], places[units])


def without(activations: Any, units: Any) -> np.ndarray:
    """Activations with some units switched off, `[N, E]`; what was given stays as it is."""
    changed = np.array(activations)
    changed[:, np.asarray(units, dtype=np.int64)] = 0
    return changed
