"""Concept annotation scored: the area under the ROC curve of each concept that was looked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.classes import Classes
from dermray.evaluate.concepts import (
    GOOD_AUROC,
    TEMPERATURE,
    concepts_of,
    group_scores,
    marks_of,
    mean_auroc,
)
from dermray.evaluate.predictions import ConceptPredictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import groups
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.predict.concept_terms import Prompts


class Concepts:
    """Scores the presence of each concept that was looked for on the images."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """Those of who predicts the concepts."""
        asked = _asked(concepts_of(samples)[0])
        return predictors.load(config.predictor_of("concepts")).texts(asked, config)

    def run(self, context: Context) -> TaskResult:
        """Score every readable image; a concept that is marked on none or on all of them is left out and named."""
        samples, features, config = context.samples, context.features, context.config
        names, unknown = concepts_of(samples)
        kept = np.flatnonzero(features.usable)
        if len(kept) == 0:
            raise EvaluationError(f"no image of the split {samples.split!r} is readable")
        marks = marks_of(samples, names)[kept]
        both = (marks.min(axis=0) == 0) & (marks.max(axis=0) == 1)
        if not both.any():
            raise EvaluationError("no concept is marked on some of the images and not on others; nothing to score")
        scored = [name for name, usable in zip(names, both, strict=True) if usable]
        predict = context.predictor("concepts").ready(context.lesson(_asked(scored)))
        scores, marks_scored, prompts = predict(context.seen(kept)).whole(), marks[:, both], Prompts.load()
        mean, each = mean_auroc(scores, marks_scored, bootstrap=config.bootstrap, seed=config.seed)
        good = sum(metric.value > GOOD_AUROC for metric in each)
        return TaskResult(
            metrics={"mean_auroc": mean},
            headline=("mean_auroc",),
            num_samples=len(kept),
            excluded={"image not readable": int((~features.usable).sum())},
            details={
                "templates": list(prompts.templates),
                "references": list(prompts.references),
                "temperature": TEMPERATURE,
                "concepts": [
                    {
                        "name": name,
                        "num_samples": int(num),
                        "auroc": metric.value,
                        "low": metric.low,
                        "high": metric.high,
                    }
                    for name, num, metric in zip(scored, marks_scored.sum(axis=0), each, strict=True)
                ],
                "num_above_0.7": good,
                "concepts_of_one_kind": [name for name, usable in zip(names, both, strict=True) if not usable],
                "concepts_without_terms": unknown,
                "groups": groups.breakdown(
                    samples.groups,
                    kept,
                    lambda rows, seed: group_scores(
                        scores[rows], marks_scored[rows], bootstrap=config.bootstrap, seed=seed
                    ),
                    min_size=config.min_group_size,
                    seed=config.seed,
                ),
            },
            predictions=ConceptPredictions(
                [samples.ids[index] for index in kept], scores.astype(np.float32), marks_scored, tuple(scored)
            ),
        )


def _asked(concepts: Sequence[str]) -> Classes:
    """Concepts as a predictor is told what it is asked about."""
    names = tuple(concepts)
    return Classes(names, names, (None,) * len(names), np.zeros(0, dtype=np.int64))


SCORER = Concepts()
