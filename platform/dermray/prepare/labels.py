"""The labels of a table before any image is read: the branches they tell, and those that name no node."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus import branches, spelling
from dermray.corpus.ontology import Ontology, display_names
from dermray.corpus.sides import side_of
from dermray.corpus.synonyms import Synonyms
from dermray.prepare.digests import by_range, numbers_of
from dermray.prepare.samples import differing, resolve_labels
from dermray.printable import printable
from dermray.raw.archives import shown
from dermray.raw.sources.telling import NUM_SHOWN_ROWS, in_words, names_of
from dermray.raw.spill import blocks, placed

# Label texts that the terminal names, and what each may mean.
NUM_SHOWN = 5
NUM_SUGGESTED = 2
SAY = "say what they mean with columns.label_map=FILE"
# One more than are shown, so that it shows that there are others.
NUM_FIRST = NUM_SHOWN_ROWS + 1
# Labels, published path, whether the row was prepared before.
_Said = tuple[tuple[str, ...], str | None, bool]


@dataclass(frozen=True)
class LabelSurvey:
    """What the labels of a table name.

    Attributes:
        num_rows: rows with a label.
        num_lost: those with a label text that names no node.
        unknown: these texts and their rows, most frequent first.
        broader: texts that are placed at the node of a broader disease, and their rows, most frequent first.
        num_spellings: different label texts, all rows together.
        has_tree: the source brings a tree; else the labels make one level.
        num_nodes: nodes that the labels name.
        strange: nodes that the package's table of names does not know, and their rows; empty where there is a tree.
        first: of each text of `unknown`, `broader` and `strange` the numbers of its first rows, at most one more than
            are shown.
        names: of these rows their files, where the source has no table that numbers them.
    """

    num_rows: int
    num_lost: int
    unknown: dict[str, int]
    broader: dict[str, int]
    num_spellings: int
    has_tree: bool
    num_nodes: int
    strange: dict[str, int]
    first: dict[str, list[int]]
    names: dict[int, str]

    def lines(self, ontology: Ontology, num_shown: int = NUM_SHOWN) -> list[str]:
        """What there is to tell, a sentence a line, with the `num_shown` most frequent texts of each kind."""
        told = []
        if self.num_rows and not self.has_tree:
            told.append(
                f"there is no disease tree at input: {self.num_spellings:,} spellings of labels make "
                f"{self.num_nodes:,} classes, all of one level"
            )
        if self.strange:
            named = self._named(self.strange, num_shown, lambda text, count: f" ({_meant(text, count)})")
            told.append(
                f"{sum(self.strange.values()):,} labels name nothing that the table of names knows, and make classes "
                f"of their own: {named}; {SAY}"
            )
        if self.unknown:
            named = self._named(self.unknown, num_shown, lambda text, count: f" ({_hint(text, count, ontology)})")
            told.append(f"{self.num_lost:,} of {self.num_rows:,} rows have labels that name no node: {named}; {SAY}")
        if self.broader:
            named = self._named(
                self.broader, num_shown, lambda text, count: f" at {ontology.resolve(text)} ({count:,})"
            )
            told.append(
                f"{sum(self.broader.values()):,} rows have labels without a node of their own, placed at a broader "
                f"one: {named}"
            )
        return told

    def _named(self, texts: Mapping[str, int], num_shown: int, about: Callable[[str, int], str]) -> str:
        """The most frequent texts with what there is to say of each, and the first rows that hold one of all."""
        listed = ", ".join(f"{text[:80]}{about(text, count)}" for text, count in list(texts.items())[:num_shown])
        rows = in_words((row for text in texts for row in self.first[text]), self.names)
        return f"{listed}{_more(texts, num_shown)}; see {rows}"


def survey(table: pa.Table, ontology: Ontology, *, has_tree: bool, by_name: bool = False) -> LabelSurvey:
    """Resolve the labels of raw rows (schema RAW), each different text once; `by_name`: rows are files, so named."""
    unknown = Counter[str]()
    spellings = Counter[str]()
    strange = Counter[str]()
    nodes: set[str] = set()
    first: dict[str, list[int]] = defaultdict(list)
    num_rows = num_lost = 0
    for row, (count, numbers) in _distinct(table).items():
        labels, hierarchy, prepared = row
        if labels:
            found = resolve_labels({"labels": labels, "hierarchy": hierarchy, "prepared": prepared}, ontology)
            num_rows += count
            num_lost += count if found.unresolved else 0
            unknown.update(dict.fromkeys(found.unresolved, count))
            spellings.update(dict.fromkeys(labels, count))
            nodes.update(found.labels)
            if not has_tree:
                strange.update(dict.fromkeys(filter(_is_strange, found.labels), count))
            for text in {*found.unresolved, *labels, *found.labels}:
                first[text] = sorted([*first[text], *numbers])[:NUM_FIRST]
    broader = {text: count for text, count in spellings.items() if ontology.is_broader(text)}
    return LabelSurvey(
        num_rows,
        num_lost,
        _ranked(unknown),
        _ranked(broader),
        len(spellings),
        has_tree,
        len(nodes),
        _ranked(strange),
        first,
        names_of(table, {row for rows in first.values() for row in rows}) if by_name else {},
    )


def told_of_tree(ontology: Ontology) -> Iterator[str]:
    """A line where the source's tree puts diseases on the other of the branches benign and malignant than the table."""
    if wrong := branches.contradictions(ontology):
        listed = ", ".join(f"{printable(name[:80])} below {_upper_side(ontology, name)}" for name in wrong[:NUM_SHOWN])
        more = f" and {len(wrong) - NUM_SHOWN:,} more" if len(wrong) > NUM_SHOWN else ""
        yield (
            f"the disease tree contradicts the table of names at {len(wrong):,} nodes: {listed}{more}; what the table "
            "knows as malignant is nowhere shown or scored as benign"
        )


