"""Zero-shot classification: a classifier from class names and prompt templates, as CLIP (arXiv 2103.00020) does it.

A class's weight vector is the mean of the text vectors of its filled templates, normalised again. Logits are 100 times
the cosine (the published fixed factor, not the model's learned scale), probabilities their softmax.

Where a disease tree is at hand, predictions are also scored level by level, and a second classifier asks for each class
by all its names: the mean runs over every template filled with every synonym.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from dermray.corpus.ontology import Ontology
from dermray.errors import EvaluationError
from dermray.evaluate import metrics
from dermray.evaluate.bootstrap import mean_distribution
from dermray.evaluate.classes import Classes, classes_of
from dermray.evaluate.classified import describe
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks import Context, TaskResult

if TYPE_CHECKING:
    from dermray.encoder import Encoder

# The prompts of the published benchmarks (Derm1M, arXiv 2503.14911).
TEMPLATES = (
    "This is a skin image of {}",
    "This is a skin image of {}.",
    "A skin image of {}.",
    "An image of {}, a skin condition.",
    "{}, a skin disorder, is shown in this image.",
    "The skin lesion depicted is {}.",
    "The skin cancer in this image is {}.",
    "This image depicts {}, a type of skin cancer.",
)
LOGIT_SCALE = 100.0
# Scores of the classifier whose classes are asked for by all their names; `synonyms_` stands before each.
SYNONYM_METRICS = ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_auroc", "weighted_f1")
NUM_EXAMPLES = 12
MAX_EXAMPLES_PER_CLASS = 2
NUM_GUESSES = 3
NUM_NEIGHBOURS = 4


def classifier_weights(text_features: torch.Tensor) -> torch.Tensor:
    """One unit vector a class from the unit vectors of its prompts.

    Args:
        text_features: `[C, T, D]`, L2-normalised: T prompts of each of C classes.

    Returns:
        `[C, D]`, L2-normalised, same dtype.
    """
    return F.normalize(text_features.mean(dim=1), dim=-1)


def probabilities(image_features: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """Softmax over classes of 100 times the cosine: `[N, D]` and `[C, D]` → `[N, C]`."""
    return torch.softmax(LOGIT_SCALE * image_features @ classifier.T, dim=-1)


def fill(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name in place of `{}`: C x T prompts, class by class.

    Raises:
        EvaluationError: no classes, a class name that is empty or given twice, or a template without `{}`.
    """
    if not class_names:
        raise EvaluationError("a zero-shot classifier needs at least one class name")
    repeated = [name for name, times in Counter(class_names).items() if times > 1]
    if repeated:
        raise EvaluationError(f"the class name {repeated[0]!r} is given more than once; each class needs its own")
    if not all(name.strip() for name in class_names):
        raise EvaluationError("a class name is empty")
    for template in templates:
        if "{}" not in template:
            raise EvaluationError(f"the template {template!r} has no {{}} for the class name")
    return [template.replace("{}", name) for name in class_names for template in templates]


