"""Derm1M-AgentAug (Li et al., 2025, arXiv 2512.03445): Derm1M's images with captions written anew by agents (MAGEN).

Expects the Parquet files of the release, which hold the images (`train-00000.parquet`, anywhere below the input), or
`MAGEN_train.csv` and images as its README unpacks them; with `MAGEN_valid.csv` beside it the tables prescribe train and
val. The columns are those that MAKE's table trains on (see `make_table`, for the masks too), and ontology_label;
agent_generated, source and source_type are taken where they are there. 163 captions of the release are the text "nan":
they are none, and counted.

Nothing else says a row's diagnosis and concepts, so these are what the published sentences name: the path of
`ontology_caption` and the list of `visual_concept_caption`. ontology_label numbers the rows of a matrix whose names are
not published; it is only kept, and -1 says nothing. With Derm1M's `ontology.json` under the input a row's labels are
the nodes that its path names; without it the last name of the path is its label. Images are found by their paths and
never by their names alone, of which some are those of several images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.captions import CONCEPT_TEMPLATE, ONTOLOGY_TEMPLATE, named_in
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.raw.sources import make_table, parquet
from dermray.raw.sources.derm1m import group_of
from dermray.raw.sources.interpreting import successive
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
    path,
    text,
)
from dermray.raw.sources.tables import StringTable, read_tree
from dermray.raw.splits import split_of_file

TABLE_NAMES = {
    "train": ("MAGEN_train.csv", "data/pretrain/MAGEN_train.csv"),
    "val": ("MAGEN_valid.csv", "data/pretrain/MAGEN_valid.csv"),
}
REQUIRED = (*make_table.REQUIRED, "ontology_label")
KEPT = ("source", "source_type", "ontology_label", "agent_generated")
USED = frozenset({*REQUIRED, *KEPT})
# What the request counts captions under that say nothing.
SILENT = "cells of truncated_caption that only stand for nothing, such as nan"
# And sentences over a diagnosis or concepts that name none in the published form.
UNNAMED = {
    "ontology": "cells of ontology_caption in another form than the published sentence; they give no label",
    "concept": "cells of visual_concept_caption in another form than the published sentence; they give no concept",
}
CAPTIONS_FROM: dict[CaptionAspect, str] = {
    **make_table.CAPTIONS_FROM,
    "raw": "column truncated_caption, written by MAGEN where agent_generated is True",
}
# What stands between two paths of one cell, and in no name of a disease.
_SEVERAL = re.compile(r";|\||\bdiagnosed as\b", re.IGNORECASE)


def read(request: SourceRequest) -> RawRows:
    """Read the tables or the Parquet files under `request.input`; `request.table` reads that one alone.

    Raises:
        CorpusError: there is neither, a column is missing, or a mask is not a list of so many 0 and 1.
        OntologyError: the tree is malformed.
        StorageError: a file cannot be read.
    """
    has_tree = storage.exists(storage.join(request.input, ONTOLOGY_NAME))
    rows_of = partial(interpret, has_tree=has_tree)
    if files := _parquet_files(request):
        raw = joined_rows(successive(_read_files(request, files, rows_of)))
    else:
        raw = joined_rows(successive(make_table.read_splits(request, TABLE_NAMES, rows_of)))
        raw = replace(raw, table=with_images_placed(request, raw.table))
    return replace(raw, ontology=read_tree(request))


def _parquet_files(request: SourceRequest) -> list[str]:
    """The files of the release as it is published; none where its images are unpacked."""
    if request.table:
        return [request.table] if request.table.endswith(".parquet") else []
    names = [name for split in TABLE_NAMES.values() for name in split]
    if any(storage.exists(storage.join(request.input, name)) for name in names):
        return []
    try:
        return parquet.files_of(request)
    except CorpusError:
        # What is missed is the table, as the reader of tables says.
        return []


def _read_files(request: SourceRequest, files: list[str], rows_of: partial[RawRows]) -> Iterator[Iterator[RawRows]]:
    splits = {file: split_of_file(file) for file in files}
    # That all is for training prescribes nothing.
    is_split = set(splits.values()) != {"train"}
    num_rows = 0
    for file in files:
        limit = None if request.limit is None else request.limit - num_rows
        if limit == 0:
            break
        table, _ = parquet.read_file(request, file)
        if table is None:
            request.findings.not_read[f".parquet without a column {request.columns.image!r} of images"] += 1
            continue
        table = table.slice(0, limit)
        num_rows += table.num_rows
        request.rows_met[file] = table.num_rows
        block = StringTable(
            file, _cells(file, table, request.columns.image), pa.array(np.arange(1, len(table) + 1)), ()
        )
        split = splits[file] if is_split else None
        yield iter([rows_of(block, request.findings, split=split, image=request.columns.image)])
    if not num_rows:
        raise CorpusError(f"{request.input}: its Parquet files hold no rows with a column of images")


def _cells(file: str, table: pa.Table, image: str) -> pa.Table:
    """The columns that are read as texts, a list as Python writes it; what else a file holds is let be.

    Raises:
        CorpusError: one of them is of something else, or stands there twice.
    """
    found: dict[str, pa.Array] = {}
    for written, column in zip(table.column_names, table.columns, strict=True):
        name = written if written == image else written.strip()
        if name not in USED and name != image:
            continue
        if name in found:
            raise CorpusError(f"{file} repeats the column {name!r}; rename one of them")
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            shown = ("" if value is None else str(value) for value in column.to_pylist())
            found[name] = pa.array(list(shown), pa.string())
            continue
        try:
            found[name] = pc.fill_null(column.cast(pa.string()), "").combine_chunks()
        except pa.ArrowException:
            raise CorpusError(
                f"{file}: column {name!r} is of {kind}; write it as texts, numbers or lists of them"
            ) from None
    return pa.table(found)


def interpret(
    cells: StringTable, findings: Findings, split: str | None = None, *, has_tree: bool, image: str | None = None
) -> RawRows:
    """The raw rows of a block; `image` is the column with the places of images, if their own files are not meant.

    Raises:
        CorpusError: a column is missing, or a mask is not a list of so many 0 and 1.
    """
    cells.require(*REQUIRED)
    written = cells["truncated_caption"]
    silent = pc.and_(pc.is_null(text(written)), pc.not_equal(pc.utf8_trim_whitespace(written), ""))
    findings.unused[SILENT] += pc.sum(silent).as_py() or 0
    names = make_table.relative_paths(cells)
    captions = make_table.masked_captions(cells)
    said = [{caption["aspect"]: caption["text"] for caption in row} for row in captions.to_pylist()]
    paths = pa.array([named_in(ONTOLOGY_TEMPLATE, row.get("ontology", "")) for row in said], pa.string())
    concepts = pa.array([named_in(CONCEPT_TEMPLATE, row.get("concept", "").lower()) for row in said], pa.string())
    for aspect, named in (("ontology", paths), ("concept", concepts)):
        unnamed = sum(aspect in row and name is None for row, name in zip(said, named.to_pylist(), strict=True))
        if unnamed:
            findings.unused[UNNAMED[aspect]] += unnamed
    if several := sum(bool(_SEVERAL.search(name or "")) for name in paths.to_pylist()):
        findings.unused["cells of ontology_caption that may name several paths, which are read as one"] += several
    labels = paths if has_tree else map_values(paths, lambda named: named.rpartition(",")[2].strip(), pa.string())
    kept = {name: text(cells[name]) for name in KEPT if name in cells}
    table = assemble(
        row=cells.rows,
        source="derm1m_agentaug",
        source_id=names,
        image=path(cells[image] if image else names),
        captions=captions,
        labels=listed(labels, separator=None),
        hierarchy=paths,
        concepts=listed(concepts),
        group=map_values(names, group_of, pa.string()),
        split=split,
        origin=kept.get("source"),
        meta=meta(len(cells.rows), extra=extras(kept)),
    )
    return RawRows(table, cells.dropped, None, CAPTIONS_FROM)
