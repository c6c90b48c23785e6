"""Probabilities of classes by the published linear probe (`dermray.evaluate.linear_probe`)."""

from __future__ import annotations

import numpy as np

from dermray.evaluate import linear_probe
from dermray.evaluate.classes import Classes
from dermray.evaluate.predictors.contract import Lesson, Predict, by_vectors
from dermray.evaluate.settings import EvaluateConfig


class LinearProbe:
    """One linear layer, fitted on the vectors in the length that the tower gives them."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def ready(self, lesson: Lesson) -> Predict:
        """Fit it; a class without a sample to learn from gets the probability 0."""
        vectors, classes = lesson.examples()
        num_classes = len(lesson.told_apart().labels)
        present, labels = np.unique(classes, return_inverse=True)
        fitted = linear_probe.fit(vectors.astype(np.float64), labels, seed=0, cost=lesson.config.probe_cost)

        def say(images: np.ndarray, lengths: np.ndarray) -> np.ndarray:
            probabilities = np.zeros((len(images), num_classes))
            probabilities[:, present] = fitted.predict_proba((images * lengths[:, None]).astype(np.float64))
            return probabilities

        return lambda seen: by_vectors(seen, say)


PREDICTOR = LinearProbe()
