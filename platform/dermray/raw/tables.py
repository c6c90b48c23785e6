"""The one reader of raw tables (CSV, TSV, Parquet): cells as strings, row numbers kept, malformed rows told.

What the bytes say for certain is recognised: UTF-8, UTF-16 and UTF-32 by their byte order mark, Excel's `sep=;` line,
a separator that splits the header and the rows alike. What is not certain is refused with what to do about it.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dermray import parquet_bounds
from dermray.errors import CorpusError
from dermray.raw.text import BLOCK_BYTES, SHOWN_CHARS, Text, one_line, refuse_bytes

# What the name of a table ends with that is no text.
PARQUET = ".parquet"
MAX_COLUMNS = 10_000
MAX_TABLE_BYTES = 32 << 30
# Of a block: as objects of Python its cells take many times their bytes.
MAX_ROWS = 16_384
SEPARATORS = (",", ";", "\t", "|")
# Rows that are looked at to tell the separator, and the share of them that must have as many cells as the header.
PROBED_ROWS = 100
AGREEING = 0.9
MALFORMED = "malformed_row"
# What `csv` says of a mark that nothing closes; of other faults it says other things.
_OPEN_AT_THE_END = "unexpected end of data"


@dataclass(frozen=True)
class DroppedRow:
    """A row that is in no sample, and why. `reason` is a short stable word."""

    row: int
    source_id: str
    image: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StringTable:
    """A table whose cells are all strings (never null), the row numbers beside it, and its malformed rows.

    `rows` is int64 `[N]`; the first row below the header is 1, whether well formed or not. Names of columns have no
    white space around them. Columns that have neither a name nor a value are left out; one that has values and no name
    is called `column K`, K counting from 1.
    """

    uri: str
    table: pa.Table
    rows: pa.Array
    dropped: tuple[DroppedRow, ...]

    def __contains__(self, name: object) -> bool:
        return name in self.table.column_names

    def __getitem__(self, name: str) -> pa.Array:
        return self.table[name].combine_chunks()

    def get(self, name: str) -> pa.Array | None:
        """A column's cells; None where there is no such column."""
        if name not in self:
            return None
        return self[name]

    @property
    def num_rows(self) -> int:
        """Rows below the header, malformed ones among them."""
        return self.table.num_rows + len(self.dropped)

    def require(self, *names: str, hint: str = "") -> None:
        """Check that columns are there; `hint` says at the end of the message what to do.

        Raises:
            CorpusError: one is not; the message lists those that are.
        """
        for name in names:
            if name not in self:
                known = ", ".join(self.table.column_names)
                raise CorpusError(f"{self.uri} has no column {name!r}; its columns are: {known}{hint}")

    def first(self, limit: int | None) -> StringTable:
        """The first so many rows, malformed ones counted; all without a limit."""
        if limit is None:
            return self
        kept = pc.less_equal(self.rows, limit)
        dropped = tuple(row for row in self.dropped if row.row <= limit)
        return StringTable(self.uri, self.table.filter(kept), self.rows.filter(kept), dropped)


def parse(uri: str, data: bytes) -> StringTable:
    """The table in the bytes of a file. Rows of another length than the header's are set aside in `dropped`.

    Args:
        uri: where it is from; `.parquet` is read as Parquet, everything else as text.
        data: the whole file.

    Raises:
        CorpusError: it is empty, not text in a known encoding, not a table, repeats a column, or holds a row that
            goes wrong over several lines, as a quotation mark does that is never closed.
    """
    if uri.endswith(PARQUET):
        return joined(parse_parquet(uri, io.BytesIO(data)))
    return joined(parse_text(uri, lambda: io.BytesIO(data)))


def joined(blocks: Iterable[StringTable]) -> StringTable:
    """The blocks of one table, one at least, as one."""
    held = list(blocks)
    return StringTable(
        held[0].uri,
        pa.concat_tables(block.table for block in held),
        pa.concat_arrays([block.rows for block in held]),
        tuple(row for block in held for row in block.dropped),
    )


