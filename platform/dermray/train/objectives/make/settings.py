"""Keys of the objective `make`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dermray.config import DecidesWeights, Uri
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.train.objectives.contrastive.settings import SoftTargetsConfig
from dermray.train.objectives.kinds import ObjectiveConfig


class MakeConfig(SoftTargetsConfig, ObjectiveConfig):
    """MAKE's objective; with `soft_targets` O-MAKE's."""

    lambda_m: DecidesWeights[float] = Field(1.0, ge=0, description="weight of the term over whole images")
    lambda_s: DecidesWeights[float] = Field(0.7, ge=0, description="weight of the term over patches")
    sigma: DecidesWeights[float] = Field(
        0.0, ge=-1, le=1, description="least similarity of a patch with the raw caption that counts"
    )
    weights: DecidesWeights[bool] = Field(
        True, description="a sub-caption counts by its similarity to the ontology caption"
    )
    sub_captions: DecidesWeights[int] = Field(
        MAX_SUB_CAPTIONS,
        ge=0,
        le=MAX_SUB_CAPTIONS,
        description="how many sub-captions of a raw caption are read, the first ones",
    )
    negatives: DecidesWeights[Literal["all", "valid"]] = Field(
        "all", description="valid: texts that a sample lacks are no negatives; all: the empty text is, as published"
    )
    mask_duplicates: DecidesWeights[tuple[Literal["text", "image", "diagnosis"], ...]] = Field(
        (), description="samples with a text, a near-duplicate image or a diagnosis in common are no negatives"
    )
    mode: DecidesWeights[Literal["intended", "released"]] = Field(
        "intended", description="released: with the faults of the public code, for comparison; one worker"
    )
    knowledge: DecidesWeights[Uri | None] = Field(
        None, description="model folder of a frozen text encoder that the texts' vectors are drawn towards"
    )
    lambda_k: DecidesWeights[float] = Field(0.4, ge=0, description="weight of that term")
    scale_jitter: DecidesWeights[float] = Field(
        0.0, ge=0, le=1, description="share of the global batches whose images are larger than the model's own size"
    )
    scale_jitter_max: DecidesWeights[float] = Field(
        2.0, gt=1, le=8, description="side of the largest of them, over the model's own"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> MakeConfig:
        if self.soft_targets and self.mask_duplicates:
            raise ValueError(
                "soft_targets already share a target out among samples of one diagnosis: leave mask_duplicates empty"
            )
        for key, on, names in (
            ("knowledge", self.knowledge is not None, ("lambda_k",)),
            ("scale_jitter", self.scale_jitter > 0, ("scale_jitter_max",)),
        ):
            idle = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if idle and not on:
                raise ValueError(f"{', '.join(idle)} means something with {key} alone")
        return self

    @property
    def num_texts(self) -> int:
        """N: raw, ontology and concept caption, then sub-captions."""
        return 3 + self.sub_captions

    @property
    def reads_diagnoses(self) -> bool:
        """Whether anything depends on a sample's label."""
        return self.soft_targets or "diagnosis" in self.mask_duplicates
