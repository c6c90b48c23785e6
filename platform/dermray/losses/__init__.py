"""Losses over features: pure in their tensors, aware of the process group, ignorant of Ray and MLflow."""

from dermray.losses.adasp import AdaSpLoss
from dermray.losses.cached import cached_backward
from dermray.losses.clip import ClipLoss
from dermray.losses.make import MakeLoss
from dermray.losses.masked_latent import MaskedLatentAlignmentLoss
from dermray.losses.siglip import SigLipLoss
from dermray.losses.soft import Graded

__all__ = [
    "AdaSpLoss",
    "ClipLoss",
    "Graded",
    "MakeLoss",
    "MaskedLatentAlignmentLoss",
    "SigLipLoss",
    "cached_backward",
]
