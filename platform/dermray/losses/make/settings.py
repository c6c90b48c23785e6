"""The numbers and choices of MAKE's objective, in one place for the loss and the keys of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dermray.errors import ConfigError
from dermray.losses.soft import Divergence

Mode = Literal["intended", "released"]
Negatives = Literal["all", "valid"]


@dataclass(frozen=True)
class MakeSettings:
    """What the objective is made of.

    Attributes:
        lambda_m: weight of the term over whole images.
        lambda_s: weight of the term over their patches.
        weights: whether a sub-caption counts by its similarity to the sample's ontology caption.
        negatives: all: an invalid text stays in the images' denominators, as in the released code; valid: it does not.
        mode: intended: what the papers mean; released: what the public code computes, on one process.
        temperature: what similarities of diagnoses are divided by.
        beta: share of the soft targets in the targets, in [0, 1].
        divergence: of soft targets; kl is cross_entropy less a number that has no gradient.
        tile_size: side of a tile of the similarity matrix; None: what suits the device.
    """

    lambda_m: float = 1.0
    lambda_s: float = 0.7
    weights: bool = True
    negatives: Negatives = "all"
    mode: Mode = "intended"
    temperature: float = 0.07
    beta: float = 0.5
    divergence: Divergence = "cross_entropy"
    tile_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ConfigError: names the choice.
        """
        for name, choices in (("negatives", Negatives), ("mode", Mode), ("divergence", Divergence)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"MAKE's loss: no {name} {getattr(self, name)!r}; there are {', '.join(get_args(choices))}"
                )
        for name in ("lambda_m", "lambda_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"MAKE's loss: needs {name} of 0 or more, got {getattr(self, name)}")
        if not self.temperature > 0 or not 0 <= self.beta <= 1:
            raise ConfigError(
                f"MAKE's loss: needs temperature > 0 and beta in [0, 1], got {self.temperature} and {self.beta}"
            )
