"""A source's table and its disease tree under the input root. Of each file the request notes the digest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import storage
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.errors import CorpusError, StorageError
from dermray.raw.cutting import CutTable, cut
from dermray.raw.cutting_parquet import PieceSize, cut_parquet
from dermray.raw.opened import Digested, changed_ns, open_once, require_unchanged
from dermray.raw.sources.rows import RawTable, SourceRequest
from dermray.raw.tables import (
    MAX_TABLE_BYTES,
    PARQUET,
    StringTable,
    joined,
    parse_parquet,
    parse_text,
)

__all__ = ["Blocks", "StringTable", "joined", "read_beside", "read_blocks", "read_table", "read_tree"]

# A table of text of fewer bytes, or of Parquet of fewer bytes unpacked and fewer rows, is read by the driver in a few
# seconds, and Ray is not asked.
TASKS_FROM_BYTES, TASKS_FROM_ROWS = 256 << 20, 400_000
PIECE_BYTES, PIECE_ROWS = 16 << 20, 32_768


def read_table(request: SourceRequest, *defaults: str) -> StringTable:
    """Read `request.table`, or the first of the source's own file names that is there, under the input root.

    Raises:
        CorpusError: the table is absent, or as `dermray.raw.tables.parse`.
        StorageError: it cannot be read.
    """
    return joined(read_blocks(replace(request, tasks=None), *defaults).blocks)


@dataclass(frozen=True)
class Blocks:
    """A table in blocks of rows, one at least, to be gone through once.

    Attributes:
        first: its first block; of a table that is cut into pieces only the columns.
        blocks: all of them.
        pieces: of a long table that tasks may read; they hold the same rows.
    """

    first: StringTable
    blocks: Iterable[StringTable]
    pieces: CutTable | None = None

    @classmethod
    def of(cls, blocks: Iterable[StringTable]) -> Blocks:
        """Blocks that are read here."""
        rest = iter(blocks)
        first = next(rest)
        return cls(first, itertools.chain([first], rest))


def read_blocks(request: SourceRequest, *defaults: str) -> Blocks:
    """The same in blocks of rows, so that a table needs not be in memory whole.

    Raises:
        CorpusError, StorageError: as `read_table`, perhaps after some blocks.
    """
    uris = [storage.join(request.input, name) for name in ([request.table] if request.table else defaults)]
    uri = uris[0] if len(uris) == 1 else next((each for each in uris if storage.exists(each)), uris[0])
    try:
        if (pieces := _pieces(request, uri)) is not None:
            names = [name.strip() for name in pieces.names]
            nothing = pa.schema([(name, pa.string()) for name in names]).empty_table()
            header = StringTable(uri, nothing, pa.array([], pa.int64()), ())
            return Blocks(header, _limited(request, uri), pieces)
        return Blocks.of(_limited(request, uri))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(f"{uri} does not exist: the table of the corpus is expected there (see table=)") from None


def _pieces(request: SourceRequest, uri: str) -> CutTable | None:
    """The pieces of a table that tasks are to read."""
    if request.tasks is None or request.limit is not None:
        return None
    try:
        if uri.endswith(PARQUET):
            if not _is_long_parquet(uri):
                return None
            return cut_parquet(uri, open_once(uri, max_bytes=MAX_TABLE_BYTES), PieceSize(PIECE_BYTES, PIECE_ROWS))
        if storage.size_bytes(uri) < TASKS_FROM_BYTES:
            return None
        return cut(uri, open_once(uri, max_bytes=MAX_TABLE_BYTES), PIECE_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from None


def _is_long_parquet(uri: str) -> bool:
    """Whether it is, by its footer, of which an object gives no more; one that cannot be read is not."""
    try:
        with storage.open_file(uri) as file:
            metadata = pq.read_metadata(file)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except (pa.ArrowException, OSError, ValueError):
        # The one reader tries again, or says what is wrong.
        return False
    num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return num_bytes >= TASKS_FROM_BYTES or metadata.num_rows >= TASKS_FROM_ROWS


def _limited(request: SourceRequest, uri: str) -> Iterator[StringTable]:
    for number, each in enumerate(_blocks(request, uri)):
        block = each.first(request.limit)
        request.rows_met[uri] += block.num_rows
        if block.num_rows or not number:
            yield block


def _blocks(request: SourceRequest, uri: str) -> Iterator[StringTable]:
    digested: list[Digested] = []

    def opened() -> Digested:
        digested.append(Digested(open_once(uri, max_bytes=MAX_TABLE_BYTES)))
        return digested[-1]

    try:
        if uri.endswith(PARQUET):
            with opened() as file:
                yield from _parquet_blocks(uri, file)
        else:
            yield from parse_text(uri, opened)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from None
    request.tables[uri] = RawTable(uri, digested[0].num_bytes, digested[0].sha256)


def _parquet_blocks(uri: str, file: Digested) -> Iterator[StringTable]:
    """The rows of a Parquet table, which is read to its end for its digest, and then wherever they lie."""
    since_ns = changed_ns(file)
    file.read_through()
    yield from parse_parquet(uri, file.plain)
    require_unchanged(uri, file, since_ns)


def read_beside(request: SourceRequest, name: str) -> StringTable:
    """Read another table of the source, whose rows become no samples; its malformed rows are counted as not used.

    Raises:
        CorpusError: as `read_table`.
    """
    table = read_table(request.beside(name))
    if table.dropped:
        request.findings.unused[f"malformed rows of {name}"] += len(table.dropped)
    return table


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
