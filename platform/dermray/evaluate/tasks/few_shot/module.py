"""Few-shot classification: the linear probe on k training images a class, drawn several times.

A score is the mean over the draws, its interval the 95 % interval of Student's t over them. A class with fewer than k
training images gives all it has.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dermray.evaluate.probing import Labelled, over_seeds
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.tasks.contract import Context, TaskResult


def draw(labels: np.ndarray, images_per_class: int, *, seed: int) -> np.ndarray:
    """Positions of at most so many samples of each class, int64, ascending."""
    generator = np.random.default_rng([seed, images_per_class])
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:images_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


class FewShot:
    """Names the condition of each image after seeing a few of each."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and of which each fit says something, for each number of images."""
        config, data = context.config, Labelled.of(context)
        # The published cost, whatever the linear probe's is.
        of_published = replace(context, config=config.model_copy(update={"probe_cost": 1.0}))
        scored, predictor = context.seen(data.asked), context.predictor("few_shot")
        drawn = [(shots, seed) for shots in config.shots for seed in range(config.num_draws)]
        lessons = (
            data.lesson(of_published, draw(data.train_labels, shots, seed=config.seed + seed)) for shots, seed in drawn
        )
        data, probabilities = data.heard([predictor.ready(lesson)(scored) for lesson in lessons])
        sizes = np.unique(data.train_labels, return_counts=True)[1]
        scores: dict[str, Metric] = {}
        # A single draw has no spread of its own; its interval comes from resampled test images.
        resamples = config.bootstrap if config.num_draws == 1 else 0
        for number, shots in enumerate(config.shots):
            each = probabilities[number * config.num_draws : (number + 1) * config.num_draws]
            mean = over_seeds(data.score(one, bootstrap=resamples, seed=config.seed) for one in each)
            scores |= {f"{shots}_shot_{name}": metric for name, metric in mean.items()}
        most = max(config.shots)
        return TaskResult(
            metrics=scores,
            headline=tuple(f"{shots}_shot_accuracy" for shots in config.shots),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details()
            | {
                "num_draws": config.num_draws,
                "shots": [
                    {"shots": shots, "num_classes_with_fewer": int((sizes < shots).sum())} for shots in config.shots
                ],
            },
            predictions=data.predictions(
                probabilities[drawn.index((most, 0))],
                setting=f"{most} images a class, the first draw",
                prefix=f"{most}_shot_",
            ),
        )


SCORER = FewShot()
