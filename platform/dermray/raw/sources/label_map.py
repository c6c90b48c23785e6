"""A map of the user's own (`columns.label_map`): what the label texts of a table stand for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from dermray import storage
from dermray.corpus import spelling
from dermray.errors import CorpusError
from dermray.raw import tables
from dermray.raw.sources.rows import RawTable, SourceRequest

LABEL, MEANS = "label", "means"
MAX_MAP_BYTES = 16 << 20


@dataclass(frozen=True)
class LabelMap:
    """The user's own map: label text as written → what it stands for, blank for nothing.

    A label is looked up as `Ontology.resolve` does: by its key first, then with plural and British spelling folded,
    where all the rows that are alike so say the same.
    """

    meanings: Mapping[str, str]

    @cached_property
    def _rows(self) -> dict[str, set[str]]:
        """Keys and folded spellings, each with the texts of the rows that it stands for."""
        rows: dict[str, set[str]] = defaultdict(set)
        for text in self.meanings:
            key = spelling.key(text)
            rows[key].add(text)
            rows[_folded(key)].add(text)
        return rows

    def row_of(self, label: str) -> str | None:
        """The row that a label matches, by its text; None where there is none, or several that differ."""
        key = spelling.key(label)
        exact = [text for text in self._rows.get(key, ()) if spelling.key(text) == key]
        alike = exact or sorted(self._rows.get(_folded(key), ()))
        return alike[0] if len({self.meanings[text] for text in alike}) == 1 else None

    def applied(self, labels: pa.Array, matched: set[str]) -> pa.Array:
        """A column of label lists with each text replaced by what the map says; `matched` takes the matching rows.

        What the map says nothing of stays. Of a text that is in no row the parts between commas are looked up.
        """

        def meant(label: str) -> str:
            row = self.row_of(label)
            if row is None:
                if "," not in label:
                    return label
                parts = [meant(part) for part in label.split(",")]
                return ", ".join(filter(None, (part.strip() for part in parts)))
            matched.add(row)
            return self.meanings[row]

        said = {label: meant(label) for label in labels.flatten().unique().to_pylist()}
        rows = [list(dict.fromkeys(filter(None, map(said.__getitem__, row)))) for row in labels.to_pylist()]
        return pa.array(rows, labels.type)

    def others(self, matched: set[str]) -> list[str]:
        """The rows that are not among those that match."""
        return [text for text in self.meanings if text not in matched]


def _folded(key: str) -> str:
    # A letter that no key has keeps the two apart in one table.
    return f"={spelling.spelling(key)}"


def read_label_map(request: SourceRequest) -> LabelMap | None:
    """The map of `columns.label_map`; None where there is none.

    Raises:
        CorpusError: there is no such file, it is no table with the columns label and means, a row of it is malformed,
            or it contradicts itself.
    """
    name = request.columns.label_map
    if not name:
        return None
    below = storage.join(request.input, name)
    uri = below if "://" not in name and storage.exists(below) else storage.normalise(name)
    try:
        data = storage.read_bytes(uri, max_bytes=MAX_MAP_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(f"columns.label_map: {name} is no file, neither as it stands nor under input") from None
    request.tables[uri] = RawTable(uri, len(data), hashlib.sha256(data).hexdigest())
    return _parsed(uri, data)


def _parsed(uri: str, data: bytes) -> LabelMap:
    table = tables.parse(uri, data)
    if LABEL not in table or MEANS not in table:
        raise CorpusError(f"{uri} must have the columns {LABEL} and {MEANS}, and a row for each label")
    # A comma in a label that is not in quotation marks would give the label a part of itself as its meaning.
    for malformed in table.dropped:
        raise CorpusError(f"{uri}, row {malformed.row}: {malformed.detail}; put a text with a comma in quotation marks")
    meanings: dict[str, str] = {}
    written: dict[str, str] = {}
    rows = zip(*(column.to_pylist() for column in (table.rows, table[LABEL], table[MEANS])), strict=True)
    for number, text, meaning in rows:
        key, means = spelling.key(text), "" if spelling.is_placeholder(meaning) else " ".join(meaning.split())
        if not key:
            raise CorpusError(f"{uri}, row {number}: no label")
        first = written.setdefault(key, " ".join(text.split()))
        if meanings.setdefault(first, means) != means:
            raise CorpusError(f"{uri}, row {number}: {text!r} means {means!r} here and {meanings[first]!r} above")
    return LabelMap(meanings)
