"""Raw data to score on: a table of image paths beside its images, as benchmarks are published and as people have them.

Images are read as they are, not prepared first, so that the pixels are those of the publication.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dermray import storage
from dermray.corpus.accounts import require_balance
from dermray.corpus.ontology import Ontology
from dermray.corpus.spelling import is_placeholder
from dermray.errors import CorpusError, SplitError, StorageError
from dermray.evaluate import telling
from dermray.evaluate.samples import Samples
from dermray.evaluate.statistics.groups import of_table
from dermray.raw import tables
from dermray.raw.cells import captions_in, written_list
from dermray.raw.spelling import folded
from dermray.raw.splits import split_name
from dermray.vectors.embedding.units import ImageFiles

IMAGES_PER_UNIT = 64
# Rows whose images are looked for to find the folder that paths start from.
PROBED_ROWS = 20
# Different placeholders that a report names.
NUM_PLACEHOLDERS = 20
_NUMBER = re.compile(r"[0-9]+(\.0+)?")
_YES = {"1", "1.0", "true"}
NO_IMAGE = "no image path"
OUTSIDE = "image path leads out of the folder"
NOT_ASKED = "in another split, or beyond max_samples"
MALFORMED = "another number of cells than the header, in any split"


@dataclass(frozen=True)
class Layout:
    """How a table is to be read; of several column names the first that it has is taken.

    Attributes:
        image, label, caption, split: column names; empty: there is none.
        concepts: every other column is a concept, 0 or 1.
        optional: columns that may be lacking, of label, caption and split.
    """

    image: tuple[str, ...]
    label: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    concepts: bool = False
    optional: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class RawTable:
    """A table that was read: its columns by purpose, its rows, and the folder that its image paths start from.

    `num_malformed` rows of all `num_rows` have another number of cells than the header and are in none of it.
    """

    uri: str
    digest: str
    columns: dict[str, str | None]
    concepts: tuple[str, ...]
    rows: list[dict[str, str]]
    images_at: str
    num_malformed: int = 0
    num_rows: int = 0

    @classmethod
    def read(cls, uri: str, layout: Layout, *, image_folders: Sequence[str] = ()) -> RawTable:
        """Read the CSV at `uri`.

        Args:
            uri: of the table.
            layout: its columns.
            image_folders: where image paths may start from, besides the table's folder and `images` in it.

        Raises:
            CorpusError: no such file, not a table, a column that is missing, or none of its first images is found.
        """
        try:
            data = storage.read_bytes(uri, max_bytes=tables.MAX_TABLE_BYTES)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CorpusError(f"the table {uri} does not exist") from None
        table = tables.parse(uri, data)
        names, rows = table.table.column_names, table.table.to_pylist()
        columns = _columns(uri, names, layout)
        used = {name for name in columns.values() if name}
        concepts = tuple(name for name in names if name and name not in used) if layout.concepts else ()
        folder = uri.rpartition("/")[0]
        bases = [folder, *(storage.join(folder, name) for name in ("images", "final_images")), *image_folders]
        images_at = _base(uri, [row[columns["image"] or ""] for row in rows], list(dict.fromkeys(bases)))
        digest = hashlib.sha256(data).hexdigest()
        return cls(uri, digest, columns, concepts, rows, images_at, len(table.dropped), table.num_rows)

    @property
    def splits(self) -> dict[str, int]:
        """Rows of each split; one split without a name where the table has none."""
        return dict(Counter(self._split(row) for row in self.rows))

    def samples(
        self,
        split: str | None,
        *,
        class_names: Sequence[str] = (),
        ontology: Ontology | None = None,
        max_samples: int | None = None,
    ) -> Samples:
        """The rows of one split, or all rows.

        Args:
            split: its name; None: all rows.
            class_names: the classes; a number in the label column counts in them from 0.
            ontology: disease tree; without it the labels form a flat one.
            max_samples: take the first so many rows only.

        Raises:
            SplitError: no row is of the split; the message lists the splits there are.
            CorpusError: its numbers count the classes from 1.
        """
        rows = [row for row in self.rows if split is None or self._split(row) == split_name(split)][:max_samples]
        if not rows:
            known = ", ".join(f"{name or 'without a split'} ({num})" for name, num in self.splits.items())
            raise SplitError(f"{self.uri} has no rows of the split {split!r}; it has: {known}")
        dropped = {NO_IMAGE: sum(not self._cell(row, "image") for row in rows), MALFORMED: self.num_malformed}
        not_asked = {NOT_ASKED: len(self.rows) - len(rows)}
        rows = [row for row in rows if self._cell(row, "image")]
        addresses = [_address(self.images_at, self._cell(row, "image")) for row in rows]
        dropped[OUTSIDE] = addresses.count(None)
        rows = [row for row, uri in zip(rows, addresses, strict=True) if uri is not None]
        uris = [uri for uri in addresses if uri is not None]
        figures = require_balance(self.uri, self.num_rows, len(rows), dropped | not_asked)
        self._require_numbers_from_0(class_names)
        cells = [self._cell(row, "label") for row in rows]
        labels = [_labels(_said(cell), class_names) for cell in cells]
        times = Counter(one for each in labels for one in each)
        tree = ontology or Ontology.folded(times, fixed=class_names)
        # One class for all spellings of a label; what the tree does not know stays as it is, and is counted.
        nodes = {one: [one] if one in class_names else list(tree.resolve_all(one).labels) or [one] for one in times}
        captions = [captions_in(self._cell(row, "caption")) for row in rows]
        return Samples(
            uri=self.uri,
            split=split or "all",
            corpus_digest=self.digest,
            images=tuple(_units(uris)),
            ids=[self._cell(row, "image") for row in rows],
            captions=[each[0] if each else None for each in captions],
            labels=[[node for one in each for node in nodes[one]] for each in labels],
            concepts=[[name for name in self.concepts if row[name].strip().lower() in _YES] for row in rows],
            ontology=tree,
            class_names=tuple(class_names),
            concept_names=self.concepts,
            groups=of_table(rows),
            dropped={reason: number for reason, number in dropped.items() if number},
            placeholders=_placeholders(cells),
            rows=figures,
            told=telling.told_of(rows, captions, {} if class_names else times, tree, is_own=ontology is None),
        )

    def _require_numbers_from_0(self, class_names: Sequence[str]) -> None:
        """Refuse numbers that would name the class beside the one that is meant; looked for in all splits."""
        cells = {self._cell(row, "label") for row in self.rows}
        numbers = {int(float(cell)) for cell in cells if _NUMBER.fullmatch(cell)}
        if class_names and numbers and 0 < min(numbers) <= len(class_names) <= max(numbers):
            raise CorpusError(
                f"{self.uri} has labels from {min(numbers)} to {max(numbers)}, and numbers count the "
                f"{len(class_names)} classes from 0: subtract 1 from each, write the names of the classes instead, or "
                "list as many classes as there are numbers"
            )

    def _split(self, row: dict[str, str]) -> str:
        return split_name(_said(self._cell(row, "split")))

    def _cell(self, row: dict[str, str], purpose: str) -> str:
        name = self.columns[purpose]
        return row[name].strip() if name else ""


def find(root: str, endings: Iterable[str]) -> str | None:
    """The file below a folder whose path ends with one of some paths, tried in their order, nearest to the root first.

    Only where none lies where it is expected, directly under the root, is every folder below it looked through.
    """
    wanted = [ending.strip("/") for ending in endings]
    for ending in wanted:
        for folder in (root, storage.join(root, "data")):
            if storage.exists(storage.join(folder, ending)):
                return storage.join(folder, ending)
    files = sorted(storage.list_files(root, recursive=True), key=lambda uri: (uri.count("/"), uri))
    return next((uri for ending in wanted for uri in files if uri.endswith(f"/{ending}")), None)


def _columns(uri: str, names: Sequence[str], layout: Layout) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for purpose in ("image", "label", "caption", "split"):
        wanted: tuple[str, ...] = getattr(layout, purpose)
        found[purpose] = next((name for name in wanted if name in names), None)
        if wanted and found[purpose] is None and purpose not in layout.optional:
            known = ", ".join(names)
            raise CorpusError(
                f"{uri} has no column {' or '.join(map(repr, wanted))}; its columns are: {known}; "
                f"in a table of your own, say which it is with columns.{purpose}="
            )
    return found


def _base(uri: str, paths: Sequence[str], candidates: Sequence[str]) -> str:
    """The folder that the table's image paths start from: the first where one of its first images is."""
    probed = [path.strip() for path in paths if path.strip()][:PROBED_ROWS]
    for candidate in candidates:
        if any(uri is not None and storage.exists(uri) for uri in (_address(candidate, path) for path in probed)):
            return candidate
    shown = ", ".join(candidates)
    example = probed[0] if probed else "none"
    raise CorpusError(f"none of the first images of {uri} ({example}, …) is found below any of: {shown}")


