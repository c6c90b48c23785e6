"""The disease tree: synonyms, paths to the root, levels, ancestors, descendants, and text resolved to nodes.

The file is Derm1M's (arXiv 2503.14911): a flat JSON object, node name → list of child names, beginning at "root". A
node's name may hold several synonyms separated by commas. A node may hang under two parents, so a node can have
several paths.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from rapidfuzz import fuzz, process

from dermray import storage
from dermray.errors import CorpusError, OntologyError

ROOT = "root"
ONTOLOGY_NAME = "ontology.json"
_APOSTROPHES = re.compile("['\u2019]")
# White space, hyphens, dashes and underscores.
_GAPS = re.compile(r"[\s\-\u2010\u2011\u2013_]+")
_COMMAS = re.compile(r"\s*,[\s,]*")
# Endings that the -s of a plural does not belong to (pityriasis, lupus, moss).
_NOT_PLURAL = ("ss", "us", "is")
# British spelling → American, on both sides of a comparison, so that what matters is only what becomes alike.
_AMERICAN = (
    (re.compile("[ao]e|[\u00e6\u0153]"), "e"),
    (re.compile(r"ageing"), "aging"),
    (re.compile(r"(?<=col|tum|vap)our"), "or"),
    (re.compile(r"is(?=ations?\b|ed\b|ing\b)"), "iz"),
    (re.compile(r"(cent|fib)re\b"), r"\1er"),
    (re.compile(r"sulph"), "sulf"),
    (re.compile(r"leuc(?=o)"), "leuk"),
    (re.compile(r"grey"), "gray"),
    (re.compile(r"(?<=\bm)ould"), "old"),
)
# Matches worth showing to a person, of 100.
SUGGESTION_SCORE = 70.0


class Resolution(NamedTuple):
    """The labels found in a free text, and the parts that name no node."""

    labels: tuple[str, ...]
    unresolved: tuple[str, ...]


class Suggestion(NamedTuple):
    """A node whose name is like a text, and how like (0-100). For people to look at, never taken by itself."""

    name: str
    score: float


class Ontology:
    """An immutable tree of node names (a directed acyclic graph where a node has two parents)."""

    def __init__(self, children: Mapping[str, Iterable[str]]) -> None:
        """Build from node → children.

        Raises:
            OntologyError: no root, a cycle, or a node that the root does not reach.
        """
        self._children = {name: tuple(dict.fromkeys(below)) for name, below in children.items()}
        for below in list(self._children.values()):
            for child in below:
                self._children.setdefault(child, ())
        if ROOT not in self._children:
            raise OntologyError(f"the ontology has no node {ROOT!r}; its top level must be listed there")
        self._parents: dict[str, list[str]] = {name: [] for name in self._children}
        for name, below in self._children.items():
            for child in below:
                self._parents[child].append(name)
        self._order = self._sorted_from_root()
        # A corpus repeats few label texts very often.
        self._resolutions: dict[str, Resolution] = {}

    @classmethod
    def load(cls, uri: str) -> Ontology:
        """Read the ontology of a corpus: a JSON file, or a folder that holds `ontology.json`.

        Raises:
            CorpusError: there is no such file.
            OntologyError: it is not a mapping of names to lists of names, or not a tree.
        """
        file = uri if uri.endswith(".json") else storage.join(uri, ONTOLOGY_NAME)
        try:
            data = storage.read_bytes(file)
        except FileNotFoundError:
            raise CorpusError(f"{file} does not exist: the disease tree is expected there") from None
        return cls.from_bytes(data, file)

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Ontology:
        """The ontology in the bytes of the JSON file at `uri`.

        Raises:
            OntologyError: it is not a mapping of names to lists of names, or not a tree.
            StorageError: it is not JSON.
        """
        try:
            return cls.from_json(storage.parse_json(data, uri))
        except OntologyError as error:
            raise OntologyError(f"{uri}: {error}") from None

    @classmethod
    def from_json(cls, document: object) -> Ontology:
        """Validate a parsed JSON document.

        Raises:
            OntologyError: it is not a mapping of names to lists of names, or not a tree.
        """
        if not isinstance(document, dict):
            raise OntologyError("expected a JSON object: node name -> list of child names")
        for name, below in document.items():
            if not isinstance(below, list) or not all(isinstance(child, str) and child.strip() for child in below):
                raise OntologyError(f"node {name!r} must have a list of child names")
        return cls(document)

    @classmethod
    def flat(cls, labels: Iterable[str]) -> Ontology:
        """One level under the root, for sources that publish labels and no tree; `labels` in any order."""
        return cls({ROOT: sorted({label for label in labels if label != ROOT})})

    @classmethod
    def from_paths(cls, paths: Iterable[Iterable[str]]) -> Ontology:
        """The tree of published paths, each coarse to fine; blank names and repetitions in a row are passed over.

        Raises:
            OntologyError: the paths contradict each other: a name is above another one and also below it.
        """
        children: dict[str, dict[str, None]] = {ROOT: {}}
        for path in paths:
            above = ROOT
            for name in path:
                if name and name != above:
                    children.setdefault(above, {})[name] = None
                    above = name
        return cls({name: sorted(below) for name, below in sorted(children.items(), key=lambda item: item[0] != ROOT)})

    def union(self, other: Ontology) -> Ontology:
        """Both trees in one; a node that only one of them puts right below the root stays where the other has it.

        Raises:
            OntologyError: they contradict each other: a name is above another one here and below it there.
        """
        trees = (self._children, other._children)
        merged = {name: [child for tree in trees for child in tree.get(name, ())] for name in {**trees[0], **trees[1]}}
        placed = {child for name, below in merged.items() if name != ROOT for child in below}
        merged[ROOT] = [child for child in merged[ROOT] if child not in placed]
        return Ontology(merged)

    def to_json(self) -> dict[str, list[str]]:
        """The mapping that `from_json` reads, in file order."""
        return {name: list(below) for name, below in self._children.items()}

    def _sorted_from_root(self) -> tuple[str, ...]:
        """Every node, parents first; proves that there is no cycle and no orphan."""
        waiting = {name: len(parents) for name, parents in self._parents.items()}
        if waiting[ROOT]:
            raise OntologyError(f"{ROOT!r} is listed as a child of {self._parents[ROOT][0]!r}: a cycle")
        orphans = [name for name, count in waiting.items() if count == 0 and name != ROOT]
        if orphans:
            raise OntologyError(f"{_name_some(orphans)} under no parent: list each in some node, or remove it")
        order: list[str] = []
        ready = [ROOT]
        while ready:
            name = ready.pop()
            order.append(name)
            for child in reversed(self._children[name]):
                waiting[child] -= 1
                if waiting[child] == 0:
                    ready.append(child)
        if len(order) < len(self._children):
            raise OntologyError(f"there is a cycle: {' > '.join(self._cycle(set(self._children) - set(order)))}")
        return tuple(order)

    def _cycle(self, stuck: set[str]) -> list[str]:
        """One cycle among nodes that a topological order could not place, its first node repeated at the end."""
        # Every stuck node has a stuck parent, so walking up must come round.
        name = min(stuck)
        walk: list[str] = []
        while name not in walk:
            walk.append(name)
            name = next(parent for parent in self._parents[name] if parent in stuck)
        return [name, *reversed(walk[walk.index(name) :])]

    def __contains__(self, name: object) -> bool:
        return name in self._children and name != ROOT

    def __iter__(self) -> Iterator[str]:
        """Every node but the root, parents first."""
        return iter(self._order[1:])

    def __len__(self) -> int:
        return len(self._order) - 1

    def children(self, name: str) -> list[str]:
        """Names directly below a node (or below "root")."""
        self._require(name)
        return list(self._children[name])

    def leaves(self) -> list[str]:
        """Nodes without children, parents' order."""
        return [name for name in self if not self._children[name]]

    def paths(self, name: str) -> list[list[str]]:
        """Every path from the root's child down to the node, the shortest first, then in file order.

        There can be very many where many nodes have two parents; `path` and `sure_path` do not list them.
        """
        self._require(name)
        found: list[list[str]] = []
        pending = [[name]]
        while pending:
            path = pending.pop()
            parents = self._parents[path[0]]
            if not parents:
                found.append(path[1:])
            pending.extend([parent, *path] for parent in reversed(parents))
        return sorted(found, key=len)

    def path(self, name: str) -> list[str]:
        """The node's path, root's child first, the node itself last; its shortest one if there are several."""
        self._require(name)
        path: list[str] = []
        while name != ROOT:
            path.insert(0, name)
            name = min(self._parents[name], key=self._depths.__getitem__)
        return path

    def sure_path(self, name: str) -> list[str]:
        """`path` without the ancestors that only some of the node's paths share: what is true whichever holds."""
        return [node for node in self.path(name) if node in self._sure[name]]

    def level(self, name: str) -> int:
        """1 for the root's children, counted along `path`; 0 for the root."""
        self._require(name)
        return self._depths[name]

    def ancestors(self, name: str) -> list[str]:
        """Every node above, over all paths, without the root: nearest first, each once."""
        self._require(name)
        found: dict[str, None] = {}
        pending = list(self._parents[name])
        while pending:
            parent = pending.pop(0)
            if parent != ROOT and parent not in found:
                found[parent] = None
                pending.extend(self._parents[parent])
        return list(found)

    def descendants(self, name: str) -> list[str]:
        """Every node below, each once, in the order of a walk from the top."""
        self._require(name)
        below = {name}
        found: list[str] = []
        for node in self._order:
            if node not in below and any(parent in below for parent in self._parents[node]):
                below.add(node)
                found.append(node)
        return found

    def synonyms(self, name: str) -> list[str]:
        """The names that a node's name holds, the first being the one to show."""
        self._require(name)
        return _synonyms(name)

    def resolve(self, text: str) -> str | None:
        """The node that a text names, or None.

        Equal up to case, spaces, hyphens, apostrophes, plural endings, accents and British or American spelling, to
        a node's whole name or one of its synonyms; nothing is guessed. A closer match wins: whole name before
        synonym, singular before plural, then spelling. Of two nodes that are spelled alike the upper one is meant, and
        none if neither is above the other.
        """
        key = _key(text)
        for names in (self._by_name, self._by_synonym):
            if key in names:
                return names[key]
        if not key:
            return None
        return self._by_singular.get(_singular(key)) or self._by_spelling.get(_spelling(key))

    def suggest(self, text: str, limit: int = 3) -> list[Suggestion]:
        """Nodes whose names are like a text that `resolve` does not know, best first.

        For reports, so that a person can mend a table or the tree; nothing in a corpus is made from it.
        """
        if limit < 1 or not _key(text):
            return []
        # A node with many synonyms may come several times.
        found = process.extract(
            _spelling(_key(text), joined=False),
            self._searchable,
            scorer=_likeness,
            score_cutoff=SUGGESTION_SCORE,
            limit=4 * limit,
        )
        best: dict[str, float] = {}
        for _, score, (name, _) in found:
            best.setdefault(name, round(score, 1))
        return [Suggestion(name, score) for name, score in best.items()][:limit]

    def resolve_all(self, text: str) -> Resolution:
        """The nodes that a comma-separated text names, in its order, each once, only the most specific ones.

        A comma may also belong to a name, so the longest run of parts that is a node is taken. A label that is
        an ancestor of another one in the same text adds nothing and is left out.
        """
        if text not in self._resolutions:
            self._resolutions[text] = self._resolve_all(text)
        return self._resolutions[text]

    def _resolve_all(self, text: str) -> Resolution:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        labels: dict[str, None] = {}
        unresolved: list[str] = []
        start = 0
        while start < len(parts):
            for end in range(len(parts), start, -1):
                name = self.resolve(", ".join(parts[start:end]))
                if name is not None:
                    labels[name] = None
                    start = end
                    break
            else:
                unresolved.append(parts[start])
                start += 1
        return Resolution(tuple(self.most_specific(labels)), tuple(unresolved))

    def most_specific(self, names: Iterable[str]) -> list[str]:
        """The given nodes, each once, without those that are ancestors of another one."""
        listed = list(dict.fromkeys(names))
        if len(listed) < 2:
            return listed
        above = {ancestor for name in listed for ancestor in self.ancestors(name)}
        return [name for name in listed if name not in above]

    def _require(self, name: str) -> None:
        if name not in self._children:
            raise OntologyError(f"the ontology has no node {name!r}; resolve() finds the node that a text names")

    @cached_property
    def _depths(self) -> dict[str, int]:
        """Length of the shortest path of each node."""
        depths = {ROOT: 0}
        for name in self:
            depths[name] = 1 + min(depths[parent] for parent in self._parents[name])
        return depths

    @cached_property
    def _sure(self) -> dict[str, frozenset[str]]:
        """The nodes that lie on all paths of each node."""
        sure: dict[str, frozenset[str]] = {ROOT: frozenset()}
        for name in self:
            sure[name] = frozenset.intersection(*(sure[parent] for parent in self._parents[name])) | {name}
        return sure

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return self._keyed((_key(name), name) for name in self)

    @cached_property
    def _by_synonym(self) -> dict[str, str]:
        return self._keyed((_key(word), name) for name in self for word in self.synonyms(name))

    @cached_property
    def _by_singular(self) -> dict[str, str]:
        return self._keyed((_singular(_key(word)), name) for name in self for word in [name, *self.synonyms(name)])

    @cached_property
    def _by_spelling(self) -> dict[str, str | None]:
        """Nodes by the weakest key. Of several, the one above all others, which holds whichever is meant; else None."""
        sharing: dict[str, dict[str, None]] = {}
        for name in self:
            for word in (name, *self.synonyms(name)):
                sharing.setdefault(_spelling(_key(word)), {})[name] = None
        keyed: dict[str, str | None] = {}
        for key, names in sharing.items():
            # Parents come first in the tree's order.
            top = next(iter(names))
            keyed[key] = top if all(top in self.ancestors(name) for name in names if name != top) else None
        return keyed

    @cached_property
    def _searchable(self) -> dict[tuple[str, int], str]:
        return {
            (name, number): _spelling(_key(word), joined=False)
            for name in self
            for number, word in enumerate(self.synonyms(name))
        }

    @staticmethod
    def _keyed(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        """First come, first kept: where two nodes share a name, the one nearer to the root answers."""
        keyed: dict[str, str] = {}
        for key, name in pairs:
            keyed.setdefault(key, name)
        return keyed


def _key(text: str) -> str:
    """Case, apostrophes, hyphens and spaces made alike."""
    text = _APOSTROPHES.sub("", text.casefold())
    return _COMMAS.sub(", ", _GAPS.sub(" ", text)).strip(" ,")


def _singular(key: str) -> str:
    """Each word of a key without its plural ending, English or Latin (scars, biopsies, keratoses, nevi, bullae)."""
    return " ".join(_singular_word(word) for word in key.split(" "))


def _singular_word(word: str) -> str:
    stem = word.rstrip(",")
    if len(stem) > 4 and stem.endswith("ies"):
        return stem[:-3] + "y"
    if len(stem) > 5 and stem.endswith("oses"):
        return stem[:-2] + "is"
    if len(stem) > 5 and stem.endswith(("ses", "xes", "ches", "shes")):
        return stem[:-2]
    if len(stem) > 3 and stem.endswith("ae"):
        return stem[:-1]
    if len(stem) > 3 and stem.endswith("i"):
        return stem[:-1] + "us"
    if len(stem) > 3 and stem.endswith("s") and not stem.endswith(_NOT_PLURAL):
        return stem[:-1]
    return stem


def _likeness(text: str, other: str, *, score_cutoff: float | None = None) -> float:
    """How like two keys are, 0-100: all words count, those in common count twice; their order does not."""
    score = (fuzz.token_sort_ratio(text, other) + fuzz.token_set_ratio(text, other)) / 2
    return 0.0 if score_cutoff is not None and score < score_cutoff else score


def _spelling(key: str, *, joined: bool = True) -> str:
    """A key in the singular, without accents, in American spelling; `joined`: also without spaces and commas."""
    plain = unicodedata.normalize("NFKD", _singular(key))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    for british, american in _AMERICAN:
        plain = british.sub(american, plain)
    return re.sub(r"[ ,]", "", plain) if joined else plain


def _name_some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    rest = f" and {len(names) - 3} more are" if len(names) > 3 else (" is" if len(names) == 1 else " are")
    return f"{shown}{rest}"


def display_names(nodes: Sequence[str]) -> tuple[str, ...]:
    """What to call nodes in prompts, reports and answers.

    A node's name lists synonyms after commas; the first is taken, and the whole name where two would share it.
    """
    firsts = [_synonyms(node)[0] for node in nodes]
    times = Counter(firsts)
    return tuple(first if times[first] == 1 else node for first, node in zip(firsts, nodes, strict=True))


def _synonyms(name: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in name.split(",") if part.strip())) or [name]