def build_classifier(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
    """Weights of the zero-shot classifier of `class_names`, float32 `[C, D]`.

    Raises:
        EvaluationError: as `fill`.
    """
    vectors = encoder.encode_texts(fill(class_names, templates))
    return classifier_weights(_by_class(vectors, len(class_names))).numpy()


class ZeroShot:
    """Names the condition of each image among the benchmark's classes, or among those that occur in the split."""

    needs_training = False

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """The prompts of all classes, and of the synonyms of their names."""
        classes, templates = classes_of(samples), config.templates or TEMPLATES
        synonyms = [name for names in _synonyms(samples, classes) for name in names]
        return fill(classes.names, templates) + fill(list(dict.fromkeys(synonyms)), templates)

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and an image; see `docs/evaluation.md` for the metrics."""
        samples, features, config = context.samples, context.features, context.config
        classes = classes_of(samples)
        labels = classes.targets
        kept = np.flatnonzero((labels >= 0) & features.usable)
        if len(kept) == 0:
            raise EvaluationError(f"no sample of the split {samples.split!r} has both a label and a readable image")
        templates = config.templates or TEMPLATES
        images, truth = torch.from_numpy(features.images[kept]), labels[kept]
        weights = classifier_weights(_by_class(features.of_texts(fill(classes.names, templates)), len(classes.names)))
        scores = probabilities(images, weights).numpy()
        synonyms = _synonyms(samples, classes)
        predictions = ClassPredictions([samples.ids[row] for row in kept], truth, scores, classes.names)
        hierarchy = hierarchy_hits(samples.ontology, classes.nodes, truth, scores.argmax(axis=1))
        found = metrics.classification(scores, truth, bootstrap=config.bootstrap, seed=config.seed)
        found |= _level_scores(hierarchy, truth, config)
        if any(len(names) > 1 for names in synonyms):
            several = torch.stack([_class_weight(features, names, templates) for names in synonyms])
            found |= _synonym_scores(probabilities(images, several).numpy(), truth, config)
        return TaskResult(
            metrics=found,
            headline=("accuracy", "top5_accuracy", "macro_auroc"),
            num_samples=len(kept),
            excluded=classes.excluded() | {"image not readable": int((~features.usable & (labels >= 0)).sum())},
            details={
                "templates": list(templates),
                "logit_scale": LOGIT_SCALE,
                "chance": 1.0 / len(classes.names),
                "most_frequent_class_share": float(np.bincount(truth).max() / len(kept)),
                "num_samples_with_several_labels": sum(len(samples.labels[index]) > 1 for index in kept),
                "num_classes_with_synonyms": sum(len(names) > 1 for names in synonyms),
                "num_samples_by_level": {str(level): len(rows) for level, (rows, _) in hierarchy.items()},
                "examples": _examples(samples, kept, images.numpy(), scores, truth, classes),
                **describe(
                    context,
                    classes,
                    kept,
                    predictions,
                    lambda images, lengths: probabilities(torch.from_numpy(images), weights).numpy(),
                ),
            },
            predictions=predictions,
        )


def class_targets(samples: Samples) -> tuple[list[str], np.ndarray]:
    """The prompts' names of the classes that occur, and the class of each sample, int64 `[N]`, below 0 without one.

    Raises:
        EvaluationError: no sample has a label.
    """
    classes = classes_of(samples)
    return list(classes.names), classes.targets


def hierarchy_hits(
    ontology: Ontology, nodes: Sequence[str | None], truth: np.ndarray, predictions: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Whether predictions are right at each level of the disease tree.

    At level l a sample counts whose class's path (`Ontology.path`) reaches that deep. It is a hit when the path's node
    at that level is the predicted class or stands above it, over whichever parent.

    Args:
        ontology: the tree.
        nodes: the tree's node of each class, None where it has none.
        truth: classes of the samples, int64 `[N]`.
        predictions: predicted classes, int64 `[N]`.

    Returns:
        Level, from 1 → rows that count and whether each is a hit.
    """
    paths = [ontology.path(node) if node else [] for node in nodes]
    above = [{node, *ontology.ancestors(node)} if node else set() for node in nodes]
    levels: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for level in range(1, max(map(len, paths), default=0) + 1):
        deep = np.array([len(path) >= level for path in paths])
        rows = np.flatnonzero(deep[truth])
        hits = [paths[truth[row]][level - 1] in above[predictions[row]] for row in rows]
        levels[level] = rows, np.array(hits, dtype=np.float64)
    return {level: found for level, found in levels.items() if len(found[0])}


def _level_scores(
    hierarchy: Mapping[int, tuple[np.ndarray, np.ndarray]], truth: np.ndarray, config: EvaluateConfig
) -> dict[str, metrics.Metric]:
    """`level_1_accuracy` … where the tree has more than one level among the classes."""
    if len(hierarchy) < 2:
        return {}
    return {
        f"level_{level}_accuracy": mean_distribution(
            hits, truth[rows], num_resamples=config.bootstrap, seed=config.seed
        ).metric()
        for level, (rows, hits) in hierarchy.items()
    }


def _synonym_scores(scores: np.ndarray, truth: np.ndarray, config: EvaluateConfig) -> dict[str, metrics.Metric]:
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


def _by_class(vectors: np.ndarray, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(vectors).reshape(num_classes, -1, vectors.shape[1])


def _examples(
    samples: Samples,
    kept: np.ndarray,
    images: np.ndarray,
    scores: np.ndarray,
    truth: np.ndarray,
    classes: Classes,
) -> dict[str, list[dict[str, Any]]]:
    """The most confident right and wrong predictions, a few of each class at most, with the images nearest to them."""
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
        nearest = np.argsort(-(images @ images[row]), kind="stable")[: NUM_NEIGHBOURS + 1]
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
                    for one in nearest[nearest != row][:NUM_NEIGHBOURS]
                ],
            }
        )
    return chosen
