"""Scores of masks equal the published figures, and so does what is done to a prediction before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dermray.evaluate import segmentation

FILE = Path(__file__).parent / "panderm_segmentation.npz"


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    with np.load(FILE) as arrays:
        found = {name: arrays[name] for name in arrays.files if not name.startswith("state.")}
    # Of equal logits the background's counts.
    return found | {"predicted": found["metric_logits"].argmax(axis=1).astype(bool)}


@pytest.mark.parametrize("figures", ["test", "validation"])
def test_the_released_scores(masks, figures):
    mine = [
        segmentation.published(predicted, truth, validation=figures == "validation")
        for predicted, truth in zip(masks["predicted"], masks["metric_target"], strict=True)
    ]
    for column, name in enumerate(("dice", "jaccard")):
        np.testing.assert_allclose([each[column] for each in mine], masks[f"{name}_{figures}"], atol=1e-12)


def test_what_is_done_to_a_prediction_and_the_scores_that_were_meant(masks):
    for row, (predicted, truth) in enumerate(zip(masks["predicted"], masks["metric_target"], strict=True)):
        spot = segmentation.largest_spot(predicted)
        if predicted.any():
            np.testing.assert_array_equal(spot, masks["metric_postprocessed"][row])
        assert segmentation.dice(spot, truth) == pytest.approx(masks["dice_intended"][row], abs=1e-12)
        assert segmentation.jaccard(spot, truth) == pytest.approx(masks["jaccard_intended"][row], abs=1e-12)
