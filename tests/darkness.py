"""A predictor of the tests alone, and no CLIP model: the darker a patch, the likelier it is malignant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from dermray import storage
from dermray.errors import ModelError
from dermray.evaluate.classes import Classes
from dermray.evaluate.predictors.contract import Lesson, Predict
from dermray.evaluate.predictors.kinds import PredictorConfig, PredictorKind
from dermray.evaluate.predictors.pictures import look_at
from dermray.evaluate.settings import EvaluateConfig
from dermray.vectors.encoder_info import EncoderInfo

# The whole model: how much each of red, green and blue counts.
WEIGHTS = "risk.json"


class DarknessConfig(PredictorConfig):
    """`predictor_keys.TASK.power`."""

    power: float = Field(1.0, gt=0, description="how much steeper than the darkness the risk grows")


darkness = PredictorKind(__name__, gives="risk", vectors=False, settings=DarknessConfig)


@dataclass(frozen=True)
class Look:
    """What travels to the workers."""

    weights: tuple[float, ...]
    power: float = 1.0

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        """Risks, float64 `[n]`, of images of any sizes."""
        means = np.stack([one.reshape(-1, 3).mean(axis=0) for one in images])
        return (1.0 - means @ np.array(self.weights) / 255) ** self.power


class Darkness:
    """Loads three weights."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def info(self, model_uri: str) -> EncoderInfo:
        """By the digest of its weights; it has no vectors and no texts."""
        file = storage.join(model_uri, WEIGHTS)
        if not storage.exists(file):
            raise ModelError(f"{model_uri} holds no {WEIGHTS}")
        return EncoderInfo(storage.name_of(model_uri), 0, 0, 0, storage.sha256(file), "", 3)

    def ready(self, lesson: Lesson) -> Predict:
        """Load them; images are looked at where they lie."""
        assert isinstance(lesson.settings, DarknessConfig)
        look = Look(tuple(storage.read_json(storage.join(lesson.model_uri, WEIGHTS))), lesson.settings.power)
        return lambda seen: look_at(seen, look, lesson.config)


PREDICTOR = Darkness()
