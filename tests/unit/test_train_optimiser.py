"""The optimiser's groups and the schedules are open_clip's."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn

from dermray.config import parse
from dermray.errors import ConfigError
from dermray.train.optimiser import build_optimiser, learning_rate, scheduled
from dermray.train.settings import OptimConfig, PretrainConfig
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


@given(st.integers(0, 50), st.integers(1, 100), st.integers(0, 200), st.floats(0.2, 3.0), st.floats(0, 0.9))
def test_constant_schedules_are_open_clips(warmup: int, cooldown: int, others: int, power: float, end: float) -> None:
    num_steps = warmup + cooldown + others
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    flat = OptimConfig(lr=1.0, warmup_steps=warmup, schedule="constant")
    keys = {"schedule": "constant_cooldown", "cooldown_epochs": 1, "cooldown_power": power, "cooldown_lr": end}
    for settings, published in (
        (flat, const_lr(optimiser, 1.0, warmup, num_steps)),
        (
            OptimConfig.model_validate({"lr": 1.0, "warmup_steps": warmup, **keys}),
            const_lr_cooldown(optimiser, 1.0, warmup, num_steps, cooldown, power, end),
        ),
    ):
        rate = scheduled(settings, steps_per_epoch=cooldown)
        for step in range(0, num_steps, 7):
            assert rate(step, num_steps) == pytest.approx(published(step), rel=1e-9)


def test_a_cosine_with_cooldown_leaves_the_cosine_where_the_cooldown_begins() -> None:
    settings = OptimConfig(
        lr=2.0, warmup_steps=10, schedule="cosine_cooldown", cooldown_epochs=2, cooldown_power=2, cooldown_lr=0.1
    )
    rate, cosine = scheduled(settings, 10), scheduled(OptimConfig(lr=2.0, warmup_steps=10), 10)
    assert [rate(step, 110) for step in range(91)] == [cosine(step, 110) for step in range(91)]
    left = 1 + math.cos(math.pi * 0.8)
    assert rate(90, 110) == pytest.approx(left)
    assert rate(100, 110) == pytest.approx(0.1 + (left - 0.1) / 4)
    assert rate(109, 110) == pytest.approx(0.1 + (left - 0.1) / 400)
    # A cooldown that is longer than the run begins in its warm-up, as in open_clip.
    assert rate(11, 20) == pytest.approx(0.1 + 1.9 * (9 / 20) ** 2)
    # A cosine that is below the end already does not rise again.
    late = scheduled(settings.model_copy(update={"cooldown_epochs": 0.5}), 10)
    assert cosine(105, 110) < settings.cooldown_lr
    assert [late(step, 110) for step in range(105, 110)] == [cosine(105, 110)] * 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["optim.cooldown_epochs=2"], "cooldown_epochs: no effect with schedule=cosine"),
        (["optim.schedule=constant_cooldown"], "schedule=constant_cooldown needs cooldown_epochs"),
        (["optim.schedule=constant_cooldown", "optim.cooldown_epochs=.inf"], "optim.cooldown_epochs: .* finite"),
        (
            ["optim.schedule=cosine_cooldown", "optim.cooldown_epochs=1", "optim.cooldown_lr=1"],
            "cooldown_lr=1 must be below lr=0.0001",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, ["corpus=c", "output=o", *keys])