def parse_text(uri: str, open_file: Callable[[], io.BytesIO | io.RawIOBase]) -> Iterator[StringTable]:
    """A table of text as `parse` reads it, in blocks of rows with the same columns; one that is not long is one block.

    Args:
        uri: where it is from.
        open_file: opens the file at its beginning.

    Raises:
        CorpusError: as `parse`, perhaps after some blocks: nothing holds of them before the last has come.
    """
    yield from _with_kept_columns(uri, _from_text(uri, open_file))


def parse_parquet(uri: str, file: BinaryIO) -> Iterator[StringTable]:
    """A Parquet table as `parse` reads it, in blocks of rows with the same columns.

    Args:
        uri: where it is from.
        file: one that can be read at any place.

    Raises:
        CorpusError: as `parse`, perhaps after some blocks.
        OSError: it cannot be read.
    """
    with of_plain_columns(uri):
        parquet = parquet_bounds.streamed(file)
    yield from _with_kept_columns(uri, parquet_blocks(uri, parquet, range(parquet.num_row_groups)))


@contextmanager
def of_plain_columns(uri: str) -> Iterator[None]:
    """Have what Arrow finds wrong with a Parquet table told of it.

    Raises:
        CorpusError: it has found something.
    """
    try:
        yield
    # Names and texts that are no UTF-8 are errors of Python's, not of Arrow's.
    except (pa.ArrowException, OSError, ValueError) as error:
        # Those of the system have a number, and say nothing against the table.
        if isinstance(error, OSError) and error.errno:
            raise
        raise CorpusError(f"{uri} is not a Parquet table of plain columns: {one_line(error)}") from None


def parquet_blocks(uri: str, parquet: pq.ParquetFile, groups: Sequence[int]) -> Iterator[StringTable]:
    """The rows of row groups, numbered from 1, in blocks that are not empty; all columns with their stripped names.

    However much a file packs, a block comes to some `BLOCK_BYTES`, or to a row.

    Raises:
        CorpusError: it is damaged, repeats a column, a column is of lists or the like, or a row group does not hold
            the rows that the footer says, perhaps after some blocks.
        OSError: it cannot be read.
    """
    num_rows = 0
    with of_plain_columns(uri):
        names = _stripped(uri, parquet.schema_arrow.names)
        most = _block_rows(parquet.metadata, groups)
        cells = (
            pa.table([pc.fill_null(column.cast(pa.string()), "") for column in part.columns], names=names)
            for batch in parquet_bounds.batches(parquet, groups, most)
            for part in parquet_bounds.unpacked_in_parts(batch, BLOCK_BYTES)
        )
        for block in _gathered(cells, most):
            numbers = pa.array(np.arange(num_rows + 1, num_rows + 1 + block.num_rows))
            num_rows += block.num_rows
            yield StringTable(uri, block, numbers, ())


def _gathered(tables: Iterable[pa.Table], most: int) -> Iterator[pa.Table]:
    """Small tables that follow each other as one, of at most so many rows or `BLOCK_BYTES`."""
    held: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in tables:
        if held and (num_rows + table.num_rows > most or num_bytes + table.nbytes > BLOCK_BYTES):
            yield pa.concat_tables(held)
            held, num_rows, num_bytes = [], 0, 0
        held.append(table)
        num_rows, num_bytes = num_rows + table.num_rows, num_bytes + table.nbytes
    if held:
        yield pa.concat_tables(held)


def _block_rows(metadata: pq.FileMetaData, groups: Sequence[int]) -> int:
    """Rows that come to one block, as far as the footer tells what they come to."""
    row_bytes = 1.0
    for each in map(metadata.row_group, groups):
        row_bytes = max(row_bytes, each.total_byte_size / max(1, each.num_rows))
    return max(1, min(MAX_ROWS, int(BLOCK_BYTES / row_bytes)))


def _with_kept_columns(uri: str, blocks: Iterator[StringTable]) -> Iterator[StringTable]:
    """Blocks without the columns that have neither name nor value.

    Raises:
        CorpusError: there is no block.
    """
    first = next(blocks, None)
    if first is None:
        raise CorpusError(f"{uri} has no rows below its header")
    names = _kept_names(first.table)
    if len(names) == first.table.num_columns:
        yield _named(first, names)
        yield from (_named(block, names) for block in blocks)
    else:
        # Whether a column without a name has a value anywhere is known when all is read.
        whole = joined([first, *blocks])
        yield _named(whole, _kept_names(whole.table))


