"""What `tests.rotation` exports, a kind of the tests alone: a small tower, and by how many quarter turns it sees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dermray import storage
from dermray.models import folder, weights
from dermray.models.image_encoders import ImageEncoder, ImageTransform
from dermray.models.kinds import ModelKind

NAME = "rotation"
KIND = ModelKind(__name__, frozenset({"images", "predictions"}), "turned.accuracy")
# The same for whoever gives no vectors.
JUDGE = ModelKind(__name__, frozenset({"predictions"}), "turned.accuracy")


def layers(side: int) -> nn.Sequential:
    """Pixels of square images, float32 `[N, S * S * 3]` in [0, 1], to logits of four turns."""
    return nn.Sequential(nn.Linear(3 * side**2, 8), nn.ReLU(), nn.Linear(8, 4))


class TurnedImageModel(ImageEncoder):
    def __init__(self, trained: nn.Sequential, side: int) -> None:
        super().__init__(trained, lambda vectors: vectors, sides=(side, side), preprocessing={"fit": side})

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual[:2](flat(images))

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return {"turns": self.visual(flat(images)).softmax(1)}


def flat(images: Tensor) -> Tensor:
    """`[N, 3, S, S]` → `[N, S * S * 3]`, as training sees them."""
    return images.permute(0, 2, 3, 1).flatten(1)


def fitted(side: int) -> ImageTransform:
    """PIL image → float32 `[3, S, S]` in [0, 1]."""

    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(ImageOps.fit(image, (side, side)), np.float32) / 255).permute(2, 0, 1)

    return transform


def write(uri: str, kind: str, state: dict[str, Tensor], config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """A model folder of configuration and safetensors; returns the digest of the weights."""
    data = safetensors.torch.save({name: value.detach().cpu() for name, value in state.items()})
    storage.write_bytes(storage.join(uri, "model.safetensors"), data)
    storage.write_json(storage.join(uri, "config.json"), config)
    digest = hashlib.sha256(data).hexdigest()
    folder.write_facts(uri, kind, digest, provenance)
    return digest


def save(model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return write(uri, NAME, model.state_dict(), {"side": int((model[0].in_features / 3) ** 0.5)}, provenance)


def load(path: Path) -> tuple[TurnedImageModel, ImageTransform, None]:
    side = storage.read_object(str(path / "config.json"))["side"]
    trained = layers(side)
    weights.load(trained, weights.read(str(path / "model.safetensors")), source=str(path))
    return TurnedImageModel(trained, side).eval(), fitted(side), None
