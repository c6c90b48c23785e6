"""Nearest neighbours scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dermray.evaluate.classified import describe
from dermray.evaluate.knn import TEMPERATURE
from dermray.evaluate.probing import Labelled
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.knn import TASK


class KNearest:
    """Names the condition of each image by the training images nearest to it."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and of which the predictor says something."""
        config, data = context.config, Labelled.of(context)
        predict = context.predictor("knn").ready(data.lesson(context))
        data, (probabilities,) = data.heard([predict(context.seen(data.asked))])
        predictions = data.predictions(probabilities)
        return TaskResult(
            metrics=data.score(probabilities, bootstrap=config.bootstrap, seed=config.seed),
            headline=("accuracy", "balanced_accuracy", "macro_auroc"),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details()
            | _voted(config, len(data.train_labels))
            | describe(context, data.classes, data.kept, predictions, predict),
            predictions=predictions,
        )


def _voted(config: EvaluateConfig, num_train_samples: int) -> dict[str, Any]:
    """How the task's own predictor votes; of another one that is not known."""
    if config.predictor_of("knn") != TASK.predictor:
        return {}
    return {"k": min(config.neighbours, num_train_samples), "temperature": TEMPERATURE}


SCORER = KNearest()