def _from_text(uri: str, open_file: Callable[[], io.BytesIO | io.RawIOBase]) -> Iterator[StringTable]:
    """The blocks of a table of text that has rows, all columns with their stripped names."""
    with open_file() as file:
        text = Text(uri, file)
        if not text.is_utf8:
            refuse_bytes(uri, open_file)
        separator, names = columns_of(uri, text)
        malformed: list[DroppedRow] = []
        block, num_rows, num_told = None, 0, 0
        try:
            for batch in _lexed(text, names, separator, malformed):
                if block:
                    yield block
                # The lexer may be a block ahead with the malformed rows, whose numbers are higher then.
                pending = malformed[num_told:]
                block = _numbered(uri, batch.rename_columns(_stripped(uri, names)), num_rows + num_told, pending)
                num_rows, num_told = num_rows + batch.num_rows, num_told + len(block.dropped)
        except pa.ArrowInvalid as error:
            text.look_at_rest()
            _require_sound(uri, open_file, text, separator)
            raise CorpusError(f"{uri} cannot be read as CSV: {one_line(error)}") from None
        if not text.is_utf8 or text.spans_lines(num_rows + len(malformed)):
            _require_sound(uri, open_file, text, separator)
    if block is None and malformed:
        nothing = pa.RecordBatch.from_arrays([pa.array([], pa.string())] * len(names), _stripped(uri, names))
        block = _numbered(uri, nothing, 0, ())
    if block:
        yield replace(block, dropped=(*block.dropped, *malformed[num_told:]))


def columns_of(uri: str, text: Text) -> tuple[str, list[str]]:
    """The separator of a table's cells, and the names of its columns as they are written.

    Raises:
        CorpusError: the header is none, or several separators may be meant.
    """
    separator = text.said_separator or _separator(uri, text.head)
    return separator, _header(uri, text.head, separator)


def _numbered(uri: str, batch: pa.RecordBatch, num_before: int, malformed: Sequence[DroppedRow]) -> StringTable:
    """A block with the numbers of its rows, and those of `malformed` that stand between them."""
    numbers = np.arange(num_before + 1, num_before + 1 + batch.num_rows + len(malformed))
    numbers = np.setdiff1d(numbers, [row.row for row in malformed], assume_unique=True)[: batch.num_rows]
    between = tuple(row for row in malformed if len(numbers) and row.row < numbers[-1])
    return StringTable(uri, pa.Table.from_batches([batch]), pa.array(numbers), between)


def _lexed(text: Text, names: list[str], separator: str, malformed: list[DroppedRow]) -> Iterator[pa.RecordBatch]:
    """Rows of strings, block by block, none of them empty; `malformed` takes the others."""

    def set_aside(row: pacsv.InvalidRow) -> str:
        detail = f"{row.actual_columns} cells where the header has {row.expected_columns}"
        # Arrow counts the header as row 1.
        malformed.append(DroppedRow(row.number - 1, "", "", MALFORMED, f"{detail}: {row.text[:SHOWN_CHARS]}"))
        return "skip"

    batches = pacsv.open_csv(
        pa.PythonFile(text, mode="r"),
        # Row numbers of malformed rows are known only when one thread reads.
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=set_aside),
        convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    for batch in text.paced(iter(batches)):
        for first in range(0, batch.num_rows, MAX_ROWS):
            yield batch.slice(first, MAX_ROWS)


def _require_sound(uri: str, open_file: Callable[[], io.BytesIO | io.RawIOBase], text: Text, separator: str) -> None:
    """Read again what one look at a file has left in doubt.

    Raises:
        CorpusError: it is not UTF-8, or a row goes wrong over several lines.
    """
    if not text.is_utf8:
        refuse_bytes(uri, open_file)
    with open_file() as file:
        _require_closed_quotes(
            uri, io.BufferedReader(Text(uri, file), 1 << 20), separator, text.first_line, text.last_line
        )


