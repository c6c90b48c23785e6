"""Raw rows of several blocks as one, and those without the rows whose image is not certain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from dermray.raw.sources.rows import RAW, DroppedRow, RawRows, merged_counts
from dermray.raw.spill import blocks, collected

# Why a row is dropped whose image may be one of several files.
AMBIGUOUS = "ambiguous_image"
NUM_SHOWN_PATHS = 4


def joined_rows(parts: Iterable[RawRows]) -> RawRows:
    """Rows that were read block by block, one block at least, as one; what is said of their source is the first's."""
    first: RawRows | None = None
    dropped: list[DroppedRow] = []
    not_understood: list[Mapping[str, Mapping[str, int]]] = []

    def tables() -> Iterator[pa.Table]:
        nonlocal first
        for part in parts:
            first = first or part
            dropped.extend(part.dropped)
            not_understood.append(part.not_understood)
            yield part.table

    table = collected(tables(), RAW)
    if first is None:
        raise ValueError("no block of rows")
    return replace(first, table=table, dropped=tuple(dropped), not_understood=merged_counts(not_understood))


def without_ambiguous(raw: RawRows, ambiguous: Mapping[str, tuple[str, ...]]) -> RawRows:
    """The rows without those whose image may be one of several files, which are dropped with their paths."""
    if not ambiguous:
        return raw
    paths = pa.array(list(ambiguous), pa.string())
    dropped = list(raw.dropped)

    def clear() -> Iterator[pa.Table]:
        for block in blocks(raw.table):
            unclear = pc.is_in(block["image"], value_set=paths)
            rows = block.filter(unclear).select(["row", "source_id", "image"]).to_pylist()
            dropped.extend(
                DroppedRow(**row, reason=AMBIGUOUS, detail=_candidates(ambiguous[row["image"]])) for row in rows
            )
            yield block.filter(pc.invert(pc.fill_null(unclear, False)))

    table = collected(clear(), raw.table.schema)
    return replace(raw, table=table, dropped=tuple(dropped))


def _candidates(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:NUM_SHOWN_PATHS])
    more = f" and {len(paths) - NUM_SHOWN_PATHS} more" if len(paths) > NUM_SHOWN_PATHS else ""
    return f"{len(paths)} files may be meant: {shown}{more}; leave one below the input"
