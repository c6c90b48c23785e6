"""Masks of patches: as many as asked on any grid, by an image's own random numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from dermray.ingest import patch_masks


def generators(num: int, first: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([3, 1, sample]) for sample in range(first, first + num)]


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize(("grid", "num_masked"), [(2, 1), (2, 3), (4, 7), (14, 98), (14, 190), (16, 128), (7, 1)])
def test_every_image_has_as_many(kind: patch_masks.MaskKind, grid: int, num_masked: int) -> None:
    masks = patch_masks.masks(kind, generators(40), grid, num_masked)
    assert (masks.shape, masks.dtype) == ((40, grid**2), np.bool_)
    assert (masks.sum(axis=1) == num_masked).all()
    assert len(np.unique(masks, axis=0)) > 1


@pytest.mark.parametrize("kind", ["block", "random"])
def test_who_is_made_beside_an_image_does_not_matter(kind: patch_masks.MaskKind) -> None:
    together = patch_masks.masks(kind, generators(12), 14, 98)
    alone = [patch_masks.masks(kind, generators(1, sample), 14, 98) for sample in range(12)]
    assert np.array_equal(together, np.concatenate(alone))
    assert patch_masks.masks(kind, [], 14, 98).shape == (0, 196)


def test_blocks_hang_together_and_single_patches_do_not() -> None:
    both = {}
    for kind in ("block", "random"):
        masks = patch_masks.masks(kind, generators(200), 14, 98).reshape(-1, 14, 14)
        both[kind] = (masks[:, 1:] & masks[:, :-1]).mean()
    assert both["random"] < 0.26
    assert both["block"] > 0.38


def test_how_many_is_a_count_or_a_share_rounded_down() -> None:
    assert patch_masks.how_many(196, ratio=0.5, count=None) == 98
    assert patch_masks.how_many(16, ratio=0.45, count=None) == 7
    assert patch_masks.how_many(196, ratio=0.5, count=75) == 75
    for ratio, count in ((0.001, None), (0.5, 196), (0.5, 0)):
        with pytest.raises(ValueError, match="of 196 patches would be masked"):
            patch_masks.how_many(196, ratio=ratio, count=count)
