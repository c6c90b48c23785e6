"""Keys of the data section of a training run."""

from __future__ import annotations

from pydantic import Field, model_validator

from dermray.config import Config, DecidesWeights, LeavesWeights
from dermray.corpus.schema import CaptionAspect
from dermray.corpus.shards import Verify


class DataConfig(Config):
    """How prepared samples become training batches."""

    split: DecidesWeights[str] = Field("train", description="split of the corpus to train on")
    fraction: DecidesWeights[float] = Field(
        1.0, gt=0, le=1, description="share of the split's samples to train on, the same ones in every epoch"
    )
    captions: DecidesWeights[dict[CaptionAspect, float]] = Field(
        {"raw": 1.0},
        description="weight of each caption aspect (raw, ontology, concept, sub) when one is drawn per sample and step",
    )
    crop_scale: DecidesWeights[tuple[float, float]] = Field(
        (0.4, 1.0), description="area share of the random resized crop, low and high"
    )
    horizontal_flip: DecidesWeights[float] = Field(0.0, ge=0, le=1, description="probability of mirroring an image")
    color_jitter: DecidesWeights[tuple[float, float, float, float] | None] = Field(
        None, description="ranges of brightness, contrast, saturation and hue around no change; empty: no jitter"
    )
    color_jitter_prob: DecidesWeights[float] = Field(
        0.8, ge=0, le=1, description="probability of jittering an image's colours"
    )
    grayscale_prob: DecidesWeights[float] = Field(
        0.0, ge=0, le=1, description="probability of turning an image grey, after the jitter"
    )
    cpus_per_task: LeavesWeights[float] = Field(
        1.0, gt=0, description="logical CPUs that Ray reserves for one decoding task, which keeps one core busy"
    )
    tasks_per_worker: LeavesWeights[int] = Field(
        4, ge=1, description="decoding tasks that at least are under way for one training worker, at two batches ahead"
    )
    verify: LeavesWeights[Verify] = Field(
        "auto",
        description="digests: a process compares each shard with its SHA-256 before first reading from it; pages: only "
        "checksums of the pages that are read; auto: digests of a corpus on a disk, pages of one in an object store",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale: needs 0 < low <= high <= 1, got {list(self.crop_scale)}")
        if self.color_jitter is not None and (min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5):
            raise ValueError(f"color_jitter: needs no negative range and hue <= 0.5, got {list(self.color_jitter)}")
        if not self.captions or min(self.captions.values()) < 0 or sum(self.captions.values()) <= 0:
            raise ValueError("captions: needs at least one aspect with a positive weight and none below zero")
        return self
