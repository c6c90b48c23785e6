"""A PanDerm encoder by itself as a folder: `config.json`, `model.safetensors` in PanDerm's or CAE v2's names.

    {"tower": "panderm", "image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "heads": 12,
     "pooling": "class"}

A public checkpoint becomes such a folder by `write`; so does what `objective.kind=masked_latent` has trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from torchvision.transforms import v2 as transforms

from dermray import documents, storage
from dermray.config import Config
from dermray.errors import ModelError
from dermray.models import bounds, folder, layout, weights
from dermray.models.panderm import PanDermEncoder, Pooling, of_tower, without_companions

CONFIG_NAME, WEIGHTS_NAME = layout.LIBRARY_NAMES[0], layout.SAFE_WEIGHTS_NAME
# Of ImageNet, by which PanDerm and CAE v2 were pretrained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the norm of mean pooling is called where it has a name of its own, and what a fine-tuned tower has beside it.
POOLED_NORM, HEAD = "fc_norm.", "head."


class PanDermConfig(Config):
    """What `config.json` says of the encoder and of the images that it takes."""

    tower: Literal["panderm"] = "panderm"
    image_size: int = Field(224, ge=1, description="side of the square input, in pixels")
    patch_size: int = Field(16, ge=1, description="side of a patch, in pixels")
    width: int = Field(768, ge=4, description="of a token")
    layers: int = Field(12, ge=1, description="blocks")
    heads: int = Field(12, ge=1, description="of attention")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of an MLP over that of a token")
    pooling: Pooling = Field("class", description="class: the class token; mean: the mean of the patches")
    resized_side: int | None = Field(
        None, ge=1, description="what the shorter side of an image is brought to before the crop; empty: image_size"
    )
    mean: tuple[float, float, float] = Field(MEAN, description="of RGB values in [0, 1]")
    std: tuple[float, float, float] = Field(STD, description="by which they are divided")

    @model_validator(mode="after")
    def _fits_together(self) -> PanDermConfig:
        if self.side_before_crop < self.image_size:
            raise ValueError(f"resized_side={self.resized_side} is less than image_size={self.image_size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be greater than 0, got {list(self.std)}")
        return self

    @property
    def side_before_crop(self) -> int:
        """What the shorter side of an image is brought to."""
        return self.resized_side or self.image_size

    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image, JSON-serialisable."""
        return {"size": self.image_size, "resized": self.side_before_crop, "mean": [*self.mean], "std": [*self.std]}


def build(
    document: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[PanDermEncoder, Callable[[Any], Tensor], PanDermConfig]:
    """The encoder that a configuration describes, with its weights, and what makes its input of a PIL image.

    Raises:
        ModelError: an unknown or a wrong key, sizes that do not divide, or weights that do not fit.
    """
    try:
        config = PanDermConfig.model_validate(document)
    except ValidationError as error:
        raise ModelError(f"{CONFIG_NAME}: {documents.first_fault(error)}") from None
    own = own_weights(state, config.pooling)
    held = bounds.Size.of_state(own)
    bounds.outlined(lambda: _tower(config), held)
    with bounds.filled_by(held):
        tower = _tower(config)
    weights.load(tower, own, source=WEIGHTS_NAME)
    return tower, transform_of(config), config


def _tower(config: PanDermConfig) -> PanDermEncoder:
    return PanDermEncoder(
        config.image_size,
        config.patch_size,
        config.width,
        config.layers,
        config.heads,
        mlp_ratio=config.mlp_ratio,
        pooling=config.pooling,
    )


def own_weights(state: Mapping[str, Tensor], pooling: Pooling) -> dict[str, Tensor]:
    """Of a checkpoint what the encoder has: no head, and the norm of its pooling, whichever of both names it bears."""
    tower = without_companions(of_tower(state))
    pooled = {key.replace(POOLED_NORM, "norm."): value for key, value in tower.items() if key.startswith(POOLED_NORM)}
    own = {key: value for key, value in tower.items() if not key.startswith((POOLED_NORM, HEAD))}
    return own | pooled if pooling == "mean" or "norm.weight" not in own else own


def transform_of(config: PanDermConfig) -> Callable[[Any], Tensor]:
    """PIL image → float32 `[3, S, S]`: bicubic to the shorter side, the middle, normalised."""
    return transforms.Compose(
        [
            # On the picture, as published: a tensor is resized a little differently.
            transforms.Resize(config.side_before_crop, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(config.image_size),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(config.mean), list(config.std)),
        ]
    )


def write(state: Mapping[str, Tensor], uri: str, config: PanDermConfig, provenance: dict[str, Any]) -> str:
    """Write a model folder of the kind `image_encoder`; `dermray.json` comes last.

    Args:
        state: in PanDerm's names, or in CAE v2's (`encoder.…`), what is beside the encoder included.
        uri: the folder, local or remote.
        provenance: JSON-serialisable facts for `dermray.json`.

    Returns:
        SHA-256 (hex) of the weights file.

    Raises:
        ModelError: the weights are not those of such an encoder.
    """
    with torch.device("meta"):
        outline = _tower(config)
    weights.require_fit(outline, own_weights(state, config.pooling), source=uri)
    held = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    saved = safetensors.torch.save(held, metadata={"format": "pt"})
    digest = hashlib.sha256(saved).hexdigest()
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), saved)
    storage.write_json(storage.join(uri, CONFIG_NAME), config.model_dump(mode="json", exclude_none=True))
    folder.write_facts(uri, layout.IMAGE_ENCODER, digest, provenance)
    return digest
