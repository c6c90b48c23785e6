"""Zero-shot classification: a classifier from class names and prompt templates, as CLIP (arXiv 2103.00020) does it.

A class's weight vector is the mean of the text vectors of its filled templates, normalised again. Logits are 100 times
the cosine (the published fixed factor, not the model's learned scale), probabilities their softmax.

Where a disease tree is at hand, predictions can also be told right or wrong level by level (`hierarchy_hits`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dermray.corpus.ontology import Ontology
from dermray.errors import EvaluationError

if TYPE_CHECKING:
    from dermray.vectors.encoder import Encoder

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
    return classifier_weights(by_class(vectors, len(class_names))).numpy()


@dataclass(frozen=True)
class LevelHits:
    """The samples of one level of the disease tree.

    Attributes:
        rows: those that count, int64 `[M]`.
        hits: 1 where the prediction is right, else 0, float64 `[M]`.
        num_open: those of which nobody knows, since the tree has several paths for a class.
    """

    rows: np.ndarray
    hits: np.ndarray
    num_open: int


def hierarchy_hits(
    ontology: Ontology, nodes: Sequence[str | None], truth: np.ndarray, predictions: np.ndarray
) -> dict[int, LevelHits]:
    """Whether predictions are right at each level of the disease tree.

    At level l a sample counts whose class has a known node there (`Ontology.levels`). It is a hit when that is the
    predicted class or stands above it on every path, a miss when on none; what is between the two is left open.

    Args:
        ontology: the tree.
        nodes: the tree's node of each class, None where it has none.
        truth: classes of the samples, int64 `[N]`.
        predictions: predicted classes, int64 `[N]`.

    Returns:
        Level, from 1 → its samples.
    """
    levels = [ontology.levels(node) if node else [] for node in nodes]
    surely = [set(ontology.path(node)) if node else set() for node in nodes]
    perhaps = [
        surely[number] if node is None or ontology.is_certain(node) else {node, *ontology.ancestors(node)}
        for number, node in enumerate(nodes)
    ]
    found: dict[int, LevelHits] = {}
    for level in range(1, max(map(len, levels), default=0) + 1):
        deep = [row for row in range(len(truth)) if len(levels[truth[row]]) >= level]
        there = {row: levels[truth[row]][level - 1] for row in deep}
        right = [row for row in deep if there[row] in surely[predictions[row]]]
        wrong = [row for row in deep if there[row] is not None and there[row] not in perhaps[predictions[row]]]
        rows = np.array(sorted([*right, *wrong]), dtype=np.int64)
        hits = np.isin(rows, right).astype(np.float64)
        found[level] = LevelHits(rows, hits, len(deep) - len(rows))
    return found


def by_class(vectors: np.ndarray, num_classes: int) -> torch.Tensor:
    """Vectors of `fill`'s prompts, `[C * T, D]`, as `classifier_weights` takes them, `[C, T, D]`."""
    return torch.from_numpy(vectors).reshape(num_classes, -1, vectors.shape[1])
