"""Nearest neighbours scored."""

from __future__ import annotations

from pathlib import Path

from dermray.evaluate.classified import describe
from dermray.evaluate.knn import TEMPERATURE
from dermray.evaluate.probing import Labelled
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks.contract import Context, TaskResult


class KNearest:
    """Names the condition of each image by the training images nearest to it."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and an image."""
        config, data = context.config, Labelled.of(context)
        predict = context.predictor("knn").ready(data.lesson(context))
        probabilities = predict(context.seen(data.kept)).whole()
        predictions = data.predictions(probabilities)
        return TaskResult(
            metrics=data.score(probabilities, bootstrap=config.bootstrap, seed=config.seed),
            headline=("accuracy", "balanced_accuracy", "macro_auroc"),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details()
            | {"k": min(config.neighbours, len(data.train_labels)), "temperature": TEMPERATURE}
            | describe(context, data.classes, data.kept, predictions, predict),
            predictions=predictions,
        )


SCORER = KNearest()
