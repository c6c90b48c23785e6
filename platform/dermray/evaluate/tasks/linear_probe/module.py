"""Linear probe scored, for each share of the labels.

For a share below 1 the subset is drawn with several seeds, the first being the published one; the score is the mean
over them, its interval the 95 % interval of Student's t. With all labels there is one fit and a bootstrap interval over
the test images. Scores are the published protocol's where `probe_cost` is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermray.evaluate.classified import describe
from dermray.evaluate.linear_probe import SUBSET_SEED, label_fraction
from dermray.evaluate.predictors.contract import Predict, Predicted
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
        """Score every sample that has a label and of which each fit says something, for each label fraction."""
        config, data = context.config, Labelled.of(context)
        fits = [fit for fraction in config.label_fractions for fit in self._fits(context, data, fraction)]
        data, probabilities = data.heard([fit.said for fit in fits])
        scores: dict[str, Metric] = {}
        fractions: list[dict[str, Any]] = []
        for fraction in config.label_fractions:
            runs = [place for place, fit in enumerate(fits) if fit.fraction == fraction]
            resamples = config.bootstrap if len(runs) == 1 else 0
            found = [data.score(probabilities[place], bootstrap=resamples, seed=config.seed) for place in runs]
            scores |= {f"{prefix(fraction)}_{name}": metric for name, metric in over_seeds(found).items()}
            fractions.append(
                {
                    "fraction": fraction,
                    "num_labels": fits[runs[0]].num_labels,
                    "num_seeds": len(runs),
                    "published_subset": {name: metric.value for name, metric in found[0].items()},
                }
            )
        fraction = max(config.label_fractions)
        shown = next(place for place, fit in enumerate(fits) if fit.fraction == fraction)
        predictions = data.predictions(probabilities[shown], setting=_setting(fraction), prefix=f"{prefix(fraction)}_")
        return TaskResult(
            metrics=scores,
            headline=tuple(f"{prefix(fraction)}_accuracy" for fraction in config.label_fractions),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details()
            | {"fractions": fractions, "described": predictions.setting}
            | describe(context, data.classes, data.kept, predictions, fits[shown].predict),
            predictions=predictions,
        )

    def _fits(self, context: Context, data: Labelled, fraction: float) -> list[_Fit]:
        """One fit a draw of the labels, the published draw first."""
        scored, predictor = context.seen(data.asked), context.predictor("linear_probe")
        fits = []
        for seed in range(1 if fraction == 1 else context.config.num_draws):
            rows = label_fraction(data.train_labels, fraction, seed=SUBSET_SEED + seed)
            predict = predictor.ready(data.lesson(context, rows))
            fits.append(_Fit(fraction, len(rows), predict, predict(scored)))
        return fits


@dataclass(frozen=True, eq=False)
class _Fit:
    """One fit: its share of the labels, how many these are, and what it says, of any samples and of the asked ones."""

    fraction: float
    num_labels: int
    predict: Predict
    said: Predicted


def _setting(fraction: float) -> str:
    return "all labels" if fraction == 1 else f"{100 * fraction:g} % of the labels, the published draw"


SCORER = LinearProbe()
