"""Keys of the objective `masked_latent`, and the encoders that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dermray.config import DecidesWeights
from dermray.ingest.patch_masks import MaskKind, how_many
from dermray.model_uri import folder_uri
from dermray.train.objectives.kinds import ObjectiveConfig

EMA = "ema"
TOY = "panderm_toy"


@dataclass(frozen=True)
class EncoderSize:
    """Of an encoder: width of a token, blocks, heads, and the published initial value of its branch scales."""

    width: int
    layers: int
    heads: int
    layer_scale: float = 0.1


# By what the key `model` says. The toy is the vision tower of `panderm_tiny_bert`.
ENCODERS = {
    TOY: EncoderSize(128, 4, 4),
    "panderm_tiny": EncoderSize(192, 12, 3),
    "panderm_small": EncoderSize(384, 12, 6),
    "panderm_base": EncoderSize(768, 12, 12),
    "panderm_large": EncoderSize(1024, 24, 16, 1e-5),
}


class MaskedLatentConfig(ObjectiveConfig):
    """Masked latent alignment; what is published is the default but for the teacher."""

    image_size: DecidesWeights[int] = Field(224, ge=8, description="side of the encoder's square input, in pixels")
    patch_size: DecidesWeights[int] = Field(
        16, ge=1, description="side of a patch, in pixels; image_size is a multiple"
    )
    regressor_layers: DecidesWeights[int] = Field(
        4, ge=1, description="blocks that predict masked patches; thrown away after pretraining"
    )
    mask: DecidesWeights[MaskKind] = Field(
        "block", description="which patches are hidden: rectangles (block, as BEiT), or one by one (random)"
    )
    mask_ratio: DecidesWeights[float] = Field(0.5, gt=0, lt=1, description="share of patches that are hidden")
    mask_count: DecidesWeights[int | None] = Field(
        None, ge=1, description="how many patches are hidden; empty: mask_ratio of them, rounded down"
    )
    teacher: DecidesWeights[str] = Field(
        EMA, description="whose latents are learned: ema, the encoder's own average; or a CLIP model's name or folder"
    )
    teacher_pretrained: DecidesWeights[str | None] = Field(
        None, description="weights of a teacher that is named: open_clip tag (openai), or a checkpoint"
    )
    teacher_decay: DecidesWeights[float] = Field(
        0.999, gt=0, lt=1, description="of teacher=ema, a step; smaller in the first steps"
    )
    teacher_layers: DecidesWeights[int] = Field(
        4, ge=1, description="of teacher=ema: the mean of so many last blocks is its latent"
    )
    masked_weight: DecidesWeights[float] = Field(1.0, ge=0, description="of tokens of masked patches in the loss")
    visible_weight: DecidesWeights[float] = Field(
        1.0, ge=0, description="of tokens of visible patches, and of the class token, in the loss"
    )
    drop_path: DecidesWeights[float] = Field(
        0.1,
        ge=0,
        lt=1,
        description="how likely the last residual branches are left out of an image; the first never are",
    )
    layer_scale: DecidesWeights[float | None] = Field(
        None, gt=0, description="initial value of branch scales; empty: 0.1, of panderm_large 1e-5"
    )
    decay: DecidesWeights[Literal["intended", "released"]] = Field(
        "intended", description="released: weights of class and mask token decay too, as in the published code"
    )
    warmup_epochs: DecidesWeights[float | None] = Field(
        None, ge=0, description="warm-up in epochs; empty: optim.warmup_steps"
    )
    min_lr: DecidesWeights[float] = Field(1e-5, ge=0, description="what the cosine ends at; 0 where optim.lr is less")

    @field_validator("teacher")
    @classmethod
    def _located(cls, value: str) -> str:
        # Workers run in folders of their own.
        return value if value == EMA else folder_uri(value) or value

    @model_validator(mode="after")
    def _fits_together(self) -> MaskedLatentConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.masked_weight == self.visible_weight == 0:
            raise ValueError("masked_weight and visible_weight are both 0: nothing would be learned")
        if self.teacher == EMA and self.teacher_pretrained is not None:
            raise ValueError("teacher_pretrained is for a teacher that is named, not for teacher=ema")
        fields = type(self).model_fields
        idle = [name for name in ("teacher_decay", "teacher_layers") if getattr(self, name) != fields[name].default]
        if idle and self.teacher != EMA:
            raise ValueError(f"{', '.join(idle)} means something with teacher=ema alone")
        assert self.num_masked
        return self

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    @property
    def num_masked(self) -> int:
        """Patches of an image that are hidden."""
        return how_many(self.grid**2, ratio=self.mask_ratio, count=self.mask_count)

    def toy(self) -> MaskedLatentConfig:
        """The same on the toy's input: other sizes, the average for a teacher, no warm-up in epochs."""
        fields = type(self).model_fields
        sizes = {"image_size": 64, "patch_size": 8, "regressor_layers": 2, "teacher_layers": 2, "layer_scale": None}
        sizes |= {name: fields[name].default for name in ("mask_count", "warmup_epochs", "teacher_decay", "min_lr")}
        return self.model_copy(update={**sizes, "teacher": EMA, "teacher_pretrained": None})
