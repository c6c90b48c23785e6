"""Zero-shot classification: a classifier from class names and prompt templates, as CLIP (arXiv 2103.00020) does it.

A class's weight vector is the mean of the text vectors of its filled templates, normalised again. Logits are 100 times
the cosine (the published fixed factor, not the model's learned scale), probabilities their softmax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from dermray.corpus.ontology import display_names
from dermray.errors import EvaluationError
from dermray.evaluate import metrics
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
NUM_EXAMPLES = 12
MAX_EXAMPLES_PER_CLASS = 2
NUM_GUESSES = 3


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
    """Names the condition of each image among those that occur in the split."""

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """The prompts of all classes."""
        return fill(display_names(_classes(samples)), config.templates or TEMPLATES)

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a label and an image; see `docs/evaluation.md` for the metrics."""
        samples, features, config = context.samples, context.features, context.config
        classes = _classes(samples)
        labels = _targets(samples, classes)
        kept = np.flatnonzero((labels >= 0) & features.usable)
        if len(kept) == 0:
            raise EvaluationError(f"no sample of the split {samples.split!r} has both a label and a readable image")
        templates = config.templates or TEMPLATES
        names = display_names(classes)
        weights = classifier_weights(_by_class(features.of_texts(fill(names, templates)), len(classes)))
        scores = probabilities(torch.from_numpy(features.images[kept]), weights).numpy()
        truth = labels[kept]
        per_class = metrics.per_class(scores, truth)
        return TaskResult(
            metrics=metrics.classification(scores, truth, bootstrap=config.bootstrap, seed=config.seed),
            num_samples=len(kept),
            excluded={
                "without a label": int((labels < 0).sum()),
                "image not readable": int((~features.usable & (labels >= 0)).sum()),
            },
            details={
                "templates": list(templates),
                "logit_scale": LOGIT_SCALE,
                "chance": 1.0 / len(classes),
                "most_frequent_class_share": float(per_class.num_samples.max() / len(kept)),
                "num_samples_with_several_labels": sum(len(samples.labels[index]) > 1 for index in kept),
                "classes": _class_rows(classes, names, per_class),
                "confusion": per_class.confusion.tolist(),
                "examples": _examples(samples, kept, scores, truth, classes, names),
            },
        )


def class_targets(samples: Samples) -> tuple[list[str], np.ndarray]:
    """The prompts' names of the classes that occur, and the class of each sample, int64 `[N]`, -1 without a label.

    Raises:
        EvaluationError: no sample has a label.
    """
    classes = _classes(samples)
    return list(display_names(classes)), _targets(samples, classes)


def _targets(samples: Samples, classes: Sequence[str]) -> np.ndarray:
    number = {label: index for index, label in enumerate(classes)}
    return np.array([number.get(_best_label(samples, each) or "", -1) for each in samples.labels], dtype=np.int64)


def _classes(samples: Samples) -> list[str]:
    """The labels that occur as some sample's best label, in the ontology's order."""
    present = {_best_label(samples, labels) for labels in samples.labels if labels}
    classes = [name for name in samples.ontology if name in present]
    if not classes:
        raise EvaluationError(f"no sample of the split {samples.split!r} has a label; zero_shot needs labels")
    return classes


def _best_label(samples: Samples, labels: Sequence[str]) -> str | None:
    """The most specific label: the deepest in the ontology, of equals the first."""
    return max(labels, key=samples.ontology.level, default=None)


def _by_class(vectors: np.ndarray, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(vectors).reshape(num_classes, -1, vectors.shape[1])


def _class_rows(classes: Sequence[str], names: Sequence[str], scores: metrics.ClassScores) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "name": name,
            "num_samples": int(scores.num_samples[row]),
            "recall": _number(scores.recall[row]),
            "precision": _number(scores.precision[row]),
            "f1": _number(scores.f1[row]),
            "auroc": _number(scores.auroc[row]),
        }
        for row, (label, name) in enumerate(zip(classes, names, strict=True))
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _examples(
    samples: Samples,
    kept: np.ndarray,
    scores: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """The most confident right and wrong predictions, a few of each class at most."""
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
        chosen[kind].append(
            {
                "index": int(kept[row]),
                "sample_id": samples.ids[kept[row]],
                "label": classes[truth[row]],
                "name": names[truth[row]],
                "guesses": [{"name": names[one], "probability": float(scores[row, one])} for one in guesses],
            }
        )
    return chosen
