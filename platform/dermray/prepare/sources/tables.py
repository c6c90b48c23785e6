"""Reading a source's table (CSV, TSV or Parquet) as strings, row numbers kept, malformed rows set aside.

Also its disease tree. Of each file that is read as a whole the request notes the digest.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dermray import storage
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.errors import CorpusError
from dermray.prepare.sources.rows import DroppedRow, RawTable, SourceRequest

# A quoted cell may span lines; a row must fit into one block.
BLOCK_BYTES = 32 << 20
MAX_TABLE_BYTES = 8 << 30


@dataclass(frozen=True)
class StringTable:
    """A table whose cells are all strings (never null), the row numbers beside it, and its malformed rows."""

    uri: str
    table: pa.Table
    rows: pa.Array
    dropped: tuple[DroppedRow, ...]

    def __contains__(self, name: object) -> bool:
        return name in self.table.column_names

    def __getitem__(self, name: str) -> pa.Array:
        return self.table[name].combine_chunks()

    def require(self, *names: str) -> None:
        """Check that columns are there.

        Raises:
            CorpusError: one is not; the message lists those that are.
        """
        for name in names:
            if name not in self:
                known = ", ".join(self.table.column_names)
                raise CorpusError(f"{self.uri} has no column {name!r}; its columns are: {known}")


def read_table(request: SourceRequest, *defaults: str) -> StringTable:
    """Read `request.table`, or the first of the source's own file names that is there, under the input root.

    Raises:
        CorpusError: the table is absent, empty, not UTF-8, or not a table.
    """
    uris = [storage.join(request.input, name) for name in ([request.table] if request.table else defaults)]
    uri = uris[0] if len(uris) == 1 else next((each for each in uris if storage.exists(each)), uris[0])
    try:
        data = _read_whole(request, uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(f"{uri} does not exist: the table of the corpus is expected there (see table=)") from None
    if uri.endswith(".parquet"):
        read = _from_parquet(uri, data)
    else:
        read = _from_csv(uri, data, delimiter="\t" if uri.endswith((".tsv", ".tab")) else ",")
    if not read.table.num_rows and not read.dropped:
        raise CorpusError(f"{uri} has no rows below its header")
    return _first_rows(read, request.limit)


def read_tree(request: SourceRequest, *, required: bool = False) -> Ontology | None:
    """The tree of `ontology.json` under the input; None if it does not lie there.

    Raises:
        CorpusError: it is required, and does not.
        OntologyError: it is malformed.
    """
    uri = storage.join(request.input, ONTOLOGY_NAME)
    try:
        data = _read_whole(request, uri)
    except (FileNotFoundError, NotADirectoryError):
        if required:
            raise CorpusError(f"{uri} does not exist: the disease tree is expected there") from None
        return None
    return Ontology.from_bytes(data, uri)


def _read_whole(request: SourceRequest, uri: str) -> bytes:
    """Read a file; the request notes size and digest of the very bytes, so that none is read twice."""
    data = storage.read_bytes(uri, max_bytes=MAX_TABLE_BYTES)
    request.tables[uri] = RawTable(uri, len(data), hashlib.sha256(data).hexdigest())
    return data


def _from_parquet(uri: str, data: bytes) -> StringTable:
    try:
        table = pq.read_table(io.BytesIO(data))
        cells = [pc.fill_null(column.cast(pa.string()), "") for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{uri} is not a Parquet table of plain columns: {error}") from None
    table = pa.table(dict(zip(table.column_names, cells, strict=True)))
    return StringTable(uri, table, pa.array(np.arange(1, table.num_rows + 1)), ())


def _from_csv(uri: str, data: bytes, *, delimiter: str) -> StringTable:
    names = _header(uri, data, delimiter)
    malformed: list[DroppedRow] = []

    def set_aside(row: pacsv.InvalidRow) -> str:
        detail = f"{row.actual_columns} cells where the header has {row.expected_columns}"
        # Arrow counts the header as row 1.
        malformed.append(DroppedRow(row.number - 1, "", "", "malformed_row", f"{detail}: {row.text[:80]}"))
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            # Row numbers of malformed rows are known only when one thread reads.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{uri} cannot be read as CSV in UTF-8: {error}") from None
    numbers = np.arange(1, table.num_rows + len(malformed) + 1)
    good = np.setdiff1d(numbers, [row.row for row in malformed], assume_unique=True)
    return StringTable(uri, table, pa.array(good), tuple(malformed))


def _header(uri: str, data: bytes, delimiter: str) -> list[str]:
    try:
        first = io.TextIOWrapper(io.BytesIO(data[:BLOCK_BYTES]), encoding="utf-8-sig", errors="replace", newline="")
        names = next(csv.reader(first, delimiter=delimiter), [])
    except csv.Error as error:
        raise CorpusError(f"{uri} cannot be read as CSV: {error}") from None
    repeated = {name for name in names if names.count(name) > 1}
    if not names or repeated:
        problem = f"repeats the column {min(repeated)!r}" if repeated else "is empty: its first line must name columns"
        raise CorpusError(f"{uri} {problem}")
    return names


def _first_rows(read: StringTable, limit: int | None) -> StringTable:
    if limit is None:
        return read
    kept = pc.less_equal(read.rows, limit)
    dropped = tuple(row for row in read.dropped if row.row <= limit)
    return StringTable(read.uri, read.table.filter(kept), read.rows.filter(kept), dropped)
