"""An evaluation task of the tests alone that asks a predictor for risks: is melanoma riskier than all else?"""

from __future__ import annotations

import numpy as np

from dermray.evaluate.concepts import area_distributions
from dermray.evaluate.predictions import OwnPredictions
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import groups
from dermray.evaluate.statistics.bootstrap import Distribution, Seed, mean_distribution
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.kinds import TaskKind
from dermray.scales import Scale

PAGE = """
{% import "parts.html" as parts %}
{% import "evaluate_parts.html" as details with context %}
{% macro block() %}
{% call parts.card(title, details.excluded(section) ~ " Asked: " ~ section.predictor ~ ".", name) %}
{{ details.scores(section, [("auroc", "AUROC"), ("distance", "Distance from the truth")]) }}
{% endcall %}
{% if section.groups.dimensions %}
{% call parts.card(title ~ ": for whom?", details.group_note(section), name ~ "-groups") %}
{{ details.by_group(section, plots) }}
{% endcall %}
{% endif %}
{% endmacro %}
"""
risk = TaskKind("Risk of melanoma", __name__, takes="risk", vectors=False)


class Risk:
    page = PAGE

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        return []

    def run(self, context: Context) -> TaskResult:
        samples, config = context.samples, context.config
        labelled = np.flatnonzero([bool(labels) for labels in samples.labels])
        said = context.predictor("risk").ready(context.lesson())(context.seen(labelled))
        kept, risks = labelled[said.answered], said.values[said.answered]
        malignant = np.array(["melanoma" in samples.labels[row] for row in kept], dtype=np.int64)
        predictions = OwnPredictions([samples.ids[row] for row in kept], {"risk": risks}, {"malignant": malignant})
        found = self.distributions(predictions, bootstrap=config.bootstrap, seed=config.seed)

        def of_group(rows: np.ndarray, seed: Seed) -> dict[str, Distribution]:
            away = np.abs(risks - malignant)[rows]
            return {"distance": mean_distribution(away, malignant[rows], num_resamples=config.bootstrap, seed=seed)}

        by_group = groups.breakdown(samples.groups, kept, of_group, min_size=config.min_group_size, seed=config.seed)
        return TaskResult(
            metrics={name: one.metric() for name, one in found.items()},
            headline=("auroc", "distance"),
            num_samples=len(kept),
            excluded={"without a label": len(samples) - len(labelled)} | said.left_out(),
            details={"groups": by_group},
            predictions=predictions,
            scales={"distance": Scale(lower_is_better=True, unit="")},
        )

    def distributions(self, predictions: OwnPredictions, *, bootstrap: int, seed: Seed) -> dict[str, Distribution]:
        risks, malignant = predictions.predicted["risk"], predictions.truth["malignant"]
        _, (area,) = area_distributions(risks[:, None], malignant[:, None], bootstrap=bootstrap, seed=seed)
        away = mean_distribution(np.abs(risks - malignant), malignant, num_resamples=bootstrap, seed=seed)
        return {"auroc": area, "distance": away}


SCORER = Risk()
