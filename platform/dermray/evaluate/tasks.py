"""The contract of an evaluation task: which texts it needs encoded, and a result from features.

A task lives in one file of this folder and is listed in `dermray.evaluate.suite.TASKS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from dermray.evaluate.bootstrap import Metric
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import Predictions
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig


@dataclass(frozen=True)
class Context:
    """What a task works on.

    Attributes:
        samples, features: the split that is scored.
        training: the split to learn from, where there is one.
        validation: the split that a temperature is fitted on, where there is one; never the one that is scored.
    """

    config: EvaluateConfig
    samples: Samples
    features: Features
    training: tuple[Samples, Features] | None = None
    validation: tuple[Samples, Features] | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    Attributes:
        metrics: name → score with its interval.
        headline: the names that sum it up, a few.
        num_samples: samples behind the scores.
        excluded: samples left out, by reason.
        details: JSON-serialisable content of the task's section in `report.json`.
        predictions: what the scores were made from, sample by sample; written beside the report.
    """

    metrics: dict[str, Metric]
    headline: tuple[str, ...]
    num_samples: int
    excluded: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None


class Task(Protocol):
    """One way to score a model."""

    # whether `Context.training` must be there
    needs_training: bool

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """Texts whose vectors `run` will ask for."""

    def run(self, context: Context) -> TaskResult:
        """Score the features.

        Raises:
            EvaluationError: the samples do not allow a score; the message says why.
        """
