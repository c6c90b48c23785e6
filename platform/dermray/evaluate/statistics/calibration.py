"""Calibration: whether a model is right as often as it says it is.

- `expected_calibration_error` (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599): the probability of the predicted
  class is the confidence; 15 bins of equal width over (0, 1], closed on the right; the mean over samples of
  |accuracy - confidence| of their bin.
- `nll`: mean negative log-likelihood of the label, in nats; a probability below 1e-12 counts as 1e-12.
- `brier`: mean over samples of the squared distance between probabilities and the label's one-hot vector, summed over
  classes (Brier 1950): from 0 to 2.

Temperature scaling (Guo et al. 2017): one number T that divides the logits of every sample, chosen for the least
negative log-likelihood on the validation split, never on what is scored. Log-probabilities serve as logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from dermray.errors import EvaluationError
from dermray.evaluate.statistics.bootstrap import Metric, mean_distribution
from dermray.evaluate.statistics.metrics import checked

NUM_BINS = 15
SMALLEST_PROBABILITY = 1e-12
# Logarithms of the temperatures that are looked through: 0.01 to 100.
LOG_TEMPERATURES = (np.log(0.01), np.log(100.0))


@dataclass(frozen=True)
class Calibration:
    """How probabilities fit what came true.

    Attributes:
        expected_calibration_error, nll, brier: as the module says. The first has no interval: a resample has repeated
            samples, so its bins err more, and the percentile interval would lie above the value.
        bins: of the `NUM_BINS` those that hold samples: `low`, `high`, `num_samples`, `confidence` (mean), `accuracy`.
    """

    expected_calibration_error: float
    nll: Metric
    brier: Metric
    bins: list[dict[str, float]]


def calibrate(probabilities: Any, labels: Any, *, bootstrap: int = 1000, seed: int = 0) -> Calibration:
    """Score the calibration of probabilities against labels. Arguments as `dermray.evaluate.metrics.classification`.

    Raises:
        EvaluationError: as `dermray.evaluate.metrics.classification`.
    """
    scores, truth = checked(probabilities, labels)
    confidence = scores.max(axis=1)
    hits = scores.argmax(axis=1) == truth
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    number = np.clip(np.searchsorted(edges, confidence, "left") - 1, 0, NUM_BINS - 1)
    bins = [
        {
            "low": float(edges[one]),
            "high": float(edges[one + 1]),
            "num_samples": int((number == one).sum()),
            "confidence": float(confidence[number == one].mean()),
            "accuracy": float(hits[number == one].mean()),
        }
        for one in np.unique(number)
    ]
    error = sum(one["num_samples"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(truth)

    def mean(values: np.ndarray) -> Metric:
        return mean_distribution(values, truth, num_resamples=bootstrap, seed=seed).metric()

    return Calibration(
        expected_calibration_error=float(error),
        nll=mean(_losses(_log(scores), truth)),
        brier=mean(((scores - np.eye(scores.shape[1])[truth]) ** 2).sum(axis=1)),
        bins=bins,
    )


def fit_temperature(probabilities: Any, labels: Any) -> float:
    """The temperature of least negative log-likelihood on validation samples, between 0.01 and 100.

    Args:
        probabilities: `[N, C]`.
        labels: `[N]`.

    Raises:
        EvaluationError: as `dermray.evaluate.metrics.classification`.
    """
    # A second of imports that each worker of a training, which validates but never scales, can do without.
    from scipy.optimize import minimize_scalar

    scores, truth = checked(probabilities, labels)
    logits = _log(scores)
    # Convex in 1 / T, so of one minimum along log T.
    found = minimize_scalar(
        lambda log_t: _losses(logits / np.exp(log_t), truth).mean(), bounds=LOG_TEMPERATURES, options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `[N, C]`, float64, after their logits are divided by the temperature.

    Raises:
        EvaluationError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise EvaluationError(f"a temperature must be above 0, not {temperature}")
    logits = _log(np.asarray(probabilities, dtype=np.float64)) / temperature
    return np.exp(logits - logsumexp(logits, axis=1, keepdims=True))


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))


def _losses(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each label, float64 `[N]`."""
    losses: np.ndarray = logsumexp(logits, axis=1) - logits[np.arange(len(truth)), truth]
    return losses
