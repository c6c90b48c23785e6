"""Probabilities of classes by the prompts that name them (`dermray.evaluate.zero_shot`)."""

from __future__ import annotations

import torch

from dermray.evaluate.classes import Classes
from dermray.evaluate.predictors.contract import Lesson, Predict, by_vectors
from dermray.evaluate.settings import EvaluateConfig
from dermray.predict.zero_shot import TEMPLATES, by_class, classifier_weights, fill, probabilities


class ZeroShot:
    """Compares images with the mean of each class's prompts."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """Every template with every class name."""
        return [] if classes is None else fill(classes.names, config.templates or TEMPLATES)

    def ready(self, lesson: Lesson) -> Predict:
        """Make the weights of the classes."""
        classes = lesson.told_apart()
        weights = classifier_weights(by_class(lesson.texts(self.texts(classes, lesson.config)), len(classes.names)))
        return lambda seen: by_vectors(
            seen, lambda images, lengths: probabilities(torch.from_numpy(images), weights).numpy()
        )


PREDICTOR = ZeroShot()
