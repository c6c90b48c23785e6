"""Keys of the section `loss`: what is compared with what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dermray.config import Config, DecidesWeights, LeavesWeights


class LossConfig(Config):
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
