"""What tasks share that learn from labelled features: both splits, what a predictor learns from, seeds to a mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dermray.errors import EvaluationError
from dermray.evaluate.classes import Classes, classes_of
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.predictors.contract import Lesson, Seen
from dermray.evaluate.statistics import metrics
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.tasks.contract import Context

# Scores of the published linear probes; their AUROC is one-vs-one.
PROBE_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "weighted_f1",
    "macro_auroc",
    "macro_auroc_ovo",
    "quadratic_kappa",
)


@dataclass(frozen=True)
class Labelled:
    """Features and classes of the samples that have both, to learn from and to score on."""

    classes: Classes
    # the `M` to learn from, with all that is known of them
    learnt: Seen
    # float32 `[M, D]` and `[N, D]`, in the length that the tower gives them; int64 `[M]` and `[N]`
    train_features: np.ndarray
    train_labels: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    # int64 `[N]`, the scored ones among the samples of their split, and their ids
    kept: np.ndarray
    sample_ids: list[str]
    # samples of the scored split left out, by reason
    excluded: dict[str, int]

    @classmethod
    def of(cls, context: Context) -> Labelled:
        """Both splits of a context under one list of classes.

        Raises:
            EvaluationError: there is no training split, or no sample with a label in one of them.
        """
        if context.training is None:
            raise EvaluationError(
                "there is no training split: a task that learns says so, by learns=True of its TaskKind"
            )
        samples, (train_samples, train_features) = context.samples, context.training
        classes = classes_of(samples.followed_by(train_samples))
        targets, train_targets = classes.targets[: len(samples)], classes.targets[len(samples) :]
        kept = (targets >= 0) & context.features.usable
        learnt = (train_targets >= 0) & train_features.usable
        for split, rows in ((samples.split, kept), (train_samples.split, learnt)):
            if not rows.any():
                raise EvaluationError(f"no sample of the split {split!r} has both a label and a readable image")
        scored = replace(classes, targets=targets)
        return cls(
            classes=scored,
            learnt=Seen(train_samples, train_features, np.flatnonzero(learnt)),
            train_features=train_features.as_given()[learnt],
            train_labels=train_targets[learnt],
            features=context.features.as_given()[kept],
            labels=targets[kept],
            kept=np.flatnonzero(kept),
            sample_ids=[samples.ids[row] for row in np.flatnonzero(kept)],
            excluded=scored.excluded() | {"image not readable": int(((targets >= 0) & ~context.features.usable).sum())},
        )

    @property
    def num_classes(self) -> int:
        """Of both splits together."""
        return len(self.classes.labels)

    def lesson(self, context: Context, rows: np.ndarray | None = None) -> Lesson:
        """Training samples for a predictor to learn from, all or some of them."""
        learnt, labels = self.learnt, self.train_labels
        if rows is not None:
            learnt, labels = replace(learnt, rows=learnt.rows[rows]), labels[rows]
        return replace(context.lesson(self.classes), learnt=learnt, labels=labels)

    def predictions(self, probabilities: np.ndarray, *, setting: str = "", prefix: str = "") -> ClassPredictions:
        """Probabilities of the scored samples as predictions of a task."""
        return ClassPredictions(
            self.sample_ids, self.labels, probabilities.astype(np.float32), self.classes.names, setting, prefix
        )

    def score(self, probabilities: np.ndarray, *, bootstrap: int, seed: int) -> dict[str, Metric]:
        """`PROBE_METRICS` of the scored samples."""
        scores = metrics.classification(probabilities, self.labels, bootstrap=bootstrap, seed=seed)
        return {name: scores[name] for name in PROBE_METRICS}

    def details(self) -> dict[str, object]:
        """How much there is to learn from, for the report."""
        return {
            "num_train_samples": len(self.train_labels),
            "num_classes": self.num_classes,
            "classes_without_training_sample": [
                self.classes.names[number]
                for number in np.setdiff1d(np.unique(self.labels), np.unique(self.train_labels))
            ],
        }


def over_seeds(runs: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Mean of each score over repetitions, with the 95 % interval of Student's t; one repetition keeps its own."""
    listed = list(runs)
    if len(listed) == 1:
        return dict(listed[0])
    return {name: _mean([run[name].value for run in listed]) for name in listed[0]}


def _mean(values: Sequence[float]) -> Metric:
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Metric(mean, mean - half, mean + half)
