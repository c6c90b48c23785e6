"""What a training sample goes through after decoding, seeded by sample so that no worker or order matters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dermray import images
from dermray.corpus.schema import CaptionAspect

CROP_ATTEMPTS = 10
ASPECT_RATIO = (3 / 4, 4 / 3)
BICUBIC, LANCZOS = cv2.INTER_CUBIC, cv2.INTER_LANCZOS4
# A box so much longer than its crop loses detail to aliasing without a filter.
STRONG_REDUCTION = 1.6


@dataclass(frozen=True)
class Crop:
    """Where a crop goes, contiguous uint8 `[size, size, 3]`, and by which of OpenCV's filters."""

    out: np.ndarray
    interpolation: int = BICUBIC


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, sample])


def crop_box(
    random: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box of a random resized crop: `(top, left, height, width)` in pixels.

    Area share uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3], ten attempts, then the largest central box
    of an admissible ratio (the published recipe, as in torchvision).
    """
    log_low, log_high = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(log_low, log_high))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(random.integers(0, height - box_height + 1))
            left = int(random.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    ratio = min(max(width / height, ASPECT_RATIO[0]), ASPECT_RATIO[1])
    box_width = min(width, round(height * ratio))
    box_height = min(height, round(width / ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@images.costs_one_image
def crop_and_resize(
    image: np.ndarray,
    random: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    horizontal_flip: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 `[H, W, 3]` → uint8 `[size, size, 3]`: random resized crop, then mirrored with a probability.

    Bicubic, as published. Averaging over areas takes three times as long and looks better from `STRONG_REDUCTION` on.

    Args:
        image: of any size.
        random: what is drawn from.
        size: side of the result, in pixels.
        scale: area share of the crop, low and high.
        horizontal_flip: probability of mirroring.
        out: contiguous uint8 `[size, size, 3]` that takes the result, which is new memory otherwise.

    Raises:
        ImageError: `truncated`: the library gives it up.
    """
    resized = np.empty((size, size, 3), dtype=np.uint8) if out is None else out
    crop_to_sizes(image, random, [Crop(resized)], scale=scale, horizontal_flip=horizontal_flip)
    return resized


@images.costs_one_image
def crop_to_sizes(
    image: np.ndarray,
    random: np.random.Generator,
    crops: Sequence[Crop],
    *,
    scale: tuple[float, float],
    horizontal_flip: float,
) -> None:
    """As `crop_and_resize`, one and the same crop to several sizes by filters of their own.

    Args:
        crops: what takes the results.

    Raises:
        ImageError: `truncated`: the library gives it up.
    """
    top, left, height, width = crop_box(random, image.shape[0], image.shape[1], scale)
    box = image[top : top + height, left : left + width]
    mirrored = bool(horizontal_flip) and random.random() < horizontal_flip
    for crop in crops:
        size = len(crop.out)
        strong = max(height, width) > STRONG_REDUCTION * size
        cv2.resize(box, (size, size), dst=crop.out, interpolation=cv2.INTER_AREA if strong else crop.interpolation)
        if mirrored:
            cv2.flip(crop.out, 1, dst=crop.out)


def choose_caption(
    captions: Sequence[Mapping[str, str]], weights: Mapping[CaptionAspect, float], random: np.random.Generator
) -> str:
    """Draw one caption by the weight of its aspect, among the aspects that the sample has.

    A sample with none of the weighted aspects gives its first caption. Captions of one aspect share its weight.
    """
    by_aspect: dict[str, float] = dict(weights.items())
    counts = Counter(caption["aspect"] for caption in captions)
    shares = [by_aspect.get(caption["aspect"], 0.0) / counts[caption["aspect"]] for caption in captions]
    total = sum(shares)
    if total == 0:
        return captions[0]["text"]
    point = random.random() * total
    for caption, share in zip(captions, shares, strict=True):
        point -= share
        if point < 0:
            return caption["text"]
    # Rounding: the point was the total.
    return next(c["text"] for c, share in zip(reversed(captions), reversed(shares), strict=True) if share > 0)
