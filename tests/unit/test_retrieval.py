"""Retrieval ranks equal a plain reference, whatever the block size, and ties score their expectation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.errors import EvaluationError
from dermray.evaluate import retrieval
from dermray.evaluate.retrieval import retrieval_metrics, score_ranks
from dermray.evaluate.statistics import ranks
from dermray.evaluate.statistics.ranks import Ranks, pair_ranks


def unit(seed: int, num: int, dim: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def plain_ranks(scores: np.ndarray) -> np.ndarray:
    """Position of the diagonal when each row is sorted in descending order; no ties."""
    order = np.argsort(-scores, axis=1)
    return np.argmax(order == np.arange(len(scores))[:, None], axis=1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 24))
def test_ranks_equal_sorting(seed, num, dim):
    images, texts = unit(seed, num, dim), unit(seed + 1, num, dim)
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    to_text, to_image = pair_ranks(images, texts)
    np.testing.assert_array_equal(to_text.higher, plain_ranks(scores))
    np.testing.assert_array_equal(to_image.higher, plain_ranks(scores.T))


@pytest.mark.parametrize("tile", [1, 7, 16, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiles_and_screening_change_nothing(monkeypatch, tile, dtype):
    images, texts = unit(0, 53, 8).astype(dtype), unit(1, 53, 8).astype(dtype)
    texts[20:30] = texts[7]
    # Lengths other than 1 and scores that only float64 tells apart.
    images[3] *= 40
    texts[40] = texts[41] + np.linspace(0, 1e-9, 8)
    exact = images.astype(np.float64) @ texts.astype(np.float64).T
    own = np.diag(exact)
    monkeypatch.setattr(ranks, "TILE", tile)
    for reach in (ranks.MAX_DOUBTFUL, 2.0, -1.0):
        monkeypatch.setattr(ranks, "MAX_DOUBTFUL", reach)
        for found, scores in zip(pair_ranks(images, texts), (exact, exact.T), strict=True):
            np.testing.assert_array_equal(found.higher, (scores > own[:, None] + 1e-12).sum(axis=1))
            np.testing.assert_array_equal(found.tied, (np.abs(scores - own[:, None]) <= 1e-12).sum(axis=1) - 1)


def test_float32_decides_almost_all_and_float64_the_rest(monkeypatch):
    """Candidates whose scores differ from the partner's by less than float32 can tell."""
    rng = np.random.default_rng(5)
    texts = unit(6, 900, 64).astype(np.float64)
    images = texts + 0.02 * rng.normal(size=texts.shape)
    texts[1::3] = texts[::3] + 1e-8 * rng.normal(size=(300, 64))
    checked_again = []
    products = ranks._products
    monkeypatch.setattr(ranks, "_products", lambda *pairs: checked_again.append(len(pairs[0])) or products(*pairs))
    monkeypatch.setattr(ranks._Scores, "_exactly", None)
    exact = images @ texts.T
    for found, scores in zip(pair_ranks(images, texts), (exact, exact.T), strict=True):
        np.testing.assert_array_equal(found.higher, (scores > np.diag(exact)[:, None] + 1e-12).sum(axis=1))
    # The pairs themselves, twice; each one's twin, from both sides.
    assert 900 + 2 * 900 <= sum(checked_again) < 0.02 * exact.size


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_far_from_one(scale):
    images, texts = unit(0, 40, 8).astype(np.float64), unit(1, 40, 8).astype(np.float64)
    for found, expected in zip(pair_ranks(scale * images, texts / scale), pair_ranks(images, texts), strict=True):
        np.testing.assert_array_equal(found.higher, expected.higher)


def test_perfect_and_worst():
    vectors = np.eye(6, dtype=np.float32)
    perfect = retrieval_metrics(vectors, vectors, ks=(1, 3))
    assert perfect["image_to_text_R@1"] == 1.0
    assert perfect["text_to_image_median_rank"] == 1.0
    worst = retrieval_metrics(vectors, -vectors, ks=(1, 5, 6))
    assert worst["image_to_text_R@1"] == 0.0
    assert worst["image_to_text_R@5"] == 0.0
    assert worst["image_to_text_R@6"] == 1.0
    assert worst["image_to_text_mean_rank"] == 6.0


def test_one_vector_for_everything_scores_chance():
    same = np.ones((40, 4), dtype=np.float32) / 2
    found = retrieval_metrics(same, same, ks=(1, 10, 100))
    for direction in ("image_to_text", "text_to_image"):
        assert found[f"{direction}_R@1"] == pytest.approx(1 / 40)
        assert found[f"{direction}_R@10"] == pytest.approx(10 / 40)
        assert found[f"{direction}_R@100"] == 1.0
        assert found[f"{direction}_mean_rank"] == pytest.approx(20.5)


def test_identical_captions_tie_however_far_apart_they_stand():
    images, texts = unit(3, 700, 48), unit(4, 700, 48)
    texts[[5, 350, 699]] = texts[5]
    to_text, _ = pair_ranks(images, texts)
    np.testing.assert_array_equal(to_text.tied[[5, 350, 699]], 2)
    assert to_text.tied.sum() == 6


def test_ties_are_the_mean_over_their_orders():
    one = Ranks(higher=np.array([1]), tied=np.array([2]))
    orders = list(itertools.permutations(["own", "other", "another"]))
    positions = np.array([1 + order.index("own") for order in orders])
    for k in range(6):
        assert one.hits(k)[0] == pytest.approx((positions < k).mean())
    assert one.expected()[0] == pytest.approx(positions.mean())


def test_intervals_equal_a_loop_over_resamples():
    to_text, _ = pair_ranks(unit(0, 80, 4), unit(1, 80, 4))
    found = score_ranks(to_text, "image_to_text", (1, 10), bootstrap=60, seed=9)
    (weights,) = retrieval.resample_weights(np.zeros(80, dtype=np.int64), 60, 9)
    samples = [np.repeat(to_text.higher, column.astype(int)) for column in weights.T]
    statistics = {
        "R@1": lambda r: (r < 1).mean(),
        "R@10": lambda r: (r < 10).mean(),
        "mean_rank": lambda r: r.mean() + 1,
        "median_rank": lambda r: np.floor(np.median(r)) + 1,
    }
    for name, statistic in statistics.items():
        low, high = np.percentile([statistic(ranks) for ranks in samples], [2.5, 97.5])
        metric = found[f"image_to_text_{name}"]
        assert (metric.low, metric.high) == pytest.approx((low, high), abs=1e-6), name
        assert metric.value == pytest.approx(statistic(to_text.higher)), name


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), "one shape"),
        (torch.ones(3, 4), torch.ones(2, 4), "one shape"),
        (torch.ones(0, 4), torch.ones(0, 4), "at least one pair"),
        (torch.tensor([[1.0], [float("nan")]]), torch.ones(2, 1), "image feature of pair 1 is not finite"),
        (torch.ones(2, 1), torch.tensor([[float("inf")], [1.0]]), "text feature of pair 0 is not finite"),
    ],
)
def test_bad_input_is_named(images, texts, message):
    with pytest.raises(EvaluationError, match=message):
        retrieval_metrics(images, texts)
