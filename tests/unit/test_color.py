"""Colour augmentation: Pillow's arithmetic, torchvision's order, random numbers of (seed, epoch, sample) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision.transforms import functional as F

from dermray.config import validate
from dermray.errors import ConfigError
from dermray.ingest import color, color_host
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.settings import DataConfig

PUBLISHED: dict[str, Any] = {
    "color_jitter": (0.32, 0.32, 0.32, 0.08),
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.2,
}
PILLOW = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def augmentation(seed: int = 3, **keys: Any) -> ColorAugmentation:
    return ColorAugmentation(DataConfig(**{**PUBLISHED, **keys}), seed)


def batch(num_images: int, side: int = 12) -> torch.Tensor:
    """Noise, flat colours, greys and black among each other."""
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (num_images, 3, side, side), dtype=np.uint8)
    pixels[::4] = pixels[::4, :, :1, :1]
    pixels[1::4, 1:] = pixels[1::4, :1]
    pixels[2::8] = 0
    return torch.from_numpy(pixels)


@given(
    hnp.arrays(np.uint8, (6, 7, 3)),
    st.sampled_from(range(4)),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=150)
def test_an_operation_is_pillows_byte_for_byte(image: np.ndarray, operation: int, share: float) -> None:
    factor = float(np.float32(share - 0.5 if operation == 3 else 2 * share))
    levels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    got = color.OPERATIONS[operation](levels, torch.full((1, 1, 1, 1), factor))[0].permute(1, 2, 0).numpy()
    expected = np.asarray(PILLOW[operation](Image.fromarray(image), factor))
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    on_host = color_host.OPERATIONS[operation](planes, np.float32(factor))
    np.testing.assert_array_equal(on_host.transpose(1, 2, 0), expected)


def test_every_hue_turns_on_a_cpu_as_on_a_device() -> None:
    """All combinations of every fifth level and the extremes."""
    some = np.array([*range(0, 255, 5), 254, 255], dtype=np.uint8)
    planes = np.stack(np.meshgrid(some, some, some, indexing="ij")).reshape(3, 1, -1)
    for shift in (-0.5, -0.08, 0.0, 0.03, 0.5):
        on_device = color.hue(torch.from_numpy(planes)[None].float(), torch.full((1, 1, 1, 1), shift))[0]
        np.testing.assert_array_equal(color_host.hue(planes, np.float32(shift)), on_device.numpy())


def test_a_batch_is_what_torchvision_does_to_each_image_with_the_same_draws() -> None:
    augment, pixels, samples = augmentation(), batch(40), np.arange(100, 140)
    got = augment(pixels, epoch=2, samples=samples)
    draws = augment.draw(2, samples)
    assert got.dtype == torch.float32
    for row in range(40):
        image = Image.fromarray(pixels[row].permute(1, 2, 0).numpy())
        if draws.jitter[row]:
            for operation in draws.order[row]:
                image = PILLOW[operation](image, float(np.float32(draws.factors[row, operation])))
        if draws.greyscale[row]:
            image = F.to_grayscale(image, num_output_channels=3)
        np.testing.assert_array_equal(got[row].permute(1, 2, 0).numpy(), np.asarray(image).astype(np.float32))


def test_neither_batch_nor_order_matters() -> None:
    augment, pixels, samples = augmentation(), batch(24), np.arange(24) * 7
    whole = augment(pixels, epoch=1, samples=samples)
    shuffled = np.random.default_rng(0).permutation(24)
    again = augment(pixels[shuffled], epoch=1, samples=samples[shuffled])
    assert torch.equal(again, whole[shuffled])
    parts = [augment(pixels[i : i + 5], epoch=1, samples=samples[i : i + 5]) for i in range(0, 24, 5)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("chunk_images", [256, 2])
def test_operations_on_a_device_are_batched_and_do_the_same(chunk_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    augment, pixels, samples = augmentation(), batch(30), np.arange(30)
    monkeypatch.setattr(color, "CHUNK_IMAGES", chunk_images)
    on_device = color.on_device(pixels.float(), augment.draw(0, samples))
    assert torch.equal(on_device, augment(pixels, epoch=0, samples=samples))


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 1}, {"samples": np.arange(1, 25)}])
def test_seed_epoch_and_sample_all_decide(change: dict[str, Any]) -> None:
    arguments = {"seed": 3, "epoch": 0, "samples": np.arange(24)}
    assert not np.isclose(color.uniforms(**arguments), color.uniforms(**{**arguments, **change})).any()


def test_the_input_stays_as_it_was_and_without_keys_nothing_changes() -> None:
    pixels = batch(8)
    before = pixels.clone()
    augmentation()(pixels, epoch=0, samples=np.arange(8))
    assert torch.equal(pixels, before)
    plain = augmentation(color_jitter=None, grayscale_prob=0.0)
    assert torch.equal(plain(pixels, epoch=0, samples=np.arange(8)), pixels.float())


def test_draws_have_the_recipes_distribution() -> None:
    draws = augmentation().draw(0, np.arange(20_000))
    assert draws.jitter.mean() == pytest.approx(0.8, abs=0.01)
    assert draws.greyscale.mean() == pytest.approx(0.2, abs=0.01)
    for column, (low, high) in enumerate([(0.68, 1.32)] * 3 + [(-0.08, 0.08)]):
        factors = draws.factors[:, column]
        assert factors.min() == pytest.approx(low, abs=1e-3)
        assert factors.max() == pytest.approx(high, abs=1e-3)
        assert factors.mean() == pytest.approx((low + high) / 2, abs=5e-3)
    orders, counts = np.unique(draws.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 20_000 / 24 * 0.8
    uniform = color.uniforms(0, 0, np.arange(20_000))
    assert np.abs(np.corrcoef(uniform.T) - np.eye(color.NUM_DRAWS)).max() < 0.03


def test_a_wide_range_stops_at_black() -> None:
    factors = augmentation(color_jitter=(1.5, 0.0, 0.0, 0.5)).draw(0, np.arange(2000)).factors
    assert factors[:, 0].min() >= 0
    assert (factors[:, 1:3] == 1).all()
    assert np.abs(factors[:, 3]).max() <= 0.5


@pytest.mark.parametrize("jitter", [(-0.1, 0, 0, 0), (0, 0, 0, 0.6), (0.1, 0.1, 0.1)])
def test_impossible_ranges_are_refused(jitter: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="color_jitter"):
        validate(DataConfig, {"color_jitter": jitter})
