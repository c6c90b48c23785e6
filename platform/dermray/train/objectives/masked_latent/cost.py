"""What a step costs: counted on shapes alone, as for contrastive learning."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dermray.models.cae import CaeV2
from dermray.train.objectives.contrastive.cost import PASSES_PER_STEP


def of_sample(model: CaeV2, teacher: nn.Module, image_size: int, teacher_size: int, num_masked: int) -> float:
    """FLOPs of a training step for one image: the model forward and backward, its teacher forward.

    Args:
        teacher: an image tower.
        image_size, teacher_size: sides of the images of both, in pixels.
        num_masked: patches that are hidden.
    """
    return PASSES_PER_STEP * of_model(model, image_size, num_masked) + _forward(teacher, teacher_size)


def of_model(model: CaeV2, image_size: int, num_masked: int) -> float:
    """FLOPs of a forward pass over one image."""
    shape_only = copy.deepcopy(model).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pixels = torch.empty(1, 3, image_size, image_size, device="meta")
        mask = torch.empty(1, shape_only.rd_pos_embed.shape[1] - 1, dtype=torch.bool, device="meta")
        shape_only(pixels, mask, num_masked=num_masked)
    return float(counter.get_total_flops())


def _forward(tower: nn.Module, size: int) -> float:
    shape_only = copy.deepcopy(tower).to("meta").float()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pixels = torch.empty(1, 3, size, size, device="meta")
        shape_only(pixels)
    return float(counter.get_total_flops())
