"""Classification metrics with 95 % intervals, equal to scikit-learn's values and vectorised over resamples.

Definitions (scikit-learn's, where they share a name):

- `accuracy`: share of samples whose most probable class is the label (equal probabilities: the first class).
- `top5_accuracy`: share whose label is among the five most probable classes (equal: the later class first).
- `balanced_accuracy`: mean recall over the classes that have samples.
- `macro_auroc`: one-vs-rest area under the ROC curve, mean over the classes that have samples; ties count half.
- `macro_auroc_ovo`: one-vs-one (Hand & Till 2001), mean over ordered pairs of classes that have samples.
- `weighted_f1`, `macro_f1`: F1 per class from the predictions, weighted by support, or the mean over classes that
  are a label or a prediction; a class without a hit counts 0.
- `quadratic_kappa`: Cohen's kappa with quadratic weights over the classes that are a label or a prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from dermray.errors import EvaluationError
from dermray.evaluate.statistics.bootstrap import Distribution, Metric, Seed, resample_weights

__all__ = [
    "METRIC_NAMES",
    "BinaryArea",
    "ClassScores",
    "Metric",
    "checked",
    "classification",
    "distributions",
    "per_class",
]

TOP_K = 5
METRIC_NAMES = (
    "accuracy",
    "top5_accuracy",
    "balanced_accuracy",
    "macro_auroc",
    "macro_auroc_ovo",
    "weighted_f1",
    "macro_f1",
    "quadratic_kappa",
)
SUM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ClassScores:
    """Point scores of each class, float64 `[C]`; NaN where a class has no sample (or no prediction: precision)."""

    num_samples: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray
    auroc: np.ndarray
    # counts `[C, C]`: rows are labels, columns predictions
    confusion: np.ndarray


def classification(probabilities: Any, labels: Any, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Metric]:
    """Score predicted probabilities against labels.

    Args:
        probabilities: `[N, C]`, numpy or torch, each row adding up to 1.
        labels: `[N]` integers in `0..C-1`. Classes without a sample are left out of means over classes.
        bootstrap: resamples of the stratified bootstrap behind the intervals; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        `METRIC_NAMES` → `Metric(value, low, high)`, a 95 % interval.

    Raises:
        EvaluationError: shapes that do not fit, no samples, NaN, rows that are no probabilities, labels outside
            the classes, or fewer than two classes among the labels (areas under the curve need two).
    """
    found = distributions(probabilities, labels, bootstrap=bootstrap, seed=seed)
    return {name: one.metric() for name, one in found.items()}


def distributions(probabilities: Any, labels: Any, *, bootstrap: int, seed: Seed) -> dict[str, Distribution]:
    """`METRIC_NAMES` on the samples and on each stratified resample. Arguments and errors as `classification`.

    The resamples depend on labels and seed only: those of two models on the same samples are paired.
    """
    scores, truth = checked(probabilities, labels)
    predictions = scores.argmax(axis=1)
    counted = [
        _hard_metrics(truth, predictions, _top_k_hits(scores, truth), scores.shape[1]),
        _areas(scores, truth),
    ]
    point = _evaluate(counted, np.ones((len(truth), 1)))
    resampled = [_evaluate(counted, weights) for weights in resample_weights(truth, bootstrap, seed)]
    return {
        name: Distribution(float(point[name][0]), np.concatenate([part[name] for part in resampled] or [np.empty(0)]))
        for name in METRIC_NAMES
    }


def per_class(probabilities: Any, labels: Any) -> ClassScores:
    """Recall, precision, F1, one-vs-rest AUROC and confusion counts of each class. Arguments as `classification`.

    Raises:
        EvaluationError: as `classification`.
    """
    scores, truth = checked(probabilities, labels)
    num_classes = scores.shape[1]
    predictions = scores.argmax(axis=1)
    confusion = np.bincount(truth * num_classes + predictions, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    support, predicted, hits = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    ones = np.ones((len(truth), 1))
    auroc = np.full(num_classes, np.nan)
    for label in np.unique(truth):
        auroc[label] = _ClassRanks(scores[:, label], truth, label).areas(ones)[0][0]
    with np.errstate(invalid="ignore"):
        return ClassScores(
            num_samples=support,
            recall=hits / support,
            precision=hits / predicted,
            f1=np.where(support > 0, 2 * hits / (support + predicted), np.nan),
            auroc=auroc,
            confusion=confusion,
        )


WeightedMetrics = Callable[[np.ndarray], dict[str, np.ndarray]]


def _evaluate(metrics: list[WeightedMetrics], weights: np.ndarray) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for metric in metrics:
        values.update(metric(weights))
    return values


def _hard_metrics(
    truth: np.ndarray, predictions: np.ndarray, top_k_hits: np.ndarray, num_classes: int
) -> WeightedMetrics:
    """Metrics of the confusion matrix, as a function of weights `[N, R]`.

    Stratified resampling keeps every class at its size, so the supports are constants.
    """
    support = np.bincount(truth, minlength=num_classes).astype(np.float64)
    labelled = support > 0
    hit_rows = _sum_by(np.where(predictions == truth, truth, -1), num_classes)
    predicted_rows = _sum_by(predictions, num_classes)
    seen = labelled | (np.bincount(predictions, minlength=num_classes) > 0)
    position = np.cumsum(seen) - 1.0
    distance = (position[truth] - position[predictions]) ** 2

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = float(len(truth))
        hits, predicted = hit_rows @ weights, predicted_rows @ weights
        sizes = support[:, None] + predicted
        f1 = np.divide(2.0 * hits, sizes, out=np.zeros(sizes.shape), where=sizes > 0)
        # Expected squared distance of independent margins, without building the C x C matrix.
        expected = (
            total * (support @ position**2)
            + total * (position**2 @ predicted)
            - 2.0 * (support @ position) * (position @ predicted)
        ) / total
        observed = distance @ weights
        return {
            "accuracy": hits.sum(axis=0) / total,
            "top5_accuracy": (top_k_hits @ weights) / total,
            "balanced_accuracy": (hits[labelled] / support[labelled, None]).mean(axis=0),
            "weighted_f1": (support @ f1) / total,
            "macro_f1": f1.sum(axis=0) / (sizes > 0).sum(axis=0),
            "quadratic_kappa": 1.0 - observed / expected,
        }

    return evaluate


def _areas(scores: np.ndarray, truth: np.ndarray) -> WeightedMetrics:
    """Both macro AUROCs as a function of weights `[N, R]`."""
    present = np.unique(truth)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        rest, pairs = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
        for label in present:
            one_vs_rest, one_vs_one = _ClassRanks(scores[:, label], truth, label).areas(weights)
            rest += one_vs_rest
            pairs += one_vs_one
        return {"macro_auroc": rest / len(present), "macro_auroc_ovo": pairs / len(present)}

    return evaluate


class _ClassRanks:
    """Where the samples of other classes fall between the scores of one class's samples.

    The area under the curve is the weighted share of (positive, negative) pairs in the right order. Negatives only
    matter by the gap between positive scores in which they fall, so they are summed by gap, one sparse product for
    all resamples. One-vs-one is the same sum with each negative divided by the size of its class.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray, label: int) -> None:
        counts = np.bincount(truth)
        positives, negatives = np.flatnonzero(truth == label), np.flatnonzero(truth != label)
        levels, level_of_positive = np.unique(scores[positives], return_inverse=True)
        # Gap 2j is below level j and above level j-1; gap 2j+1 is level j itself.
        values = scores[negatives]
        gaps = np.searchsorted(levels, values, "left") + np.searchsorted(levels, values, "right")
        self._num_gaps = 2 * len(levels) + 1
        self._num_pairs = float(len(positives)) * len(negatives)
        self._num_class_pairs = float(len(positives)) * (np.count_nonzero(counts) - 1)
        self._positive_rows = _sum_by(level_of_positive, len(levels), columns=positives, width=len(truth))
        self._negative_rows = _sum_by(gaps, self._num_gaps, columns=negatives, width=len(truth))
        self._class_share_rows = self._negative_rows.astype(np.float64)
        self._class_share_rows.data /= counts[truth[self._negative_rows.indices]]

    def ordered(self, weights: np.ndarray) -> np.ndarray:
        """Weighted (positive, negative) pairs in the right order, ties half; float64 `[R]`."""
        positives = (self._positive_rows @ weights).astype(np.float64)
        return self._ordered(positives, self._negative_rows @ weights)

    def areas(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One-vs-rest area, and mean one-vs-one area against each other class; each float64 `[R]`."""
        positives = (self._positive_rows @ weights).astype(np.float64)
        one_vs_rest = self._ordered(positives, self._negative_rows @ weights) / self._num_pairs
        by_class_share = self._class_share_rows.astype(weights.dtype) @ weights
        one_vs_one = self._ordered(positives, by_class_share) / self._num_class_pairs
        return one_vs_rest, one_vs_one

    def _ordered(self, positives: np.ndarray, by_gap: np.ndarray) -> np.ndarray:
        below = np.cumsum(by_gap, axis=0, dtype=np.float64)
        return np.einsum("lr,lr->r", positives, below[0:-1:2] + 0.5 * by_gap[1::2])


class BinaryArea:
    """Area under the ROC curve of one score against yes or no, as a function of sample weights; ties count half."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        """Rank the scores, float `[N]`, against the answers, bool `[N]`.

        Raises:
            EvaluationError: all answers are the same.
        """
        truth = positive.astype(np.int64)
        if truth.min() == truth.max():
            raise EvaluationError(f"all {len(truth)} answers are {bool(truth[0])}; an area under the curve needs both")
        self._positive = positive
        self._ranks = _ClassRanks(scores.astype(np.float64), truth, 1)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Areas, float64 `[R]`, under weights `[N, R]`; NaN where they leave only one answer."""
        pairs = weights[self._positive].sum(axis=0, dtype=np.float64) * weights[~self._positive].sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._ranks.ordered(weights) / np.where(pairs > 0, pairs, np.nan)


def _sum_by(
    groups: np.ndarray, num_groups: int, *, columns: np.ndarray | None = None, width: int | None = None
) -> sparse.csr_matrix:
    """A sparse matrix whose product with weights `[N, R]` sums them by group; negative groups are left out."""
    kept = groups >= 0
    where = (np.arange(len(groups)) if columns is None else columns)[kept]
    shape = (num_groups, len(groups) if width is None else width)
    return sparse.csr_matrix((np.ones(len(where), dtype=np.float32), (groups[kept], where)), shape=shape)


def _top_k_hits(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    own = scores[np.arange(len(truth)), truth][:, None]
    later = np.arange(scores.shape[1])[None, :] > truth[:, None]
    ahead = (scores > own).sum(axis=1) + ((scores == own) & later).sum(axis=1)
    return (ahead < TOP_K).astype(np.float32)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities as float64 `[N, C]` and labels as int64 `[N]`. Arguments and errors as `classification`."""
    scores, truth = _array(probabilities), _array(labels)
    if scores.ndim != 2 or truth.ndim != 1 or len(scores) != len(truth):
        raise EvaluationError(
            f"probabilities must be [N, C] and labels [N], not {list(scores.shape)} and {list(truth.shape)}"
        )
    if len(truth) == 0:
        raise EvaluationError("there is no sample to score")
    if not np.issubdtype(truth.dtype, np.integer):
        raise EvaluationError(f"labels must be integers, not {truth.dtype}")
    scores = scores.astype(np.float64, copy=False)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise EvaluationError(
            f"probabilities of sample {row} are not finite; look for NaN in the features or the model's weights"
        )
    outside = np.flatnonzero((truth < 0) | (truth >= scores.shape[1]))
    if len(outside):
        raise EvaluationError(
            f"label {int(truth[outside[0]])} of sample {int(outside[0])} is outside the {scores.shape[1]} classes"
        )
    wrong = np.flatnonzero((np.abs(scores.sum(axis=1) - 1.0) > SUM_TOLERANCE) | (scores < 0).any(axis=1))
    if len(wrong):
        raise EvaluationError(
            f"row {int(wrong[0])} is no probability distribution (sum {scores[wrong[0]].sum():.4g}); "
            "give probabilities, for example the softmax of logits"
        )
    if (truth == truth[0]).all():
        raise EvaluationError(
            f"all {len(truth)} labels are class {int(truth[0])}; scores between classes need at least two"
        )
    return scores, truth.astype(np.int64)
