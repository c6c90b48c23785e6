"""A source's table and its disease tree under the input root. Of each file the request notes the digest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from dermray import storage
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.errors import CorpusError, StorageError
from dermray.raw.cutting import CutText, cut
from dermray.raw.opened import Digested, open_once
from dermray.raw.sources.rows import RawTable, SourceRequest
from dermray.raw.tables import MAX_TABLE_BYTES, StringTable, joined, parse, parse_text

__all__ = ["Blocks", "StringTable", "joined", "read_beside", "read_blocks", "read_table", "read_tree"]

# A table of text of fewer bytes is read by the driver in a few seconds, and Ray is not asked.
TASKS_FROM_BYTES = 256 << 20
PIECE_BYTES = 16 << 20


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
    pieces: CutText | None = None

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
            names = [name.strip() for name in pieces.columns.names]
            nothing = pa.schema([(name, pa.string()) for name in names]).empty_table()
            header = StringTable(uri, nothing, pa.array([], pa.int64()), ())
            return Blocks(header, _limited(request, uri), pieces)
        return Blocks.of(_limited(request, uri))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(f"{uri} does not exist: the table of the corpus is expected there (see table=)") from None


def _pieces(request: SourceRequest, uri: str) -> CutText | None:
    """The pieces of a table that tasks are to read."""
    is_text = request.tasks is not None and request.limit is None and not uri.endswith(".parquet")
    if not is_text or storage.size_bytes(uri) < TASKS_FROM_BYTES:
        return None
    try:
        return cut(uri, open_once(uri, max_bytes=MAX_TABLE_BYTES), PIECE_BYTES)
    except OSError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from None


def _limited(request: SourceRequest, uri: str) -> Iterator[StringTable]:
    for number, each in enumerate(_blocks(request, uri)):
        block = each.first(request.limit)
        request.rows_met[uri] += block.num_rows
        if block.num_rows or not number:
            yield block


def _blocks(request: SourceRequest, uri: str) -> Iterator[StringTable]:
    if uri.endswith(".parquet"):
        yield parse(uri, _read_whole(request, uri))
        return
    digested: list[Digested] = []

    def opened() -> Digested:
        digested.append(Digested(open_once(uri, max_bytes=MAX_TABLE_BYTES)))
        return digested[-1]

    try:
        yield from parse_text(uri, opened)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from None
    request.tables[uri] = RawTable(uri, digested[0].num_bytes, digested[0].sha256)


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
