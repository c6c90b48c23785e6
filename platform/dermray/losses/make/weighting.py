"""How much each text of a sample counts: MAKE's weights of sub-captions, and which texts are targets at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dermray.losses.make.settings import MakeSettings

# Raw, ontology and concept caption; then come sub-captions.
ONTOLOGY, FIRST_SUB = 1, 3


@dataclass(frozen=True)
class Counted:
    """What each text counts in the three means, `[B, N]` each, 0 for invalid ones; without gradients."""

    i2t: Tensor
    t2i: Tensor
    local: Tensor


def counted(text: Tensor, valid: Tensor, settings: MakeSettings, labels: Tensor | None) -> Counted:
    """Weights of the texts `[B, N, D]` by what is asked for.

    Args:
        text: L2-normalised.
        valid: bool `[B, N]`.
        settings: of the objective.
        labels: None: texts are asked for their images without weights.
    """
    text = text.detach()
    num, texts_per_image, _ = text.shape
    is_valid = valid.to(text.dtype)
    weights = torch.ones_like(is_valid)
    targets = is_valid.clone()
    targets[:, 0] = 0
    if settings.mode == "released":
        # It takes the flat list, sample by sample, for one that goes text by text.
        flat = text.flatten(0, 1)
        if settings.weights and texts_per_image > FIRST_SUB:
            sub = flat[FIRST_SUB * num :].view(-1, num, text.shape[2]).transpose(0, 1)
            weights = caption_weights(flat[ONTOLOGY * num : (ONTOLOGY + 1) * num], sub, valid)
        targets = is_valid.flatten().clone()
        targets[:num] = 0
        targets = targets.view_as(is_valid)
        of_texts = weights.flatten()[:num, None]
    else:
        if settings.weights and texts_per_image > FIRST_SUB:
            weights = caption_weights(text[:, ONTOLOGY], text[:, FIRST_SUB:], valid)
        of_texts = weights
    return Counted(is_valid * weights, is_valid if labels is None else is_valid * of_texts, targets * weights)


def caption_weights(ontology: Tensor, sub: Tensor, valid: Tensor) -> Tensor:
    """Of each text, `[B, N]`: a softmax over similarities to the ontology caption, divided by its largest.

    The nearest valid sub-caption has 1, and so have all that is no sub-caption or not valid, and all texts of a sample
    without an ontology caption (MAKE, arXiv 2505.09372).

    Args:
        ontology: `[B, D]`.
        sub: `[B, K, D]`.
        valid: bool `[B, N]`, N = 3 + K.
    """
    similarity = torch.einsum("bd,bkd->bk", ontology, sub).masked_fill(~valid[:, FIRST_SUB:], -torch.inf)
    weights = (similarity - similarity.amax(dim=1, keepdim=True)).exp()
    weights = weights.where(valid[:, FIRST_SUB:] & valid[:, ONTOLOGY, None], 1)
    return torch.cat([weights.new_ones(len(weights), FIRST_SUB), weights], dim=1)
