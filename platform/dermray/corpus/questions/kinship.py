"""Which conditions could both be true of one picture, so that one is no wrong answer where the other is right.

By the tree, the package's table of names, the words of the names, and the families that no word tells, which are data
(`families.json`). A pair that none of these holds counts as two conditions of which one is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from dermray import documents
from dermray.corpus import sides, spelling
from dermray.corpus.ontology import Ontology
from dermray.corpus.questions.words import words
from dermray.corpus.synonyms import Synonyms

TABLE_NAME = "families.json"
# A name with one of these more than another says that it is not that: non-melanoma.
_DENIALS = frozenset({"non", "not", "no"})


@dataclass(frozen=True)
class Sense:
    """What a label says.

    Attributes:
        node: of the tree, None where it has none.
        above: the node and every node above it, over all of its paths.
        spellings: every name of it, folded.
        words: of each name of it, and of each that the package's table gives it.
        means, broader: its diseases in the package's table of names, and these with every broader one.
        families, heads: the families that it is in, and those whose other members could all be true with it.
        general: the side of a name that says benign or malignant and nothing else.
        side: benign or malignant, where that is known.
    """

    node: str | None
    above: frozenset[str]
    spellings: frozenset[str]
    words: frozenset[frozenset[str]]
    means: frozenset[str]
    broader: frozenset[str]
    families: frozenset[int]
    heads: frozenset[int]
    general: str | None
    side: str | None

    @classmethod
    def of(cls, label: str, ontology: Ontology) -> Sense:
        """By a tree and the package's tables of names and families."""
        node, table = ontology.resolve(label), Synonyms.load()
        names = {label} | ({node, *ontology.synonyms(node)} if node is not None else set())
        # Of a name with several meanings each could be the one that is meant.
        meant = names.union(*map(table.may_mean, names))
        chains = [[meaning.name for meaning in table.meanings(name)] for name in sorted(meant)]
        means = frozenset(chain[0] for chain in chains if chain)
        each = frozenset(filter(None, map(words, meant | means)))
        heads, members = _families_of(each)
        side = sides.side_of(label)
        return cls(
            node=node,
            above=frozenset([node, *ontology.ancestors(node)]) if node is not None else frozenset(),
            spellings=frozenset(spelling.spelling(spelling.key(name)) for name in names),
            words=each,
            means=means,
            broader=frozenset(name for chain in chains for name in chain),
            families=members,
            heads=heads,
            general=side if sides.is_general(label) else None,
            side=side or table.branch(label),
        )

    def may_hold_with(self, other: Sense) -> bool:
        """Whether both could be true.

        So it is for the same disease, for one below the other, for a name that holds all words of the other's, for
        those of a family, and for one that only says the other's side. What only says `malignant` is wrong for what is
        known to be benign, and for nothing else.
        """
        if self.spellings & other.spellings or self.node in other.above or other.node in self.above:
            return True
        if self.means & other.broader or other.means & self.broader:
            return True
        if self.heads & other.families or other.heads & self.families:
            return True
        if any(_says_more(one, two) for one in self.words for two in other.words):
            return True
        if self.general or other.general:
            return self.side is None or other.side is None or self.side == other.side
        return False


def _says_more(one: frozenset[str], two: frozenset[str]) -> bool:
    """Whether one of two names holds the other, and does not deny it."""
    return (one <= two or two <= one) and not (one ^ two) & _DENIALS


def _families_of(names: Iterable[frozenset[str]]) -> tuple[frozenset[int], frozenset[int]]:
    """The families of which some name holds a head, and those of which some name holds a head or a member."""
    heads, families = set[int](), set[int]()
    for number, (first, all_of_it) in enumerate(_table()):
        for name in names:
            if any(_holds(name, each) for each in first):
                heads.add(number)
            if any(_holds(name, each) for each in all_of_it):
                families.add(number)
    return frozenset(heads), frozenset(families)


def _holds(name: frozenset[str], part: frozenset[str]) -> bool:
    return part <= name and not (name - part) & _DENIALS


@cache
def _table() -> list[tuple[list[frozenset[str]], list[frozenset[str]]]]:
    """Of each family the words of its heads, which could be true with all of it, and of all that it holds."""
    text = resources.files(__package__).joinpath(TABLE_NAME).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = documents.parse_json(text, TABLE_NAME)["families"]
    read = [([*map(words, row["names"])], [*map(words, row.get("members", []))]) for row in rows]
    return [(heads, heads + members) for heads, members in read]
