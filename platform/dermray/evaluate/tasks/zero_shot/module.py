"""Zero-shot classification scored.

Where a disease tree is at hand, predictions are also scored level by level, and a second classifier asks for each class
by all its names: the mean runs over every template filled with every synonym.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermray.evaluate.classes import Classes, classes_of
from dermray.evaluate.classified import describe
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import metrics
from dermray.evaluate.statistics.bootstrap import mean_distribution
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.zero_shot import TASK
from dermray.predict.zero_shot import (
    LOGIT_SCALE,
    TEMPLATES,
    LevelHits,
    classifier_weights,
    fill,
    hierarchy_hits,
    probabilities,
)

# Scores of the classifier whose classes are asked for by all their names; `synonyms_` stands before each.
SYNONYM_METRICS = ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_auroc", "weighted_f1")
NUM_EXAMPLES = 12
MAX_EXAMPLES_PER_CLASS = 2
NUM_GUESSES = 3
NUM_NEIGHBOURS = 4


class ZeroShot:
    """Names the condition of each image among the benchmark's classes, or among those that occur in the split."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """The prompts of all classes, and of the synonyms of their names."""
        classes = classes_of(samples)
        asked = predictors.load(config.predictor_of("zero_shot")).texts(classes.untold(), config)
        if not _is_prompted(config):
            return asked
        synonyms = [name for names in _synonyms(samples, classes) for name in names]
        return asked + fill(list(dict.fromkeys(synonyms)), config.templates or TEMPLATES)

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and of which the predictor says something (`docs/evaluation.md`)."""
        samples, config = context.samples, context.config
        classes = classes_of(samples)
        labelled = np.flatnonzero(classes.targets >= 0)
        predict = context.predictor("zero_shot").ready(context.lesson(classes))
        heard = predictors.Heard.of([predict(context.seen(labelled))], len(classes.names), "classes")
        (scores,), kept = heard.values, labelled[heard.answered]
        truth, synonyms = classes.targets[kept], _synonyms(samples, classes)
        predictions = ClassPredictions([samples.ids[row] for row in kept], truth, scores, classes.names)
        hierarchy = hierarchy_hits(samples.ontology, classes.nodes, truth, scores.argmax(axis=1))
        found = metrics.classification(scores, truth, bootstrap=config.bootstrap, seed=config.seed)
        found |= _level_scores(hierarchy, truth, config)
        examples = _examples(samples, kept, context.features, scores, truth, classes)
        if _is_prompted(config):
            found |= _synonym_scores(context.features, kept, synonyms, truth, config)
        return TaskResult(
            metrics=found,
            headline=("accuracy", "top5_accuracy", "macro_auroc"),
            num_samples=len(kept),
            excluded=classes.excluded() | heard.left_out,
            details={
                **_prompted(config),
                "chance": 1.0 / len(classes.names),
                "most_frequent_class_share": float(np.bincount(truth).max() / len(kept)),
                "num_samples_with_several_labels": sum(len(samples.labels[index]) > 1 for index in kept),
                "num_classes_with_synonyms": sum(len(names) > 1 for names in synonyms),
                "num_samples_by_level": {
                    str(level): len(each.rows) for level, each in hierarchy.items() if len(each.rows)
                },
                "num_open_by_level": {str(level): each.num_open for level, each in hierarchy.items() if each.num_open},
                "examples": examples,
                **describe(context, classes, kept, predictions, predict),
            },
            pictures=frozenset(_shown(examples)),
            predictions=predictions,
        )


def _is_prompted(config: EvaluateConfig) -> bool:
    """Whether the task's own predictor predicts; how another one asks, and by which names, is not known."""
    return config.predictor_of("zero_shot") == TASK.predictor


def _prompted(config: EvaluateConfig) -> dict[str, Any]:
    """What the task's own predictor asks with."""
    if not _is_prompted(config):
        return {}
    return {"templates": list(config.templates or TEMPLATES), "logit_scale": LOGIT_SCALE}


