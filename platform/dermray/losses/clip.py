"""The symmetric contrastive loss of CLIP (Radford et al., 2021, arXiv 2103.00020) over the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.losses.gather import all_gather, world


class ClipLoss(nn.Module):
    """Mean of image-to-text and text-to-image cross-entropy; every other pair of the global batch is a negative.

    Each rank computes the rows of its own samples against the gathered features of all ranks. The mean over ranks of
    the returned value is the global loss, and averaging parameter gradients over ranks (as DDP does) gives exactly
    the gradient of the global loss. Every rank must hold the same number of samples.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """The loss of this rank's rows, a scalar.

        Args:
            image_features: L2-normalised, `[n, D]`.
            text_features: L2-normalised, `[n, D]`; row i belongs to image row i.
            logit_scale: exponentiated scale, a scalar.
        """
        rank, _ = world()
        num_local = image_features.shape[0]
        targets = torch.arange(num_local, device=image_features.device) + rank * num_local
        logits_per_image = logit_scale * image_features @ all_gather(text_features).T
        logits_per_text = logit_scale * text_features @ all_gather(image_features).T
        return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_text, targets)) / 2
