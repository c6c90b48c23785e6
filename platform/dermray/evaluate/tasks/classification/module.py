"""Any classifier scored: the metrics of zero-shot, for whoever the run names by `predictor.classification`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dermray.evaluate.classes import classes_of
from dermray.evaluate.classified import describe
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import metrics
from dermray.evaluate.tasks.contract import Context, TaskResult


class Classification:
    """Compares the label of each image with the probabilities that its predictor gives."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """What the predictor asks for."""
        predictor = predictors.load(config.predictor_of("classification"))
        return predictor.texts(classes_of(samples).untold(), config)

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and of which the predictor says something."""
        samples, config, classes = context.samples, context.config, classes_of(context.samples)
        labelled = np.flatnonzero(classes.targets >= 0)
        predict = context.predictor("classification").ready(context.lesson(classes))
        heard = predictors.Heard.of([predict(context.seen(labelled))], len(classes.names), "classes")
        kept, probabilities = labelled[heard.answered], heard.values[0].astype(np.float32)
        predictions = ClassPredictions(
            [samples.ids[row] for row in kept], classes.targets[kept], probabilities, classes.names
        )
        return TaskResult(
            metrics=metrics.classification(
                probabilities, classes.targets[kept], bootstrap=config.bootstrap, seed=config.seed
            ),
            headline=("accuracy", "balanced_accuracy", "macro_auroc"),
            num_samples=len(kept),
            excluded=classes.excluded() | heard.left_out,
            details=describe(context, classes, kept, predictions, predict),
            predictions=predictions,
        )


SCORER = Classification()
