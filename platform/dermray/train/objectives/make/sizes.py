"""Images of one size a global batch, of another in the next (scale jitter): a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dermray.errors import ModelError
from dermray.models.architectures import is_panderm
from dermray.train.objectives.make.settings import MakeConfig

# Sets these draws apart from others of the same seed.
_DRAW = 0x51CE


@dataclass(frozen=True)
class Sizes:
    """Sides of square images, in pixels.

    Attributes:
        usual: the model's own.
        largest: the largest one.
        patch: of which every other side is a multiple.
        share: of the batches that are of another size, half of these of the largest, half of any between.
        seed: of the run.
    """

    usual: int
    largest: int
    patch: int
    share: float
    seed: int

    def at(self, step: int) -> int:
        """The side of all images of a global step."""
        random = np.random.default_rng(np.random.SeedSequence([self.seed, step, _DRAW]))
        chance = random.random()
        if chance >= self.share:
            return self.usual
        if chance < self.share / 2:
            return self.largest
        return self.patch * int(random.integers(-(-self.usual // self.patch), self.largest // self.patch + 1))


def sizes_of(settings: MakeConfig, model_cfg: dict[str, Any], name: str, seed: int) -> Sizes | None:
    """The sizes that a run asks for; None: always the model's own.

    Args:
        settings: of the objective.
        model_cfg: of the model (`models.architectures`).
        name: of the model, for the message.
        seed: of the run.

    Raises:
        ModelError: the vision tower takes one size only, or there is no multiple of its patch up to the largest side.
    """
    if not settings.scale_jitter:
        return None
    if not is_panderm(model_cfg):
        raise ModelError(
            f"the model {name!r}: its vision tower takes images of one size; objective.scale_jitter is for PanDerm, "
            "whose fixed table of positions is resized"
        )
    usual, patch = int(model_cfg["vision_cfg"]["image_size"]), int(model_cfg["vision_cfg"]["patch_size"])
    largest = int(settings.scale_jitter_max * usual) // patch * patch
    if largest <= usual:
        raise ModelError(
            f"objective.scale_jitter_max={settings.scale_jitter_max:g} gives no side above the {usual} pixels of the "
            f"model {name!r} that is a multiple of its patches of {patch}"
        )
    return Sizes(usual, largest, patch, settings.scale_jitter, seed)
