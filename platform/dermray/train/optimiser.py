"""AdamW with open_clip's parameter groups, and its learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dermray.train.objectives.contract import ParameterGroup
from dermray.train.settings import COOLDOWN, OptimConfig, Schedule

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


def open_clip_groups(model: nn.Module) -> list[ParameterGroup]:
    """Trained parameters that do not decay, and those that do."""
    return groups_by_part(model, {"": 1.0}, lambda name: "")


def groups_by_part(
    model: nn.Module, factors: Mapping[str, float], part_of: Callable[[str], str]
) -> list[ParameterGroup]:
    """For every part of a model two groups as `open_clip_groups` has them, with the part's learning-rate factor.

    Args:
        model: what is trained of it.
        factors: of each part, all of them named, in the order of the groups.
        part_of: name of a parameter → its part.
    """
    decaying: dict[str, list[nn.Parameter]] = {part: [] for part in factors}
    exempt: dict[str, list[nn.Parameter]] = {part: [] for part in factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            skips = parameter.ndim < 2 or any(mark in name for mark in NO_DECAY_MARKS)
            (exempt if skips else decaying)[part_of(name)].append(parameter)
    return [
        group
        for part, factor in factors.items()
        for group in (ParameterGroup(exempt[part], 0.0, factor), ParameterGroup(decaying[part], None, factor))
    ]


def scheduled(settings: OptimConfig, steps_per_epoch: int) -> Callable[[int, int], float]:
    """`(step, num_steps)` → learning rate, as the settings say.

    Args:
        settings: of the optimiser.
        steps_per_epoch: what `cooldown_epochs` counts in.
    """

    def rate(step: int, num_steps: int) -> float:
        return learning_rate(
            step,
            peak=settings.lr,
            warmup_steps=settings.warmup_steps,
            num_steps=num_steps,
            schedule=settings.schedule,
            cooldown_steps=settings.cooldown_steps(steps_per_epoch),
            cooldown_power=settings.cooldown_power,
            cooldown_lr=settings.cooldown_lr,
        )

    return rate


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: Schedule = "cosine",
    cooldown_steps: int = 0,
    cooldown_power: float = 1.0,
    cooldown_lr: float = 0.0,
) -> float:
    """Linear warm-up `peak * (step + 1) / warmup_steps`, then `peak`, or half a cosine that is 0 after `num_steps`.

    In the last `cooldown_steps` of a schedule with a cooldown the rate falls from what it has come to, to `cooldown_lr`
    after `num_steps`, or stays if it is below that already: by `left ** cooldown_power`, where `left` falls from 1 to
    0. With `constant` this is open_clip's `const-cooldown`: 100 steps, the last 20 a cooldown with power 2, at step 90:
    a quarter of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    begin = num_steps - cooldown_steps if schedule.endswith(COOLDOWN) else num_steps
    rate = peak
    if schedule.startswith("cosine"):
        progress = max(0, min(step, begin) - warmup_steps) / max(1, num_steps - warmup_steps)
        rate = peak * 0.5 * (1 + math.cos(math.pi * progress))
    if step < begin or begin == num_steps:
        return rate
    left, end = 1 - (step - begin) / cooldown_steps, min(cooldown_lr, rate)
    return left**cooldown_power * (rate - end) + end
