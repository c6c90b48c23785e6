"""Vision towers that give features of patches beside those of the image: open_clip's ViTs and PanDerm.

A patch's features are what the tower would make of that patch alone where it makes the image's: the same last norms
and projection (MAKE, arXiv 2505.09372, for ViTs that pool by the class token).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from dermray.models.panderm import PanDermVisionTransformer
from dermray.models.texts import Rows
from dermray.train.objectives.make.towers import no_patches


def require_patches(visual: nn.Module, name: str) -> None:
    """Refuse a vision tower that has no patches in the space of texts.

    Args:
        visual: the tower.
        name: of the model, for the message.

    Raises:
        ModelError: names the tower and which ones do.
    """
    is_vit = type(visual) is VisionTransformer and visual.attn_pool is None and visual.pool_type in ("tok", "avg")
    if not isinstance(visual, PanDermVisionTransformer) and not (is_vit and not visual.final_ln_after_pool):
        raise no_patches(name, f"its vision tower ({type(visual).__name__})")


def image_and_patches(visual: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of images `[B, D]` and of their patches `[B, P, D]`, not normalised.

    Args:
        visual: a tower that `require_patches` lets through.
        pixels: `[B, 3, S, S]`, normalised.
    """
    if isinstance(visual, PanDermVisionTransformer):
        tokens = visual.forward_tokens(pixels)[:, 1:]
        return visual.head(visual.norm(tokens.mean(dim=1))), visual.head(visual.norm(tokens))
    assert isinstance(visual, VisionTransformer)
    # The way through `forward` is the one on which hooks lie.
    visual.output_tokens = True
    try:
        image, tokens = visual(pixels)
    finally:
        visual.output_tokens = False
    return image, tokens if visual.proj is None else tokens @ visual.proj


class _WithPatches(nn.Module):
    """`forward` of a model of open_clip's that gives patches too."""

    def forward(self, pixels: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """L2-normalised images `[B, D]`, patches `[B, P, D]`, texts `[M, D]`, and the exponentiated logit scale."""
        model: Any = self
        image, patches = image_and_patches(model.visual, pixels)
        text = model.encode_text(rows, normalize=True)
        return F.normalize(image, dim=-1), F.normalize(patches, dim=-1), text, model.logit_scale.exp()


def give_patches(model: nn.Module, name: str) -> None:
    """Let a model's `forward` give patches too, in place; parameters and their names stay.

    Raises:
        ModelError: as `require_patches`.
    """
    require_patches(model.get_submodule("visual"), name)
    given = type(model)
    model.__class__ = type(f"{given.__name__}WithPatches", (_WithPatches, given), {})
