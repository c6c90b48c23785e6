"""An evaluation task of the tests alone: the class whose mean image vector is nearest."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dermray.evaluate.probing import Labelled
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import metrics
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.kinds import TaskConfig, TaskKind

PAGE = """
{% import "parts.html" as parts %}
{% import "evaluate_parts.html" as details with context %}
{% macro tiles() %}
<div class="tiles">{{ parts.tile(title, section.metrics.accuracy.value | percent) }}</div>
{% endmacro %}
{% macro block() %}
{% call parts.card(title, details.learnt(section) ~ " Sharpness " ~ section.sharpness ~ ".", name) %}
{{ details.scores(section, details.probe_metrics) }}
<div class="strip">{% for index in section.shown %}{{ details.picture(index, "shown") }}{% endfor %}</div>
{% endcall %}
{% endmacro %}
"""


class CentroidsConfig(TaskConfig):
    sharpness: float = Field(10.0, gt=0, description="of the softmax over distances")
    note: str = ""


centroids = TaskKind("Nearest mean", __name__, settings=CentroidsConfig, uses=("train_split",), learns=True)


class Centroids:
    page = PAGE

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        return []

    def run(self, context: Context) -> TaskResult:
        settings = context.config.task["centroids"]
        assert isinstance(settings, CentroidsConfig)
        data = Labelled.of(context)
        present = np.unique(data.train_labels)
        means = np.stack([data.train_features[data.train_labels == one].mean(axis=0) for one in present])
        # float64 [N, C]: distances of N images from the means of C classes
        distances = np.linalg.norm(data.features[:, None].astype(np.float64) - means[None], axis=2)
        weights = np.exp(-settings.sharpness * (distances - distances.min(axis=1, keepdims=True)))
        probabilities = np.zeros((len(data.labels), data.num_classes))
        probabilities[:, present] = weights / weights.sum(axis=1, keepdims=True)
        found = metrics.classification(probabilities, data.labels, bootstrap=context.config.bootstrap, seed=0)
        return TaskResult(
            metrics={name: found[name] for name in ("accuracy", "balanced_accuracy")},
            headline=("accuracy",),
            num_samples=len(data.labels),
            excluded=data.excluded,
            details=data.details() | {"sharpness": settings.sharpness, "shown": [int(data.kept[0])]},
            pictures=frozenset([int(data.kept[0])]),
            predictions=data.predictions(probabilities),
        )


SCORER = Centroids()