def _level_scores(
    hierarchy: Mapping[int, LevelHits], truth: np.ndarray, config: EvaluateConfig
) -> dict[str, metrics.Metric]:
    """`level_1_accuracy` … where the tree has more than one level among the classes."""
    if len(hierarchy) < 2:
        return {}
    scored = {level: each for level, each in hierarchy.items() if len(each.rows)}
    return {
        f"level_{level}_accuracy": mean_distribution(
            each.hits, truth[each.rows], num_resamples=config.bootstrap, seed=config.seed
        ).metric()
        for level, each in scored.items()
    }


def _synonym_scores(
    features: Features, kept: np.ndarray, synonyms: Sequence[Sequence[str]], truth: np.ndarray, config: EvaluateConfig
) -> dict[str, metrics.Metric]:
    """`synonyms_…`, where a class has more names than one."""
    if not any(len(names) > 1 for names in synonyms):
        return {}
    templates = config.templates or TEMPLATES
    weights = torch.stack([_class_weight(features, names, templates) for names in synonyms])
    scores = probabilities(torch.from_numpy(features.images[kept]), weights).numpy()
    found = metrics.classification(scores, truth, bootstrap=config.bootstrap, seed=config.seed)
    return {f"synonyms_{name}": found[name] for name in SYNONYM_METRICS}


def _synonyms(samples: Samples, classes: Classes) -> list[list[str]]:
    """What each class may be called: its name first, then the ontology's other names of its node."""
    return [
        list(dict.fromkeys([name, *(samples.ontology.synonyms(node) if node else [])]))
        for name, node in zip(classes.names, classes.nodes, strict=True)
    ]


def _class_weight(features: Features, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    vectors = torch.from_numpy(features.of_texts(fill(names, templates)))
    return classifier_weights(vectors[None])[0]


def _examples(
    samples: Samples,
    kept: np.ndarray,
    features: Features,
    scores: np.ndarray,
    truth: np.ndarray,
    classes: Classes,
) -> dict[str, list[dict[str, Any]]]:
    """The most confident right and wrong predictions, a few of each class at most, with the images nearest to them."""
    images, seen = features.images[kept], features.usable[kept] & (features.images.shape[1] > 0)
    predictions = scores.argmax(axis=1)
    by_confidence = np.argsort(-scores.max(axis=1), kind="stable")
    chosen: dict[str, list[dict[str, Any]]] = {"right": [], "wrong": []}
    shown: Counter[tuple[str, int]] = Counter()
    for row in by_confidence:
        kind = "right" if predictions[row] == truth[row] else "wrong"
        key = (kind, int(predictions[row]))
        if len(chosen[kind]) == NUM_EXAMPLES or shown[key] == MAX_EXAMPLES_PER_CLASS:
            continue
        shown[key] += 1
        guesses = np.argsort(-scores[row], kind="stable")[:NUM_GUESSES]
        nearest = np.argsort(-(images @ images[row]), kind="stable")
        # None of what the run has no vector of: who predicts may look at the images alone.
        near = nearest[(nearest != row) & seen[nearest] & seen[row]]
        chosen[kind].append(
            {
                "index": int(kept[row]),
                "sample_id": samples.ids[kept[row]],
                "label": classes.labels[truth[row]],
                "name": classes.names[truth[row]],
                "guesses": [{"name": classes.names[one], "probability": float(scores[row, one])} for one in guesses],
                "neighbours": [
                    {
                        "index": int(kept[one]),
                        "name": classes.names[truth[one]],
                        "cosine": float(images[one] @ images[row]),
                    }
                    for one in near[:NUM_NEIGHBOURS]
                ],
            }
        )
    return chosen


def _shown(examples: Mapping[str, list[dict[str, Any]]]) -> Iterator[int]:
    """Samples whose pictures stand beside the examples."""
    for one in (one for each in examples.values() for one in each):
        yield one["index"]
        yield from (neighbour["index"] for neighbour in one["neighbours"])


SCORER = ZeroShot()
