"""Which conditions could both be true of one picture, so that one is no wrong answer where the other is right."""

from __future__ import annotations

from dataclasses import dataclass

from dermray.corpus import sides, spelling
from dermray.corpus.ontology import Ontology
from dermray.corpus.synonyms import Synonyms


@dataclass(frozen=True)
class Sense:
    """What a label says.

    Attributes:
        node: of the tree, None where it has none.
        above: the node and every node above it, over all of its paths.
        words: every name of it, folded.
        means, broader: its disease in the package's table of names, and that with every broader one.
        general: the side of a name that says benign or malignant and nothing else.
        side: benign or malignant, where that is known.
    """

    node: str | None
    above: frozenset[str]
    words: frozenset[str]
    means: frozenset[str]
    broader: frozenset[str]
    general: str | None
    side: str | None

    @classmethod
    def of(cls, label: str, ontology: Ontology) -> Sense:
        """By a tree and the package's table of names."""
        node, table = ontology.resolve(label), Synonyms.load()
        names = {label} | ({node, *ontology.synonyms(node)} if node is not None else set())
        chains = [[meaning.name for meaning in table.meanings(name)] for name in sorted(names)]
        side = sides.side_of(label)
        return cls(
            node=node,
            above=frozenset([node, *ontology.ancestors(node)]) if node is not None else frozenset(),
            words=frozenset(spelling.spelling(spelling.key(name)) for name in names),
            means=frozenset(chain[0] for chain in chains if chain),
            broader=frozenset(name for chain in chains for name in chain),
            general=side if sides.is_general(label) else None,
            side=side or table.branch(label),
        )

    def may_hold_with(self, other: Sense) -> bool:
        """Whether both could be true: the same disease, one below the other, or one that only says the other's side.

        What only says `malignant` is wrong for what is known to be benign, and for nothing else.
        """
        if self.words & other.words or self.node in other.above or other.node in self.above:
            return True
        if self.means & other.broader or other.means & self.broader:
            return True
        if self.general or other.general:
            return self.side is None or other.side is None or self.side == other.side
        return False
