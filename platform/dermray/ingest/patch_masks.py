"""Which patches of an image are hidden: in blocks, as BEiT does it (Bao et al., 2021), or one by one.

What an image gets is a function of its own random numbers, whoever is made beside it; many images are made at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

MaskKind = Literal["block", "random"]
Masks = npt.NDArray[np.bool_]
# Height over width of a block, drawn log-uniformly, and its least area: published are 16 of 196 patches.
ASPECT_RATIOS = (0.3, 1 / 0.3)
LEAST_SHARE = 16 / 196
# Attempts to place a block that are drawn at once, and how often that is done; what is then missing comes one by one.
ATTEMPTS, MAX_ROUNDS = 16, 64


def how_many(num_patches: int, *, ratio: float, count: int | None) -> int:
    """Masked patches of an image: `count`, or the share `ratio` rounded down, as published.

    Raises:
        ValueError: that leaves none, or hides none.
    """
    masked = int(ratio * num_patches) if count is None else count
    if not 0 < masked < num_patches:
        raise ValueError(f"{masked} of {num_patches} patches would be masked; some must be, and some must be left")
    return masked


def masks(kind: MaskKind, randoms: Sequence[np.random.Generator], grid: int, num_masked: int) -> Masks:
    """Bool `[n, grid²]`, true where a patch is masked, row by row: `num_masked` of each image.

    Args:
        kind: `block` or `random`.
        randoms: of each image.
        grid: patches on a side.
        num_masked: at least 1, and less than there are.
    """
    make: Callable[..., Masks] = {"block": block_masks, "random": random_masks}[kind]
    return make(randoms, grid, num_masked)


def random_masks(randoms: Sequence[np.random.Generator], grid: int, num_masked: int) -> Masks:
    """Every set of patches is as likely."""
    keys = np.array([random.random(grid * grid) for random in randoms]).reshape(-1, grid * grid)
    return _lowest(keys, np.full(len(keys), num_masked))


def block_masks(randoms: Sequence[np.random.Generator], grid: int, num_masked: int) -> Masks:
    """Rectangles, until exactly so many patches are masked.

    A rectangle's area is uniform between the least one and what is still to be masked, its place uniform. It is placed
    if it is smaller than the grid on both sides and hides at least one patch more, and no more than are to be hidden.
    """
    masked = np.zeros((len(randoms), grid, grid), dtype=bool)
    for _ in range(MAX_ROUNDS):
        (waiting,) = np.nonzero(masked.sum(axis=(1, 2)) < num_masked)
        if not len(waiting):
            break
        # [images, attempts, area, aspect, row, column]
        draws = np.stack([randoms[image].random((ATTEMPTS, 4)) for image in waiting.tolist()])
        for attempt in range(ATTEMPTS):
            masked[waiting] |= _blocks(masked[waiting], draws[:, attempt], num_masked)
    missing = num_masked - masked.sum(axis=(1, 2))
    flat = masked.reshape(len(randoms), grid * grid)
    for image in np.flatnonzero(missing).tolist():
        keys = np.where(flat[image], np.inf, randoms[image].random(grid * grid))
        flat[image] |= _lowest(keys[None], missing[image : image + 1])[0]
    return flat


def _blocks(masked: Masks, draws: npt.NDArray[np.float64], num_masked: int) -> Masks:
    """One attempt for each image: the patches of a rectangle that may be placed, else none.

    Args:
        masked: up to now, `[n, grid, grid]`.
        draws: uniform in [0, 1): area, aspect ratio, row and column of each, `[n, 4]`.
    """
    grid = masked.shape[1]
    least = max(1, round(LEAST_SHARE * grid * grid))
    left = num_masked - masked.sum(axis=(1, 2))
    # With fewer left than the least area the range is turned round, as published.
    area = least + draws[:, 0] * (left - least)
    aspect = np.exp(np.interp(draws[:, 1], (0, 1), [math.log(ratio) for ratio in ASPECT_RATIOS]))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    top, start = np.floor(draws[:, 2] * (grid - height + 1)), np.floor(draws[:, 3] * (grid - width + 1))
    along = np.arange(grid)
    rows = (along >= top[:, None]) & (along < (top + height)[:, None])
    columns = (along >= start[:, None]) & (along < (start + width)[:, None])
    block = rows[:, :, None] & columns[:, None, :]
    more = (block & ~masked).sum(axis=(1, 2))
    fits = (height < grid) & (width < grid) & (more > 0) & (more <= left)
    return block & fits[:, None, None]


def _lowest(keys: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> Masks:
    """Where the `counts` lowest keys of each row are: `[[0.3, 0.1, 0.2]]`, `[2]` → `[[0, 1, 1]]`."""
    ranks = keys.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return ranks < counts[:, None]
