"""Reading samples of a prepared corpus by index, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.errors import CorpusError, StorageError


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample index lives; small enough to travel with every task.

    Attributes:
        corpus: URI of the corpus.
        locations: `(shard path, row group number)` of every row group in manifest order.
        starts: first sample index of every row group plus the total at the end, int64 `[num_row_groups + 1]`.
    """

    corpus: str
    locations: tuple[tuple[str, int], ...]
    starts: np.ndarray

    @classmethod
    def of(cls, corpus: str, manifest: Manifest) -> ShardIndex:
        """The index of a manifest (or of one split of it)."""
        starts = np.concatenate([[0], np.cumsum(manifest.row_group_sizes())])
        return cls(storage.normalise(corpus), tuple(manifest.row_group_locations()), starts)

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
        uri = storage.join(self.corpus, path)
        table = read_row_group(uri, number, columns)
        expected = int(self.starts[group + 1] - self.starts[group])
        if table.num_rows != expected:
            raise CorpusError(f"{uri} row group {number} has {table.num_rows} rows, the manifest says {expected}")
        return table

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Every row group in manifest order."""
        for group in range(len(self.locations)):
            yield self.read_row_group(group, columns)


def read_row_group(uri: str, number: int, columns: Sequence[str]) -> pa.Table:
    """Columns of one row group of the shard at `uri`; open shards are remembered by the process.

    Raises:
        CorpusError: the shard is gone or damaged.
    """
    try:
        return storage.with_retries(
            lambda: _open(uri).read_row_group(number, columns=list(columns), use_threads=False), uri
        )
    except FileNotFoundError:
        raise CorpusError(f"{uri} is in the manifest but not there; restore it or prepare again") from None
    except (StorageError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(f"cannot read row group {number} of {uri} ({reason}); restore it or prepare again") from error


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
    pq.write_table(schema.empty_table(), empty)
    stored = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    return [stored.column(number).path for number in range(len(stored))]


@lru_cache(maxsize=32)
def _open(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(storage.open_file(uri), pre_buffer=not storage.is_local(uri))
