"""The classes that samples are told apart by: from a fixed list, or the labels that occur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dermray.corpus import spelling
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
    # what stands in place of a label and says nothing, and how often
    placeholders: Mapping[str, int] = field(default_factory=dict)

    def untold(self) -> Classes:
        """The same classes without that of any sample, for who is to tell them apart."""
        return replace(self, targets=np.zeros(0, dtype=np.int64), placeholders={})

    def excluded(self) -> dict[str, int]:
        """Samples that have no class, by reason."""
        outside = int((self.targets == OUTSIDE).sum())
        without = int((self.targets == WITHOUT).sum())
        return {
            "without a label": without - sum(self.placeholders.values()),
            **{f"label {text!r} says nothing": count for text, count in self.placeholders.items()},
            **({"label outside the class list": outside} if outside else {}),
        }


def classes_of(samples: Samples) -> Classes:
    """The classes of the samples, each sample counting with its most specific label that is a class.

    With a fixed list, a label belongs to the class of its name, to the class whose node it is, or to the class that
    is nearest above it in the ontology on every one of its paths.

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
    return Classes(labels, names, nodes, targets, samples.placeholders)


def class_targets(samples: Samples) -> tuple[list[str], np.ndarray]:
    """The prompts' names of the classes that occur, and the class of each sample, int64 `[N]`, below 0 without one.

    Raises:
        EvaluationError: no sample has a label.
    """
    classes = classes_of(samples)
    return list(classes.names), classes.targets


def labels_outside(samples: Samples) -> dict[str, int]:
    """Labels that are of no class of the samples' fixed list, and how often each occurs; none without a list."""
    nodes = tuple(samples.ontology.resolve(label) for label in samples.class_names)
    number_of = _numbering(samples.ontology, samples.class_names, nodes)
    times = Counter(label for labels in samples.labels for label in labels) if samples.class_names else {}
    return {label: count for label, count in times.items() if number_of(label) == OUTSIDE}


def targets_among(samples: Samples, classes: Classes) -> np.ndarray:
    """The class of each of other samples under the same classes, int64 `[N]`, below 0 where it has none."""
    return _targets(samples, classes.labels, classes.nodes)


def _occurring(samples: Samples) -> list[str]:
    """The labels that occur as some sample's best label, in the ontology's order."""
    present = {samples.ontology.deepest(labels) for labels in samples.labels if labels}
    classes = [name for name in samples.ontology if name in present]
    if not classes:
        raise EvaluationError(f"no sample of the split {samples.split!r} has a label; classification needs labels")
    return classes


def _numbering(ontology: Ontology, labels: Sequence[str], nodes: Sequence[str | None]) -> Callable[[str], int]:
    """What finds the class of a label, `OUTSIDE` where it is of none."""
    by_name = {spelling.key(label): number for number, label in reversed(list(enumerate(labels)))}
    by_node = {node: number for number, node in reversed(list(enumerate(nodes))) if node is not None}
    known: dict[str, int] = {}

    def number_of(label: str) -> int:
        if label not in known:
            node = ontology.resolve(label)
            above = reversed(ontology.path(node)) if node is not None else ()
            found = next((by_node[each] for each in above if each in by_node), OUTSIDE)
            known[label] = by_name.get(spelling.key(label), found)
        return known[label]

    return number_of


def _targets(samples: Samples, labels: Sequence[str], nodes: Sequence[str | None]) -> np.ndarray:
    number_of = _numbering(samples.ontology, labels, nodes)
    targets = np.full(len(samples), WITHOUT, dtype=np.int64)
    for row, given in enumerate(samples.labels):
        best = samples.ontology.deepest([one for one in given if number_of(one) >= 0] or given)
        if best is not None:
            targets[row] = number_of(best)
    return targets
