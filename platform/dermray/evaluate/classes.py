"""The classes that samples are told apart by: from a fixed list, or the labels that occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermray.corpus.ontology import Ontology, display_names
from dermray.errors import EvaluationError
from dermray.evaluate.samples import Samples

OUTSIDE = -2
WITHOUT = -1


@dataclass(frozen=True)
class Classes:
    """C classes and the class of each sample."""

    # the ontology's node or the label of each class, and its name in prompts and reports
    labels: tuple[str, ...]
    names: tuple[str, ...]
    # the node of each class, None where the ontology knows none
    nodes: tuple[str | None, ...]
    # int64 `[N]`: 0..C-1, `WITHOUT` a label, or a label `OUTSIDE` the list
    targets: np.ndarray

    def excluded(self) -> dict[str, int]:
        """Samples that have no class, by reason."""
        outside = int((self.targets == OUTSIDE).sum())
        return {
            "without a label": int((self.targets == WITHOUT).sum()),
            **({"label outside the class list": outside} if outside else {}),
        }


def classes_of(samples: Samples) -> Classes:
    """The classes of the samples, each sample counting with its most specific label that is a class.

    With a fixed list, a label belongs to the class of its name, to the class whose node it is, or to the class that
    is nearest above it in the ontology.

    Raises:
        EvaluationError: no sample has a label, or none is of a class of the list.
    """
    labels = samples.class_names or tuple(_occurring(samples))
    names = samples.class_names or display_names(labels)
    nodes = tuple(samples.ontology.resolve(label) for label in labels)
    targets = _targets(samples, labels, nodes)
    if not (targets >= 0).any():
        raise EvaluationError(
            f"no sample of the split {samples.split!r} has a label among the {len(labels)} classes "
            f"({', '.join(labels[:3])}, …)"
        )
    return Classes(labels, names, nodes, targets)


def targets_among(samples: Samples, classes: Classes) -> np.ndarray:
    """The class of each of other samples under the same classes, int64 `[N]`, below 0 where it has none."""
    return _targets(samples, classes.labels, classes.nodes)


def _occurring(samples: Samples) -> list[str]:
    """The labels that occur as some sample's best label, in the ontology's order."""
    present = {_best_label(samples.ontology, labels) for labels in samples.labels if labels}
    classes = [name for name in samples.ontology if name in present]
    if not classes:
        raise EvaluationError(f"no sample of the split {samples.split!r} has a label; classification needs labels")
    return classes


def _targets(samples: Samples, labels: Sequence[str], nodes: Sequence[str | None]) -> np.ndarray:
    by_name = {label.casefold(): number for number, label in enumerate(labels)}
    by_node = {node: number for number, node in reversed(list(enumerate(nodes))) if node is not None}
    known: dict[str, int] = {}

    def number_of(label: str) -> int:
        if label not in known:
            above = samples.ontology.ancestors(label) if label in samples.ontology else []
            found = [by_node[node] for node in (label, *above) if node in by_node]
            known[label] = by_name.get(label.casefold(), found[0] if found else OUTSIDE)
        return known[label]

    targets = np.full(len(samples), WITHOUT, dtype=np.int64)
    for row, given in enumerate(samples.labels):
        best = _best_label(samples.ontology, [one for one in given if number_of(one) >= 0] or given)
        if best is not None:
            targets[row] = number_of(best)
    return targets


def _best_label(ontology: Ontology, labels: Sequence[str]) -> str | None:
    """The most specific label: the deepest in the ontology, of equals the first."""
    return max(labels, key=lambda label: ontology.level(label) if label in ontology else 0, default=None)
