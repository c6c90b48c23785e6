"""The nearest of many vectors to each of others: copies of training images among those of an evaluation.

Vectors are those of a network for copy detection, or of any encoder; what similarity tells a copy depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dermray.errors import VectorIndexError

# Vectors that are divided by less are zero.
_MIN_LENGTH = 1e-8
# Similarities of a tile's side (float32: 64 MiB a tile).
_TILE = 4096
# Pairs that are compared exactly at a time.
_PAIRS = 1 << 13
_UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, eq=False)
class Nearest:
    """Of each query the most similar vector of the bank.

    Attributes:
        similarity: their cosine, float32 `[N]`; 0 of a vector of zeros.
        index: which it is, int64 `[N]`; of equal ones the first.
        flagged: at least as similar as the threshold, bool `[N]`.
    """

    similarity: np.ndarray
    index: np.ndarray
    flagged: np.ndarray


def top1(queries: Any, bank: Any, *, threshold: float = 0.75) -> Nearest:
    """The most similar vector of a bank to each query, and whether the two count as copies (DermFM-Zero's rule).

    Queries `[[1, 0], [0, 2]]` and the bank `[[3, 0]]`: similarities 1 and 0, the first one flagged. Memory: some tiles
    beside the vectors. Which is the nearest, and that equal ones are, is decided in float64.

    Args:
        queries: `[N, D]`, of any length; the images of an evaluation.
        bank: `[M, D]`, one at least; the images of training.
        threshold: similarity from which on a query is flagged, itself included. The default is that of the published
            copy detector (SSCD); for other vectors it says nothing.

    Raises:
        VectorIndexError: arrays of other shapes, an empty bank, or values that are not finite.
    """
    questions, others = (_checked(name, each) for name, each in (("queries", queries), ("bank", bank)))
    if questions.shape[1] != others.shape[1] or not len(others):
        raise VectorIndexError(
            f"queries {list(questions.shape)} and bank {list(others.shape)} must be [N, D] and [M, D] of one D, and "
            "the bank must hold a vector"
        )
    similarity, index = np.full(len(questions), -np.inf), np.zeros(len(questions), dtype=np.int64)
    # Everything is as far from a vector of zeros as anything else.
    similarity[~questions.any(axis=1)] = 0.0
    for start in range(0, len(others), _TILE):
        tile = _unit(others[start : start + _TILE])
        # A picture may stand there a thousand times; the first one counts.
        firsts = np.sort(np.unique(tile, axis=0, return_index=True)[1])
        for first in range(0, len(questions), _TILE):
            rows = slice(first, first + _TILE)
            _improve(similarity[rows], index[rows], _unit(questions[rows]), tile[firsts], start + firsts)
    told = similarity.astype(np.float32)
    return Nearest(told, index, told >= np.float32(threshold))


def _improve(best: np.ndarray, index: np.ndarray, queries: np.ndarray, others: np.ndarray, numbers: np.ndarray) -> None:
    """Brings the highest similarity and its index, `[Q]`, up to date with further unit vectors and their numbers."""
    # What float32 may err by, in the products (Higham, 3.1) and in rounding the vectors, on both sides of a comparison.
    margin = 4 * (queries.shape[1] + 4) * _UNIT_ROUNDOFF
    products = queries.astype(np.float32) @ others.astype(np.float32).T
    products[~queries.any(axis=1)] = -np.inf
    least = np.maximum(best, products.max(axis=1)) - margin
    for rows, columns in _parts(*np.nonzero(products >= least[:, None])):
        exact = np.einsum("pd,pd->p", queries[rows], others[columns])
        # The last one written stays: the highest, and of equal ones the first.
        order = np.lexsort((-columns, exact))
        rows, columns, exact = rows[order], columns[order], exact[order]
        better = exact > best[rows]
        best[rows[better]], index[rows[better]] = exact[better], numbers[columns[better]]


def _parts(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(rows), _PAIRS):
        yield rows[first : first + _PAIRS], columns[first : first + _PAIRS]


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), _MIN_LENGTH)


def _checked(name: str, vectors: Any) -> np.ndarray:
    found = np.asarray(vectors)
    if found.ndim != 2 or not found.shape[1]:
        raise VectorIndexError(f"{name} must be vectors [N, D], not {list(found.shape)}")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise VectorIndexError(
            f"{name}: row {row} is not finite; leave out what could not be encoded, with its table row"
        )
    return found
