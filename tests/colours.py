"""A classifier of the tests alone that looks at images: the class, or the named colour, that is nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dermray.evaluate.classes import Classes
from dermray.evaluate.predictors.contract import Lesson, Predict
from dermray.evaluate.predictors.kinds import CLASSES, CONCEPTS, PredictorKind
from dermray.evaluate.predictors.pictures import look_at
from dermray.evaluate.settings import EvaluateConfig
from dermray.vectors.encoder_info import EncoderInfo
from tests.corpora import COLOURS, RGB

colours = PredictorKind(__name__, gives=CLASSES, vectors=False)
named = PredictorKind(__name__, gives=CONCEPTS, vectors=False)


@dataclass(frozen=True)
class Nearest:
    """What travels to the workers: a colour a class."""

    wanted: tuple[tuple[int, ...], ...]

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        """Probabilities, float64 `[n, C]`."""
        means = np.stack([one.reshape(-1, 3).mean(axis=0) for one in images])
        scores = np.exp(-np.linalg.norm(means[:, None] - np.array(self.wanted)[None], axis=2) / 50)
        return scores / scores.sum(axis=1, keepdims=True)


class Colours:
    """Knows the colours of the tests' conditions."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def info(self, model_uri: str) -> EncoderInfo:
        """It has no weights."""
        return EncoderInfo("colours", 0, 0, 0, "c" * 64, "", 0)

    def ready(self, lesson: Lesson) -> Predict:
        """Find the colour of each class; a concept is one."""
        look = Nearest(tuple(RGB[COLOURS.get(label, label)] for label in lesson.told_apart().labels))
        return lambda seen: look_at(seen, look, lesson.config)


PREDICTOR = Colours()
