"""A long Parquet table cut into pieces at its row groups, so that many readers can read it side by side.

    group group group ▏ group ▏ rows of a large group ▏ rows of it ▏ group

A piece of whole row groups is their bytes as they lie in the file, with the file's footer; its reader unpacks them. A
row group that is too large for one reader is unpacked here, a little at a time as its pieces are asked for, and their
readers get cells. So are all row groups where the footer is too long to go with every piece.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import parquet_bounds
from dermray.errors import CorpusError, StorageError
from dermray.raw.cutting import CutTable
from dermray.raw.opened import Digested, changed_ns
from dermray.raw.tables import MAX_ROWS, StringTable, of_plain_columns, parquet_blocks

MAX_FOOTER_BYTES = 1 << 20
# Row groups of more are unpacked here: times what a piece comes to.
MOST_TIMES = 4
# Arrow looks so far, and less, behind the columns of files of early writers (PARQUET-816).
BEHIND_BYTES = 128

# Numbers of row groups that follow each other, but for those without rows.
Groups = tuple[int, ...]


class PieceSize(NamedTuple):
    """What a piece comes to, less a row group: bytes as its footer counts them, not compressed, and rows."""

    num_bytes: int
    num_rows: int


@dataclass(frozen=True)
class GroupsPiece:
    """Row groups as they lie in their file.

    Attributes:
        uri: of the file.
        metadata: its footer.
        groups: which ones.
        begin: where in the file `data` begins.
        size: bytes of the file.
        data: bytes of the file, those of the row groups among them.
    """

    uri: str
    metadata: pq.FileMetaData
    groups: Groups
    begin: int
    size: int
    data: bytes

    def blocks(self) -> Iterator[StringTable]:
        """As `Piece.blocks`."""
        with of_plain_columns(self.uri):
            file = _Part(self.data, self.begin, self.size)
            parquet = pq.ParquetFile(
                file,
                metadata=self.metadata,
                read_dictionary=parquet_bounds.repeating_texts(self.metadata),
                page_checksum_verification=True,
            )
        yield from parquet_blocks(self.uri, parquet, self.groups)


@dataclass(frozen=True)
class RowsPiece:
    """Rows as strings, in Arrow's format for streams."""

    uri: str
    stream: bytes

    def blocks(self) -> Iterator[StringTable]:
        """As `Piece.blocks`."""
        table = pa.ipc.open_stream(self.stream).read_all()
        numbers = pa.array(range(1, table.num_rows + 1), pa.int64())
        for begin in range(0, table.num_rows, MAX_ROWS):
            yield StringTable(self.uri, table.slice(begin, MAX_ROWS), numbers.slice(begin, MAX_ROWS), ())


class _Part(io.RawIOBase):
    """A file of which only some bytes are there."""

    def __init__(self, data: bytes, begin: int, size: int) -> None:
        super().__init__()
        self._data, self._begin, self._size, self._place = data, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        place = self._place - self._begin
        if place < 0:
            raise ValueError("a column lies elsewhere than its footer says")
        data = self._data[place:] if size < 0 else self._data[place : place + size]
        self._place += len(data)
        return data


@dataclass(frozen=True)
class _Groups:
    """Row groups where they lie; pickled, a `GroupsPiece`."""

    table: CutParquet
    groups: Groups
    begin: int
    end: int

    def __reduce__(self) -> tuple[Any, ...]:
        table, data = self.table, self.table.bytes_between(self.begin, self.end)
        return GroupsPiece, (table.uri, table.parquet.metadata, self.groups, self.begin, table.file.num_bytes, data)


@dataclass(frozen=True)
class _Rows:
    """Some of the rows of row groups; pickled, a `RowsPiece`."""

    table: CutParquet
    groups: Groups
    begin: int
    end: int

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            rows = self.table.unpacked.rows(self.groups, self.begin, self.end)
        except OSError as error:
            raise StorageError(f"{self.table.uri}: {' '.join(str(error).split())}") from None
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return RowsPiece, (self.table.uri, sink.getvalue())


class _Unpacked:
    """Rows of a file's row groups as strings. Those that follow the last ones go on there, others begin anew."""

    def __init__(self, uri: str, parquet: pq.ParquetFile) -> None:
        self._uri, self._parquet = uri, parquet
        self._groups: Groups = ()
        self._place = 0
        self._blocks: Iterator[StringTable] = iter(())
        self._held = pa.table({})

    def rows(self, groups: Groups, begin: int, end: int) -> pa.Table:
        """Rows `begin` to `end` of those of some row groups, strings.

        Raises:
            CorpusError: they are damaged, or are not so many as the footer says.
            OSError: they cannot be read.
        """
        if self._groups != groups or self._place > begin:
            self._blocks = parquet_blocks(self._uri, self._parquet, groups)
            self._groups, self._place, self._held = groups, 0, pa.table({})
        while self._place < begin:
            self._next(begin - self._place)
        parts = []
        while self._place < end:
            parts.append(self._next(end - self._place))
        if end == _size(self._parquet.metadata, groups)[1]:
            # The reader sees only behind the last rows that the footer says whether there are more.
            next(self._blocks, None)
        return pa.concat_tables(parts)

    def _next(self, most: int) -> pa.Table:
        if not self._held.num_rows:
            block = next(self._blocks, None)
            if block is None:
                raise CorpusError(f"{self._uri}: a row group has fewer rows than its footer says")
            self._held = block.table
        rows, self._held = self._held.slice(0, most), self._held.slice(most)
        self._place += rows.num_rows
        return rows


