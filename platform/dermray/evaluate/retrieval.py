"""Image-to-text and text-to-image retrieval: one caption per image, pair `i` belongs together.

The rank of a pair is the number of candidates that score higher than the true partner (0-based). `R@k` is the share
of ranks below k, `mean_rank` the mean plus one, `median_rank` the median rounded down plus one. Candidates whose score
equals the partner's (identical captions do) stand in random order: every figure is its expectation over those orders,
so that a model which gives one vector to everything scores chance. Published code leaves ties to its sort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dermray.evaluate.statistics.bootstrap import Distribution, Metric, Seed, resample_weights
from dermray.evaluate.statistics.ranks import Ranks, pair_ranks
from dermray.scales import RETRIEVAL_WAYS

DEFAULT_KS = (1, 5, 10, 50, 100, 200)
# What is scored by group.
GROUP_KS = (1, 10)


def retrieval_metrics(image_features: Any, text_features: Any, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Recall at k, mean and median rank in both directions.

    Args:
        image_features: `[N, D]`, numpy or torch, L2-normalised; row i belongs to row i of the texts.
        text_features: `[N, D]`.
        ks: numbers of candidates to look at.

    Returns:
        `image_to_text_R@1`, …, `image_to_text_mean_rank`, `image_to_text_median_rank`, and the same for
        `text_to_image`.

    Raises:
        EvaluationError: shapes that do not fit, no pairs, or features that are not finite.
    """
    return {
        name: metric.value
        for direction, ranks in zip(RETRIEVAL_WAYS, pair_ranks(image_features, text_features), strict=True)
        for name, metric in score_ranks(ranks, direction, ks, bootstrap=0, seed=0).items()
    }


def score_ranks(ranks: Ranks, direction: str, ks: Sequence[int], *, bootstrap: int, seed: int) -> dict[str, Metric]:
    """Metrics of one direction with 95 % intervals over resampled queries; the candidates stay as they are.

    Args:
        ranks: of the queries.
        direction: prefix of the names.
        ks: numbers of candidates to look at.
        bootstrap: resamples behind the intervals; 0 leaves them out.
        seed: of the bootstrap.
    """
    found = rank_distributions(ranks, direction, ks, bootstrap=bootstrap, seed=seed)
    return {name: one.metric() for name, one in found.items()}


def rank_distributions(
    ranks: Ranks, direction: str, ks: Sequence[int], *, bootstrap: int, seed: Seed
) -> dict[str, Distribution]:
    """As `score_ranks`, with the values on each resample: those of two models on the same queries are paired."""
    rank = ranks.expected()
    names = [f"{direction}_R@{k}" for k in ks] + [f"{direction}_mean_rank"]
    columns = np.column_stack([*(ranks.hits(k) for k in ks), rank + 1.0])
    one_stratum = np.zeros(len(rank), dtype=np.int64)
    order = np.argsort(rank, kind="stable")
    means, medians = [np.empty((len(names), 0))], [np.empty(0)]
    for weights in resample_weights(one_stratum, bootstrap, seed):
        means.append((columns.T @ weights) / len(rank))
        medians.append(_weighted_medians(rank[order], weights[order]))
    resampled = np.concatenate(means, axis=1)
    scores = {
        name: Distribution(float(value), resampled[row])
        for row, (name, value) in enumerate(zip(names, columns.mean(axis=0), strict=True))
    }
    median = math.floor(np.median(rank)) + 1.0
    return scores | {f"{direction}_median_rank": Distribution(median, np.concatenate(medians))}


def _weighted_medians(ascending: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median rank (rounded down, plus one) of each resample, from sorted ranks `[N]` and weights `[N, R]`."""
    drawn = np.cumsum(weights, axis=0, dtype=np.float64)
    total = len(ascending)
    lower = ascending[(drawn > (total - 1) // 2).argmax(axis=0)]
    upper = ascending[(drawn > total // 2).argmax(axis=0)]
    return np.floor((lower + upper) / 2.0) + 1.0


def group_scores(
    ranks: Mapping[str, Ranks], rows: np.ndarray, *, bootstrap: int, seed: Seed
) -> dict[str, Distribution]:
    """`GROUP_KS` of some of the queries in both directions, among all candidates."""
    found: dict[str, Distribution] = {}
    for direction, every in ranks.items():
        some = Ranks(every.higher[rows], every.tied[rows])
        scores = rank_distributions(some, direction, GROUP_KS, bootstrap=bootstrap, seed=seed)
        found |= {name: scores[name] for name in (f"{direction}_R@{k}" for k in GROUP_KS)}
    return found
