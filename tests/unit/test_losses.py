"""Losses over pairs on one process, against plain references: values, gradients, duplicates, memory, precision."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dermray.errors import ConfigError
from dermray.losses import ClipLoss, SigLipLoss
from dermray.losses.gather import all_gather, world
from tests.contrastive import CLIP_METHODS, features, naive_clip, naive_siglip, some_labels, value_and_gradients

WIDTH = 6

every_method = pytest.mark.parametrize("method", CLIP_METHODS)
cases = st.tuples(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 16), st.floats(0.1, 100))
labelled = st.sampled_from([None, "text", "text and image"])


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def labels_of(kind: str | None, seed: int, num: int) -> Tensor | None:
    return None if kind is None else some_labels(seed, num, None if kind == "text" else 2)


def clip(method: str, tile_size: int | None, labels: Tensor | None = None) -> Any:
    return functools.partial(ClipLoss(method, tile_size), labels=labels)  # type: ignore[arg-type]


def assert_all_close(left: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@given(cases, st.integers(1, 13), labelled)
@settings(deadline=None, max_examples=60)
def test_clip_equals_the_plain_reference_by_every_method(
    case: tuple[int, int, int, float], tile_size: int, kind: str | None
) -> None:
    """Tiles of any size, also ones that do not divide the batch; forwards and backwards."""
    seed, num, width, scale = case
    labels = labels_of(kind, seed, num)
    tensors = (*features(seed, num, width), double(scale))
    expected = value_and_gradients(functools.partial(naive_clip, labels=labels), *tensors)
    for method in CLIP_METHODS:
        assert_all_close(value_and_gradients(clip(method, tile_size, labels), *tensors), expected, 1e-9)
        single = value_and_gradients(clip(method, tile_size, labels), *(each.float() for each in tensors))
        assert single[0].item() == pytest.approx(expected[0].item(), rel=1e-4, abs=1e-4)


@given(cases, st.floats(-20, 5), st.integers(1, 13), labelled)
@settings(deadline=None, max_examples=60)
def test_siglip_equals_the_plain_reference(
    case: tuple[int, int, int, float], bias: float, tile_size: int, kind: str | None
) -> None:
    seed, num, width, scale = case
    labels = labels_of(kind, seed, num)
    tensors = (*features(seed, num, width), double(scale), double(bias))
    expected = value_and_gradients(functools.partial(naive_siglip, labels=labels), *tensors)
    loss = functools.partial(SigLipLoss(tile_size), labels=labels)
    assert_all_close(value_and_gradients(loss, *tensors), expected, 1e-9)
    single = value_and_gradients(loss, *(each.float() for each in tensors))
    assert single[0].item() == pytest.approx(expected[0].item(), rel=1e-4, abs=1e-4)


@every_method
@given(case=cases, random=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_order_of_pairs_and_roles_of_towers_do_not_matter(
    method: str, case: tuple[int, int, int, float], random: Any
) -> None:
    seed, num, width, scale = case
    image, text = features(seed, num, width)
    order = list(range(num))
    random.shuffle(order)
    loss_of, factor = clip(method, 5), double(scale)
    loss = loss_of(image, text, factor)
    torch.testing.assert_close(loss_of(image[order], text[order], factor), loss, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss_of(text, image, factor), loss, atol=1e-9, rtol=1e-9)


@every_method
def test_extremes(method: str) -> None:
    loss = clip(method, 2)
    image, _ = features(0, 1, WIDTH)
    assert loss(image, image, torch.tensor(100.0)).item() == 0
    same = image.expand(5, -1)
    assert loss(same, same, torch.tensor(10.0)).item() == pytest.approx(np.log(5))
    orthogonal = torch.eye(4)
    assert loss(orthogonal, orthogonal, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-12)
    assert loss(orthogonal, orthogonal.roll(1, 0), torch.tensor(100.0)).item() == pytest.approx(100, rel=1e-6)
    opposite = value_and_gradients(loss, orthogonal, -orthogonal, torch.tensor(100.0))
    assert all(bool(each.isfinite().all()) for each in opposite)
    assert loss(orthogonal, -orthogonal, torch.tensor(100.0)).item() == pytest.approx(100 + np.log(3), rel=1e-6)


def test_siglip_extremes() -> None:
    orthogonal = torch.eye(4)
    certain = SigLipLoss()(orthogonal, orthogonal, torch.tensor(60.0), torch.tensor(-30.0))
    assert certain.item() == pytest.approx(4 * np.exp(-30), rel=1e-4), "no cancellation next to zero"
    wrong = SigLipLoss()(orthogonal, -orthogonal, torch.tensor(100.0), torch.tensor(-100.0))
    assert wrong.item() == pytest.approx(200, rel=1e-6)


def test_all_duplicates_leave_only_the_own_pair() -> None:
    image, text = features(3, 7, WIDTH)
    labels = torch.zeros(7, dtype=torch.int64)
    for method in CLIP_METHODS:
        tensors = value_and_gradients(clip(method, 3, labels), image, text, double(30.0))
        assert_all_close(tensors, [torch.zeros_like(each) for each in tensors], 1e-12)
    positives = 30 * (image * text).sum(1) - 3
    alone = SigLipLoss(3)(image, text, double(30.0), double(-3.0), labels)
    torch.testing.assert_close(alone, -torch.nn.functional.logsigmoid(positives).mean())


@every_method
@pytest.mark.parametrize("kind", [None, "text"])
def test_gradients_are_those_of_finite_differences(method: str, kind: str | None) -> None:
    image, text = (each.requires_grad_() for each in features(1, 5, 3))
    loss = clip(method, 2, labels_of(kind, 1, 5))
    assert torch.autograd.gradcheck(loss, (image, text, double(5.0).requires_grad_()))
    assert torch.autograd.gradcheck(lambda each: loss(each, text.detach(), double(5.0)), (image,)), "a frozen tower"


@pytest.mark.parametrize("kind", [None, "text and image"])
def test_siglip_gradients_are_those_of_finite_differences(kind: str | None) -> None:
    image, text = (each.requires_grad_() for each in features(1, 5, 3))
    loss = functools.partial(SigLipLoss(2), labels=labels_of(kind, 1, 5))
    scalars = (double(5.0).requires_grad_(), double(-2.0).requires_grad_())
    assert torch.autograd.gradcheck(loss, (image, text, *scalars))
    with torch.no_grad():
        assert not loss(image, text, *scalars).requires_grad


class LargestTensor(TorchDispatchMode):
    """Watches for the largest result of any operation."""

    num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.num_elements = max(self.num_elements, each.numel())
        return result


def test_the_similarity_matrix_is_never_whole() -> None:
    num, width, tile_size = 96, 4, 16
    image, text = features(0, num, width)
    labels = some_labels(0, num, 2)
    scalars = (double(10.0), double(-10.0))
    largest = {}
    for name, loss, tensors in (
        ("dense", clip("dense", None, labels), (image, text, scalars[0])),
        ("tiled", clip("tiled", tile_size, labels), (image, text, scalars[0])),
        ("siglip", functools.partial(SigLipLoss(tile_size), labels=labels), (image, text, *scalars)),
    ):
        with LargestTensor() as watch:
            value_and_gradients(loss, *tensors)
        largest[name] = watch.num_elements
    assert largest["dense"] >= num * num
    assert max(largest["tiled"], largest["siglip"]) <= max(num * width, tile_size**2)


@pytest.mark.parametrize("loss", [*(clip(method, 3) for method in CLIP_METHODS), SigLipLoss(3)])
def test_products_are_full_precision_whatever_the_features_are(loss: Any) -> None:
    """As in training: features out of autocast, the loss inside or outside of it."""
    image, text = features(4, 8, 16, torch.bfloat16)
    scalars = (torch.tensor(100.0), torch.tensor(-10.0))[: 2 if isinstance(loss, SigLipLoss) else 1]
    expected = value_and_gradients(loss, image.float(), text.float(), *scalars)
    outside = value_and_gradients(loss, image, text, *scalars)
    inside = value_and_gradients(torch.autocast("cpu", dtype=torch.bfloat16)(loss), image, text, *scalars)
    for got in (outside, inside):
        assert [each.dtype for each in got[:3]] == [torch.float32, torch.bfloat16, torch.bfloat16]
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1].float(), expected[1], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(got[3], expected[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [*(clip(method, 3) for method in CLIP_METHODS), SigLipLoss(3)])
@pytest.mark.parametrize("made", [float, torch.tensor, lambda value: torch.tensor([value])])
def test_scale_and_bias_may_be_numbers(loss: Any, made: Any) -> None:
    image, text = features(5, 7, 4)
    values = (14.3, -10.0)[: 2 if isinstance(loss, SigLipLoss) else 1]
    got = loss(image, text, *(made(value) for value in values))
    assert got.shape == ()
    torch.testing.assert_close(got, loss(image, text, *map(double, values)), atol=1e-5, rtol=0)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="no method 'sparse' of the CLIP loss; there are local, dense, tiled"):
        ClipLoss("sparse")  # type: ignore[arg-type]


def test_alone_there_is_nothing_to_gather() -> None:
    local = torch.randn(2, 3)
    assert world() == (0, 1)
    assert all_gather(local) is local
