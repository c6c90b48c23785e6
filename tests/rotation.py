"""An objective of the tests alone: by how many quarter turns an image was turned. One image, no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dermray import images
from dermray.config import DecidesWeights
from dermray.ingest import augment
from dermray.ingest.loader import Batch
from dermray.ingest.views import Arrays, ArraySpec, Item
from dermray.train.objectives.contract import Autocast, Built, Figure, Objective, Outcome, ParameterGroup
from dermray.train.objectives.kinds import ObjectiveConfig, ObjectiveKind
from dermray.train.settings import PretrainConfig
from tests import rotation_model


class RotationConfig(ObjectiveConfig):
    side: DecidesWeights[int] = 16
    head_lr_factor: DecidesWeights[float] = 10.0


OBJECTIVE = ObjectiveKind(RotationConfig, __name__)


@dataclass(frozen=True)
class TurnedImage:
    side: int
    columns = ("image",)

    def specs(self, step: int) -> dict[str, ArraySpec]:
        return {"image": ArraySpec("uint8", (self.side, self.side, 3)), "turns": ArraySpec("int64", ())}

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        for place, item in enumerate(items):
            pixels = images.decode(item.rows[0]["image"])
            crop = augment.crop_and_resize(pixels, item.random, size=self.side, scale=(0.5, 1.0), horizontal_flip=0.0)
            turns = out["turns"][place] = item.random.integers(4)
            out["image"][place] = np.rot90(crop, turns)


class Rotation(Objective):
    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        turns = batch["turns"].to(device)
        with autocast():
            logits = model(batch["image"].to(device).flatten(1).float() / 255)
        loss = F.cross_entropy(logits, turns)
        loss.backward()
        right = (logits.argmax(1) == turns).float()
        return Outcome(loss.detach(), {"accuracy": Figure(right.mean()), "num_right": Figure(right.sum(), "sum")})


def check(config: PretrainConfig) -> None:
    """Nothing could fail later."""


def build(config: PretrainConfig, device: torch.device) -> Built:
    settings = config.objective
    assert isinstance(settings, RotationConfig)
    model = rotation_model.layers(settings.side).to(device)
    groups = [
        ParameterGroup(list(model[0].parameters())),
        ParameterGroup([*model[2].parameters()], 0.0, settings.head_lr_factor),
    ]
    return Built(model, Rotation(), TurnedImage(settings.side), rotation_model.save, groups=groups)
