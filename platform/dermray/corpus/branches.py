"""Which of several branches a disease belongs to, learned from a corpus's own rows and from the package's table.

Derm1M's flat tree hangs `melanocytic` under `benign` and under `malignant`, and melanoma and nevus alike below it. What
is learned is written into the tree as an edge from the branch to the node (`dermray.corpus.graph`), so it goes wherever
the tree goes and every reader of `ontology.json` can load it. Nothing is learned where the rows disagree.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from dermray import storage
from dermray.corpus import spelling
from dermray.corpus.graph import ROOT
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.corpus.sides import OPPOSITE, is_general, is_no_growth, side_of
from dermray.corpus.synonyms import BENIGN, MALIGNANT, Synonyms

# Words of names that rows alone cannot put under benign: the table may not know the disease, and the name warns of it.
_WARNING = re.compile(r"malign|metasta|leuka?emi|\bin situ\b|\bbowen|\bmerkel\b|\bpaget")
NUM_TOLD = 5
# Where a node's paths meet → how many rows took the way by each of its parents.
Votes = Mapping[str, Counter[str]]


@dataclass(frozen=True)
class Branch:
    """What is known of one node whose paths differ.

    Attributes:
        node: its name.
        below: where its paths meet: the node itself, or one above it.
        chosen: the parent of `below` by which it is meant; None: that stays open.
        by: what says so: the rows, or the package's table.
        rows: parent of `below` → rows whose published path goes by it.
    """

    node: str
    below: str
    chosen: str | None
    by: Literal["rows", "table"] | None
    rows: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As it stands in reports and records."""
        return asdict(self)


def load(uri: str) -> Ontology:
    """The tree at `uri`, its nodes on the branch that the package's table knows where the tree leaves it open.

    Raises:
        CorpusError, OntologyError, StorageError: as `Ontology.load`.
    """
    return settled(Ontology.load(uri))


def settled(ontology: Ontology) -> Ontology:
    """The tree with what the package's table knows of benign and malignant, where the tree leaves it open."""
    return learn(ontology, {})[0]


def votes(ontology: Ontology, rows: Iterable[tuple[Iterable[str], str, int]]) -> dict[str, dict[str, Counter[str]]]:
    """Node → where its paths meet → rows by parent, from rows as (labels' nodes, published path, how many).

    A path counts where it names exactly one of the parents.
    """
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for nodes, path, count in rows:
        named = set(ontology.named_in(path))
        for node in nodes:
            for place, parents in _crossings(ontology, node).items():
                taken = [parent for parent in parents if parent in named]
                if len(taken) == 1:
                    found[node][place][taken[0]] += count
    return found


def learn(ontology: Ontology, found: Mapping[str, Votes]) -> tuple[Ontology, list[Branch]]:
    """The tree with every branch that the table or all rows agree on, and what was found of each node concerned.

    The table comes first: rows that put a disease which it knows on the other branch are shown, and not followed.
    """
    ontology = _opened(ontology)
    branches: list[Branch] = []
    for node in ontology:
        marks = ontology.branch_marks(node)
        # A node that the tree has placed already is open again if rows take another way.
        if not marks and ontology.is_certain(node):
            continue
        for place, parents in _crossings(ontology, node).items():
            sides = {parent: _side_above(ontology, parent) for parent in parents}
            branches.append(_branch(node, place, sides, marks, found.get(node, {}).get(place, Counter())))
    return _unmarked(_written(ontology, branches)), branches


def contradictions(ontology: Ontology) -> list[str]:
    """Nodes that the tree itself puts on another of the branches benign and malignant than the table knows."""
    sides = {name: side for name in ontology if ontology.children(name) and (side := side_of(name))}
    wrong = []
    for node in ontology if sides else ():
        above = {sides[name] for name in ontology.path(node)[:-1] if name in sides}
        verdict = _verdict(node) if len(above) == 1 else None
        if verdict and OPPOSITE[verdict] in above:
            wrong.append(node)
    return wrong


