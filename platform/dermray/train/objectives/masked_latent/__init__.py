"""Masked latent alignment (CAE v2, PanDerm): from an image's visible patches what a teacher sees in all of them."""

from collections.abc import Mapping
from typing import Any

from dermray.train.objectives.kinds import ObjectiveKind
from dermray.train.objectives.masked_latent.settings import TOY, MaskedLatentConfig


def _toy(config: Any) -> Mapping[str, Any]:
    """A tiny encoder whose teacher is its own average, so that nothing is fetched."""
    settings: MaskedLatentConfig = config.objective
    return {"model": TOY, "objective": settings.toy()}


OBJECTIVE = ObjectiveKind(
    MaskedLatentConfig,
    "dermray.train.objectives.masked_latent.module",
    scores=dict.fromkeys(
        (
            *("validation_knn_accuracy", "validation_linear_probe_accuracy", "validation_effective_rank"),
            *("validation_spread", "validation_masked_cosine"),
        ),
        "max",
    ),
    toy=_toy,
)
