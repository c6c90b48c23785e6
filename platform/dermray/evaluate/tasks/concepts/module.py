"""Concept annotation scored: the area under the ROC curve of each concept that was looked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from dermray.evaluate.tasks.concepts import TASK
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
        """Score every image of which the predictor says something; a concept of one kind is left out and named."""
        samples, config = context.samples, context.config
        names, unknown = concepts_of(samples)
        marks = marks_of(samples, names)
        asked = _of_both_kinds(marks)
        predict = context.predictor("concepts").ready(context.lesson(_asked([names[place] for place in asked])))
        heard = predictors.Heard.of([predict(context.seen(np.arange(len(samples))))], len(asked), "concepts")
        kept = np.flatnonzero(heard.answered)
        # Samples left out may have held all marks of one: asked [0, 2, 5], still [0, 2] → columns [0, 5] of marks.
        still = _of_both_kinds(marks[kept][:, asked])
        scores, marks_scored = heard.values[0][:, still], marks[kept][:, asked[still]]
        scored = [names[place] for place in asked[still]]
        mean, each = mean_auroc(scores, marks_scored, bootstrap=config.bootstrap, seed=config.seed)
        good = sum(metric.value > GOOD_AUROC for metric in each)
        return TaskResult(
            metrics={"mean_auroc": mean},
            headline=("mean_auroc",),
            num_samples=len(kept),
            excluded=heard.left_out,
            details={
                **_prompted(config),
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
                "concepts_of_one_kind": [name for name in names if name not in scored],
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


def _of_both_kinds(marks: np.ndarray) -> np.ndarray:
    """Columns of marks `[N, C]` that are 0 in some rows and 1 in others, int64; [[1, 0, 1], [1, 1, 0]] → [1, 2].

    Raises:
        EvaluationError: there is none.
    """
    found = np.flatnonzero((marks.min(axis=0) == 0) & (marks.max(axis=0) == 1))
    if len(found) == 0:
        raise EvaluationError("no concept is marked on some of the images and not on others; nothing to score")
    return found


def _prompted(config: EvaluateConfig) -> dict[str, Any]:
    """What the task's own predictor asks with; of another one that is not known."""
    if config.predictor_of("concepts") != TASK.predictor:
        return {}
    prompts = Prompts.load()
    return {
        "templates": list(prompts.templates),
        "references": list(prompts.references),
        "temperature": TEMPERATURE,
    }


def _asked(concepts: Sequence[str]) -> Classes:
    """Concepts as a predictor is told what it is asked about."""
    names = tuple(concepts)
    return Classes(names, names, (None,) * len(names), np.zeros(0, dtype=np.int64))


SCORER = Concepts()
