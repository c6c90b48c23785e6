"""Scores of masks: drawn by hand, of any shape, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dermray.errors import EvaluationError
from dermray.evaluate import segmentation


def square(side: int, top: int, left: int, size: int) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_overlap_by_hand():
    assert segmentation.dice([[1, 1, 0]], [[0, 1, 0]]) == 2 / 3
    assert segmentation.jaccard([[1, 1, 0]], [[0, 1, 0]]) == 1 / 2
    nothing = np.zeros((2, 3), dtype=bool)
    assert (segmentation.dice(nothing, nothing), segmentation.jaccard(nothing, nothing)) == (1, 1)
    assert (segmentation.dice(nothing, ~nothing), segmentation.jaccard(~nothing, nothing)) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_both_scores_are_symmetric_and_tell_the_same(seed):
    one, other = np.random.default_rng(seed).random((2, 17, 23)) < 0.4
    dice, jaccard = segmentation.dice(one, other), segmentation.jaccard(one, other)
    assert dice == pytest.approx(2 * jaccard / (1 + jaccard), abs=1e-15)
    assert (dice, jaccard) == (segmentation.dice(other, one), segmentation.jaccard(other, one))
    assert segmentation.dice(one, one) == segmentation.jaccard(one, one) == 1


def test_the_largest_spot_is_one_over_corners_and_has_no_holes():
    ring = square(9, 1, 1, 5) & ~square(9, 2, 2, 3)
    # The corner at (6, 6) touches the ring, the pixel at (8, 0) does not.
    mask = ring | square(9, 6, 6, 1) | square(9, 8, 0, 1)
    np.testing.assert_array_equal(segmentation.largest_spot(mask), square(9, 1, 1, 5) | square(9, 6, 6, 1))
    # A hole that is open over an edge is none, one that is open over a corner only is one.
    assert not segmentation.largest_spot(ring & ~square(9, 1, 3, 1))[3, 3]
    assert segmentation.largest_spot(ring & ~square(9, 1, 1, 1))[3, 3]
    twins = square(9, 0, 6, 2) | square(9, 4, 0, 2)
    np.testing.assert_array_equal(segmentation.largest_spot(twins), square(9, 0, 6, 2))
    assert not segmentation.largest_spot(np.zeros((4, 5))).any()


def test_the_released_faults_are_kept_apart():
    empty, lesion = np.zeros((5, 7), dtype=bool), np.ones((5, 7), dtype=bool)
    assert segmentation.published(empty, lesion) == (1, 1)
    assert segmentation.dice(empty, lesion) == 0
    assert segmentation.published(lesion, empty) == (2 / 36, 1 / 35)
    assert segmentation.published(lesion, empty, validation=True) == (0, 0)
    assert not empty.any(), "what is given stays as it is"


def test_the_distance_between_outlines():
    one = square(40, 5, 5, 20)
    assert segmentation.hausdorff_95(one, one) == 0
    assert segmentation.hausdorff_95(one, square(40, 5, 8, 20)) == pytest.approx(3)
    assert segmentation.hausdorff_95(square(9, 0, 0, 1), square(9, 3, 4, 1)) == 5
    # One far pixel among many is beyond the percentile.
    assert segmentation.hausdorff_95(one, one | square(40, 39, 39, 1)) == 0
    assert segmentation.hausdorff_95(one, ~one & one) == float("inf")
    assert segmentation.hausdorff_95(~one & one, ~one & one) == 0


def test_the_distance_is_that_of_all_pairs():
    one, other = np.random.default_rng(5).random((2, 12, 9)) < 0.6
    outlines = []
    for mask in (one, other):
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        outlines.append(np.argwhere(mask & ~inner))
    apart = np.linalg.norm(outlines[0][:, None] - outlines[1][None], axis=2)
    distances = np.concatenate([apart.min(axis=1), apart.min(axis=0)])
    assert segmentation.hausdorff_95(one, other) == pytest.approx(np.percentile(distances, 95), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((3, 4)), np.zeros((4, 3)), r"\[3, 4\] and \[4, 3\]"),
        (np.zeros(3), np.zeros(3), r"\[H, W\]"),
        (np.zeros((0, 3)), np.zeros((0, 3)), r"\[H, W\]"),
        (np.zeros((2, 2)), np.full((2, 2), 255), "true mask holds 255"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), "predicted mask holds nan"),
    ],
)
def test_what_is_no_mask_is_said(prediction, truth, message):
    for score in (segmentation.dice, segmentation.jaccard, segmentation.published, segmentation.hausdorff_95):
        with pytest.raises(EvaluationError, match=message):
            score(prediction, truth)
