"""Side tables of a corpus: what only some tasks know of its samples (masks, survival times, facts), beside the shards.

A side table has one Parquet file for each shard, with a row for each of its samples in their order and with its row
groups, so that what is said of a row group of samples is one row group too, and no random read:

    data/train-00000-1f3c….parquet            sample_id image captions …      row groups 128 128 57
    sides/masks/train-00000-77ab….parquet     sample_id mask                  row groups 128 128 57

A sample of which the table says nothing has nulls there. Beside the columns of the samples its column `mask` is called
`sides.masks.mask`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from dermray import storage
from dermray.corpus.manifest import Manifest, SideKind, SideTable
from dermray.corpus.shards import ShardIndex, Verify
from dermray.errors import CorpusError

ID = "sample_id"
FOLDER = "sides"
# How names of their columns begin among those of the samples.
AMONG_COLUMNS = "sides."
_TYPES: Mapping[SideKind, pa.DataType] = {"text": pa.string(), "number": pa.float64(), "mask": pa.binary()}


def schema_of(columns: Mapping[str, SideKind]) -> pa.Schema:
    """The schema of a side table's files: the sample's id, then these columns."""
    return pa.schema(
        [pa.field(ID, pa.string(), nullable=False), *(pa.field(name, _TYPES[kind]) for name, kind in columns.items())]
    )


def fields_of(table: SideTable) -> list[pa.Field]:
    """Its columns as they are called among those of the samples."""
    return [pa.field(f"{AMONG_COLUMNS}{table.name}.{name}", _TYPES[kind]) for name, kind in table.columns.items()]


def in_words(tables: Iterable[SideTable]) -> str:
    """Names of side tables with their columns: `masks (mask), times (days, state)`."""
    return ", ".join(f"{table.name} ({', '.join(table.columns)})" for table in tables)


def side_table(corpus: str, manifest: Manifest, name: str) -> SideTable:
    """The side table of this name.

    Raises:
        CorpusError: the corpus has none; the message names those that it has.
    """
    found = next((table for table in manifest.side_tables if table.name == name), None)
    if found is None:
        known = ", ".join(table.name for table in manifest.side_tables) or "none"
        raise CorpusError(
            f"{corpus} has no side table {name!r}; it has: {known}; prepare it with side_tables.{name}.uri="
        )
    return found


def side_index(corpus: str, manifest: Manifest, name: str, verify: Verify = "auto") -> ShardIndex:
    """What reads a side table as `ShardIndex.of(corpus, manifest)` reads the samples: same indices, same row groups.

    `read_row_group(5, ["mask"])` gives the masks of the samples that `ShardIndex.read_row_group(5, …)` gives.

    Raises:
        CorpusError: the corpus has no such table.
    """
    table = side_table(corpus, manifest, name)
    own = {shard.path: side for shard, side in zip(manifest.shards, table.shards, strict=True)}
    samples = ShardIndex.of(corpus, manifest, "pages")
    locations = tuple((own[path].path, number) for path, number in samples.locations)
    whole = verify == "digests" or (verify == "auto" and storage.is_local(corpus))
    digests = {side.path: side.sha256 for side in table.shards} if whole else {}
    return ShardIndex(samples.corpus, locations, samples.starts, digests)


class RowGroupReader(Protocol):
    """What a reader needs to know of samples that lie in row groups, numbered from 0 on."""

    @property
    def corpus(self) -> str:
        """URI, for messages."""
        ...

    @property
    def starts(self) -> np.ndarray:
        """First sample of every row group plus the total at the end, int64 `[num_row_groups + 1]`."""
        ...

    def read_row_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of one row group.

        Raises:
            CorpusError: its shard is shorter than its manifest says, damaged, or gone.
        """
        ...


@dataclass(frozen=True)
class SidedIndex:
    """Where samples lie, and what side tables say of them.

    Attributes:
        samples: the index of the samples.
        tables: that of each side table, by its name.
    """

    samples: ShardIndex
    tables: Mapping[str, ShardIndex]

    @property
    def corpus(self) -> str:
        """URI of the corpus."""
        return self.samples.corpus

    @property
    def starts(self) -> np.ndarray:
        """As `ShardIndex.starts`."""
        return self.samples.starts

    def read_row_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """One row group with columns of the samples and, as `sides.TABLE.COLUMN`, of side tables.

        Raises:
            CorpusError: a file is shorter than the manifest says, damaged, or gone, or has other samples.
        """
        own = [name for name in columns if not name.startswith(AMONG_COLUMNS)]
        table = self.samples.read_row_group(group, list(dict.fromkeys([*own, ID])))
        for name, wanted in _by_table(columns).items():
            beside = self.tables[name].read_row_group(group, [ID, *wanted])
            path, number = self.tables[name].locations[group]
            if beside.column_names != [ID, *wanted] or beside[ID] != table[ID]:
                raise CorpusError(
                    f"{self.corpus}: row group {number} of {path} is not about the samples of its shard, or lacks "
                    "columns that the manifest names; prepare the corpus again"
                )
            for column in wanted:
                table = table.append_column(f"{AMONG_COLUMNS}{name}.{column}", beside[column])
        return table if ID in columns else table.drop_columns(ID)


def index_of(corpus: str, manifest: Manifest, columns: Sequence[str], verify: Verify = "auto") -> RowGroupReader:
    """The index of a manifest (or of one split of it), with the side tables of which there are columns.

    Raises:
        CorpusError: the corpus has no such table, or the table no such column.
    """
    require_columns(corpus, manifest, columns)
    samples, asked = ShardIndex.of(corpus, manifest, verify), _by_table(columns)
    return (
        SidedIndex(samples, {name: side_index(corpus, manifest, name, verify) for name in asked}) if asked else samples
    )


def require_columns(corpus: str, manifest: Manifest, columns: Sequence[str]) -> None:
    """Refuse what no side table of the corpus has of some columns; those of the samples are not looked at.

    Raises:
        CorpusError: the corpus has no such table, or the table no such column; names both, and what there is.
    """
    known = {table.name: table.columns for table in manifest.side_tables}
    for name, wanted in _by_table(columns).items():
        asked = ", ".join(f"{AMONG_COLUMNS}{name}.{column}" for column in wanted)
        if name not in known:
            there_is = in_words(manifest.side_tables) or "none"
            raise CorpusError(
                f"{corpus} has no side table {name!r}, of which {asked} is wanted; it has: {there_is}; prepare it with "
                f"side_tables.{name}.uri="
            )
        if missing := [column for column in wanted if column not in known[name]]:
            raise CorpusError(
                f"{corpus}: the side table {name!r} has no column {missing[0]!r}, as {asked} is wanted; it has: "
                f"{', '.join(known[name])}"
            )


def _by_table(columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of side tables, by table: `["image", "sides.masks.mask"]` → `{"masks": ["mask"]}`."""
    asked: dict[str, list[str]] = defaultdict(list)
    for name in columns:
        if name.startswith(AMONG_COLUMNS):
            table, _, column = name.removeprefix(AMONG_COLUMNS).partition(".")
            asked[table].append(column)
    return {table: list(dict.fromkeys(names)) for table, names in asked.items()}
