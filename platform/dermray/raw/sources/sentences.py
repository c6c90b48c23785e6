"""The published sentence over the labels of a row, for rows that bring no caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from dermray.corpus.captions import ontology_caption
from dermray.corpus.ontology import Ontology, display_names


def label_sentences(labels: pa.Array, tree: Ontology | None) -> pa.Array:
    """The sentence of each row: by the names of its labels' nodes, or else by the labels as they are written.

    Args:
        labels: list of strings `[N]`, without placeholders.
        tree: the source's disease tree; None: one level over all labels, those of one spelling or meaning being alike.

    Returns:
        string `[N]`; null where a row has no label.
    """
    times = Counter(labels.flatten().to_pylist())
    known = tree or Ontology.folded(times)
    names = {label: _names(label, known) for label in times}
    rows = ([name for label in row for name in names[label]] for row in labels.to_pylist())
    return pa.array([ontology_caption(row) for row in rows], pa.string())


def _names(label: str, tree: Ontology) -> Sequence[str]:
    """What a label's nodes are called; the label itself where a part of it names none, or only a broader one."""
    found = tree.resolve_all(label)
    if found.unresolved or any(tree.is_broader(part) for part in (label, *label.split(","))):
        return [label]
    return display_names(found.labels)
