"""What tasks share that learn from labelled features: both splits, what a predictor learns from, seeds to a mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dermray.errors import EvaluationError
from dermray.evaluate.classes import Classes, classes_of
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.predictors.contract import UNREADABLE, Heard, Lesson, Predicted, Seen
from dermray.evaluate.samples import Samples
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


@dataclass(frozen=True, eq=False)
class Labelled:
    """What there is to learn from, and the samples that are scored: at first those with a label and a vector.

    Attributes:
        samples, vectors: of the scored split, and what its images look like to the run's model.
        classes: of both splits together, with the class of each sample of the scored one.
        learnt: the `M` samples to learn from, with all that is known of them; where the run encodes images, those that
            have a vector.
        train_labels: int64 `[M]`, their classes.
        kept: int64 `[N]`, the scored ones among the samples of their split.
        left_out: samples with a label that are not scored, by reason.
    """

    samples: Samples
    vectors: Features
    classes: Classes
    learnt: Seen
    train_labels: np.ndarray
    kept: np.ndarray
    left_out: dict[str, int]

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
        return cls(
            samples=samples,
            vectors=context.features,
            classes=replace(classes, targets=targets),
            learnt=Seen(train_samples, train_features, np.flatnonzero(learnt)),
            train_labels=train_targets[learnt],
            kept=np.flatnonzero(kept),
            left_out={UNREADABLE: int(((targets >= 0) & ~context.features.usable).sum())},
        )

    def heard(self, said: Sequence[Predicted]) -> tuple[Labelled, tuple[np.ndarray, ...]]:
        """What predictors say of the samples that are `asked` for.

        Args:
            said: by each fit, one at least.

        Returns:
            The same with those as scored samples of which each fit says something, and the probabilities of these by
            each fit, `[N, C]`.

        Raises:
            EvaluationError: nothing is left to score, or a fit gives no probability for each class.
        """
        found = Heard.of(said, self.num_classes, "classes")
        return replace(self, kept=self.asked[found.answered], left_out=found.left_out), found.values

    @property
    def asked(self) -> np.ndarray:
        """The samples with a label, int64: a predictor may look at images that have no vector."""
        return np.flatnonzero(self.classes.targets >= 0)

    @property
    def train_features(self) -> np.ndarray:
        """Vectors to learn from, float32 `[M, D]`, in the length that the tower gives them."""
        return self.learnt.vectors()

    @property
    def features(self) -> np.ndarray:
        """Vectors of the scored samples, float32 `[N, D]`, in the length that the tower gives them."""
        return self.vectors.as_given()[self.kept]

    @property
    def labels(self) -> np.ndarray:
        """Classes of the scored samples, int64 `[N]`."""
        return self.classes.targets[self.kept]

    @property
    def excluded(self) -> dict[str, int]:
        """Samples of the scored split left out, by reason."""
        return self.classes.excluded() | self.left_out

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
        ids = [self.samples.ids[row] for row in self.kept]
        return ClassPredictions(ids, self.labels, probabilities.astype(np.float32), self.classes.names, setting, prefix)

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
