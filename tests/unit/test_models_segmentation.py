"""The segmentation network at other sizes: shapes, what learns, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dermray.errors import ModelError
from dermray.models.segmentation import PanDermSegmenter

SIZES = {"image_size": 24, "patch_size": 8, "width": 8, "layers": 5, "heads": 2, "channels": 4, "num_classes": 3}


@pytest.mark.parametrize(("patch_size", "num_classes"), [(8, 3), (4, 1), (12, 2)])
def test_a_class_of_every_pixel_whatever_the_grid(patch_size, num_classes):
    model = PanDermSegmenter(
        **{**SIZES, "patch_size": patch_size, "num_classes": num_classes}, taps=(0, 1, 2, 4)
    ).eval()
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    grid = 24 // patch_size
    assert [each.shape[-1] for each in model.backbone.pyramid(images)] == [4 * grid, 2 * grid, grid, grid // 2]
    assert model(images).shape == (2, num_classes, 24, 24)
    torch.testing.assert_close(model(images[:1]), model(images)[:1])


def test_blocks_above_the_last_tap_are_not_run_and_all_others_learn():
    model = PanDermSegmenter(**SIZES, taps=[0, 1, 2, 3])
    model(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    idle = {name for name, each in model.named_parameters() if each.requires_grad and each.grad is None}
    assert idle == {name for name, _ in model.named_parameters() if name.startswith("backbone.blocks.4.")}


def test_recomputed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    model, images = PanDermSegmenter(**SIZES, taps=[0, 1, 2, 4]), torch.randn(2, 3, 24, 24)
    gradients = []
    for recompute in (False, True):
        model.backbone.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(images).square().mean().backward()
        gradients.append(model.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": (0, 1, 2)}, "taps"),
        ({"taps": (0, 1, 2, 5)}, "between 0 and 4"),
        ({"taps": (0, 2, 1, 3)}, "ascending"),
        ({"taps": (0, 1, 1, 3)}, "ascending"),
        ({"taps": (-1, 1, 2, 3)}, "ascending"),
        ({"patch_size": 24}, "two patches"),
        ({"patch_size": 7}, "multiple of patch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        PanDermSegmenter(**{**SIZES, "taps": (0, 1, 2, 3), **change})
