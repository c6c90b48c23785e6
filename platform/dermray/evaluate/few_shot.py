"""Few-shot classification: the linear probe on k training images a class, drawn several times.

A score is the mean over the draws, its interval the 95 % interval of Student's t over them. A class with fewer than k
training images gives all it has.
"""

from __future__ import annotations

import numpy as np

from dermray.evaluate.bootstrap import Metric
from dermray.evaluate.probing import Labelled, over_seeds
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks import Context, TaskResult


def draw(labels: np.ndarray, images_per_class: int, *, seed: int) -> np.ndarray:
    """Positions of at most so many samples of each class, int64, ascending."""
    generator = np.random.default_rng([seed, images_per_class])
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:images_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


class FewShot:
    """Names the condition of each image after seeing a few of each."""

    needs_training = True

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """None."""
        return []

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and an image, for each number of images a class."""
        config, data = context.config, Labelled.of(context)
        sizes = np.unique(data.train_labels, return_counts=True)[1]
        scores: dict[str, Metric] = {}
        rows = []
        for shots in config.shots:
            mean = over_seeds(self._scores(data, shots, seed, config) for seed in range(config.num_draws))
            scores |= {f"{shots}_shot_{name}": metric for name, metric in mean.items()}
            rows.append({"shots": shots, "num_classes_with_fewer": int((sizes < shots).sum())})
        return TaskResult(
            metrics=scores,
            headline=tuple(f"{shots}_shot_accuracy" for shots in config.shots),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details() | {"num_draws": config.num_draws, "shots": rows},
        )

    def _scores(self, data: Labelled, shots: int, seed: int, config: EvaluateConfig) -> dict[str, Metric]:
        rows = draw(data.train_labels, shots, seed=config.seed + seed)
        # A single draw has no spread of its own; its interval comes from resampled test images.
        resamples = config.bootstrap if config.num_draws == 1 else 0
        return data.score(data.probe(rows, seed=0), bootstrap=resamples, seed=config.seed)
