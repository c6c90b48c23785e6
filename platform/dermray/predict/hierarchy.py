"""A ranking of classes rolled up the disease tree: how probable is each node above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dermray.corpus.ontology import Ontology
from dermray.predict.classifier import RankedClass


@dataclass(frozen=True, slots=True)
class RankedNode:
    """A node above ranked classes; `probability` is the sum over the ranked classes that are it or lie below it."""

    node: str
    level: int
    path: tuple[str, ...]
    probability: float


def roll_up(ranking: Sequence[RankedClass], ontology: Ontology) -> list[RankedNode]:
    """Inner nodes above the ranked classes, upper levels first, each level most probable first.

    A class that the tree does not know counts nowhere. One that lies under several branches counts only in what all
    its paths share, so the nodes of one level may sum to less than 1.
    """
    sums: dict[str, float] = {}
    named: set[str] = set()
    for ranked in ranking:
        node = ontology.resolve(ranked.label)
        if node is None:
            continue
        named.add(node)
        for name in ontology.path(node):
            sums[name] = sums.get(name, 0.0) + ranked.probability
    nodes = [
        RankedNode(name, ontology.level(name), tuple(ontology.path(name)), min(1.0, total))
        for name, total in sums.items()
        if name not in named or ontology.children(name)
    ]
    return sorted(nodes, key=lambda one: (one.level, -one.probability, one.node))
