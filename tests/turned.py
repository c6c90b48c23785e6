"""The score of `tests.rotation`: how often its model sees by how many quarter turns a held-out image was turned."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dermray import images
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import metrics
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.kinds import TaskKind
from dermray.vectors.encoder import Encoder

turned = TaskKind("Quarter turns", __name__)


def turn(data: bytes, turns: int) -> bytes:
    """An encoded image turned counterclockwise, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(images.decode(data), turns)).save(buffer, "PNG")
    return buffer.getvalue()


class Turned:
    page = ""

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        return []

    def run(self, context: Context) -> TaskResult:
        found = context.samples.read_images(list(range(len(context.samples))))
        labels = np.arange(len(context.samples)) % 4
        shown = [turn(found[index], int(turns)) for index, turns in enumerate(labels)]
        predicted, _ = Encoder.load(context.config.model).predict_readable(shown)
        probabilities = np.stack([one["turns"] for one in predicted if one is not None]).astype(np.float64)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        scores = metrics.classification(probabilities, labels, bootstrap=context.config.bootstrap, seed=0)
        return TaskResult(
            metrics={"accuracy": scores["accuracy"]},
            headline=("accuracy",),
            num_samples=len(labels),
            excluded={},
            predictions=ClassPredictions(context.samples.ids, labels, probabilities, ("0", "1", "2", "3")),
        )


SCORER = Turned()
