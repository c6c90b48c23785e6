"""How sure concepts are present, by the prompts that name them (`dermray.evaluate.concepts`)."""

from __future__ import annotations

from functools import partial

import numpy as np

from dermray.evaluate.classes import Classes
from dermray.evaluate.concepts import presence_scores
from dermray.evaluate.predictors.contract import Lesson, Predict, Predicted, Seen, by_vectors
from dermray.evaluate.settings import EvaluateConfig
from dermray.predict.concept_terms import Prompts


class Presence:
    """Compares images with sentences about a concept and with the same sentences without it."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """The target prompts of all concepts, and the reference sentences."""
        if classes is None:
            return []
        prompts = Prompts.load()
        return [text for name in classes.names for text in prompts.targets(name)] + list(prompts.references)

    def ready(self, lesson: Lesson) -> Predict:
        """Take the vectors of the prompts, one concept after the other."""
        prompts = Prompts.load()
        references = lesson.texts(prompts.references)[:, None]
        targets = [
            lesson.texts(prompts.targets(name)).reshape(len(prompts.templates), len(prompts.terms[name]), -1)
            for name in lesson.told_apart().names
        ]
        return partial(_say, targets, references)


def _say(targets: list[np.ndarray], references: np.ndarray, seen: Seen) -> Predicted:
    """Scores `[N, C]` in (0, 1)."""
    return by_vectors(
        seen, lambda images, lengths: np.stack([presence_scores(images, one, references) for one in targets], axis=1)
    )


PREDICTOR = Presence()
