"""Side tables of a corpus: what only some tasks know of its samples (masks, survival times, facts), beside the shards.

A side table has one Parquet file for each shard, with a row for each of its samples in their order and with its row
groups, so that what is said of a row group of samples is one row group too, and no random read:

    data/train-00000-1f3c….parquet            sample_id image captions …      row groups 128 128 57
    sides/masks/train-00000-77ab….parquet     sample_id mask                  row groups 128 128 57

A sample of which the table says nothing has nulls there.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from dermray import storage
from dermray.corpus.manifest import Manifest, SideKind, SideTable
from dermray.corpus.shards import ShardIndex, Verify
from dermray.errors import CorpusError

ID = "sample_id"
FOLDER = "sides"
_TYPES: Mapping[SideKind, pa.DataType] = {"text": pa.string(), "number": pa.float64(), "mask": pa.binary()}


def schema_of(columns: Mapping[str, SideKind]) -> pa.Schema:
    """The schema of a side table's files: the sample's id, then these columns."""
    return pa.schema(
        [pa.field(ID, pa.string(), nullable=False), *(pa.field(name, _TYPES[kind]) for name, kind in columns.items())]
    )


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
