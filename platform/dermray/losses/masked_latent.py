"""The loss of masked latent alignment (CAE v2, PanDerm): predicted tokens point where a teacher's do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskedLatentAlignmentLoss:
    """Mean over all tokens of 1 - cosine, where masked tokens and the others may weigh differently.

    Weights are factors: with `visible_weight=0` visible tokens and the class token, which is made of visible ones,
    count nothing, and the mean is still one over all tokens. Samples are independent, so that the mean over ranks is
    the loss of the global batch.

    Args:
        masked_weight: of tokens of masked patches.
        visible_weight: of tokens of visible patches and of the class token.
    """

    def __init__(self, masked_weight: float = 1.0, visible_weight: float = 1.0) -> None:
        self._masked_weight, self._visible_weight = masked_weight, visible_weight

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            prediction: unit vectors `[B, 1 + N, D]` in the order class, visible, masked.
            target: unit vectors of the teacher in the same order.
            mask: `[B, N]`, true where a patch is masked, in the order of patches: how many are is all that counts.
        """
        distances = token_distances(prediction, target)
        if self._masked_weight == self._visible_weight:
            return self._masked_weight * distances.mean()
        masked = is_masked(mask, distances)
        return (distances * torch.where(masked, self._masked_weight, self._visible_weight)).mean()


def token_distances(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each token: unit vectors `[B, L, D]` twice → `[B, L]`, float32 or wider."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return 1 - F.cosine_similarity(prediction.to(dtype), target.to(dtype), dim=-1)


def is_masked(mask: Tensor, distances: Tensor) -> Tensor:
    """Which tokens in the order class, visible, masked are of masked patches: `[B, N]` → bool `[B, 1 + N]`.

    `[[1, 0, 0]]` → `[[0, 0, 0, 1]]`.
    """
    length = distances.shape[1]
    first = length - mask.bool().sum(dim=1, keepdim=True).to(distances.device)
    return torch.arange(length, device=distances.device) >= first
