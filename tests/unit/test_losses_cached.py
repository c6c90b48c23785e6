"""Cached gradients on one process: equal to one large batch, for any micro-batch, also with a frozen tower."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dermray.losses import SigLipLoss, cached_backward
from tests.unit.test_losses_distributed import GLOBAL_BATCH, Towers, clip_and_bias, gradients, inputs, weights_gradients


@given(st.integers(2, GLOBAL_BATCH + 1), st.booleans())
@settings(deadline=None, max_examples=15)
def test_equal_one_large_batch(micro_batch_size: int, sigmoid: bool) -> None:
    loss = SigLipLoss(7) if sigmoid else clip_and_bias
    whole, cached = (weights_gradients(0, 1, loss, micro_batch_size=size) for size in (None, micro_batch_size))
    torch.testing.assert_close(cached["loss"], whole["loss"], atol=1e-6, rtol=0)
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(cached["gradients"][name], gradient, atol=1e-6, rtol=0)


def test_gradients_add_to_what_is_there() -> None:
    model = Towers()
    for _ in range(2):
        cached_backward(model, inputs(), clip_and_bias, micro_batch_size=6)
    for name, gradient in weights_gradients(0, 1, clip_and_bias)["gradients"].items():
        torch.testing.assert_close(gradients(model)[name], 2 * gradient, atol=2e-6, rtol=0)


def test_a_frozen_tower_and_a_frozen_scale_stay_without_gradients() -> None:
    model = Towers()
    model.image.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    cached_backward(model, inputs(), clip_and_bias, micro_batch_size=6)
    got = gradients(model)
    assert set(got) == {"text.weight", "text.bias", "logit_bias"}
    expected = weights_gradients(0, 1, clip_and_bias)["gradients"]
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0)


def test_towers_hold_one_micro_batch_and_random_numbers_go_on_after_it() -> None:
    model = Towers(dropout=0.5)
    seen: list[tuple[int, bool]] = []
    model.image.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    torch.manual_seed(0)
    cached_backward(model, inputs(), clip_and_bias, micro_batch_size=8)
    assert seen == [(8, False), (8, False), (4, False), (8, True), (8, True), (4, True)]
    after_cached = torch.rand(1)
    torch.manual_seed(0)
    for part in zip(*(each.split(8) for each in inputs()), strict=True):
        model(*part)
    assert torch.equal(after_cached, torch.rand(1)), "as if each micro-batch had gone through once"


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_autocast_surrounds_the_towers_only(micro_batch_size: int | None) -> None:
    model = Towers()
    dtypes: list[torch.dtype] = []

    def loss(image: Tensor, *others: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        dtypes.append(image.dtype)
        return clip_and_bias(image, *others)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    cached_backward(
        lambda *part: (model.image(part[0]), model.text(part[1]), model.logit_scale.exp(), model.logit_bias),
        inputs(),
        loss,
        micro_batch_size=micro_batch_size,
        autocast=autocast,
    )
    assert dtypes == [torch.bfloat16]
    assert len(gradients(model)) == 8
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients(model).values())


def test_any_number_of_features_takes_its_gradients() -> None:
    """As one large batch: features of images, of texts and, with another shape, of both together."""
    wanted: dict[int | None, dict[str, Tensor]] = {}
    for micro_batch_size in (None, 6):
        model = Towers()

        def encode(*part: Tensor, model: Towers = model) -> tuple[Tensor, ...]:
            image, text, scale, bias = model(*part)
            return image, text, torch.stack([image, text], dim=1), scale, bias

        def loss(image: Tensor, text: Tensor, both: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return clip_and_bias(image, text, scale, bias) + both.cumsum(0).square().mean()

        cached_backward(encode, inputs(), loss, num_features=3, micro_batch_size=micro_batch_size)
        wanted[micro_batch_size] = gradients(model)
    assert wanted[None].keys() == wanted[6].keys()
    for name, gradient in wanted[None].items():
        torch.testing.assert_close(wanted[6][name], gradient, atol=1e-5, rtol=0)
