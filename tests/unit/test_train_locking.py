"""Towers that keep their weights: which parameters, as open_clip counts; no gradient, no moments, no statistics."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from dermray import models
from dermray.config import parse
from dermray.errors import ConfigError, ModelError
from dermray.ingest.loader import Batch
from dermray.models import locking
from dermray.train import checkpoint
from dermray.train.objectives import contract, kinds
from dermray.train.objectives.contrastive import parts
from dermray.train.objectives.contrastive.cost import flop_model
from dermray.train.optimiser import LR_FACTOR, build_optimiser
from dermray.train.settings import PretrainConfig
from tests.corpora import MODEL_CFG

CPU = torch.device("cpu")
RUN = ("corpus=c", "output=o", "model=dermray_tiny", "train.global_batch_size=8")
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def under(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 5])
def test_a_vision_transformer_and_clips_text_tower_are_locked_as_in_open_clip(unlocked: int) -> None:
    ours, _, _ = models.create("dermray_tiny")
    published, _, _ = models.create("dermray_tiny")
    published.lock_image_tower(unlocked)
    published.lock_text_tower(min(unlocked, 3))
    locking.lock(ours, "image", unlocked)
    locking.lock(ours, "text", min(unlocked, 3))
    assert trained(ours) == trained(published)
    blocks = [f"visual.transformer.resblocks.{number}." for number in range(4)]
    groups = ["visual.conv1", *blocks[:3], blocks[3], "visual.proj"]
    assert under(trained(ours), *groups) == under(set(ours.state_dict()), *groups[len(groups) - unlocked :])


@pytest.mark.parametrize("unlocked", [0, 1, 2, 5])
def test_the_groups_of_panderm_are_those_of_a_vision_transformer(unlocked: int) -> None:
    model, _, _ = models.create("panderm_tiny_bert")
    every = trained(model)
    locking.lock(model, "image", unlocked)
    groups: list[tuple[str, ...]] = [("visual.patch_embed", "visual.cls_token")]
    groups += [(f"visual.blocks.{number}.",) for number in range(3)]
    groups += [("visual.blocks.3.", "visual.norm."), ("visual.head.",)]
    prefixes = [prefix for group in groups[len(groups) - unlocked :] for prefix in group]
    assert trained(model) == under(every, *prefixes, "text.", "logit_scale")


@pytest.mark.parametrize(("unlocked", "prefixes"), [(0, ()), (1, ("1",)), (2, ("0", "1"))])
def test_of_a_hugging_face_tower_layers_count_and_the_projection_is_trained(
    unlocked: int, prefixes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = models.create("panderm_tiny_bert")
    every = trained(model)
    locking.lock(model, "text", unlocked)
    layers = [f"text.transformer.encoder.layer.{number}." for number in prefixes]
    assert trained(model) == under(every, *layers, "text.proj", "visual.", "logit_scale")
    assert not capsys.readouterr().out


def test_a_locked_batch_norm_keeps_its_statistics_in_training_too() -> None:
    model = open_clip.CLIP(**(MODEL_CFG | {"vision_cfg": RESNET}))
    names = list(model.state_dict())
    locking.lock(model, "image")
    model.eval().train()
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    model.encode_image(torch.randn(4, 3, 32, 32))
    assert list(model.state_dict()) == names
    assert any("running_mean" in name for name in before)
    for name, value in model.visual.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.transformer.training


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("dermray_tiny", ("lock=image", "lock_image_unlocked_groups=6"), "locks nothing: the image tower has no more"),
        ("dermray_tiny", ("lock=text", "lock_text_unlocked_layers=4"), "locks nothing: the text tower has no more"),
        ("panderm_tiny_bert", ("lock=image", "lock_image_unlocked_groups=6"), "locks nothing: the image tower"),
        ("panderm_tiny_bert", ("lock=text", "lock_text_unlocked_layers=3"), "locks nothing: the text tower"),
        ("RN50", ("lock=image", "lock_image_unlocked_groups=1"), "locked whole or not at all; leave out"),
    ],
)
def test_locks_that_do_not_fit_the_model_are_refused_by_the_driver(
    model: str, keys: tuple[str, ...], message: str
) -> None:
    config = parse(PretrainConfig, [*RUN, *(f"train.{key}" for key in keys)])
    with pytest.raises(ModelError, match=message):
        parts.require_lockable(models.architecture(model), config.train)


def test_what_the_driver_cannot_know_the_worker_refuses() -> None:
    resnet = open_clip.CLIP(**(MODEL_CFG | {"vision_cfg": RESNET}))
    with pytest.raises(ModelError, match=r"cannot be locked with train.lock_image_unlocked_groups=1 \(partial locking"):
        locking.lock(resnet, "image", 1)
    with pytest.raises(ModelError, match="cannot be locked"):
        locking.lock(nn.Linear(2, 2), "text")
    vit = open_clip.CLIP(**MODEL_CFG)
    with pytest.raises(ModelError, match="locks nothing"):
        locking.lock(vit, "image", 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.lock=images"], "train.lock"),
        (["train.lock=[[image]]"], "train.lock.0: input should be 'image' or 'text'"),
        (["train.lock_image_unlocked_groups=2"], "means something with lock=image alone"),
        (["train.lock=image", "train.lock_text_unlocked_layers=2"], "means something with lock=text alone"),
        (["optim.factors={image: 0}"], "optim.factors"),
        (["optim.factors={image: .inf}"], "optim.factors"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, [*RUN, *keys])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["optim.factors={picture: 0.1}"], "objective.kind=contrastive has no part picture .* image, text, scale"),
        (
            ["objective.kind=tests.rotation:OBJECTIVE", "train.lock=image"],
            "train.lock: .* has no part image .*; there is none",
        ),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kinds.require_parts(parse(PretrainConfig, [*RUN, *keys]))


def test_the_order_of_locked_towers_says_nothing_and_earlier_runs_go_on() -> None:
    one, other = (parse(PretrainConfig, [*RUN, f"train.lock=[{order}]"]) for order in ("text, image", "image, text"))
    assert one.trajectory() == other.trajectory()
    assert parse(PretrainConfig, [*RUN, "train.lock=text"]).train.lock == ("text",)
    now = parse(PretrainConfig, RUN).trajectory()
    new = ("train.lock", "optim.schedule", "optim.cooldown", "optim.factors")
    before = {key: value for key, value in now.items() if not key.startswith(new)}
    assert len(now) == len(before) + 8
    assert checkpoint.differing_settings(before, now) == []
    (told,) = checkpoint.differing_settings(before, one.trajectory())
    assert told == "train.lock was [], now ['image', 'text']"


def batch() -> Batch:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "pixels": random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
        "tokens": random.integers(1, 400, (8, 48)),
    }
    return Batch(0, 0, np.arange(8), {name: torch.from_numpy(value) for name, value in arrays.items()})


def stepped(*keys: str) -> tuple[contract.Built, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """The objective after a step, its optimiser, and the gradients of the step."""
    config = parse(PretrainConfig, [*RUN, *keys])
    torch.manual_seed(0)
    built = contract.module_of("contrastive").build(config, CPU)
    optimiser = build_optimiser(built.model, config.optim, built.groups)
    built.objective.backward(built.model, batch(), CPU, nullcontext)
    gradients = {name: each.grad.clone() for name, each in built.model.named_parameters() if each.grad is not None}
    optimiser.step()
    return built, optimiser, gradients


@pytest.mark.parametrize(
    "keys",
    [
        ("train.lock=image",),
        ("train.lock=image", "train.lock_image_unlocked_groups=2"),
        ("train.lock=text", "train.lock_text_unlocked_layers=1"),
        ("train.lock=[image, text]",),
    ],
)
def test_what_is_locked_takes_no_gradient_and_no_moments_by_micro_batches_too(keys: tuple[str, ...]) -> None:
    built, optimiser, gradients = stepped(*keys)
    assert set(gradients) == trained(built.model) < set(dict(built.model.named_parameters()))
    moments = optimiser.state_dict()
    assert len(moments["state"]) == len(gradients) == sum(len(group["params"]) for group in moments["param_groups"])
    _, _, whole = stepped()
    _, _, parted = stepped(*keys, "train.micro_batch_size=3")
    assert set(parted) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(parted[name], gradient, atol=2e-5, rtol=1e-3)


def test_make_trains_with_locked_towers_and_factors() -> None:
    config = parse(
        PretrainConfig, [*RUN, "objective.kind=make", "train.lock=text", "optim.factors={image: 0.5, scale: 2}"]
    )
    built = contract.module_of("make").build(config, CPU)
    assert under(trained(built.model), "visual.", "logit_scale") == trained(built.model)
    groups = build_optimiser(built.model, config.optim, built.groups).param_groups
    assert [group[LR_FACTOR] for group in groups if group["params"]] == [0.5, 0.5, 2.0]


def test_factors_are_of_parts_and_decay_stays_open_clips() -> None:
    built, optimiser, _ = stepped("optim.factors={image: 0.1}", "optim.weight_decay=0.2")
    name_of = {id(parameter): name for name, parameter in built.model.named_parameters()}
    seen: dict[str, tuple[float, float]] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            seen[name_of[id(parameter)]] = (group[LR_FACTOR], group["weight_decay"])
    assert set(seen) == trained(built.model)
    assert seen["visual.conv1.weight"] == (0.1, 0.2)
    assert seen["visual.ln_pre.weight"] == (0.1, 0.0)
    assert seen["token_embedding.weight"] == (1.0, 0.2)
    assert seen["ln_final.bias"] == (1.0, 0.0)
    assert seen["logit_scale"] == (1.0, 0.0)


def test_backward_passes_of_what_is_locked_cost_nothing() -> None:
    model, _, _ = models.create("dermray_tiny")
    whole = flop_model(model, image_size=64, context_length=48)
    assert (whole.image_passes, whole.text_passes) == (3, 3)
    locking.lock(model, "image")
    locking.lock(model, "text", 2)
    locked = flop_model(model, image_size=64, context_length=48)
    assert locked.image_passes == 1
    assert 1.8 < locked.text_passes < 2.4, "the projection and one of two blocks"
    assert locked.of_step(2, 24) == 2 * (locked.image + locked.text_passes * locked.text / 2)
