"""Stratified bootstrap as weights: how often each sample was drawn, for many resamples at a time.

A metric that is a function of weighted counts needs no loop over resamples: it multiplies by these weights.
Intervals are percentile intervals (Efron 1979); strata keep their size in every resample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LOW_PERCENTILE, HIGH_PERCENTILE = 2.5, 97.5
# Weights held at a time (float32: 128 MiB). The size of a chunk depends on the number of samples only, so the
# random stream, and with it every interval, does not depend on the machine.
_CHUNK_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class Metric:
    """A score with its 95 % bootstrap interval; `low` and `high` are None when no resamples were drawn."""

    value: float
    low: float | None = None
    high: float | None = None


def resample_weights(strata: np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
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


def with_interval(value: float, resampled: np.ndarray) -> Metric:
    """A metric from its point value and its values on the resamples, float `[R]` (R may be 0)."""
    if len(resampled) == 0:
        return Metric(value)
    low, high = np.percentile(resampled, [LOW_PERCENTILE, HIGH_PERCENTILE])
    return Metric(value, float(low), float(high))


def mean_with_interval(values: np.ndarray, strata: np.ndarray, *, num_resamples: int, seed: int) -> Metric:
    """The mean of one value a sample, float `[N]`, with its stratified bootstrap interval."""
    chunks = [values @ weights for weights in resample_weights(strata, num_resamples, seed)]
    resampled = np.concatenate(chunks or [np.empty(0)]) / len(values)
    return with_interval(float(values.mean()), resampled)
