"""One small reader per published layout, and the registry of them.

A reader is a function `SourceRequest -> RawRows`. To add one: write a module, name its function here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from dermray.corpus.accounts import require_balance
from dermray.raw.sources import (
    csv,
    derm1m,
    derm1m_agentaug,
    derm7pt,
    fitzpatrick17k,
    ham10000,
    image_folder,
    isic,
    make_table,
    pad_ufes_20,
    parquet,
    skincap,
    skincon,
    webdataset,
)
from dermray.raw.sources.joining import without_ambiguous
from dermray.raw.sources.rows import RawRows, SourceRequest

Reader = Callable[[SourceRequest], RawRows]

READERS: dict[str, Reader] = {
    "csv": csv.read,
    "derm1m": derm1m.read,
    "derm1m_agentaug": derm1m_agentaug.read,
    "derm7pt": derm7pt.read,
    "fitzpatrick17k": fitzpatrick17k.read,
    "ham10000": ham10000.read,
    "image_folder": image_folder.read,
    "isic": isic.read,
    "make_table": make_table.read,
    "pad_ufes_20": pad_ufes_20.read,
    "parquet": parquet.read,
    "skincap": skincap.read,
    "skincon": skincon.read,
    "webdataset": webdataset.read,
}


# Sources of files and not of a table: nobody sees their rows numbered, so that messages name the files.
OF_FILES = frozenset({"image_folder", "webdataset", "parquet"})


def read(source: str, request: SourceRequest) -> RawRows:
    """Read a source's rows; those whose image may be one of several files are dropped.

    Raises:
        AssertionError: the reader has lost rows, or made some up.
        CorpusError, OntologyError, StorageError: as the reader.
    """
    raw = without_ambiguous(READERS[source](request), request.findings.ambiguous)
    reasons = Counter(row.reason for row in raw.dropped)
    require_balance(f"source {source}", request.rows_met.total(), raw.table.num_rows, reasons)
    return raw


__all__ = ["OF_FILES", "READERS", "RawRows", "Reader", "SourceRequest", "read"]
