"""Raw data to score on: a table of image paths beside its images, as benchmarks are published and as people have them.

Images are read as they are, not prepared first, so that the pixels are those of the publication.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dermray import storage
from dermray.corpus.ontology import Ontology
from dermray.embedding.units import ImageFiles
from dermray.errors import CorpusError
from dermray.evaluate.groups import of_table
from dermray.evaluate.samples import Samples

IMAGES_PER_UNIT = 64
# Rows whose images are looked for to find the folder that paths start from.
PROBED_ROWS = 20
MAX_TABLE_BYTES = 1 << 30
_NUMBER = re.compile(r"[0-9]+(\.0+)?")
_YES = {"1", "1.0", "true"}
NO_IMAGE = "no image path"


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
    """A table that was read: its columns by purpose, its rows, and the folder that its image paths start from."""

    uri: str
    digest: str
    columns: dict[str, str | None]
    concepts: tuple[str, ...]
    rows: list[dict[str, str]]
    images_at: str

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
            data = storage.read_bytes(uri, max_bytes=MAX_TABLE_BYTES)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CorpusError(f"the table {uri} does not exist") from None
        names, rows = _parse(uri, data)
        columns = _columns(uri, names, layout)
        used = {name for name in columns.values() if name}
        concepts = tuple(name for name in names if name and name not in used) if layout.concepts else ()
        folder = uri.rpartition("/")[0]
        bases = [folder, *(storage.join(folder, name) for name in ("images", "final_images")), *image_folders]
        images_at = _base(uri, [row[columns["image"] or ""] for row in rows], list(dict.fromkeys(bases)))
        return cls(uri, hashlib.sha256(data).hexdigest(), columns, concepts, rows, images_at)

    @property
    def splits(self) -> dict[str, int]:
        """Rows of each split; one split without a name where the table has none."""
        return dict(Counter(self._cell(row, "split") for row in self.rows))

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
            CorpusError: no row is of the split; the message lists the splits there are.
        """
        rows = [row for row in self.rows if split is None or self._cell(row, "split") == split][:max_samples]
        if not rows:
            known = ", ".join(f"{name or 'without a split'} ({num})" for name, num in self.splits.items())
            raise CorpusError(f"{self.uri} has no rows of the split {split!r}; it has: {known}")
        dropped = Counter({NO_IMAGE: sum(not self._cell(row, "image") for row in rows)})
        rows = [row for row in rows if self._cell(row, "image")]
        labels = [_label(self._cell(row, "label"), class_names) for row in rows]
        uris = [_address(self.images_at, self._cell(row, "image")) for row in rows]
        flat = Ontology.flat(dict.fromkeys([*class_names, *(one for each in labels for one in each)]))
        return Samples(
            uri=self.uri,
            split=split or "all",
            corpus_digest=self.digest,
            images=tuple(_units(uris)),
            ids=[self._cell(row, "image") for row in rows],
            captions=[self._cell(row, "caption") or None for row in rows],
            labels=labels,
            concepts=[[name for name in self.concepts if row[name].strip().lower() in _YES] for row in rows],
            ontology=ontology or flat,
            class_names=tuple(class_names),
            concept_names=self.concepts,
            groups=of_table(rows),
            dropped={reason: number for reason, number in dropped.items() if number},
        )

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


def _parse(uri: str, data: bytes) -> tuple[list[str], list[dict[str, str]]]:
    try:
        text = data.decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if uri.endswith(".tsv") else ",")
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        rows = [{name: row.get(name) or "" for name in names} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{uri} cannot be read as CSV in UTF-8: {error}") from None
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not names or repeated is not None:
        problem = f"repeats the column {repeated!r}" if repeated is not None else "is empty"
        raise CorpusError(f"{uri} {problem}")
    if not rows:
        raise CorpusError(f"{uri} has no rows below its header")
    return names, rows


def _columns(uri: str, names: Sequence[str], layout: Layout) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for purpose in ("image", "label", "caption", "split"):
        wanted: tuple[str, ...] = getattr(layout, purpose)
        found[purpose] = next((name for name in wanted if name in names), None)
        if wanted and found[purpose] is None and purpose not in layout.optional:
            known = ", ".join(names)
            raise CorpusError(f"{uri} has no column {' or '.join(map(repr, wanted))}; its columns are: {known}")
    return found


def _base(uri: str, paths: Sequence[str], candidates: Sequence[str]) -> str:
    """The folder that the table's image paths start from: the first where one of its first images is."""
    probed = [path.strip() for path in paths if path.strip()][:PROBED_ROWS]
    for candidate in candidates:
        if any(storage.exists(_address(candidate, path)) for path in probed):
            return candidate
    shown = ", ".join(candidates)
    example = probed[0] if probed else "none"
    raise CorpusError(f"none of the first images of {uri} ({example}, …) is found below any of: {shown}")


def _address(base: str, path: str) -> str:
    """A path of the table as a URI; one that is absolute or a URI already stays."""
    return path if path.startswith("/") or "://" in path else storage.join(base, path.removeprefix("./"))


def _label(text: str, class_names: Sequence[str]) -> list[str]:
    if not text:
        return []
    if not _NUMBER.fullmatch(text):
        return [text]
    number = int(float(text))
    # A number outside the list stays a number, which is no class: it is counted as such.
    return [class_names[number] if number < len(class_names) else str(number)]


def _units(uris: Sequence[str]) -> Iterable[ImageFiles]:
    for start in range(0, len(uris), IMAGES_PER_UNIT):
        yield ImageFiles(tuple(uris[start : start + IMAGES_PER_UNIT]), start)
