"""The optimiser's groups and the schedule are open_clip's."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.scheduler import cosine_lr
from torch import nn

from dermray.train.optimiser import build_optimiser, learning_rate
from dermray.train.settings import OptimConfig
from tests.corpora import MODEL_CFG


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return open_clip.CLIP(**MODEL_CFG)


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}  # type: ignore[attr-defined]
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_decay_is_for_matrices_alone(model: nn.Module) -> None:
    exempt, decaying = build_optimiser(model, OptimConfig(weight_decay=0.2)).param_groups
    assert exempt["weight_decay"] == 0
    assert decaying["weight_decay"] == 0.2
    assert names(model, exempt) | names(model, decaying) == {name for name, _ in model.named_parameters()}
    assert not names(model, exempt) & names(model, decaying)
    for name in ("logit_scale", "visual.ln_pre.weight", "visual.class_embedding", "ln_final.bias"):
        assert name in names(model, exempt)
    assert "transformer.resblocks.0.attn.in_proj_bias" in names(model, exempt)
    for name in ("visual.conv1.weight", "token_embedding.weight", "text_projection", "positional_embedding"):
        assert name in names(model, decaying)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    groups = build_optimiser(model, OptimConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_settings_reach_adamw(model: nn.Module) -> None:
    settings = OptimConfig(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-7)
    optimiser = build_optimiser(model, settings)
    assert isinstance(optimiser, torch.optim.AdamW)
    for group in optimiser.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(1e-6, 1.0))
def test_schedule_is_open_clips(warmup_steps: int, cosine_steps: int, peak: float) -> None:
    num_steps = warmup_steps + cosine_steps
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    published = cosine_lr(optimiser, peak, warmup_steps, num_steps)
    for step in range(0, num_steps, 7):
        ours = learning_rate(step, peak=peak, warmup_steps=warmup_steps, num_steps=num_steps)
        assert ours == pytest.approx(published(step), rel=1e-12)


def test_schedule_at_its_corners() -> None:
    def rate(step: int, num_steps: int = 110) -> float:
        return learning_rate(step, peak=2.0, warmup_steps=10, num_steps=num_steps)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(35) == pytest.approx(1 + math.cos(math.pi / 4))
    assert 0 < rate(109) < 1e-3
    # A run that ends inside its warm-up has no cosine.
    assert rate(5, num_steps=6) == pytest.approx(1.2)
    assert rate(10, num_steps=10) == 2.0
