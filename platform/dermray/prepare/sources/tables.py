"""A source's table and its disease tree under the input root. Of each file the request notes the digest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from dermray import storage
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.errors import CorpusError, StorageError
from dermray.prepare.sources.rows import RawTable, SourceRequest
from dermray.raw.opened import Digested, open_once
from dermray.raw.tables import MAX_TABLE_BYTES, StringTable, joined, parse, parse_text

__all__ = ["StringTable", "joined", "read_beside", "read_blocks", "read_table", "read_tree"]


def read_table(request: SourceRequest, *defaults: str) -> StringTable:
    """Read `request.table`, or the first of the source's own file names that is there, under the input root.

    Raises:
        CorpusError: the table is absent, or as `dermray.raw.tables.parse`.
        StorageError: it cannot be read.
    """
    return joined(read_blocks(request, *defaults))


def read_blocks(request: SourceRequest, *defaults: str) -> Iterator[StringTable]:
    """The same in blocks of rows, one at least, so that a table needs not be in memory whole.

    Raises:
        CorpusError, StorageError: as `read_table`, perhaps after some blocks.
    """
    uris = [storage.join(request.input, name) for name in ([request.table] if request.table else defaults)]
    uri = uris[0] if len(uris) == 1 else next((each for each in uris if storage.exists(each)), uris[0])
    try:
        blocks = _blocks(request, uri)
        first = next(blocks)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(f"{uri} does not exist: the table of the corpus is expected there (see table=)") from None
    request.rows_met[uri] = 0
    for number, each in enumerate(itertools.chain([first], blocks)):
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
