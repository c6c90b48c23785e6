"""Probabilities of classes by the votes of the nearest images (`dermray.evaluate.knn`)."""

from __future__ import annotations

import numpy as np

from dermray.evaluate.classes import Classes
from dermray.evaluate.knn import vote
from dermray.evaluate.predictors.contract import Lesson, Predict, by_vectors
from dermray.evaluate.settings import EvaluateConfig
from dermray.vectors.embedding.store import unit_length


class KNearest:
    """Keeps what it learns from, and compares."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def ready(self, lesson: Lesson) -> Predict:
        """Keep the vectors."""
        vectors, labels = lesson.examples()
        known, num_classes, k = unit_length(vectors)[0], len(lesson.told_apart().labels), lesson.config.neighbours

        def say(images: np.ndarray, lengths: np.ndarray) -> np.ndarray:
            # Again of length 1 after rounding, as the vectors that they are compared with.
            units = unit_length(images * lengths[:, None])[0]
            return vote(units, known, labels, num_classes, k=k)

        return lambda seen: by_vectors(seen, say)


PREDICTOR = KNearest()
