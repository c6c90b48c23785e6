"""The nearest vectors of a bank: in tiles of any size, the first of equal ones, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dermray.audit import nearest
from dermray.audit.leakage import top1
from dermray.errors import VectorIndexError


def drawn(*, copies: bool) -> tuple[np.ndarray, np.ndarray]:
    """Queries and a bank; with copies every vector of the bank stands there three times, at other lengths."""
    rng = np.random.default_rng(3)
    queries, bank = rng.normal(size=(37, 16)).astype(np.float32), rng.normal(size=(61, 16)).astype(np.float32)
    queries[5] = 0
    bank[[0, 7]] = 0
    queries[10:20] = bank[30:40] * 2
    return queries, np.concatenate([bank, 2 * bank, bank / 4]) if copies else bank


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("tile", [1, 10, 4096])
def test_the_first_of_the_nearest_whatever_the_tile(monkeypatch, tile, copies):
    monkeypatch.setattr(nearest, "_TILE", tile)
    monkeypatch.setattr(nearest, "_PAIRS", 7)
    queries, bank = drawn(copies=copies)
    found = top1(queries, bank)
    wide = [
        each / np.maximum(np.linalg.norm(each.astype(float), axis=1, keepdims=True), 1e-8) for each in (queries, bank)
    ]
    # Lengths by powers of two change no bit, so that copies are equal and the first one counts.
    similarity = wide[0] @ wide[1].T
    np.testing.assert_array_equal(found.index, similarity[:, :61].argmax(axis=1))
    np.testing.assert_allclose(found.similarity, similarity.max(axis=1), atol=1e-7)
    np.testing.assert_array_equal(found.flagged, similarity.max(axis=1) >= 0.75)
    assert (found.similarity[5], found.index[5]) == (0, 0)
    assert found.flagged[10:20].all()
    assert (found.similarity.dtype, found.index.dtype, found.flagged.dtype) == (np.float32, np.int64, bool)


def test_the_threshold_itself_is_flagged():
    query, bank = [[1.0, 0.0]], np.array([[0.75, np.sqrt(1 - 0.75**2)]], dtype=np.float32)
    assert top1(query, bank).flagged.tolist() == [True]
    assert top1(query, bank, threshold=0.7501).flagged.tolist() == [False]
    assert top1([[1.0, 0.0]], [[-3.0, 0.0]]).similarity.tolist() == [-1]
    assert len(top1(np.zeros((0, 2)), bank).index) == 0


def test_of_others_as_near_the_first_counts():
    assert top1([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).index.tolist() == [0, 0]
    assert top1([[1.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]).index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("queries", "bank", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), r"\[2, 3\] and bank \[2, 4\]"),
        (np.ones((2, 3)), np.ones((0, 3)), "must hold a vector"),
        (np.ones(3), np.ones((2, 3)), r"queries must be vectors \[N, D\]"),
        (np.ones((2, 3)), np.array([[1.0, 2, 3], [1, np.nan, 3]]), "bank: row 1 is not finite"),
    ],
)
def test_what_is_no_bank_is_said(queries, bank, message):
    with pytest.raises(VectorIndexError, match=message):
        top1(queries, bank)
