"""Each colour operation equals the published pipeline's, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.ingest import color

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    ("name", "apply", "factor"),
    [
        ("aug_brightness_0p8", color.brightness, 0.8),
        ("aug_contrast_1p25", color.contrast, 1.25),
        ("aug_saturation_0p7", color.saturation, 0.7),
        ("aug_hue_plus0p05", color.hue, 0.05),
        ("aug_hue_minus0p08", color.hue, -0.08),
        ("aug_gray", lambda levels, _: color.greyscale(levels), 0.0),
    ],
)
def test_operation(name: str, apply: Callable[..., torch.Tensor], factor: float) -> None:
    with np.load(FOLDER / "preprocessing.npz") as arrays:
        crop, expected = arrays["aug_crop"], arrays[name]
    levels = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
    got = apply(levels, torch.full((1, 1, 1, 1), factor))[0].permute(1, 2, 0)
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))
    assert (crop != expected).any()