def _address(base: str, path: str) -> str | None:
    """A path of the table as a URI; one that is absolute or a URI already stays. None: it climbs out of the folder."""
    if path.startswith("/") or "://" in path:
        return path
    for way in (path, folded(path)):
        with contextlib.suppress(StorageError):
            return storage.inside(base, posixpath.normpath(way))
    return None


def _said(cell: str) -> str:
    """A cell, blank where it only stands for nothing."""
    return "" if is_placeholder(cell) else cell


def _placeholders(cells: Iterable[str]) -> dict[str, int]:
    """The texts that only stand for nothing, the most frequent ones with their number."""
    times = Counter(cell.lower() for cell in cells if cell and is_placeholder(cell))
    return dict(times.most_common(NUM_PLACEHOLDERS))


def _labels(text: str, class_names: Sequence[str]) -> list[str]:
    """The labels of a cell, which may be a list as Python or JSON writes it."""
    written = written_list(text)
    return [_label(part, class_names) for part in ([text] if written is None else written) if part]


def _label(text: str, class_names: Sequence[str]) -> str:
    if not _NUMBER.fullmatch(text):
        return text
    number = int(float(text))
    # A number outside the list stays a number, which is no class: it is counted as such.
    return class_names[number] if number < len(class_names) else str(number)


def _units(uris: Sequence[str]) -> Iterable[ImageFiles]:
    for start in range(0, len(uris), IMAGES_PER_UNIT):
        yield ImageFiles(tuple(uris[start : start + IMAGES_PER_UNIT]), start)
