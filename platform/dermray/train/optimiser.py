"""AdamW with open_clip's parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from dermray.train.settings import OptimConfig

NO_DECAY_MARKS = ("bn", "ln", "bias", "logit_scale")


def build_optimiser(model: nn.Module, settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW in which parameters of fewer than two dimensions, norms, biases and logit_scale do not decay.

    Fused, on CPU too: only then it leaves a step out where its `found_inf` says so.
    """
    decay: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            skips = parameter.ndim < 2 or any(mark in name for mark in NO_DECAY_MARKS)
            (exempt if skips else decay).append(parameter)
    groups = [
        {"params": exempt, "weight_decay": 0.0},
        {"params": decay, "weight_decay": settings.weight_decay},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up `peak * (step + 1) / warmup_steps`, then half a cosine that ends at 0 after `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
