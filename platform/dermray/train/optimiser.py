"""AdamW with open_clip's parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dermray.train.objectives.contract import ParameterGroup
from dermray.train.settings import OptimConfig

# Key of a group: what the schedule's rate is multiplied with.
LR_FACTOR = "lr_factor"
NO_DECAY_MARKS = ("bn", "ln", "bias", "logit_scale")


def build_optimiser(
    model: nn.Module, settings: OptimConfig, groups: Sequence[ParameterGroup] | None = None
) -> torch.optim.AdamW:
    """AdamW over groups of parameters; without any, those of open_clip.

    In open_clip's, parameters of fewer than two dimensions, norms, biases and logit_scale do not decay. Fused, on CPU
    too: only then it leaves a step out where its `found_inf` says so.
    """
    made = [
        {
            "params": list(group.parameters),
            "weight_decay": settings.weight_decay if group.weight_decay is None else group.weight_decay,
            LR_FACTOR: group.lr_factor,
        }
        for group in (open_clip_groups(model) if groups is None else groups)
    ]
    return torch.optim.AdamW(made, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def open_clip_groups(model: nn.Module) -> tuple[ParameterGroup, ParameterGroup]:
    """Trained parameters that do not decay, and those that do."""
    decay: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            skips = parameter.ndim < 2 or any(mark in name for mark in NO_DECAY_MARKS)
            (exempt if skips else decay).append(parameter)
    return ParameterGroup(exempt, weight_decay=0.0), ParameterGroup(decay)


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up `peak * (step + 1) / warmup_steps`, then half a cosine that ends at 0 after `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