@dataclass(frozen=True)
class CutParquet(CutTable):
    """A Parquet table that is cut.

    Attributes:
        parquet: the table.
        size: of a piece.
        unpacked: what is unpacked here.
    """

    parquet: pq.ParquetFile
    size: PieceSize
    unpacked: _Unpacked = field(repr=False)

    def pieces(self) -> Sequence[_Groups | _Rows]:
        """As `CutTable.pieces`."""
        metadata = self.parquet.metadata
        if metadata.serialized_size > MAX_FOOTER_BYTES:
            return list(self._of_rows(_with_rows(metadata)))
        return [piece for groups in _runs(metadata, self.size) for piece in self._of_groups(groups)]

    def _of_groups(self, groups: Groups) -> Iterator[_Groups | _Rows]:
        """One piece, or several where it is too large for one reader, or its bytes are elsewhere."""
        most = self.size.num_bytes * MOST_TIMES
        num_bytes, num_rows = _size(self.parquet.metadata, groups)
        begin, end = _between(self.parquet.metadata, groups)
        end = min(end + BEHIND_BYTES, self.file.num_bytes)
        if num_bytes > most or num_rows > self.size.num_rows * MOST_TIMES or not 0 <= begin < end <= begin + most:
            yield from self._of_rows(groups)
        else:
            yield _Groups(self, groups, begin, end)

    def _of_rows(self, groups: Groups) -> Iterator[_Rows]:
        num_bytes, num_rows = _size(self.parquet.metadata, groups)
        step = max(1, min(self.size.num_rows, int(self.size.num_bytes * num_rows / max(1, num_bytes))))
        for begin in range(0, num_rows, step):
            yield _Rows(self, groups, begin, min(begin + step, num_rows))


def cut_parquet(uri: str, file: BinaryIO, size: PieceSize) -> CutParquet | None:
    """A Parquet table cut into pieces; None where it has no row, or one reader must tell its columns: one has no name.

    Args:
        uri: where it is from.
        file: a local one, at its beginning.
        size: of a piece.

    Raises:
        CorpusError: it is none.
        OSError: it cannot be read.
    """
    since_ns, digested = changed_ns(file), Digested(file)
    digested.read_through()
    with of_plain_columns(uri):
        parquet = parquet_bounds.streamed(file)
        names = tuple(parquet.schema_arrow.names)
    if not names or not all(name.strip() for name in names) or not parquet.metadata.num_rows:
        return None
    return CutParquet(uri, names, digested, since_ns, parquet, size, _Unpacked(uri, parquet))


def _with_rows(metadata: pq.FileMetaData) -> Groups:
    """The row groups that have any; the others may lie nowhere."""
    return tuple(number for number in range(metadata.num_row_groups) if metadata.row_group(number).num_rows)


def _runs(metadata: pq.FileMetaData, size: PieceSize) -> Iterator[Groups]:
    """Row groups that have rows, as many together as come to a piece; a larger one is alone."""
    held: Groups = ()
    num_bytes = num_rows = 0
    for number in _with_rows(metadata):
        more_bytes, more_rows = _size(metadata, (number,))
        if held and (num_bytes + more_bytes > size.num_bytes or num_rows + more_rows > size.num_rows):
            yield held
            held, num_bytes, num_rows = (), 0, 0
        held, num_bytes, num_rows = (*held, number), num_bytes + more_bytes, num_rows + more_rows
    if held:
        yield held


def _size(metadata: pq.FileMetaData, groups: Groups) -> tuple[int, int]:
    """Bytes and rows of row groups, as the footer says."""
    each = [metadata.row_group(number) for number in groups]
    return sum(group.total_byte_size for group in each), sum(group.num_rows for group in each)


def _between(metadata: pq.FileMetaData, groups: Groups) -> tuple[int, int]:
    """Where in the file the columns of row groups begin and end, as the footer says."""
    begins, ends = [], []
    for group in map(metadata.row_group, groups):
        for column in map(group.column, range(group.num_columns)):
            begins.append(min(filter(None, (column.data_page_offset, column.dictionary_page_offset)), default=0))
            ends.append(begins[-1] + column.total_compressed_size)
    return min(begins), max(ends)