def _separator(uri: str, data: bytes) -> str:
    """The one that splits header and rows alike; that of the file's ending where nothing tells against it.

    Raises:
        CorpusError: two others than that of the ending do.
    """
    usual = "\t" if uri.lower().endswith((".tsv", ".tab")) else ","
    fitting = [each for each in SEPARATORS if _fits(data, each)]
    if usual in fitting or not fitting:
        return usual
    if len(fitting) > 1:
        shown = " and ".join(repr(each) for each in fitting)
        raise CorpusError(f"{uri} may be separated by {shown}: put a line such as sep=; before its header")
    return fitting[0]


def _fits(data: bytes, separator: str) -> bool:
    """Whether it makes two cells or more of the header, and as many of the rows below it."""
    try:
        counts = [len(row) for row in islice(_rows(io.BytesIO(data[: 4 << 20]), separator), PROBED_ROWS + 1) if row]
    except csv.Error:
        return False
    if len(counts) < 2 or counts[0] < 2:
        return bool(counts) and counts[0] > 1
    return sum(count == counts[0] for count in counts[1:]) >= AGREEING * (len(counts) - 1)


def _rows(text: BinaryIO, separator: str, *, strict: bool = False) -> Any:
    lines = io.TextIOWrapper(text, encoding="utf-8", errors="replace", newline="")
    return csv.reader(lines, delimiter=separator, strict=strict)


def _header(uri: str, data: bytes, separator: str) -> list[str]:
    try:
        # Arrow passes over empty lines, before the header too.
        names: list[str] = next((row for row in _rows(io.BytesIO(data[:BLOCK_BYTES]), separator) if row), [])
    except csv.Error as error:
        raise CorpusError(f"{uri} cannot be read as CSV: {one_line(error)}") from None
    if len(names) > MAX_COLUMNS:
        raise CorpusError(f"{uri} has {len(names):,} columns, and a table may have {MAX_COLUMNS:,}")
    if not any(name.strip() for name in names):
        raise CorpusError(f"{uri} is empty: its first line must name columns")
    _stripped(uri, names)
    return names


def _stripped(uri: str, names: list[str]) -> list[str]:
    """Names of columns without white space around them; blank ones stay blank.

    Raises:
        CorpusError: two columns have one name.
    """
    stripped = [name.strip() for name in names]
    repeated = sorted(name for name, count in Counter(stripped).items() if name and count > 1)
    if repeated:
        raise CorpusError(f"{uri} repeats the column {repeated[0]!r}; rename one of them")
    return stripped


def _kept_names(table: pa.Table) -> dict[int, str]:
    """Columns by their place, without those that have neither name nor value, as a spreadsheet leaves them behind."""
    kept = {}
    for place, name in enumerate(table.column_names):
        if name:
            kept[place] = name
        elif pc.any(pc.not_equal(pc.utf8_trim_whitespace(table.column(place)), "")).as_py():
            kept[place] = f"column {place + 1}"
    return kept


def _named(read: StringTable, names: dict[int, str]) -> StringTable:
    return replace(read, table=pa.table({name: read.table.column(place) for place, name in names.items()}))


def _require_closed_quotes(uri: str, text: BinaryIO, separator: str, first_line: int, last_line: int) -> None:
    """Read again by the strict rules of RFC 4180: a row over several lines must be well formed.

    Raises:
        CorpusError: one is not; names its first and last line.
    """
    reader = _rows(text, separator, strict=True)
    num_cells, before, is_open = 0, 0, False
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, is_open = None, str(error) == _OPEN_AT_THE_END
        lines = (before + first_line, reader.line_num + first_line - 1)
        before = reader.line_num
        num_cells = num_cells or len(cells or ())
        if lines[0] < lines[1] and (cells is None or len(cells) != num_cells):
            raise CorpusError(
                f"{uri}: the row that begins in line {lines[0]} opens a quotation mark and goes on to line {lines[1]}; "
                'close the mark, or write one that is meant as such twice ("")'
            )
        if cells is None and is_open and lines[0] == lines[1] and reader.line_num >= last_line:
            raise CorpusError(f"{uri}: line {lines[0]}, the last one, opens a quotation mark and never closes it")
