"""How often a sample is drawn in an epoch, where that is neither once nor what an objective says: pure functions.

The draws of a corpus lie side by side on a circle, those of a sample together, row groups in a seeded order. An epoch
takes the next stretch of it, beginning where the one before ended. So every epoch has exactly the number of draws that
is asked for, after any number of epochs the samples have been drawn equally often, but for one time, and row groups
beyond the stretch are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

# Beside those of `dermray.ingest.plan`, which draws by (seed, epoch, purpose).
_CIRCLE = 3


def stretch(
    weights: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], *, seed: int, begin: int, length: int
) -> npt.NDArray[np.int64]:
    """How many draws of each sample lie on a stretch of the circle, which may go round it several times.

    Args:
        weights: draws of each sample on the circle, `[num_samples]`, with a positive sum.
        sizes: samples of each row group, `[num_row_groups]`.
        seed: of the order of row groups.
        begin: of the stretch, from 0 on, counted over all rounds.
        length: draws of the stretch, the sum of what is returned.

    Returns:
        int64 `[num_samples]`.
    """
    total = int(weights.sum())
    order = np.random.default_rng([seed, 0, _CIRCLE]).permutation(len(sizes))
    ends = np.cumsum(weights)
    firsts = np.cumsum(sizes) - sizes
    # Draws before each row group, in manifest order and on the circle.
    before = np.concatenate([[0], ends])[firsts]
    of_groups = np.diff(np.concatenate([before, [total]]))
    on_circle = np.empty(len(sizes), dtype=np.int64)
    on_circle[order] = np.cumsum(of_groups[order]) - of_groups[order]
    # Weights [1, 2 | 3] of two row groups in the order 1, 0: the samples begin at [3, 4, 0].
    begins = ends - weights + np.repeat(on_circle - before, sizes)
    rounds, rest = divmod(length, total)
    first = begin % total
    counts = rounds * weights
    for low in (first, first - total):
        counts += np.clip(np.minimum(begins + weights, low + rest) - np.maximum(begins, low), 0, None)
    return counts


def share(sizes: npt.NDArray[np.int64], *, seed: int, fraction: float) -> npt.NDArray[np.int64]:
    """Some of the samples, the same in every epoch: 1 for each that is kept, 0 for the others, int64 `[num_samples]`.

    The fraction is exact to half a sample, at least one is kept, a larger fraction keeps all that a smaller one does,
    and whole row groups are left out: a prepared corpus is shuffled, so each of them is a random draw of its split.
    """
    num_samples = int(sizes.sum())
    kept = max(1, round(fraction * num_samples))
    return stretch(np.ones(num_samples, dtype=np.int64), sizes, seed=seed, begin=0, length=kept)


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of positive weights that add up to a total: 10 by 1, 1, 1 are 4, 3, 3.

    Each is its exact part rounded down, and those with the largest fractions get what is left, of equals the first.
    """
    exact = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    parts = [math.floor(part) for part in exact]
    by_fraction = sorted(range(len(parts)), key=lambda place: parts[place] - exact[place])
    for place in by_fraction[: total - sum(parts)]:
        parts[place] += 1
    return parts
