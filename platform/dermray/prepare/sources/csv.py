"""Any table of image paths: a caption column, a label column or both, and whatever else `columns.*` names.

A table that jobs/export.py has written (with a column `dermray_sample`) gives the prepared samples back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus import exchange
from dermray.corpus.captions import ontology_caption
from dermray.errors import CorpusError
from dermray.prepare.sources.rows import (
    PREPARED,
    Columns,
    DroppedRow,
    RawRows,
    SourceRequest,
    assemble,
    captions_from,
    extras,
    first_of,
    joined_lists,
    leftover,
    listed,
    map_values,
    meta,
    path,
    prepared_rows,
    raw_captions,
    skin_types,
    text,
    years,
)
from dermray.prepare.sources.tables import StringTable, read_table, read_tree

TABLE_NAME = "metadata.csv"
# Column of an exported table: the object of `corpus.exchange`, beside the image's path in the column `image`.
SAMPLE_COLUMN = "dermray_sample"
STEP = 10_000


def read(request: SourceRequest) -> RawRows:
    """Read a table by the column names of `request.columns`.

    `ontology.json` is taken if it lies beside the images. A row without a caption column takes the published
    sentence over its labels as its caption.

    Raises:
        CorpusError: the table is missing, a named column is not in it, or it has neither captions nor labels.
        OntologyError: the tree is malformed.
    """
    cells = read_table(request, TABLE_NAME)
    if SAMPLE_COLUMN in cells:
        return _prepared(request, cells)
    return interpret(request, cells)


def interpret(request: SourceRequest, cells: StringTable, default_source: str = "csv") -> RawRows:
    """Raw rows from a table's cells by the column names of `request.columns`.

    Raises:
        CorpusError, OntologyError: as `read`.
    """
    names = _present(cells, request.columns)
    num_rows = len(cells.rows)

    def column(key: str, convert: Callable[[pa.Array], pa.Array] = text) -> pa.Array | None:
        return convert(cells[names[key][0]]) if names[key] else None

    labels = _labels(cells, names["label"], request.columns.label_separator)
    patients, lesions = column("patient_id"), column("lesion_id")
    images = cells[names["image"][0]]
    table = assemble(
        row=cells.rows,
        source=first_of(column("source"), pa.repeat(default_source, num_rows)),
        source_id=first_of(column("source_id"), images),
        image=path(images),
        captions=raw_captions(column("caption") if names["caption"] else _captions_from(labels)),
        labels=labels,
        concepts=column("concepts", lambda cell: listed(text(cell, lower=True))),
        skin_type=column("skin_type", skin_types),
        group=_key(cells, names["group"]) or first_of(patients, lesions),
        split=column("split"),
        meta=meta(
            num_rows,
            age=column("age", years),
            sex=column("sex"),
            body_site=column("body_site"),
            symptoms=column("symptoms"),
            patient_id=patients,
            lesion_id=lesions,
            extra=extras(leftover(cells.table, {name for used in names.values() for name in used})),
        ),
    )
    made = "the published sentence over the labels" if not names["caption"] else f"column {names['caption'][0]}"
    return RawRows(table, cells.dropped, read_tree(request), {"raw": made})


def _prepared(request: SourceRequest, cells: StringTable) -> RawRows:
    """The samples of an exported table."""
    cells.require("image")
    tables = [PREPARED.empty_table()]
    dropped = list(cells.dropped)
    images, documents = path(cells["image"]), cells[SAMPLE_COLUMN]
    # Objects of Python are many times larger than Arrow's columns, so there are never many at once.
    for first in range(0, len(images), STEP):
        samples: list[dict[str, Any]] = []
        for place in range(first, min(first + STEP, len(images))):
            row, image = cells.rows[place].as_py(), images[place].as_py()
            try:
                sample = exchange.from_document(json.loads(documents[place].as_py()))
            except (ValueError, RecursionError) as error:
                detail = f"{SAMPLE_COLUMN}: {error}"
                dropped.append(DroppedRow(row, image or "", image or "", "malformed_row", detail))
            else:
                samples.append({"row": row, "image": image, **sample})
        tables.append(pa.Table.from_pylist(samples, PREPARED))
    table = prepared_rows(pa.concat_tables(tables))
    return RawRows(table, tuple(dropped), read_tree(request), captions_from(table, {}))


def _present(cells: StringTable, columns: Columns) -> dict[str, list[str]]:
    """Each key of `columns` with those of its columns that the table has; what is not a default must be there."""
    found: dict[str, list[str]] = {}
    for key, field in type(columns).model_fields.items():
        value = getattr(columns, key)
        wanted = [] if value is None or key == "label_separator" else [value] if isinstance(value, str) else value
        if value != field.default or key == "image":
            cells.require(*wanted)
        found[key] = [name for name in wanted if name in cells]
    if not found["caption"] and not found["label"]:
        known = ", ".join(cells.table.column_names)
        raise CorpusError(
            f"{cells.uri} has neither captions ({columns.caption}) nor labels ({columns.label}); its columns are: "
            f"{known}; name one with columns.caption= or columns.label="
        )
    return found


def _labels(cells: StringTable, names: list[str], separator: str | None) -> pa.Array | None:
    if not names:
        return None
    return joined_lists([listed(text(cells[name]), separator) for name in names])


def _captions_from(labels: pa.Array) -> pa.Array:
    return pa.array([ontology_caption(row) for row in labels.to_pylist()], pa.string())


def _key(cells: StringTable, names: list[str]) -> pa.Array | None:
    """One key over one or several columns; null where all of them are."""
    if not names:
        return None
    parts = [text(cells[name]) for name in names]
    if len(parts) == 1:
        return parts[0]
    joined = pc.binary_join_element_wise(*(pc.fill_null(part, "") for part in parts), "/")
    return map_values(joined, lambda key: key if key.strip("/") else None, pa.string())
