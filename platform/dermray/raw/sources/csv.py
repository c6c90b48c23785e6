"""Any table of image paths: a caption column, a label column or both, and whatever else `columns.*` names.

A table that jobs/export.py has written (with a column `dermray_sample`) gives the prepared samples back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus import exchange
from dermray.corpus.ontology import Ontology
from dermray.documents import parse_json
from dermray.errors import CorpusError, DocumentError
from dermray.raw.sources.interpreting import interpreted
from dermray.raw.sources.joining import joined_rows
from dermray.raw.sources.label_map import LabelMap, read_label_map
from dermray.raw.sources.pictures import modalities
from dermray.raw.sources.rows import (
    PATIENT_FIELDS,
    PREPARED,
    Columns,
    DroppedRow,
    Findings,
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
    of_patients,
    path,
    prepared_rows,
    raw_captions,
    text,
)
from dermray.raw.sources.sentences import label_sentences
from dermray.raw.sources.tables import Blocks, StringTable, joined, read_blocks, read_tree

TABLE_NAME = "metadata.csv"
# Column of an exported table: the object of `corpus.exchange`, beside the image's path in the column `image`.
SAMPLE_COLUMN = "dermray_sample"
STEP = 10_000
# Keys of `columns` that name no column.
NOT_COLUMNS = ("label_separator", "label_map")


def read(request: SourceRequest) -> RawRows:
    """Read a table by the column names of `request.columns`.

    `ontology.json` is taken if it lies beside the images. A row without a caption column takes the published
    sentence over its labels as its caption.

    Raises:
        CorpusError: the table is missing, a named column is not in it, or it has neither captions nor labels.
        OntologyError: the tree is malformed.
    """
    blocks = read_blocks(request, TABLE_NAME)
    return _prepared(request, blocks) if SAMPLE_COLUMN in blocks.first else interpret(request, blocks)


def interpret(request: SourceRequest, blocks: Blocks, default_source: str = "csv") -> RawRows:
    """Raw rows from a table's cells by the column names of `request.columns`.

    Raises:
        CorpusError, OntologyError: as `read`.
    """
    names = _present(blocks.first, request.columns, request.keep_untexted)
    label_map = read_label_map(request) if names["label"] else None
    tree = read_tree(request)
    if not names["caption"] and tree is None:
        # What a label is called in a sentence hangs on the labels of all rows.
        blocks = Blocks.of([joined(blocks.blocks)])
    reading = _Reading(names, request.columns.label_separator, tree, label_map, default_source)
    raw = joined_rows(interpreted(request, blocks, reading.rows))
    if label_map:
        request.findings.map_rows_unused[:] = label_map.others(request.findings.map_rows_matched)
    used = reading.used()
    request.findings.extra_columns.extend(name for name in blocks.first.table.column_names if name not in used)
    made = "the published sentence over the labels" if not names["caption"] else f"column {names['caption'][0]}"
    return replace(raw, ontology=tree, captions_from={"raw": made})


@dataclass(frozen=True)
class _Reading:
    """How the cells of a table are meant.

    Attributes:
        names: of each key of `columns` those of its columns that the table has.
        label_separator: of several labels in a cell.
        tree: of the labels, if there is one.
        label_map: the user's own.
        default_source: of rows that name none.
    """

    names: Mapping[str, list[str]]
    label_separator: str | None
    tree: Ontology | None
    label_map: LabelMap | None
    default_source: str

    def used(self, without: str | None = None) -> set[str]:
        """The columns that a key names; `without`: but for that key."""
        return {name for key, names in self.names.items() if key != without for name in names}

    def rows(self, cells: StringTable, findings: Findings) -> RawRows:
        """The raw rows of a block."""
        names, num_rows = self.names, len(cells.rows)

        def column(key: str, convert: Callable[[pa.Array], pa.Array] = text) -> pa.Array | None:
            return convert(cells[names[key][0]]) if names[key] else None

        said = of_patients(num_rows, **{key: column(key) for key in PATIENT_FIELDS})
        labels = _labels(findings, cells, names["label"], self.label_separator)
        if labels is not None and self.label_map:
            labels = self.label_map.applied(labels, findings.map_rows_matched)
        patients, lesions = column("patient_id"), column("lesion_id")
        images, kinds = cells[names["image"][0]], next(iter(names["modality"]), None)
        table = assemble(
            row=cells.rows,
            source=first_of(column("source"), pa.repeat(self.default_source, num_rows)),
            source_id=first_of(column("source_id"), images),
            image=path(images),
            captions=raw_captions(_texts(column("caption"), labels, self.tree, num_rows)),
            labels=labels,
            concepts=column("concepts", lambda cell: listed(text(cell, lower=True))),
            skin_type=said.skin_type,
            group=_key(cells, names["group"]) or first_of(patients, lesions),
            split=column("split"),
            meta=meta(
                num_rows,
                age=said.age,
                sex=said.sex,
                body_site=column("body_site"),
                symptoms=column("symptoms"),
                patient_id=patients,
                lesion_id=lesions,
                # The modality stays there as it is written: its reading is one of few words.
                extra=extras({**leftover(cells.table, self.used(without="modality")), **said.as_written}),
            ),
            modality=modalities(findings, kinds, cells[kinds], cells.rows) if kinds else None,
        )
        return RawRows(table, cells.dropped, not_understood=said.not_understood)


def _texts(captions: pa.Array | None, labels: pa.Array | None, tree: Ontology | None, num_rows: int) -> pa.Array:
    """The raw caption of each row: its own, or a sentence over its labels; null where a table has neither."""
    if captions is not None:
        return captions
    return pa.nulls(num_rows, pa.string()) if labels is None else label_sentences(labels, tree)


def _prepared(request: SourceRequest, blocks: Blocks) -> RawRows:
    """The samples of an exported table."""
    request.note_map_unused()
    raw = joined_rows(interpreted(request, blocks, _samples))
    return replace(raw, ontology=read_tree(request), captions_from=captions_from(raw.table, {}))


def _samples(cells: StringTable, findings: Findings) -> RawRows:
    cells.require("image")
    tables = [PREPARED.empty_table()]
    dropped = list(cells.dropped)
    images, samples_of = path(cells["image"]), cells[SAMPLE_COLUMN]
    # Objects of Python are many times larger than Arrow's columns, so there are never many at once.
    for first in range(0, len(images), STEP):
        samples: list[dict[str, Any]] = []
        for place in range(first, min(first + STEP, len(images))):
            row, image = cells.rows[place].as_py(), images[place].as_py()
            try:
                document = parse_json(samples_of[place].as_py(), SAMPLE_COLUMN, findings.doubled_keys)
                sample = exchange.from_document(document)
            except (ValueError, TypeError, DocumentError) as error:
                detail = f"{SAMPLE_COLUMN}: {error}"
                dropped.append(DroppedRow(row, image or "", image or "", "malformed_row", detail))
            else:
                samples.append({"row": row, "image": image, **sample})
        tables.append(pa.Table.from_pylist(samples, PREPARED))
    return RawRows(prepared_rows(pa.concat_tables(tables)), tuple(dropped))


def _present(cells: StringTable, columns: Columns, keep_untexted: bool) -> dict[str, list[str]]:
    """Each key of `columns` with those of its columns that the table has; what is not a default must be there."""
    found: dict[str, list[str]] = {}
    for key, field in type(columns).model_fields.items():
        value = getattr(columns, key)
        wanted = [] if value is None or key in NOT_COLUMNS else [value] if isinstance(value, str) else value
        if (value != field.default or key == "image") and key not in NOT_COLUMNS:
            cells.require(*wanted, hint=f"; say which it is with columns.{key}=")
        found[key] = [name for name in wanted if name in cells]
    if not found["caption"] and not found["label"] and not keep_untexted:
        known = ", ".join(cells.table.column_names)
        raise CorpusError(
            f"{cells.uri} has neither captions ({columns.caption}) nor labels ({columns.label}); its columns are: "
            f"{known}; name one with columns.caption= or columns.label=, or keep_untexted=true to "
            "learn from images alone"
        )
    return found


def _labels(findings: Findings, cells: StringTable, names: list[str], separator: str | None) -> pa.Array | None:
    if not names:
        return None
    for name in names:
        findings.count_placeholders(cells[name], separator)
    return joined_lists([listed(text(cells[name]), separator) for name in names])


def _key(cells: StringTable, names: list[str]) -> pa.Array | None:
    """One key over one or several columns; null where all of them are."""
    if not names:
        return None
    parts = [text(cells[name]) for name in names]
    if len(parts) == 1:
        return parts[0]
    joined = pc.binary_join_element_wise(*(pc.fill_null(part, "") for part in parts), "/")
    return map_values(joined, lambda key: key if key.strip("/") else None, pa.string())
