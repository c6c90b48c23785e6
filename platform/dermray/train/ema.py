"""An exponential moving average of the parameters (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of the trained parameters: `average ← decay · average + (1 - decay) · parameter` after every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """Move the averages towards the parameters; `taken` is 1, or 0 for a step that was skipped."""
        weight = taken * (1 - self._decay)
        for name, parameter in self._parameters.items():
            self.averages[name].lerp_(parameter.detach(), weight)

    def restore(self, averages: dict[str, Tensor]) -> None:
        """Take up the averages of a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averages for parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)
