"""What an image's patches say of its raw caption, as one vector; no product of patches with other images' texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dermray.errors import ConfigError
from dermray.losses.tiles import full_precision, promoted

# As `torch.nn.functional.normalize` has it: patches that are all below the threshold have no direction.
LEAST_NORM = 1e-12


def local_vectors(patch_features: Tensor, raw_text_features: Tensor, *, sigma: float = 0.0) -> Tensor:
    """The patches of each image, weighted by their similarity to its own raw caption: float32 at least, `[B, D]`.

    Similarities below `sigma` count nothing; the weights of an image are divided by their L2 norm, and the sum is not
    normalised again (MAKE, arXiv 2505.09372). Gradients reach the patches, also through the weights, and the caption.

    Args:
        patch_features: L2-normalised, `[B, P, D]`.
        raw_text_features: L2-normalised, `[B, D]`; row i is of image i.
        sigma: least similarity that counts.

    Raises:
        ConfigError: shapes that do not fit.
    """
    shape = patch_features.shape
    if patch_features.ndim != 3 or raw_text_features.shape != (shape[0], shape[2]):
        raise ConfigError(
            "MAKE's loss: needs patches [B, P, D] and raw captions [B, D], "
            f"got {list(shape)} and {list(raw_text_features.shape)}"
        )
    with full_precision(patch_features.device):
        patches, text = promoted(patch_features, raw_text_features)
        return _LocalVectors.apply(patches, text, sigma)


class _LocalVectors(torch.autograd.Function):
    """Its backward makes the patches' gradient, as large as the patches, once: autograd would make it three times."""

    @staticmethod
    def forward(context: Any, patches: Tensor, text: Tensor, sigma: float) -> Tensor:
        similarity = torch.bmm(patches, text[:, :, None]).squeeze(2)
        kept = similarity >= sigma
        similarity.masked_fill_(~kept, 0)
        norm = similarity.norm(dim=1, keepdim=True)
        weights = similarity / norm.clamp(min=LEAST_NORM)
        context.save_for_backward(patches, text, weights, kept, norm)
        return torch.bmm(weights[:, None, :], patches).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        patches, text, weights, kept, norm = context.saved_tensors
        (gradient,) = gradients
        with full_precision(patches.device):
            of_weights = torch.bmm(patches, gradient[:, :, None]).squeeze(2)
            along = weights * (weights * of_weights).sum(dim=1, keepdim=True)
            of_similarity = (of_weights - along.masked_fill(norm < LEAST_NORM, 0)) / norm.clamp(min=LEAST_NORM)
            of_similarity.masked_fill_(~kept, 0)
            factors = torch.stack([of_similarity, weights], dim=2)
            of_patches = (
                torch.bmm(factors, torch.stack([text, gradient], dim=1)) if context.needs_input_grad[0] else None
            )
            return of_patches, torch.bmm(of_similarity[:, None, :], patches).squeeze(1), None
