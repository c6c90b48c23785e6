"""Which vision towers give features of patches, by their configuration alone; the driver needs no open_clip for it."""

from __future__ import annotations

from typing import Any

from dermray.errors import ModelError
from dermray.models.architectures import is_panderm


def may_give_patches(model_cfg: dict[str, Any]) -> bool:
    """Whether the vision tower of this `model_cfg` (`models.architectures`) has patches in the space of texts."""
    if is_panderm(model_cfg):
        return True
    vision_cfg = model_cfg["vision_cfg"]
    is_vit = isinstance(vision_cfg.get("layers", 12), int) and not vision_cfg.get("timm_model_name")
    pools = not vision_cfg.get("attentional_pool") and vision_cfg.get("pool_type", "tok") in ("tok", "avg")
    return is_vit and pools and not vision_cfg.get("final_ln_after_pool")


def no_patches(name: str, tower: str) -> ModelError:
    """The error for a model whose tower has none.

    Args:
        name: of the model.
        tower: how it is called.
    """
    return ModelError(
        f"the model {name!r}: {tower} gives no features of patches that objective.kind=make could compare with texts; "
        "vision transformers of open_clip that pool by class token or mean do (ViT-B-16, ViT-L-14), and PanDerm"
    )
