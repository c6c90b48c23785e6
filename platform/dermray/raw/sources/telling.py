"""What the terminal says of a source's rows: what is not understood, not read or not used, and which they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from dermray.printable import printable
from dermray.raw import archives, litter
from dermray.raw.sources.rows import Findings, RawRows
from dermray.raw.spill import blocks
from dermray.raw.telling import MAX_SHOWN_CHARS, NUM_TOLD, most_frequent, not_understood

NUM_COLUMNS = 12
# Rows that a message names of each fault.
NUM_SHOWN_ROWS = 3


def told_of(raw: RawRows, findings: Findings, *, by_name: bool = False) -> Iterator[str]:
    """What the source holds and no sample tells of, a line each; `by_name`: rows are files, so named."""
    if findings.passed_over:
        yield litter.told(findings.passed_over)
    if findings.not_read:
        shown = ", ".join(f"{name} ({count:,})" for name, count in findings.not_read.most_common())
        yield f"{findings.not_read.total():,} files are not read, since this source knows no use for them: {shown}"
    if columns := [repr(name[:MAX_SHOWN_CHARS]) for name in findings.extra_columns]:
        more = f" and {len(columns) - NUM_COLUMNS:,} more" if len(columns) > NUM_COLUMNS else ""
        yield f"columns that nothing names are only kept, in meta.extra: {', '.join(columns[:NUM_COLUMNS])}{more}"
    if unused := +findings.unused:
        shown = ", ".join(f"{name} ({count:,})" for name, count in unused.most_common())
        yield f"not used, or perhaps not as it is meant: {shown}"
    if findings.doubled_keys:
        shown = most_frequent(findings.doubled_keys, "keys")
        yield f"keys stand twice in one object of JSON, and the last one counts: {shown}"
    if findings.unread_modalities:
        unread = most_frequent(findings.unread_modalities, max_chars=2 * MAX_SHOWN_CHARS)
        first = findings.unread_modality_rows
        where = in_words(first, names_of(raw.table, {*first}) if by_name else None)
        yield (
            f"{findings.unread_modalities.total():,} rows have a modality that is not understood, and kept as written: "
            f"{unread}; the first: {where}"
        )
    if findings.placeholders:
        shown = ", ".join(f"{text!r} ({count:,})" for text, count in findings.placeholders.most_common())
        yield f"{findings.placeholders.total():,} labels only stand for nothing and count as none: {shown}"
    if rows := findings.map_rows_unused:
        shown = ", ".join(repr(text[:MAX_SHOWN_CHARS]) for text in rows[:NUM_TOLD])
        more = f" and {len(rows) - NUM_TOLD:,} more" if len(rows) > NUM_TOLD else ""
        yield f"{len(rows):,} rows of columns.label_map match no label of the table: {shown}{more}"
    for name, texts in raw.not_understood.items():
        yield not_understood(name, texts, "it is kept as written")


def in_words(rows: Iterable[int], names: Mapping[int, str] | None = None) -> str:
    """The first of some row numbers: `rows 3, 8, 9, …`; or, where a source's rows have `names`, these instead."""
    ranked = sorted(set(rows))
    first, more = ranked[:NUM_SHOWN_ROWS], ", …" if len(ranked) > NUM_SHOWN_ROWS else ""
    if names:
        return ", ".join(names.get(row, f"row {row}") for row in first) + more
    return f"{'row' if len(ranked) == 1 else 'rows'} {', '.join(map(str, first))}{more}"


def names_of(table: pa.Table, rows: set[int]) -> dict[int, str]:
    """The files of some rows: of each its image, or what it is called where there is none."""
    wanted = pa.array(sorted(rows), pa.int64())
    names: dict[int, str] = {}
    for block in blocks(table):
        found = block.filter(pc.is_in(block["row"], value_set=wanted))
        columns = (found[name].to_pylist() for name in ("row", "image", "source_id"))
        names.update((row, printable(archives.shown(image or name))) for row, image, name in zip(*columns, strict=True))
    return names
