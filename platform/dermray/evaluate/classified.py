"""What a report says of any classifier's probabilities: class by class, how far to be trusted, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.classes import Classes, targets_among
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.predictors.contract import Predict, Seen
from dermray.evaluate.statistics import calibration, groups, metrics
from dermray.evaluate.statistics.bootstrap import Distribution, Seed, mean_distribution
from dermray.evaluate.tasks.contract import Context

GROUP_METRICS = ("accuracy", "balanced_accuracy", "macro_auroc")


def describe(
    context: Context, classes: Classes, kept: np.ndarray, predictions: ClassPredictions, predict: Predict
) -> dict[str, Any]:
    """The keys `classes`, `confusion`, `calibration` and `groups` of a task's section (docs/evaluation.md).

    Args:
        context: of the task.
        classes: that are told apart.
        kept: int64 `[N]`, the samples that are scored.
        predictions: of them.
        predict: the classifier, ready, for the validation split.
    """
    scores = metrics.per_class(predictions.probabilities, predictions.labels)
    return {
        "classes": _class_rows(classes.labels, classes.names, scores),
        "confusion": scores.confusion.tolist(),
        "calibration": _calibration(context, classes, predictions, predict),
        "groups": groups.breakdown(
            context.samples.groups,
            kept,
            lambda rows, seed: group_scores(
                predictions.probabilities[rows], predictions.labels[rows], bootstrap=context.config.bootstrap, seed=seed
            ),
            min_size=context.config.min_group_size,
            seed=context.config.seed,
        ),
    }


def group_scores(
    probabilities: np.ndarray, labels: np.ndarray, *, bootstrap: int, seed: Seed
) -> dict[str, Distribution]:
    """`GROUP_METRICS` of one group; only the accuracy where all its samples are of one class."""
    if (labels == labels[0]).all():
        hits = (probabilities.argmax(axis=1) == labels).astype(np.float64)
        return {"accuracy": mean_distribution(hits, labels, num_resamples=bootstrap, seed=seed)}
    found = metrics.distributions(probabilities, labels, bootstrap=bootstrap, seed=seed)
    return {name: found[name] for name in GROUP_METRICS}


def _calibration(context: Context, classes: Classes, predictions: ClassPredictions, predict: Predict) -> dict[str, Any]:
    """As predicted, and after a temperature that the validation split chooses; or why there is none."""
    config = context.config

    def scored(probabilities: np.ndarray) -> dict[str, Any]:
        found = calibration.calibrate(probabilities, predictions.labels, bootstrap=config.bootstrap, seed=config.seed)
        return asdict(found)

    section = {
        "num_bins": calibration.NUM_BINS,
        **scored(predictions.probabilities),
        "temperature": None,
        "without_temperature": None,
    }
    if context.validation is None:
        taken = config.validation_split in (context.samples.split, config.train_split)
        reason = (
            f"the split {config.validation_split!r} is scored or learnt from; a temperature is fitted on another one"
            if taken
            else f"there is no split {config.validation_split!r} to fit it on"
        )
        return section | {"without_temperature": reason}
    samples, features = context.validation
    targets = targets_among(samples, classes)
    rows = np.flatnonzero((targets >= 0) & features.usable)
    try:
        if len(rows) == 0:
            raise EvaluationError("it has no readable image with a label among the classes")
        predicted = predict(Seen.of(samples, features, rows))
        rows = rows[predicted.answered]
        temperature = calibration.fit_temperature(predicted.values[predicted.answered], targets[rows])
    except EvaluationError as error:
        return section | {"without_temperature": f"not fitted on the split {samples.split!r}: {error}"}
    after = scored(calibration.apply_temperature(predictions.probabilities, temperature))
    return section | {
        "temperature": {"value": temperature, "split": samples.split, "num_samples": len(rows), **after},
    }


def _class_rows(classes: Sequence[str], names: Sequence[str], scores: metrics.ClassScores) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "name": name,
            "num_samples": int(scores.num_samples[row]),
            "recall": _number(scores.recall[row]),
            "precision": _number(scores.precision[row]),
            "f1": _number(scores.f1[row]),
            "auroc": _number(scores.auroc[row]),
        }
        for row, (label, name) in enumerate(zip(classes, names, strict=True))
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
