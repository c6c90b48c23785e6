"""Derm1M (Yan et al., 2025, arXiv 2503.14911): the v2 release's tables, `ontology.json` and images.

Expects `Derm1M_v2_pretrain.csv` and `ontology.json`. With `Derm1M_v2_validation.csv` beside it, the tables prescribe
the splits train and val, and the rows of the second are numbered after those of the first. Images lie below the input
as their `filename` says, or still in the release's .zip archives. `concept.csv` (filename, and either a column that
lists concepts or one column of 0 and 1 a concept) gives concepts to the rows whose own cell has none.

The raw caption is `truncated_caption`, on which the published recipes train. Frames of one video, pictures of one
forum post, figures of one article and cuts of one book page show the same patient, so each of these is a group.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.prepare.sources.places import unpacked_or_archived
from dermray.prepare.sources.rows import (
    RawRows,
    SourceRequest,
    assemble,
    extras,
    listed,
    map_values,
    meta,
    path,
    raw_captions,
    text,
    years,
)
from dermray.prepare.sources.tables import StringTable, read_table, read_tree

TABLE_NAME = "Derm1M_v2_pretrain.csv"
VALIDATION_NAME = "Derm1M_v2_validation.csv"
CONCEPTS_NAME = "concept.csv"
CONCEPT_LISTS = ("skin_concept", "skin_concepts", "concepts", "concept")
CAPTIONS_FROM: dict[CaptionAspect, str] = {
    "raw": "column truncated_caption",
    "ontology": "the published sentence over hierarchical_disease_label, or else over the path in the tree",
}
REQUIRED = (
    "filename",
    "truncated_caption",
    "source",
    "source_type",
    "disease_label",
    "hierarchical_disease_label",
    "skin_concept",
    "body_location",
    "symptoms",
    "age",
    "gender",
)

# What file names of one patient share: `group` of the first pattern that fits.
GROUPS = (
    re.compile(r"(?P<group>youtube/.+)_frame_\d+.*"),
    re.compile(r"(?P<group>IIYI/\d+)_\d+\.\w+"),
    re.compile(r"pubmed/.*(?P<group>PMC\d+).*"),
    re.compile(r"(?P<group>(?:edu|note|textbook)/.+_\d{5})_\d{5}(?:_\d+)?\.\w+"),
)


def read(request: SourceRequest) -> RawRows:
    """Read the release's tables and disease tree under `request.input`; `request.table` reads that table alone.

    `request.limit` counts for each table.

    Raises:
        CorpusError: a table, one of its columns or the tree is missing, or an archive is cut off.
        OntologyError: the tree is malformed.
    """
    first = read_table(request, TABLE_NAME)
    has_validation = not request.table and storage.exists(storage.join(request.input, VALIDATION_NAME))
    parts = [_rows(first, "train" if has_validation else None)]
    dropped = [*first.dropped]
    if has_validation:
        second = read_table(request, VALIDATION_NAME)
        # Numbers go on where the first table ends, whatever `limit` has left of it.
        offset = max([0, *first.rows.to_pylist(), *(row.row for row in first.dropped)])
        second = replace(second, rows=pc.add(second.rows, offset))
        parts.append(_rows(second, "val"))
        dropped.extend(replace(row, row=row.row + offset) for row in second.dropped)
    table = _with_images(request, pa.concat_tables(parts).combine_chunks())
    tree = read_tree(request, required=True)
    return RawRows(_with_concepts(request, table), tuple(dropped), tree, CAPTIONS_FROM)


def _rows(cells: StringTable, split: str | None) -> pa.Table:
    cells.require(*REQUIRED)
    origin = text(cells["source"])
    return assemble(
        row=cells.rows,
        source="derm1m",
        source_id=cells["filename"],
        image=path(cells["filename"]),
        captions=raw_captions(text(cells["truncated_caption"])),
        labels=listed(text(cells["disease_label"]), separator=None),
        hierarchy=text(cells["hierarchical_disease_label"]),
        concepts=listed(text(cells["skin_concept"], lower=True)),
        group=map_values(cells["filename"], group_of, pa.string()),
        split=split,
        origin=origin,
        meta=meta(
            len(cells.rows),
            age=years(cells["age"]),
            sex=text(cells["gender"], lower=True),
            body_site=text(cells["body_location"], lower=True),
            symptoms=text(cells["symptoms"], lower=True),
            extra=extras({"source": origin, "source_type": text(cells["source_type"])}),
        ),
    )


def _with_images(request: SourceRequest, table: pa.Table) -> pa.Table:
    images = unpacked_or_archived(request.input, table["image"].combine_chunks())
    return table.set_column(table.column_names.index("image"), table.schema.field("image"), images)


def _with_concepts(request: SourceRequest, table: pa.Table) -> pa.Table:
    """The table with the concepts of `concept.csv` where a row has none of its own."""
    if not storage.exists(storage.join(request.input, CONCEPTS_NAME)):
        return table
    cells = read_table(request.beside(CONCEPTS_NAME))
    cells.require("filename")
    given = dict(zip(cells["filename"].to_pylist(), _listed_concepts(cells), strict=True))
    rows = zip(table["source_id"].to_pylist(), table["concepts"].to_pylist(), strict=True)
    concepts = pa.array([own or given.get(name, []) for name, own in rows], pa.list_(pa.string()))
    return table.set_column(table.column_names.index("concepts"), table.schema.field("concepts"), concepts)


def _listed_concepts(cells: StringTable) -> list[list[str]]:
    """Concepts of each row, from a column that lists them or from the columns that hold nothing but 0 and 1."""
    name = next((each for each in CONCEPT_LISTS if each in cells), None)
    if name:
        return listed(text(cells[name], lower=True)).to_pylist()
    flags = {
        column: cells[column]
        for column in cells.table.column_names
        if column != "filename" and set(pc.unique(cells[column]).to_pylist()) <= {"0", "1", "0.0", "1.0", ""}
    }
    if not flags:
        known = ", ".join(cells.table.column_names)
        raise CorpusError(
            f"{cells.uri} has no column {CONCEPT_LISTS[0]!r} and none of 0 and 1 only; its columns are: {known}; "
            "to go on without its concepts, give it another name"
        )
    found: list[list[str]] = [[] for _ in range(len(cells.rows))]
    for column, flag in flags.items():
        for row in pc.indices_nonzero(pc.starts_with(flag, "1")).to_pylist():
            found[row].append(column.strip().lower())
    return found


def group_of(filename: str) -> str | None:
    """The video, post, article or book page that a file name tells; None if it tells none."""
    for pattern in GROUPS:
        match = pattern.fullmatch(filename)
        if match:
            return match["group"]
    return None
