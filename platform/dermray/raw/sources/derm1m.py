"""Derm1M (Yan et al., 2025, arXiv 2503.14911): the v2 release's tables, `ontology.json` and images.

Expects `Derm1M_v2_pretrain.csv` and `ontology.json`. With `Derm1M_v2_validation.csv` beside it, the tables prescribe
the splits train and val, and the rows of the second are numbered after those of the first. Or the layout that the
README announces: `captions.csv` of the same columns (`caption` where there is no `truncated_caption`), `images/`, and
`splits/` with lists for train and val (see `split_files`). Images lie below the input
as their `filename` says, or still in the release's .zip archives. `concept.csv` (filename, and either a column that
lists concepts or one column of 0 and 1 a concept) gives concepts to the rows whose own cell has none.

The raw caption is `truncated_caption`, on which the published recipes train. Frames of one video, pictures of one
forum post, figures of one article and cuts of one book page show the same patient, so each of these is a group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa

from dermray import storage
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.raw.sources import marks, split_files
from dermray.raw.sources.interpreting import interpreted, successive
from dermray.raw.sources.joining import joined_rows
from dermray.raw.sources.places import with_images_placed
from dermray.raw.sources.rows import (
    Findings,
    RawRows,
    SourceRequest,
    assemble,
    extras,
    listed,
    map_values,
    meta,
    of_patients,
    path,
    raw_captions,
    text,
)
from dermray.raw.sources.tables import StringTable, read_beside, read_blocks, read_table, read_tree
from dermray.raw.spelling import folded

TABLE_NAME = "Derm1M_v2_pretrain.csv"
VALIDATION_NAME = "Derm1M_v2_validation.csv"
ANNOUNCED_NAME = "captions.csv"
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
    if _is_announced(request):
        return _read_announced(request)
    has_validation = not request.table and storage.exists(storage.join(request.input, VALIDATION_NAME))

    def tables() -> Iterator[Iterator[RawRows]]:
        train = partial(_rows, split="train" if has_validation else None)
        yield interpreted(request, read_blocks(request, TABLE_NAME), train)
        if has_validation:
            yield interpreted(request, read_blocks(request, VALIDATION_NAME), partial(_rows, split="val"))

    return _joined(request, successive(tables()))


def _joined(request: SourceRequest, parts: Iterable[RawRows]) -> RawRows:
    """Raw rows of tables, or blocks of them, with what lies beside these."""
    raw = joined_rows(parts)
    table = _with_concepts(request, with_images_placed(request, raw.table))
    return replace(raw, table=table, ontology=read_tree(request, required=True))


def _is_announced(request: SourceRequest) -> bool:
    """Whether the input is in the README's layout.

    Raises:
        CorpusError: it is in both.
    """
    here = storage.exists(storage.join(request.input, ANNOUNCED_NAME))
    if request.table or not here:
        return False
    if storage.exists(storage.join(request.input, TABLE_NAME)):
        raise CorpusError(
            f"{request.input} holds {TABLE_NAME} and {ANNOUNCED_NAME}, two layouts of Derm1M: name one with table="
        )
    return True


def _read_announced(request: SourceRequest) -> RawRows:
    """The README's layout: one table, and the splits beside it."""
    cells = read_table(replace(request, limit=None), ANNOUNCED_NAME)
    if "truncated_caption" not in cells and "caption" in cells:
        cells = replace(cells, table=cells.table.append_column("truncated_caption", cells["caption"]))
    cells.require(*REQUIRED)
    request.rows_met[cells.uri] = cells.first(request.limit).num_rows
    if not storage.exists(storage.join(request.input, split_files.FOLDER)):
        cells = cells.first(request.limit)
        return _joined(request, [_rows(cells, request.findings, None)])
    splits, unclear = split_files.read_splits(request, cells, "filename")
    known = splits.is_valid()
    kept = replace(cells, table=cells.table.filter(known), rows=cells.rows.filter(known))
    dropped = [row for row in (*cells.dropped, *unclear) if request.limit is None or row.row <= request.limit]
    first = replace(kept.first(request.limit), dropped=tuple(dropped))
    return _joined(request, [_rows(first, request.findings, splits.drop_null()[: len(first.rows)])])


def _rows(cells: StringTable, findings: Findings, split: str | pa.Array | None) -> RawRows:
    """The raw rows of a table, or of a block of it, of the release's columns."""
    cells.require(*REQUIRED)
    findings.count_placeholders(cells["disease_label"])
    said = of_patients(len(cells.rows), age=cells["age"], sex=cells["gender"])
    origin = text(cells["source"])
    table = assemble(
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
            age=said.age,
            sex=said.sex,
            body_site=text(cells["body_location"], lower=True),
            symptoms=text(cells["symptoms"], lower=True),
            extra=extras({"source": origin, "source_type": text(cells["source_type"]), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, None, CAPTIONS_FROM, said.not_understood)


def _with_concepts(request: SourceRequest, table: pa.Table) -> pa.Table:
    """The table with the concepts of `concept.csv` where a row has none of its own."""
    if not storage.exists(storage.join(request.input, CONCEPTS_NAME)):
        return table
    cells = read_beside(request, CONCEPTS_NAME)
    cells.require("filename")
    unused = request.findings.unused
    given: dict[str, list[str]] = {}
    for name, concepts in zip(map(folded, cells["filename"].to_pylist()), _listed_concepts(cells, unused), strict=True):
        unused[f"rows of {CONCEPTS_NAME} for a file that one above names"] += name in given
        given.setdefault(name, concepts)
    names = list(map(folded, table["source_id"].to_pylist()))
    if request.limit is None:
        unused[f"rows of {CONCEPTS_NAME} for files that no row has"] += len(given.keys() - set(names))
    found = [own or given.get(name, []) for name, own in zip(names, table["concepts"].to_pylist(), strict=True)]
    column = pa.array(found, pa.list_(pa.string()))
    return table.set_column(table.column_names.index("concepts"), table.schema.field("concepts"), column)


def _listed_concepts(cells: StringTable, unused: Counter[str]) -> list[list[str]]:
    """Concepts of each row, from a column that lists them or from the columns of marks.

    Cells of a column of marks that are none are counted in `unused`.
    """
    name = next((each for each in CONCEPT_LISTS if each in cells), None)
    if name:
        return listed(text(cells[name], lower=True)).to_pylist()
    others = [column for column in cells.table.column_names if column not in REQUIRED]
    flags = {column.strip().lower(): marks.read(cells[column]) for column in others if marks.is_column(cells[column])}
    if not flags:
        known = ", ".join(cells.table.column_names)
        raise CorpusError(
            f"{cells.uri} has no column {CONCEPT_LISTS[0]!r} and none of 0 and 1 only; its columns are: {known}; "
            "to go on without its concepts, give it another name"
        )
    for column in others:
        unused[f"{CONCEPTS_NAME}, column {column}, which holds no marks"] += column.strip().lower() not in flags
    found: list[list[str]] = [[] for _ in range(len(cells.rows))]
    for concept, (yes, unread) in flags.items():
        marks.note(unused, f"{CONCEPTS_NAME}, column {concept}", unread)
        for row in yes:
            found[row].append(concept)
    return found


def group_of(filename: str) -> str | None:
    """The video, post, article or book page that a file name tells, however it is spelled; None if it tells none."""
    name = folded(filename).removeprefix("images/")
    for pattern in GROUPS:
        match = pattern.fullmatch(name)
        if match:
            return match["group"]
    return None
