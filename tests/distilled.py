"""An objective of the tests alone, and the kind that it exports: a student of a frozen teacher.

It has an average of its own as state, which is exported, two learning rates, and a parameter that gets no gradient. It
learns from pairs of one lesion, of each image what the mask beside it leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dermray import images
from dermray.config import DecidesWeights
from dermray.corpus.manifest import Manifest
from dermray.corpus.side_tables import side_index
from dermray.ingest import augment, items
from dermray.ingest.loader import Batch
from dermray.ingest.views import Arrays, ArraySpec, Item
from dermray.masks import decode_mask
from dermray.models import weights
from dermray.models.image_encoders import ImageEncoder, ImageTransform
from dermray.models.kinds import ModelKind
from dermray.train.objectives.contract import Autocast, Built, Figure, Objective, Outcome, ParameterGroup
from dermray.train.objectives.kinds import ObjectiveConfig, ObjectiveKind
from dermray.train.settings import PretrainConfig
from tests import rotation_model

SIDE, WIDTH = 16, 12


class DistilledConfig(ObjectiveConfig):
    decay: DecidesWeights[float] = 0.9
    trunk_lr_factor: DecidesWeights[float] = 0.2


def pairs(config: PretrainConfig, manifest: Manifest) -> np.ndarray:
    tables = side_index(config.corpus_uris[0], manifest, "lesions").row_groups(["lesion"])
    lesions = pa.concat_tables(tables)["lesion"].to_pylist()
    return items.of_neighbours(lesions, manifest.row_group_sizes(), most=2, least=2)


OBJECTIVE = ObjectiveKind(DistilledConfig, __name__, items=pairs, columns=lambda config: Pairs.columns)
KIND = ModelKind(__name__, frozenset({"images"}), "agreement.cosine")


def teacher() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Linear(3 * SIDE**2, WIDTH).requires_grad_(False)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3 * SIDE**2, 32), nn.Linear(32, WIDTH)
        # What no batch needs.
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.trunk(pixels).relu())


@dataclass(frozen=True)
class Pairs:
    columns = ("image", "sides.masks.mask")

    def specs(self, step: int) -> dict[str, ArraySpec]:
        return dict.fromkeys(("one", "other"), ArraySpec("uint8", (SIDE, SIDE, 3)))

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        for place, item in enumerate(items):
            for name, row in zip(("one", "other"), item.rows, strict=True):
                pixels = images.decode(row["image"])
                if row["sides.masks.mask"] is not None:
                    pixels = pixels * (decode_mask(row["sides.masks.mask"]) > 0)[:, :, None]
                out[name][place] = augment.crop_and_resize(
                    pixels, item.random, size=SIDE, scale=(0.7, 1.0), horizontal_flip=0.0
                )


class Distillation(Objective):
    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        self.teacher = teacher().to(device)
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        self._decay = decay

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        one, other = (batch[name].to(device).flatten(1).float() / 255 for name in ("one", "other"))
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        with autocast(), torch.no_grad():
            wanted, averaged = self.teacher(one), functional_call(plain, self.average, (other,))
        with autocast():
            given = model(one)
        agreement = F.cosine_similarity(given, wanted).mean()
        loss = 1 - agreement + 0.1 * (1 - F.cosine_similarity(given, averaged).mean())
        loss.backward()
        return Outcome(loss.detach(), {"agreement": Figure(agreement.detach())})

    def after_step(self, model: nn.Module, taken: Tensor) -> None:
        for name, value in model.named_parameters():
            self.average[name].lerp_(value.detach(), taken * (1 - self._decay))

    def state(self) -> dict[str, Any]:
        return {"average": self.average}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def check(config: PretrainConfig) -> None:
    """Nothing could fail later."""


def build(config: PretrainConfig, device: torch.device) -> Built:
    settings = config.objective
    assert isinstance(settings, DistilledConfig)
    model = Student().to(device)
    objective = Distillation(model, settings.decay, device)
    slow = ParameterGroup([*model.trunk.parameters()], 0.0, settings.trunk_lr_factor)
    groups = [slow, ParameterGroup([*model.head.parameters(), model.unused])]
    export = functools.partial(save, objective.average)
    return Built(model, objective, Pairs(), export, groups=groups, unused_parameters=True)


def save(average: dict[str, Tensor], model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return rotation_model.write(uri, "distilled", average, {"side": SIDE}, provenance)


class DistilledModel(ImageEncoder):
    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(rotation_model.flat(images))


def load(path: Path) -> tuple[DistilledModel, ImageTransform, None]:
    student = Student()
    weights.load(student, weights.read(str(path / "model.safetensors")), source=str(path))
    encoder = DistilledModel(student, lambda v: v, sides=(SIDE, SIDE), preprocessing={"fit": SIDE})
    return encoder.eval(), rotation_model.fitted(SIDE), None
