"""k-nearest-neighbour classification: how well a model's image vectors lie together, with nothing to fit.

The k training images of the highest cosine vote for their classes, each with the weight exp(cosine / 0.07) (Wu et al.,
2018, arXiv 1805.01978); probabilities are the shares of the votes. Of equal cosines the earlier image is taken.
"""

from __future__ import annotations

import numpy as np

from dermray.errors import EvaluationError

TEMPERATURE = 0.07
# Cosines held at a time (float32: 64 MiB), whatever the number of images.
_BLOCK_SCORES = 1 << 24


def vote(
    features: np.ndarray, train_features: np.ndarray, train_labels: np.ndarray, num_classes: int, *, k: int
) -> np.ndarray:
    """Probabilities, float64 `[N, C]`, of unit vectors `[N, D]` by labelled unit vectors `[M, D]`.

    Raises:
        EvaluationError: no training vectors, or k below 1. A k above M takes all of them.
    """
    if len(train_features) == 0 or k < 1:
        raise EvaluationError("neighbours need at least one training image and k of at least 1")
    k = min(k, len(train_features))
    probabilities = np.zeros((len(features), num_classes))
    rows = max(1, _BLOCK_SCORES // len(train_features))
    for start in range(0, len(features), rows):
        cosines = features[start : start + rows] @ train_features.T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        near = np.take_along_axis(cosines, nearest, axis=1).astype(np.float64)
        weights = np.exp((near - near[:, :1]) / TEMPERATURE)
        block = probabilities[start : start + rows]
        np.add.at(block, (np.arange(len(block))[:, None], train_labels[nearest]), weights)
        block /= weights.sum(axis=1, keepdims=True)
    return probabilities
