"""Keys of the section `loss`: what is compared with what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dermray.config import Config, DecidesWeights, LeavesWeights


class SoftTargetsConfig(Config):
    """O-MAKE's targets graded by diagnosis, for every loss over pairs that takes them."""

    soft_targets: DecidesWeights[bool] = Field(
        False, description="O-MAKE: targets graded by how near diagnoses stand in the disease tree"
    )
    temperature: DecidesWeights[float] = Field(0.07, gt=0, description="divides similarities of diagnoses")
    beta: DecidesWeights[float] = Field(0.5, ge=0, le=1, description="share of the soft targets")
    divergence: DecidesWeights[Literal["cross_entropy", "kl"]] = Field(
        "cross_entropy", description="of soft targets; kl has the same gradient"
    )
    curriculum_epochs: DecidesWeights[int | None] = Field(
        None, ge=1, description="beta falls along half a cosine and is 0 from this epoch on; empty: it stays"
    )

    @model_validator(mode="after")
    def _has_targets_to_shape(self) -> Self:
        names = ("temperature", "beta", "divergence", "curriculum_epochs")
        idle = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if idle and not self.soft_targets:
            raise ValueError(f"{', '.join(idle)} means something with soft_targets=true alone")
        return self


class LossConfig(SoftTargetsConfig):
    """What is compared with what."""

    name: DecidesWeights[Literal["clip", "siglip"]] = Field(
        "clip", description="clip: softmax over the global batch; siglip: sigmoid"
    )
    method: LeavesWeights[Literal["local", "dense", "tiled"]] = Field(
        "tiled", description="of clip: tiled (least memory), local (own rows whole) or dense (the whole matrix)"
    )
    mask_duplicates: DecidesWeights[bool] = Field(
        False, description="samples with the same text are not negatives of each other"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LossConfig:
        if self.soft_targets and self.mask_duplicates:
            raise ValueError(
                "soft_targets already share a target out among samples of one diagnosis: leave mask_duplicates out"
            )
        return self