def _upper_side(ontology: Ontology, node: str) -> str:
    return next(name for name in ontology.path(node)[:-1] if side_of(name))


def conflicts(table: pa.Table, ontology: Ontology) -> dict[str, tuple[str, ...]]:
    """Images whose rows name different diseases, none of them a broader word for the other, with these."""
    texts_of: dict[str, dict[str, None]] = {}
    several = _with_several(table)
    for block in blocks(table) if len(several) else ():
        images, texts = block["image"].combine_chunks(), _joined(block)
        chosen = np.isin(_hashed(images), several)
        for image, text in zip(images.filter(chosen).to_pylist(), texts.filter(chosen).to_pylist(), strict=True):
            if image is not None and text:
                texts_of.setdefault(image, {})[text] = None
    # A corpus repeats few combinations very often.
    known: dict[frozenset[str], list[str]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for image, texts in texts_of.items():
        if len(texts) > 1:
            combined = frozenset(texts)
            if combined not in known:
                known[combined] = _conflicting(list(texts), ontology)
            if known[combined]:
                found[image] = display_names(known[combined])
    return found


def _with_several(table: pa.Table) -> np.ndarray:
    """Hashes of the images whose rows have different labels, int64; by chance one of another image's too."""
    images, texts = np.empty(table.num_rows, np.int64), np.empty(table.num_rows, np.int32)
    numbers: dict[str, int] = {}
    for rows, block in placed(table.select(["image", "labels"])):
        said = _joined(block)
        images[rows] = _hashed(block["image"].combine_chunks())
        # A row without a label says nothing against others: it is as if it were not there.
        texts[rows] = numbers_of(pc.if_else(pc.equal(said, ""), pa.scalar(None, pa.string()), said), numbers)
    found = []
    for places in by_range(images):
        places = places[texts[places] >= 0]
        places = places[np.argsort(images[places])]
        hashed, said = images[places], texts[places]
        found.append(np.unique(hashed[1:][(hashed[1:] == hashed[:-1]) & (said[1:] != said[:-1])]))
    return np.concatenate([np.zeros(0, np.int64), *found])


def _joined(block: pa.Table) -> pa.Array:
    """The labels of each row in lines."""
    return pc.binary_join(block["labels"].combine_chunks(), "\n")


def _hashed(texts: pa.Array) -> np.ndarray:
    """Python's hash of each text, int64, made once for each different one."""
    encoded = texts.dictionary_encode(null_encoding="encode")
    hashes = np.fromiter(map(hash, encoded.dictionary.to_pylist()), np.int64, len(encoded.dictionary))
    return hashes[encoded.indices.to_numpy()]


def told_of_conflicts(found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line about what `conflicts` found, if it did."""
    if found:
        first = [(image, found[image]) for image in sorted(found)[:NUM_SHOWN]]
        listed = ", ".join(f"{printable(shown(image))} ({'; '.join(names)})" for image, names in first)
        yield f"{len(found):,} images have rows that name different diseases, and get them all: {listed}{_more(found)}"


def _conflicting(texts: Sequence[str], ontology: Ontology) -> list[str]:
    """The diseases that rows name, each row's labels in lines; none where one row names all, and others say less."""
    named = [[node for label in text.split("\n") for node in ontology.resolve_all(label).labels] for text in texts]
    return differing(named, ontology)


def learn_branches(table: pa.Table, ontology: Ontology) -> tuple[Ontology, list[branches.Branch]]:
    """The tree with the branch of each node that the rows' published paths, or the package's table, say.

    Returns it and what was found of every node with several paths.
    """
    rows = [
        (resolve_labels({"labels": labels, "hierarchy": hierarchy}, ontology).labels, hierarchy, count)
        for (labels, hierarchy, prepared), (count, _) in _distinct(table).items()
        if hierarchy and not prepared
    ]
    return branches.learn(ontology, branches.votes(ontology, rows))


def counted(table: pa.Table) -> Counter[str]:
    """How many rows carry each label text."""
    times = Counter[str]()
    for block in blocks(table):
        for each in pc.value_counts(block["labels"].combine_chunks().flatten()).to_pylist():
            times[each["values"]] += each["counts"]
    return times


def _distinct(table: pa.Table) -> dict[_Said, tuple[int, list[int]]]:
    """Different (labels, published path, prepared before): how many rows, and the numbers of the first of them."""
    counts = Counter[_Said]()
    first: dict[_Said, list[int]] = defaultdict(list)
    for block in blocks(table):
        for said, count, rows in _distinct_in(block):
            counts[said] += count
            first[said].extend(rows[: NUM_FIRST - len(first[said])])
    return {said: (count, first[said]) for said, count in counts.items()}


def _distinct_in(block: pa.Table) -> Iterator[tuple[_Said, int, list[int]]]:
    """What the rows of a block say of diseases: each different, how many rows do, and the numbers of the first."""
    labels = block["labels"].combine_chunks()
    numbers = labels.flatten().dictionary_encode().indices.cast(pa.string())
    offsets = pc.subtract(labels.offsets, labels.offsets[0])
    keys = {
        "labels": pc.binary_join(pa.ListArray.from_arrays(offsets, numbers), ","),
        "hierarchy": block["hierarchy"],
        "prepared": block["prepared"],
    }
    places = pa.array(np.arange(block.num_rows))
    table = pa.table({**keys, "place": places, "row": block["row"]})
    grouped = table.group_by(list(keys), use_threads=False).aggregate(
        [("place", "min"), ("row", "count"), ("row", "list")]
    )
    grouped = grouped.sort_by("place_min")
    said = labels.take(grouped["place_min"].combine_chunks()).to_pylist()
    columns = (grouped[name].to_pylist() for name in ("hierarchy", "prepared", "row_count"))
    first = pc.list_slice(grouped["row_list"].combine_chunks(), 0, NUM_FIRST).to_pylist()
    for texts, path, prepared, count, rows in zip(said, *columns, first, strict=True):
        yield (tuple(texts), path, bool(prepared)), count, rows


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _more(counts: Mapping[str, Any], num_shown: int = NUM_SHOWN) -> str:
    return f" and {len(counts) - num_shown:,} more" if len(counts) > num_shown else ""


def _is_strange(label: str) -> bool:
    return Synonyms.load().meaning(label) is None


def _meant(text: str, count: int) -> str:
    """The rows of a text, and what it could mean where that is several diseases."""
    competing = Synonyms.load().may_mean(text)
    return f"{count:,}; could be {' or '.join(competing)}" if competing else f"{count:,}"


def _hint(text: str, count: int, ontology: Ontology) -> str:
    if Synonyms.load().may_mean(text):
        return _meant(text, count)
    if spelling.denies(text, text):
        return f"{count:,}; it denies or asks"
    similar = [each.name for each in ontology.suggest(text, NUM_SUGGESTED)]
    return f"{count:,}; did you mean {' or '.join(similar)}?" if similar else f"{count:,}"
