"""The disease tree: synonyms, paths to the root, levels, ancestors, descendants, and text resolved to nodes.

The file is Derm1M's (arXiv 2503.14911): a flat JSON object, node name → list of child names, beginning at "root". A
node's name may hold several synonyms separated by commas. A node may hang under two parents, so a node can have
several paths; of these only what is true on every one is ever shown or scored (`path`, `levels`).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from rapidfuzz import fuzz, process

from dermray import documents, storage
from dermray.corpus import spelling
from dermray.corpus.graph import ROOT, Graph
from dermray.corpus.synonyms import Synonyms
from dermray.errors import CorpusError, OntologyError

ONTOLOGY_NAME = "ontology.json"
# Far above any published tree.
MAX_BYTES = 64 << 20
# Matches worth showing to a person, of 100, and how much of a text is compared.
SUGGESTION_SCORE = 70.0
SUGGESTION_CHARS = 200
# Nodes that stand twice, as a refusal names them.
NUM_DOUBLED = 5
# A text may be longer than a tree's longest name, or than this where they are short, and still be one of them.
NAME_CHARS = 128


class Resolution(NamedTuple):
    """The labels found in a free text, and the parts that name no node."""

    labels: tuple[str, ...]
    unresolved: tuple[str, ...]


class Suggestion(NamedTuple):
    """A node whose name is like a text, and how like (0-100). For people to look at, never taken by itself."""

    name: str
    score: float


class Ontology(Graph):
    """An immutable tree of node names (a directed acyclic graph where a node has two parents)."""

    def __init__(self, children: Mapping[str, Iterable[str]]) -> None:
        """Build from node → children.

        Raises:
            OntologyError: as `Graph`.
        """
        super().__init__(children)
        # A corpus repeats few label texts very often.
        self._resolutions: dict[str, Resolution] = {}
        self._named_in: dict[str, tuple[str, ...]] = {}

    @classmethod
    def load(cls, uri: str) -> Ontology:
        """Read the ontology of a corpus: a JSON file, or a folder that holds `ontology.json`.

        Raises:
            CorpusError: there is no such file.
            OntologyError: it is not a mapping of names to lists of names, or not a tree.
            StorageError: it is larger than a tree may be, or the store fails.
        """
        file = uri if uri.endswith(".json") else storage.join(uri, ONTOLOGY_NAME)
        try:
            data = storage.read_bytes(file, max_bytes=MAX_BYTES)
        except FileNotFoundError:
            raise CorpusError(f"{file} does not exist: the disease tree is expected there") from None
        return cls.from_bytes(data, file)

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Ontology:
        """The ontology in the bytes of the JSON file at `uri`.

        Raises:
            OntologyError: it is not a mapping of names to lists of names, names a node twice, or is not a tree.
            StorageError: it is not JSON.
        """
        try:
            doubled = Counter[str]()
            document = documents.parse_json(data, uri, doubled)
            if doubled:
                shown = ", ".join(repr(name[:SUGGESTION_CHARS]) for name in list(doubled)[:NUM_DOUBLED])
                raise OntologyError(
                    f"{len(doubled):,} nodes stand twice ({shown}): write the children of each in one list"
                )
            return cls.from_json(document)
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
    def folded(cls, labels: Mapping[str, int], *, fixed: Iterable[str] = ()) -> Ontology:
        """`flat` over labels as people write them: those of one spelling, or of one meaning, are one node.

        A label that names several (`BCC, AK`) makes a node of each, and none of its own: that one would bear the
        others' names.

        Args:
            labels: label → how often it occurs; the most frequent way to write it becomes the node's name.
            fixed: names that are nodes as they stand, whatever they mean.
        """
        named = cls.flat(fixed)
        others = {label: count for label, count in labels.items() if not len(named) or named.resolve(label) is None}
        return cls.flat([*named, *Synonyms.load().unify(_apart(others)).values()])

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

    def synonyms(self, name: str) -> list[str]:
        """The names that a node's name holds, the first being the one to show."""
        self._require(name)
        return _synonyms(name)

    def resolve(self, text: str) -> str | None:
        """The node that a text names, or None.

        Equal up to case, spaces, hyphens, apostrophes, plural endings, accents and British or American spelling, to
        a node's whole name or one of its synonyms; nothing is guessed. A closer match wins: whole name before
        synonym, singular before plural, then spelling. Of two nodes that are spelled alike the upper one is meant, and
        none if neither is above the other. A text that names none so is looked up in the package's table of synonyms,
        lay words and abbreviations: the node of that disease, or of the nearest broader one that the tree has.
        A text more than twice as long as every name here names none, and is not looked at.
        """
        if self._is_too_long(text):
            return None
        node = self._resolve_own(text)
        return node if node is not None or not text.strip() else self._by_meaning(text)[0]

    def is_broader(self, text: str) -> bool:
        """True if a text is resolved to the node of a broader disease, since the tree has none of its own."""
        if self._is_too_long(text):
            return False
        return self._resolve_own(text) is None and self._by_meaning(text)[1] > 0

    def _by_meaning(self, text: str) -> tuple[str | None, int]:
        """The node that the package's table leads to, and how many steps broader it is."""
        for steps, meaning in enumerate(Synonyms.load().meanings(text)):
            node = self._resolve_own(meaning.name)
            if node is None:
                node = self._upper({found for word in meaning.spellings if (found := self._resolve_own(word))})
            if node is not None:
                return node, steps
        return None, 0

    def _resolve_own(self, text: str) -> str | None:
        """`resolve` by the names that the tree itself holds."""
        key = spelling.key(text)
        for names in (self._by_name, self._by_synonym):
            if key in names:
                return names[key]
        if not key:
            return None
        return self._by_singular.get(spelling.singular(key)) or self._by_spelling.get(spelling.spelling(key))

    def _is_too_long(self, text: str) -> bool:
        """Whether a text is more than twice as long as every name, or would be, its ligatures taken apart."""
        return len(text) > self._most_chars or len(unicodedata.normalize("NFKD", text)) > self._most_chars

    def _upper(self, names: Iterable[str]) -> str | None:
        """Of several nodes the one that is above all others whichever path is meant, or None."""
        ordered = sorted(names, key=lambda name: (self._depths[name], name))
        if ordered and all(ordered[0] in self._path(name) for name in ordered):
            return ordered[0]
        return None

    def suggest(self, text: str, limit: int = 3) -> list[Suggestion]:
        """Nodes whose names are like a text that `resolve` does not know, best first.

        For reports, so that a person can mend a table or the tree; nothing in a corpus is made from it.
        """
        text_key = spelling.key(text[:SUGGESTION_CHARS])
        if limit < 1 or not text_key:
            return []
        # A node with many synonyms may come several times.
        found = process.extract(
            spelling.spelling(text_key, joined=False),
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
        named = list(self._named(text))
        labels = self.most_specific(name for _, name in named if name is not None)
        return Resolution(tuple(labels), tuple(part for part, name in named if name is None))

    def named_in(self, text: str) -> list[str]:
        """Every node that a comma-separated text names, in its order, each once: of a path all its nodes."""
        if text not in self._named_in:
            self._named_in[text] = tuple(dict.fromkeys(name for _, name in self._named(text) if name is not None))
        return list(self._named_in[text])

    def _named(self, text: str) -> Iterator[tuple[str, str | None]]:
        """The parts of a comma-separated text, each with its node or None.

        A part that denies or questions the others (`melanoma, excluded`) makes of all of them one text.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if any(map(spelling.is_denial, parts)):
            yield text.strip(), self.resolve(text)
            return
        start = 0
        while start < len(parts):
            for end in range(min(len(parts), start + self._most_parts), start, -1):
                name = self.resolve(", ".join(parts[start:end]))
                if name is not None:
                    yield ", ".join(parts[start:end]), name
                    start = end
                    break
            else:
                yield parts[start], None
                start += 1

    @cached_property
    def _most_parts(self) -> int:
        """Parts between commas of the longest name that can be resolved."""
        return 1 + max((name.count(",") for name in self), default=0)

    @cached_property
    def _most_chars(self) -> int:
        """Characters of the longest text that is resolved: blanks and accents may make a name longer."""
        return 2 * max(NAME_CHARS, *map(len, self._children))

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return self._keyed((spelling.key(name), name) for name in self)

    @cached_property
    def _by_synonym(self) -> dict[str, str]:
        return self._keyed((spelling.key(word), name) for name in self for word in self.synonyms(name))

    @cached_property
    def _by_singular(self) -> dict[str, str]:
        return self._keyed(
            (spelling.singular(spelling.key(word)), name) for name in self for word in [name, *self.synonyms(name)]
        )

    @cached_property
    def _by_spelling(self) -> dict[str, str | None]:
        """Nodes by the weakest key. Of several, the one above all others, which holds whichever is meant; else None."""
        sharing: dict[str, dict[str, None]] = {}
        for name in self:
            for word in (name, *self.synonyms(name)):
                sharing.setdefault(spelling.spelling(spelling.key(word)), {})[name] = None
        return {key: next(iter(names)) if len(names) == 1 else self._upper(names) for key, names in sharing.items()}

    @cached_property
    def _searchable(self) -> dict[tuple[str, int], str]:
        return {
            (name, number): spelling.spelling(spelling.key(word), joined=False)
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


def _likeness(text: str, other: str, *, score_cutoff: float | None = None) -> float:
    """How like two keys are, 0-100: all words count, those in common count twice; their order does not."""
    score = (fuzz.token_sort_ratio(text, other) + fuzz.token_set_ratio(text, other)) / 2
    return 0.0 if score_cutoff is not None and score < score_cutoff else score


def display_names(nodes: Sequence[str]) -> tuple[str, ...]:
    """What to call nodes in prompts, reports and answers.

    A node's name lists synonyms after commas; the first is taken, and the whole name where two would share it.
    """
    firsts = [_synonyms(node)[0] for node in nodes]
    times = Counter(firsts)
    return tuple(first if times[first] == 1 else node for first, node in zip(firsts, nodes, strict=True))


def _apart(labels: Mapping[str, int]) -> Counter[str]:
    """Labels and how often each occurs; of one that lists several, in its place those of its parts that are labels.

    A part is one if it names a disease of the package's table, or stands in another label too.
    """
    table = Synonyms.load()
    parts_of = {_folded(label): {_folded(part) for part in _synonyms(label)} for label in labels}
    times = Counter(part for parts in parts_of.values() for part in parts)
    apart = Counter[str]()
    for label, count in labels.items():
        if any(map(spelling.is_denial, label.split(","))):
            # With a comma it would be a node that bears the disease's name.
            apart[" ".join(label.replace(",", " ").split())] += count
            continue
        parts = [] if table.meaning(label) else _synonyms(label)
        listed = [part for part in parts if len(parts) > 1 and (table.meaning(part) or times[_folded(part)] > 1)]
        apart.update(dict.fromkeys(listed or [label], count))
    return apart


def _folded(label: str) -> str:
    return spelling.spelling(spelling.key(label))


def _synonyms(name: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in name.split(",") if part.strip())) or [name]
