"""Reading samples of a prepared corpus by index, one row group at a time, and never other content than was written.

Every page that is read is checked against its own checksum; shards of earlier builds have none. The digests of the
manifest cover the rest: a shard is compared with its digest before a process first reads from it, if that is wanted.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import object_stores, parquet_bounds, storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import MODALITY
from dermray.errors import CorpusError, StorageError

# Whether digests of shards are checked: always, never (page checksums alone), or where that needs no network.
Verify: TypeAlias = Literal["auto", "digests", "pages"]

# Shards that this process has found to be what their manifest says, and what keeps it from looking twice at once.
_whole: set[tuple[str, str]] = set()
_looking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample index lives; small enough to travel with every task.

    Attributes:
        corpus: URI of the corpus.
        locations: `(shard path, row group number)` of every row group in manifest order.
        starts: first sample index of every row group plus the total at the end, int64 `[num_row_groups + 1]`.
        digests: SHA-256 (hex) of shards that must fit before they are read, by path.
    """

    corpus: str
    locations: tuple[tuple[str, int], ...]
    starts: np.ndarray
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: str, manifest: Manifest, verify: Verify = "auto") -> ShardIndex:
        """The index of a manifest (or of one split of it)."""
        starts = np.concatenate([[0], np.cumsum(manifest.row_group_sizes())])
        locations = tuple(manifest.row_group_locations())
        return cls(storage.normalise(corpus), locations, starts, digests_to_check(corpus, manifest, verify))

    def read(self, samples: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows of the given sample indices in the given order; each row group is read once.

        Raises:
            CorpusError: a shard is shorter than its manifest says, damaged, or gone.
        """
        groups = np.searchsorted(self.starts, samples, side="right") - 1
        tables, offsets, total = [], {}, 0
        for group in np.unique(groups):
            table = self.read_row_group(int(group), columns)
            offsets[int(group)] = total
            total += table.num_rows
            tables.append(table)
        positions = np.array([offsets[int(g)] for g in groups], dtype=np.int64) + samples - self.starts[groups]
        return pa.concat_tables(tables).take(pa.array(positions))

    def read_row_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """One row group by its number in manifest order."""
        path, number = self.locations[group]
        uri = storage.inside(self.corpus, path)
        table = read_row_group(uri, number, columns, sha256=self.digests.get(path))
        expected = int(self.starts[group + 1] - self.starts[group])
        if table.num_rows != expected:
            raise CorpusError(f"{uri} row group {number} has {table.num_rows} rows, the manifest says {expected}")
        return table

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Every row group in manifest order."""
        for group in range(len(self.locations)):
            yield self.read_row_group(group, columns)


def digests_to_check(corpus: str, manifest: Manifest, verify: Verify = "auto") -> dict[str, str]:
    """SHA-256 (hex) of the shards whose digest is to be checked, by path.

    `auto` checks none of a corpus in an object store: each process would fetch each shard whole, where it may need a
    row group of it.
    """
    if verify == "pages" or (verify == "auto" and not storage.is_local(corpus)):
        return {}
    return {shard.path: shard.sha256 for shard in manifest.shards}


def read_row_group(uri: str, number: int, columns: Sequence[str], *, sha256: str | None = None) -> pa.Table:
    """Columns of one row group of the shard at `uri`; open shards are remembered by the process.

    `modality` is null for all samples of a shard that has no such column.

    Args:
        sha256: what the digest (hex) of the whole shard must be; checked once in a process.

    Raises:
        CorpusError: the shard is gone or damaged.
        StorageError: the store refuses.
    """
    try:
        if sha256 is not None:
            _require_digest(uri, sha256)
        table = storage.with_retries(
            lambda: _open(uri).read_row_group(number, columns=list(columns), use_threads=False), uri
        )
        if MODALITY.name in columns and MODALITY.name not in table.column_names:
            table = table.append_column(MODALITY, pa.nulls(table.num_rows, MODALITY.type))
        return table
    except FileNotFoundError:
        raise CorpusError(f"{uri} is in the manifest but not there; restore it or prepare again") from None
    # Names and texts that are no UTF-8 are errors of Python's, not of Arrow's.
    except (StorageError, pa.ArrowException, ValueError) as error:
        cause = error.__cause__
        if isinstance(error, StorageError) and isinstance(cause, Exception) and object_stores.is_refusal(cause):
            # Nothing is wrong with the shard, and another attempt may well read it.
            raise
        reason = " ".join(str(error).split())
        raise CorpusError(f"cannot read row group {number} of {uri} ({reason}); restore it or prepare again") from error


def _require_digest(uri: str, sha256: str) -> None:
    with _looking[uri]:
        if (uri, sha256) in _whole:
            return
        found = storage.sha256(uri)
        if found != sha256:
            raise StorageError(f"its SHA-256 is {found[:12]}…, the manifest says {sha256[:12]}…")
        _whole.add((uri, sha256))


def label_counts(corpus: str, manifest: Manifest) -> dict[str, int]:
    """How many samples carry each ontology node, most frequent first, ties by name."""
    counts: dict[str, int] = {}
    for table in ShardIndex.of(corpus, manifest).row_groups(["labels"]):
        for labels in table["labels"].to_pylist():
            for label in labels:
                counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def stored_columns(schema: pa.Schema) -> list[str]:
    """Dotted names of the Parquet columns that a schema is stored in."""
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty, write_page_checksum=True)
    stored = pq.ParquetFile(pa.BufferReader(empty.getvalue()), page_checksum_verification=True).schema
    return [stored.column(number).path for number in range(len(stored))]


@lru_cache(maxsize=32)
def _open(uri: str) -> pq.ParquetFile:
    file = pq.ParquetFile(storage.open_file(uri), pre_buffer=not storage.is_local(uri), page_checksum_verification=True)
    parquet_bounds.require_bounded(file.metadata)
    return file