def told_of_old(uri: str) -> Iterator[str]:
    """A line where the tree of the corpus at `uri` is from before the table knew some of its malignancies.

    Its tree is settled wherever it is loaded; the sentences in its captions are as they were written.

    Raises:
        CorpusError, OntologyError, StorageError: as `Ontology.load`.
    """
    # Training needs no tree, so that a corpus which has lost its own is no error here.
    if Manifest.load(uri).ontology_sha256 is None or not storage.exists(storage.join(uri, ONTOLOGY_NAME)):
        return
    stored = Ontology.load(uri)
    astray = [
        node
        for node in stored
        if any(is_benign(name) or is_no_growth(name) for name in stored.path(node)[:-1]) and _verdict(node) == MALIGNANT
    ]
    if astray:
        shown = ", ".join(node[:80] for node in astray[:NUM_TOLD])
        more = f" and {len(astray) - NUM_TOLD:,} more" if len(astray) > NUM_TOLD else ""
        yield (
            f"{uri} was prepared before this version knew {shown}{more} as malignant: captions of the aspect ontology "
            "may name them below benign diseases or infections; the same jobs/prepare.py command writes them anew"
        )


def is_benign(name: str) -> bool:
    """Whether a node is a branch benign, or a disease that the table knows as benign: melanoma is no kind of nevus."""
    return BENIGN in (side_of(name), _verdict(name))


def denies(node: str, above: Iterable[str], *, mixed: bool = False) -> bool:
    """Whether the table knows that nodes named above a disease are not: no malignancy is an infection, or benign.

    Args:
        node: the disease, as its node or a text names it.
        above: what a row's published path names besides the disease.
        mixed: the row names a benign disease too, of which `benign` may be said where `malignant` stands beside it.
    """
    verdict = _verdict(node)
    if verdict is None:
        return False
    names = list(above)
    if verdict == MALIGNANT and not mixed:
        return any(is_benign(name) or is_no_growth(name) for name in names)
    sides = {side_of(name) for name in names}
    if verdict in sides:
        return False
    return OPPOSITE[verdict] in sides or (verdict == MALIGNANT and any(map(is_no_growth, names)))


def _opened(ontology: Ontology) -> Ontology:
    """The tree with a second parent for a malignancy that it hangs among infections or benign diseases.

    That is the branch malignant. Derm1M's tree has mycosis fungoides, a lymphoma, below `bacterial`; one from before
    the table knew a disease may have it below `benign`. With two paths a node is open, and neither is shown or scored,
    unless the table settles it. Among infections nothing is opened where no node, or more than one, is the branch
    malignant; below `benign` all of several become parents, and without any the node goes right below the root. So it
    does not stay where no branch benign stands above it, but a disease that is (a melanoma below `Nevi`).
    """
    ontology = _with_branches_apart(ontology)
    malignant = {name for name in ontology if ontology.children(name) and side_of(name) == MALIGNANT}
    general = {name for name in malignant if is_general(name)}
    upmost = [name for name in ontology if name in general and not general & set(ontology.ancestors(name))]
    children = ontology.to_json()
    moved: set[str] = set()
    for node in ontology:
        if _verdict(node) != MALIGNANT:
            continue
        above = set(ontology.ancestors(node))
        astray = _is_astray(ontology, node)
        # A mark by which it is benign is taken away in the end.
        if above & moved or (above & malignant and (not astray or ontology.branch_marks(node))):
            continue
        if not astray and not (len(upmost) == 1 and any(map(is_no_growth, above))):
            continue
        moved.add(node)
        into = [branch for branch in upmost if node not in (branch, *ontology.ancestors(branch))]
        # Below a benign branch it stays as well, so that the rows of both ways are told.
        settled_here = bool(above & malignant) or not any(side_of(name) == BENIGN for name in above)
        for parent in ontology.parents(node) if not into or (astray and settled_here) else ():
            children[parent].remove(node)
        for parent in into or [ROOT]:
            children[parent].append(node)
    return Ontology(children) if moved else ontology


def _with_branches_apart(ontology: Ontology) -> Ontology:
    """The tree without a branch malignant that surely stands below benign: it goes right below the root."""
    below = {
        name: ontology.parents(name)
        for name in ontology
        if ontology.children(name)
        and side_of(name) == MALIGNANT
        and is_general(name)
        and any(side_of(each) == BENIGN for each in ontology.path(name)[:-1])
    }
    return _taken_away(ontology, below, into=[ROOT])


