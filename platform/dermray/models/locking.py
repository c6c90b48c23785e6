"""Towers that keep their weights, whole or but for their last groups (LiT: Zhai et al., 2022, arXiv 2111.07991).

What a group is, is open_clip's: of a vision transformer the patch embedding, each block, the projection; of a text
tower the embeddings, each block, the projection. A Hugging Face text tower and one of timm count no projection: it is
always trained, since it does not come with their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dermray.errors import ModelError
from dermray.models.architectures import Tower, is_huggingface

KEYS: dict[Tower, str] = {"image": "train.lock_image_unlocked_groups", "text": "train.lock_text_unlocked_layers"}


def lock(model: nn.Module, tower: Tower, unlocked: int = 0) -> None:
    """Let a tower's parameters take no gradient, in place; batch norms that are locked keep their statistics too.

    Args:
        model: of open_clip's interface, made by `dermray.models.create`.
        tower: which.
        unlocked: how many of its last groups stay trained.

    Raises:
        ModelError: the tower cannot be locked, or not in part, or nothing of it would be.
    """
    # Not at the top: a driver reads this file to check keys, and does without open_clip's start of seconds.
    from open_clip.hf_model import HFTextEncoder

    fixed = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    num_trained = _num_trained(model)
    try:
        if tower == "text" and isinstance(getattr(model, "text", None), HFTextEncoder):
            _lock_language_model(model.get_submodule("text.transformer"), unlocked)
        else:
            getattr(model, f"lock_{tower}_tower")(unlocked)
    except (AttributeError, AssertionError, NotImplementedError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"train.lock={tower}: the {tower} tower cannot be locked with {KEYS[tower]}={unlocked} ({reason})"
        ) from error
    for parameter in fixed:
        parameter.requires_grad_(False)
    if _num_trained(model) == num_trained:
        raise _nothing_locked(tower, unlocked)
    for module in (model.get_submodule("visual") if tower == "image" else getattr(model, "text", model)).modules():
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in module.parameters()):
            _keep_statistics(module)


def _lock_language_model(transformer: nn.Module, unlocked: int) -> None:
    """As open_clip does, which knows how some models call their layers, but not BERT."""
    if not unlocked:
        transformer.requires_grad_(False)
        return
    inside = getattr(transformer, "encoder", transformer)
    layers = next(list(module) for module in inside.children() if isinstance(module, nn.ModuleList))
    embeddings = getattr(transformer, "embeddings", None) or transformer.embed_tokens
    for module in [embeddings, *layers][:-unlocked]:
        module.requires_grad_(False)


def require_groups(model_cfg: dict[str, Any], towers: Sequence[Tower], unlocked: Mapping[Tower, int]) -> None:
    """Refuse what `lock` would, as far as a configuration tells; the driver builds no model.

    Args:
        model_cfg: of the model (`models.architectures`).
        towers: that are to be locked.
        unlocked: last groups of each tower that stay trained.

    Raises:
        ModelError: a tower cannot be locked in part, or nothing of it would be locked.
    """
    for tower in towers:
        num_groups = _num_groups(model_cfg, tower)
        if num_groups is not None and unlocked[tower] >= num_groups:
            raise _nothing_locked(tower, unlocked[tower])
        if unlocked[tower] and tower == "image" and not isinstance(model_cfg["vision_cfg"].get("layers", 12), int):
            raise ModelError(
                f"train.lock=image: a ResNet's tower is locked whole or not at all; leave out {KEYS[tower]}"
            )


def _num_groups(model_cfg: dict[str, Any], tower: Tower) -> int | None:
    """Of a tower, as open_clip counts them; None where the configuration does not say it."""
    if tower == "image":
        vision_cfg = model_cfg["vision_cfg"]
        layers = None if vision_cfg.get("timm_model_name") else vision_cfg.get("layers", 12)
        return layers + 2 if isinstance(layers, int) else None
    text_cfg = model_cfg["text_cfg"]
    if is_huggingface(text_cfg):
        layers = (text_cfg.get("hf_config") or {}).get("num_hidden_layers")
        return None if layers is None else layers + 1
    return int(text_cfg.get("layers", 12)) + 2


def _nothing_locked(tower: Tower, unlocked: int) -> ModelError:
    return ModelError(
        f"train.lock={tower} with {KEYS[tower]}={unlocked} locks nothing: the {tower} tower has no more groups than "
        "that; lower it, or leave out train.lock"
    )


def _num_trained(model: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in model.parameters())


class _KeepsStatistics(nn.Module):
    """A batch norm that stays in evaluation mode, whatever mode its model is put into."""

    def train(self, mode: bool = True) -> _KeepsStatistics:
        """Nothing changes."""
        return super().train(False)


def _keep_statistics(norm: nn.Module) -> None:
    """In place; parameters, figures and their names stay."""
    given = type(norm)
    norm.__class__ = type(f"{given.__name__}WithKeptStatistics", (_KeepsStatistics, given), {})
    norm.eval()
