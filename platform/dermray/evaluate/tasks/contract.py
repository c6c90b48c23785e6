"""The contract of an evaluation task: which texts it needs encoded, a result from predictions or vectors, and its page.

A task is a folder beside this file, or lives in a package of one's own (`dermray.evaluate.tasks.kinds`): a `TaskKind`
that says what it is called and needs, and a module with a `SCORER`, which is a `Task`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from dermray import extensions
from dermray.errors import EvaluationError
from dermray.evaluate.classes import Classes
from dermray.evaluate.predictions import OwnPredictions, Predictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.predictors.contract import Lesson, Predictor, Seen
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Distribution, Metric, Seed
from dermray.evaluate.tasks import kinds
from dermray.scales import Scale

if TYPE_CHECKING:
    from dermray.evaluate.features import Features


# What every task's section of `report.json` has beside its details.
OWN_KEYS = frozenset({"title", "num_samples", "headline", "excluded", "metrics", "predictions", "predictor", "options"})
# What a score may be called: `TASK.NAME` and `TASK/NAME` are cut at the last point or stroke.
_SCORE = re.compile(r"[A-Za-z0-9_@%+-]+")


@dataclass(frozen=True)
class Context:
    """What a task works on.

    Attributes:
        samples, features: the split that is scored.
        training: the split to learn from, where there is one.
        validation: the split that a temperature is fitted on, where there is one; never the one that is scored.
        model_uri: where the run's model lies.
    """

    config: EvaluateConfig
    samples: Samples
    features: Features
    training: tuple[Samples, Features] | None = None
    validation: tuple[Samples, Features] | None = None
    model_uri: str = ""

    def predictor(self, task: str) -> Predictor:
        """Who predicts for a task, by its name, with the keys that the run gives it there."""
        name = self.config.predictor_of(task)
        settings = self.config.predictor_keys.get(kinds.short(task)) or predictors.kinds.find(name).settings()
        return predictors.Asked(predictors.load(name), settings)

    def lesson(self, classes: Classes | None = None) -> Lesson:
        """What a predictor is made ready by that has nothing to learn from; `classes` are those to tell apart."""
        untold = classes.untold() if classes else None
        return Lesson(self.config, self.model_uri, self.features.of_texts, untold)

    def seen(self, rows: np.ndarray) -> Seen:
        """Some of the samples that are scored, int64 `[N]`, for a predictor."""
        return Seen.of(self.samples, self.features, rows)


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    Attributes:
        metrics: name → score with its interval; NaN where it is not defined.
        headline: the names that sum it up, a few.
        num_samples: samples behind the scores.
        excluded: samples left out, by reason.
        details: JSON-serialisable content of the task's section in `report.json`, by names other than `OWN_KEYS`.
            `groups` is drawn as `groups.breakdown` makes it, `classes` with `confusion` and `calibration` as
            `classified.describe` does.
        pictures: samples whose images the task's part of the page shows (`thumbnail(index)` there).
        predictions: what the scores were made from, sample by sample; written beside the report.
        scales: of scores that are no shares of 1 or of which less is better, by name. Without one, it is read by the
            end of the name (`dermray.scales.of`).
    """

    metrics: dict[str, Metric]
    headline: tuple[str, ...]
    num_samples: int
    excluded: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: frozenset[int] = frozenset()
    predictions: Predictions | None = None
    scales: Mapping[str, Scale] = field(default_factory=dict)


class Task(Protocol):
    """One way to score a model, or what a predictor says: the truth against it.

    Attributes:
        page: its part of the page, a Jinja template: a macro `block()`, and where wanted `tiles()` for the top of the
            page and `computed()` for its end. They see `section` (of `report.json`), `plots`, `name`, `title`, `first`
            (of the tasks with tiles) and `thumbnail`, and may import `parts.html` and `evaluate_parts.html`. Empty:
            a table of its scores.
    """

    page: str

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """Texts whose vectors `run` will ask for."""

    def run(self, context: Context) -> TaskResult:
        """Score the features.

        Raises:
            EvaluationError: the samples do not allow a score; the message says why.
        """


class ComparableTask(Task, Protocol):
    """One whose predictions are `OwnPredictions`: it says itself how two models' are scored on the same resamples."""

    def distributions(self, predictions: OwnPredictions, *, bootstrap: int, seed: Seed) -> dict[str, Distribution]:
        """Scores by the names of `TaskResult.metrics`, on the samples and on `bootstrap` resamples."""


def require_sound(result: TaskResult, num_samples: int) -> None:
    """Refuse what no report can be made of.

    Args:
        result: of a task.
        num_samples: that there are to show pictures of.

    Raises:
        EvaluationError: says what is wrong with it.
    """
    for name, metric in result.metrics.items():
        if not isinstance(metric, Metric) or not all(
            isinstance(value, int | float) for value in (metric.value, *_ends(metric))
        ):
            raise EvaluationError(f"its score {name} must be a Metric of floats with both ends or none, not {metric!r}")
        if math.isinf(metric.value) or not all(map(math.isfinite, _ends(metric))):
            raise EvaluationError(
                f"its score {name} must be finite, or NaN alone where it is undefined, not {metric!r}"
            )
    problems = (
        ("names of scores that are not of letters, digits and _@%+-", {n for n in result.metrics if not _named(n)}),
        ("scales of no score", set(result.scales) - set(result.metrics)),
        ("a headline that is no score", set(result.headline) - set(result.metrics)),
        ("details by names of the report's own", set(result.details) & OWN_KEYS),
        ("pictures of no sample", {at for at in result.pictures if not 0 <= at < num_samples}),
    )
    for what, found in problems:
        if found:
            raise EvaluationError(f"it has {what}: {', '.join(map(str, sorted(found)))}")
    try:
        json.dumps(result.details, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"its details are no JSON: {error}") from error


def _named(name: str) -> bool:
    return _SCORE.fullmatch(name) is not None


def _ends(metric: Metric) -> tuple[Any, ...]:
    """Of a score's interval; none without resamples."""
    return () if metric.low is None and metric.high is None else (metric.low, metric.high)


@cache
def scorer(name: str) -> Task:
    """What computes a task, imported.

    Raises:
        EvaluationError: its module cannot be imported or has no `SCORER`.
    """
    return cast(Task, extensions.member(kinds.find(name).module, "SCORER", f"the task {name!r}", EvaluationError))
