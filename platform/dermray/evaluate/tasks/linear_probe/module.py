"""Linear probe scored, for each share of the labels.

For a share below 1 the subset is drawn with several seeds, the first being the published one; the score is the mean
over them, its interval the 95 % interval of Student's t. With all labels there is one fit and a bootstrap interval over
the test images. Scores are the published protocol's where `probe_cost` is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dermray.evaluate.classified import describe
from dermray.evaluate.linear_probe import SUBSET_SEED, label_fraction
from dermray.evaluate.predictors.contract import Predict
from dermray.evaluate.probing import Labelled, over_seeds
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.tasks.contract import Context, TaskResult


def prefix(fraction: float) -> str:
    """What the scores of a label fraction are called: 0.1 → `10pct`."""
    return f"{100 * fraction:g}pct"


class LinearProbe:
    """Names the condition of each image by a linear layer fitted on the training split's labels."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and an image, for each label fraction."""
        config, data = context.config, Labelled.of(context)
        scores: dict[str, Metric] = {}
        fractions: list[dict[str, Any]] = []
        shown: tuple[float, _Run] | None = None
        for fraction in config.label_fractions:
            runs = self._runs(context, data, fraction)
            scores |= {
                f"{prefix(fraction)}_{name}": metric for name, metric in over_seeds(run.scores for run in runs).items()
            }
            first = runs[0]
            fractions.append(
                {
                    "fraction": fraction,
                    "num_labels": first.num_labels,
                    "num_seeds": len(runs),
                    "published_subset": {name: metric.value for name, metric in first.scores.items()},
                }
            )
            if shown is None or fraction > shown[0]:
                shown = fraction, first
        assert shown is not None, "the configuration holds at least one label fraction"
        fraction, run = shown
        predictions = data.predictions(run.probabilities, setting=_setting(fraction), prefix=f"{prefix(fraction)}_")
        return TaskResult(
            metrics=scores,
            headline=tuple(f"{prefix(fraction)}_accuracy" for fraction in config.label_fractions),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details()
            | {"fractions": fractions, "described": predictions.setting}
            | describe(
                context,
                data.classes,
                data.kept,
                predictions,
                run.predict,
            ),
            predictions=predictions,
        )

    def _runs(self, context: Context, data: Labelled, fraction: float) -> list[_Run]:
        """One fit a draw of the labels, the published draw first."""
        config, scored = context.config, context.seen(data.kept)
        num_seeds = 1 if fraction == 1 else config.num_draws
        resamples = config.bootstrap if num_seeds == 1 else 0
        runs = []
        for seed in range(num_seeds):
            rows = label_fraction(data.train_labels, fraction, seed=SUBSET_SEED + seed)
            predict = context.predictor("linear_probe").ready(data.lesson(context, rows))
            probabilities = predict(scored).whole()
            scores = data.score(probabilities, bootstrap=resamples, seed=config.seed)
            runs.append(_Run(scores, len(rows), predict, probabilities))
        return runs


@dataclass(frozen=True, eq=False)
class _Run:
    """One fit: its scores, how many labels it saw, and what it says of features and of the scored samples."""

    scores: dict[str, Metric]
    num_labels: int
    predict: Predict
    probabilities: np.ndarray


def _setting(fraction: float) -> str:
    return "all labels" if fraction == 1 else f"{100 * fraction:g} % of the labels, the published draw"


SCORER = LinearProbe()
