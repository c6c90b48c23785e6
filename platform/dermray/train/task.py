"""A task binds batch → model → loss, so that the loop knows none of the three."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.losses import ClipLoss

MAX_LOGIT_SCALE = math.log(100)


class Task(Protocol):
    """What the training loop asks of an objective."""

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """The rank's loss, a scalar whose mean over ranks is the global loss; `model` may be wrapped by DDP."""

    def after_step(self, model: nn.Module) -> None:
        """Constrain parameters after an optimiser step; `model` is not wrapped."""

    def report(self, model: nn.Module) -> dict[str, float]:
        """Scalars of the model worth logging."""


class ContrastiveTask:
    """CLIP's objective on one image and one caption a sample."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, color: ColorAugmentation
    ) -> None:
        self._color = color
        self._loss = ClipLoss()
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Augment and normalise uint8 pixels on the device, run both towers, compare over the global batch."""
        levels = self._color(batch.pixels.to(device, non_blocking=True), epoch=batch.epoch, samples=batch.samples)
        pixels = (levels - self._mean) / self._std
        tokens = batch.tokens.to(device, non_blocking=True)
        image_features, text_features, logit_scale = model(pixels, tokens)[:3]
        return self._loss(image_features.float(), text_features.float(), logit_scale.float())

    def after_step(self, model: nn.Module) -> None:
        """Clamp logit_scale to [0, ln 100] (Radford et al., 2021)."""
        with torch.no_grad():
            _logit_scale(model).clamp_(0, MAX_LOGIT_SCALE)

    def report(self, model: nn.Module) -> dict[str, float]:
        """The exponentiated logit scale."""
        return {"logit_scale": float(_logit_scale(model).detach().exp())}


def _logit_scale(model: nn.Module) -> Tensor:
    scale = model.logit_scale
    assert isinstance(scale, Tensor)
    return scale
