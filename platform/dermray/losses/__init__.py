"""Losses over features: pure in their tensors, aware of the process group, ignorant of Ray and MLflow."""

from dermray.losses.clip import ClipLoss

__all__ = ["ClipLoss"]
