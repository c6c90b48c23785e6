"""The parts of a model of two towers: which of them are trained, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dermray.models import locking
from dermray.train.objectives.contract import ParameterGroup
from dermray.train.objectives.contrastive import PARTS
from dermray.train.optimiser import groups_by_part
from dermray.train.settings import TrainConfig

_SCALE = ("logit_scale", "logit_bias")


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of open_clip's models belongs to, by its name."""
    if name in _SCALE:
        return "scale"
    return "image" if name.startswith("visual.") else "text"


def require_lockable(model_cfg: dict[str, Any], settings: TrainConfig) -> None:
    """Refuse locks that do not fit the architecture.

    Raises:
        ModelError: names the key.
    """
    locking.require_groups(model_cfg, settings.lock, settings.unlocked)


def lock(model: nn.Module, settings: TrainConfig) -> None:
    """Lock the towers that `train.lock` names, in place; before anything asks which parameters are trained.

    Raises:
        ModelError: a tower cannot be locked so.
    """
    for tower in settings.lock:
        locking.lock(model, tower, settings.unlocked[tower])


def groups(model: nn.Module, factors: Mapping[str, float]) -> Sequence[ParameterGroup] | None:
    """Parameter groups by part where `optim.factors` names any; None: those of open_clip."""
    return groups_by_part(model, {part: factors.get(part, 1.0) for part in PARTS}, part_of) if factors else None
