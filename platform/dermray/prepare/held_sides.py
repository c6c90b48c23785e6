"""What a corpus's side tables say of samples of other sources, when one more source joins or one comes again.

A source's own tables say what is said of its samples; of the others' everything stays, found by the sample's id. A
sample that several sources have brought in is that of the first, whose name it bears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.manifest import Manifest, SideKind, SideTable
from dermray.errors import CorpusError
from dermray.prepare.digests import distinct, flat, is_among
from dermray.prepare.generations import CommittedCorpus, identity
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.sides import Joined, SidePlace, SideRows


class HeldPlace(NamedTuple):
    """Where a sample is: number of the shard, of the row group in it, and of the row in that."""

    shard: int
    group: int
    row: int


@dataclass(frozen=True)
class HeldSides:
    """The side tables that are there.

    Attributes:
        output: URI of the corpus.
        tables: as they were committed last.
        places: of the samples of other sources, by id.
        brought: from the first generation to the one that is being made, whether it is of the source itself, and the
            digests of the images that it has brought in, ascending uint64 `[N]`.
    """

    output: str
    tables: tuple[SideTable, ...]
    places: Mapping[str, HeldPlace]
    brought: tuple[tuple[bool, np.ndarray], ...]

    def is_ours(self, known: pa.ChunkedArray) -> np.ndarray:
        """Whether samples, by the digests of their images (lists of uint64), are the source's own, bool `[N]`."""
        return is_ours(self.brought, known)

    def beside(self, joined: Mapping[str, Joined], final: Sequence[ShardRecord]) -> dict[str, Joined]:
        """The side tables of a source, with what stays of those that are there.

        Raises:
            AssertionError: a sample of another source is in the corpus no more: a fault of ours.
            CorpusError: a column is of another kind there.
        """
        shards = [(record.shard, record.notes["sample_id"].to_pylist()) for record in final if record.shard is not None]
        gone = self.places.keys() - {each for _, ids in shards for each in ids}
        assert not gone, f"a committed sample always stays, and {len(gone)} of {self.output} are gone"
        found = dict(joined)
        for table in self.tables:
            none = tuple(SideRows(table.name, shard, {}, {}) for shard, _ in shards)
            own = joined.get(table.name) or Joined(self.output, 0, none, (), {})
            kinds = _both(table, own.kinds)
            parts = tuple(
                replace(rows, kinds=kinds, kept=self._kept(table, ids))
                for rows, (_, ids) in zip(own.shards, shards, strict=True)
            )
            found[table.name] = replace(own, shards=parts, kinds=kinds)
        return found

    def _kept(self, table: SideTable, ids: Sequence[str]) -> dict[int, SidePlace]:
        """The rows that stay of those beside a shard with these samples, by their place in it."""
        kept = {at: self.places[each] for at, each in enumerate(ids) if each in self.places}
        return {at: SidePlace(table.shards[place.shard].path, place.group, place.row) for at, place in kept.items()}


def _both(table: SideTable, own: Mapping[str, SideKind]) -> dict[str, SideKind]:
    """Columns of a side table as it is and as a source has it."""
    for name, kind in own.items():
        if table.columns.get(name, kind) != kind:
            raise CorpusError(
                f"side_tables.{table.name}: the column {name!r} is a {kind} here, and a {table.columns[name]} in the "
                "corpus; give the table another name"
            )
    return {**table.columns, **own}


def held_sides(config: PrepareConfig, committed: CommittedCorpus, made: Sequence[ShardRecord]) -> HeldSides | None:
    """What is there of other sources; None where the corpus is of this source alone, or nothing has side tables.

    Args:
        made: records of what this run has made.
    """
    whose = [each.identity == identity(config) for each in committed.generations]
    manifest = Manifest(shards=()) if all(whose) else Manifest.load(config.output)
    if all(whose) or not (manifest.side_tables or config.side_tables):
        return None
    now = distinct(flat(record.notes["known"]) for record in made)
    before = (committed.known([each]) for each in committed.generations)
    brought = (*zip(whose, before, strict=True), (True, now))
    records = {each.shard.path: each for each in committed.records.values() if each.shard is not None}
    places = dict[str, HeldPlace]()
    for number, shard in enumerate(manifest.shards):
        notes = records[shard.path].notes
        at = [HeldPlace(number, group, row) for group, size in enumerate(shard.row_groups) for row in range(size)]
        theirs = np.flatnonzero(~is_ours(brought, notes["known"]))
        ids = notes["sample_id"].take(pa.array(theirs)).to_pylist()
        places.update((each, at[place]) for each, place in zip(ids, theirs.tolist(), strict=True))
    return HeldSides(config.output, manifest.side_tables, places, brought)


def is_ours(brought: Sequence[tuple[bool, np.ndarray]], known: pa.ChunkedArray) -> np.ndarray:
    """Of each sample whether the first generation with one of its images is of the source itself, or none has it.

    Of samples with the images `[[1, 2], [3], [4]]` and the generations `[(False, [2]), (True, [1, 3])]` it is
    `[False, True, True]`.

    Args:
        brought: as `HeldSides.brought`.
        known: digests of each sample's images, lists of uint64 `[N]`.

    Returns:
        bool `[N]`.
    """
    digests, samples = flat(known), pc.list_parent_indices(known).to_numpy()
    found = np.ones(len(known), bool)
    # Backwards, so that the first generation has the last word.
    for ours, of_generation in reversed(brought):
        found[samples[is_among(digests, of_generation)]] = ours
    return found
