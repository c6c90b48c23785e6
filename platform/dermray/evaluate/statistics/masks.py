"""How well a mask of one image covers the true one. Masks are `[H, W]`, of booleans or of 0 and 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from dermray.errors import EvaluationError


def dice(prediction: Any, truth: Any) -> float:
    """Twice the common area over the sum of both (Dice, 1945); two empty masks agree, 1.

    `[[1, 1, 0]]` and `[[0, 1, 0]]`: 2 · 1 / (2 + 1).

    Raises:
        EvaluationError: masks of different shapes, not `[H, W]`, or with other values.
    """
    return _ratio(*_overlap(*_checked(prediction, truth)))[0]


def jaccard(prediction: Any, truth: Any) -> float:
    """The common area over that of either (Jaccard, 1901); two empty masks agree, 1.

    Raises:
        EvaluationError: as `dice`.
    """
    return _ratio(*_overlap(*_checked(prediction, truth)))[1]


def published(prediction: Any, truth: Any, *, validation: bool = False) -> tuple[float, float]:
    """Dice and Jaccard of one image as PanDerm's released code scores it, faults and all.

    Of the prediction the largest spot is kept and its holes are filled (`largest_spot`), but an empty one becomes a
    full mask. In an empty truth the pixel at the centre is set first, when testing; in validation any prediction of it
    scores 0. The code does so at 224 x 224 pixels; here the masks stay as they are.

    Args:
        prediction: the class of the higher logit, before anything is done to it.
        truth: of the same size.
        validation: as the checkpoint is chosen, not as the test figure is computed.

    Raises:
        EvaluationError: as `dice`.
    """
    predicted, true = _checked(prediction, truth)
    spot = largest_spot(predicted) if predicted.any() else np.ones_like(predicted)
    if not validation and not true.any():
        true = true.copy()
        true[true.shape[0] // 2, true.shape[1] // 2] = True
    return _ratio(*_overlap(spot, true))


def largest_spot(mask: Any) -> np.ndarray:
    """The largest connected part (over edges and corners) with its holes filled, bool `[H, W]`; of nothing, nothing.

    Of equal ones the first, row by row. A hole is background that no way over edges leads out of to the border.

    Raises:
        EvaluationError: as `dice`.
    """
    from scipy import ndimage

    spots = _checked(mask, mask)[0]
    numbers, count = ndimage.label(spots, structure=np.ones((3, 3)))
    if not count:
        return spots
    sizes = np.bincount(numbers.ravel())[1:]
    return ndimage.binary_fill_holes(numbers == 1 + sizes.argmax())


def hausdorff_95(prediction: Any, truth: Any) -> float:
    """The 95th percentile of the distances from each outline to the other, both ways together, in pixels.

    An outline is what a mask loses where each of its pixels needs its four neighbours, the border of the image counting
    as outside. Two empty masks: 0; one empty mask: infinite.

    Raises:
        EvaluationError: as `dice`.
    """
    from scipy import ndimage

    masks = _checked(prediction, truth)
    if not all(mask.any() for mask in masks):
        return float("inf") if any(mask.any() for mask in masks) else 0.0
    ours, theirs = (mask & ~ndimage.binary_erosion(mask) for mask in masks)
    from_ours = ndimage.distance_transform_edt(~theirs)[ours]
    from_theirs = ndimage.distance_transform_edt(~ours)[theirs]
    return float(np.percentile(np.concatenate([from_ours, from_theirs]), 95))


def _overlap(predicted: np.ndarray, true: np.ndarray) -> tuple[int, int]:
    """Pixels in both masks, and the sum of their areas."""
    return int((predicted & true).sum()), int(predicted.sum()) + int(true.sum())


def _ratio(common: int, areas: int) -> tuple[float, float]:
    return (2 * common / areas, common / (areas - common)) if areas else (1.0, 1.0)


def _checked(prediction: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(prediction), np.asarray(truth)
    if predicted.ndim != 2 or predicted.shape != true.shape or not predicted.size:
        raise EvaluationError(
            f"masks must have one shape [H, W], not {list(predicted.shape)} and {list(true.shape)}; bring the "
            "prediction to the size of the truth"
        )
    for what, mask in (("predicted", predicted), ("true", true)):
        if mask.dtype != bool and (wrong := (mask != 0) & (mask != 1)).any():
            raise EvaluationError(f"a {what} mask holds {mask[wrong][0]}; masks are of booleans or of 0 and 1")
    return predicted.astype(bool), true.astype(bool)
