"""Stratified bootstrap as weights: how often each sample was drawn, for many resamples at a time.

A metric that is a function of weighted counts needs no loop over resamples: it multiplies by these weights.
Intervals are percentile intervals (Efron 1979); strata keep their size in every resample. The resamples are a function
of the strata and the seed, so two models scored on the same samples see the same ones: their values are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LOW_PERCENTILE, HIGH_PERCENTILE = 2.5, 97.5
# Weights held at a time (float32: 128 MiB). The size of a chunk depends on the number of samples only, so the
# random stream, and with it every interval, does not depend on the machine.
_CHUNK_WEIGHTS = 1 << 25

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Metric:
    """A score with its 95 % bootstrap interval; `low` and `high` are None when no resamples were drawn."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Distribution:
    """A score and what it is on each resample.

    Attributes:
        value: on the samples themselves.
        resampled: float64 `[R]`, R may be 0; NaN where a resample leaves the score undefined.
    """

    value: float
    resampled: np.ndarray

    def metric(self) -> Metric:
        """The score with its percentile interval over the resamples that define it."""
        defined = self.resampled[~np.isnan(self.resampled)]
        if len(defined) == 0:
            return Metric(self.value)
        low, high = np.percentile(defined, [LOW_PERCENTILE, HIGH_PERCENTILE])
        return Metric(self.value, float(low), float(high))

    def minus(self, other: Distribution) -> Distribution:
        """The difference of two scores, resample by resample.

        Paired where both come of the same samples and seed; one of independent samples where the seeds differ.
        """
        return Distribution(self.value - other.value, self.resampled - other.resampled)

    def p_value(self) -> float | None:
        """Two-sided p-value of the hypothesis that the score is 0; None without resamples.

        Twice the share of resamples on the far side of 0, which inverts the percentile interval (Efron & Tibshirani
        1993), with one added to both counts (Davison & Hinkley 1997): never 0, at least 2 / (R + 1).
        """
        defined = self.resampled[~np.isnan(self.resampled)]
        if len(defined) == 0:
            return None
        beyond = min((defined <= 0).sum(), (defined >= 0).sum())
        return float(min(1.0, 2.0 * (beyond + 1) / (len(defined) + 1)))


def resample_weights(strata: np.ndarray, num_resamples: int, seed: Seed) -> Iterator[np.ndarray]:
    """Draw stratified bootstrap resamples.

    Args:
        strata: int64 `[N]`, the stratum of each sample; each stratum is resampled to its own size.
        num_resamples: how many resamples in all.
        seed: of the random stream.

    Yields:
        float32 `[N, R]` chunks, R adding up to `num_resamples`: times each sample was drawn in each resample.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    chunk = max(1, _CHUNK_WEIGHTS // max(1, len(strata)))
    for start in range(0, num_resamples, chunk):
        width = min(chunk, num_resamples - start)
        weights = np.empty((len(strata), width), dtype=np.float32)
        for indices in members:
            weights[indices] = _draw_counts(generator, len(indices), width)
        yield weights


def _draw_counts(generator: np.random.Generator, size: int, width: int) -> np.ndarray:
    drawn = generator.integers(0, size, size=(size, width), dtype=np.int64)
    drawn *= width
    drawn += np.arange(width)
    return np.bincount(drawn.ravel(), minlength=size * width).reshape(size, width)


def mean_distribution(values: np.ndarray, strata: np.ndarray, *, num_resamples: int, seed: Seed) -> Distribution:
    """The mean of one value a sample, float `[N]`, on the samples and on stratified resamples."""
    chunks = [values @ weights for weights in resample_weights(strata, num_resamples, seed)]
    return Distribution(float(values.mean()), np.concatenate(chunks or [np.empty(0)]) / len(values))
