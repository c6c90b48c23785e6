"""Raw rows of a table, block by block: read and interpreted here, or, where the table is long, by tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dermray.errors import CorpusError
from dermray.raw.cutting import CutTable, Piece
from dermray.raw.sources.pictures import NUM_ROWS
from dermray.raw.sources.rows import RAW, Findings, RawRows, RawTable, SourceRequest, merged_counts
from dermray.raw.sources.tables import Blocks, StringTable
from dermray.raw.spill import Spill

# What makes raw rows of a block; picklable. What it meets besides goes into the findings.
Interpret = Callable[[StringTable, Findings], RawRows]
# What a piece's rows may come to: a piece is small in its file, but a text that repeats is there only once. What is
# more is left to the one reader, which lays rows down as it goes.
MAX_PIECE_BYTES = 256 << 20
COUNTED = ("passed_over", "not_read", "placeholders", "unused", "doubled_keys", "unread_modalities")


def interpreted(request: SourceRequest, blocks: Blocks, interpret: Interpret) -> Iterator[RawRows]:
    """The raw rows of a table, in its order; the request notes what was met and read.

    With tasks or without, the rows are the same. A table whose pieces do not all end with a row is read as one.

    Raises:
        CorpusError: the table cannot be read, or as `interpret`.
        StorageError: the table cannot be read, or the disk for temporary files is full.
    """
    done = blocks.pieces and _done(request, blocks.pieces, interpret)
    if done:
        yield from done
    else:
        for block in blocks.blocks:
            yield interpret(block, request.findings)


def successive(tables: Iterable[Iterable[RawRows]]) -> Iterator[RawRows]:
    """The raw rows of several tables, each begun when the one before it is done, and numbered from where that ended."""
    before = 0
    for table in tables:
        last = before
        for each in table:
            rows = moved(each, before) if before else each
            yield rows
            last = max([last, *rows.table["row"][-1:].to_pylist(), *(row.row for row in rows.dropped)])
        before = last


def moved(rows: RawRows, by: int) -> RawRows:
    """The same rows with higher numbers."""
    place = rows.table.column_names.index("row")
    numbers = pc.add(rows.table["row"], by)
    table = rows.table.set_column(place, RAW.field("row"), numbers)
    return replace(rows, table=table, dropped=tuple(replace(row, row=row.row + by) for row in rows.dropped))


class _Piece(NamedTuple):
    """What has become of a piece, its rows numbered from 1."""

    rows: RawRows
    findings: Findings
    num_rows: int


@dataclass(frozen=True)
class _Reader:
    """Reads and interprets a piece; None where it cannot be read by itself, or comes to too much."""

    interpret: Interpret

    def __call__(self, piece: Piece) -> _Piece | None:
        findings = Findings()
        num_rows = num_bytes = 0
        parts = []
        try:
            for block in piece.blocks():
                num_rows += block.num_rows
                parts.append(self.interpret(block, findings))
                num_bytes += parts[-1].table.nbytes
                if num_bytes > MAX_PIECE_BYTES:
                    return None
            table = pa.concat_tables(part.table for part in parts).combine_chunks()
        # The one reader says the same of the whole table, or can read it.
        except (CorpusError, pa.ArrowException):
            return None
        dropped = tuple(row for part in parts for row in part.dropped)
        not_understood = merged_counts(part.not_understood for part in parts)
        rows = replace(parts[0], table=table, dropped=dropped, not_understood=not_understood)
        return _Piece(rows, findings, num_rows)


def _done(request: SourceRequest, table: CutTable, interpret: Interpret) -> Iterator[RawRows] | None:
    """The raw rows of a table whose pieces tasks have read; None where it is to be read as one."""
    if request.tasks is None:
        return None
    pieces: dict[str, Any] = {f"{number}": piece for number, piece in enumerate(table.pieces())}
    found: dict[str, _Piece] = {}
    places: dict[str, int] = {}
    spill = Spill(RAW)
    # They come in any order, so their rows are laid down as they come.
    for name, piece in request.tasks(pieces, _Reader(interpret)):
        if piece is None:
            return None
        if piece.rows.table.num_rows:
            places[name] = len(places)
            spill.append(piece.rows.table)
        found[name] = piece._replace(rows=replace(piece.rows, table=RAW.empty_table()))
    table.require_unchanged()
    request.tables[table.uri] = RawTable(table.uri, table.file.num_bytes, table.file.sha256)
    spilled, num_before, numbered = spill.done(), 0, []
    for name in pieces:
        _merge(request.findings, found[name].findings, num_before)
        numbered.append((name, num_before))
        num_before += found[name].num_rows
    request.rows_met[table.uri] += num_before

    def rows_of(name: str) -> RawRows:
        rows = found[name].rows
        return replace(rows, table=spilled.block(places[name])) if name in places else rows

    return (moved(rows_of(name), before) for name, before in numbered)


def _merge(findings: Findings, found: Findings, num_before: int) -> None:
    """Note what was found in the rows after the first `num_before` ones."""
    for name in COUNTED:
        getattr(findings, name).update(getattr(found, name))
    findings.map_rows_matched |= found.map_rows_matched
    rows = [*findings.unread_modality_rows, *(row + num_before for row in found.unread_modality_rows)]
    findings.unread_modality_rows[:] = rows[:NUM_ROWS]