def _taken_away(ontology: Ontology, nodes: Mapping[str, Iterable[str]], *, into: Iterable[str] = ()) -> Ontology:
    """The tree with each node taken from the parents given for it, and put below others."""
    if not nodes:
        return ontology
    children = ontology.to_json()
    for node, parents in nodes.items():
        for parent in parents:
            children[parent].remove(node)
        for parent in into:
            children[parent].append(node)
    return Ontology(children)


def _is_astray(ontology: Ontology, node: str) -> bool:
    """Whether the tree surely puts a malignancy of the table below a benign node."""
    return _verdict(node) == MALIGNANT and any(map(is_benign, ontology.path(node)[:-1]))


def _crossings(ontology: Ontology, node: str) -> dict[str, list[str]]:
    """Where paths to a node meet, itself included: node → its parents, where it has several."""
    places = (node, *ontology.ancestors(node))
    several = {place: ontology.parents(place) for place in places}
    return {place: parents for place, parents in several.items() if len(parents) > 1}


def _side_above(ontology: Ontology, parent: str) -> str | None:
    """Whether a node is on the branch benign or malignant, by its own name or else by those surely above it."""
    said = {side_of(name) for name in ontology.path(parent)} - {None}
    return side_of(parent) or (said.pop() if len(said) == 1 else None)


def _branch(node: str, place: str, sides: Mapping[str, str | None], marks: list[str], rows: Counter[str]) -> Branch:
    """What is known of a node at `place`, whose parents there are on these `sides`."""
    verdict = _verdict(node)
    if verdict is not None and len(set(sides.values()) & {BENIGN, MALIGNANT}) == 2:
        fitting = [parent for parent, side in sides.items() if side == verdict]
        if len(fitting) == 1:
            return Branch(node, place, fitting[0], "table", dict(rows))
    ways = {*rows, *(mark for mark in marks if mark in sides)}
    # Rows that take a disease past the branch which the table knows, and which the tree has, do not settle it.
    passed = verdict is not None and verdict in sides.values()
    if len(ways) == 1 and not (passed and sides[next(iter(ways))] is None) and not _warned(node, sides, ways):
        return Branch(node, place, ways.pop(), "rows", dict(rows))
    return Branch(node, place, None, None, dict(rows))


def _warned(node: str, sides: Mapping[str, str | None], ways: Iterable[str]) -> bool:
    """Whether rows put a node under benign whose own name warns that it is not, be it as a question."""
    warning = _WARNING.search(spelling.key(node)) is not None or Synonyms.load().is_denied(node)
    verdict = _verdict(node)
    named = verdict == MALIGNANT or (warning and verdict != BENIGN)
    return named and any(sides.get(way) == BENIGN for way in ways)


def _written(ontology: Ontology, branches: Iterable[Branch]) -> Ontology:
    children = ontology.to_json()
    leaves = set(ontology.leaves())
    changed = False
    for branch in branches:
        node, parents = branch.node, ontology.parents(branch.below)
        if branch.below != node:
            # Several ways leave several marks, which together say that it is open; one mark would say that it is not.
            ways = [parent for parent in parents if branch.rows.get(parent) or node in children[parent]]
            wanted = [branch.chosen] if branch.chosen else ways if len(ways) > 1 else []
            for parent in parents:
                listed = node in children[parent]
                if parent in wanted and not listed:
                    children[parent].append(node)
                    changed = True
                elif parent not in wanted and listed:
                    children[parent].remove(node)
                    changed = True
        elif branch.chosen and node in leaves:
            for parent in parents:
                if parent != branch.chosen:
                    children[parent].remove(node)
                    changed = True
    return Ontology(children) if changed else ontology


def _unmarked(ontology: Ontology) -> Ontology:
    """The tree without the marks, whoever has made them, by which a malignancy of the table is benign."""
    marks = {node: ontology.branch_marks(node) for node in ontology}
    return _taken_away(ontology, {node: of for node, of in marks.items() if of and _is_astray(ontology, node)})


# A corpus repeats few names very often.
@lru_cache(maxsize=16_384)
def _verdict(node: str) -> str | None:
    """What the table says of a node by its names; None where it knows none of them, or they differ."""
    table = Synonyms.load()
    if table.is_denied(node) or any(map(spelling.is_denial, node.split(","))):
        return None
    said = {table.branch(word) for word in (node, *node.split(","))} - {None}
    return said.pop() if len(said) == 1 else None
