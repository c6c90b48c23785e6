"""SkinCon (Daneshjou et al., 2022, arXiv 2302.00785): 48 clinical concepts marked on Fitzpatrick17k and DDI images.

Expects `annotations_fitzpatrick17k.csv` or `annotations_ddi.csv` with ImageID (a file name) and a column of 0 and 1
for each concept, images of these names anywhere below the input. Rows marked "Do not consider this image" are left
out. Where `fitzpatrick17k.csv` or `ddi_metadata.csv` (DDI_file, disease) lies beside the table, diagnoses and skin
types are taken from there. The raw caption is the published sentence over the concepts.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.captions import concept_caption
from dermray.corpus.ontology import Ontology
from dermray.errors import CorpusError
from dermray.raw.sources import marks
from dermray.raw.sources.places import locate
from dermray.raw.sources.rows import (
    EXCLUDED,
    DroppedRow,
    Findings,
    RawRows,
    SourceRequest,
    assemble,
    extras,
    leftover,
    listed,
    meta,
    of_patients,
    raw_captions,
    text,
    tree_columns,
)
from dermray.raw.sources.tables import StringTable, read_beside, read_table

TABLE_NAMES = ("annotations_fitzpatrick17k.csv", "annotations_ddi.csv")
REJECTED = "Do not consider this image"
# Tables with diagnoses: file, column of the image, columns of the diagnosis, column of the skin type.
DIAGNOSES = (
    (
        "fitzpatrick17k.csv",
        "md5hash",
        ("three_partition_label", "nine_partition_label", "label"),
        "fitzpatrick_scale",
    ),
    ("ddi_metadata.csv", "DDI_file", ("disease",), None),
)
CONCEPTS = (
    *("Vesicle", "Papule", "Macule", "Plaque", "Abscess", "Pustule", "Bulla", "Patch", "Nodule", "Ulcer", "Crust"),
    *("Erosion", "Excoriation", "Atrophy", "Exudate", "Purpura/Petechiae", "Fissure", "Induration", "Xerosis"),
    *("Telangiectasia", "Scale", "Scar", "Friable", "Sclerosis", "Pedunculated", "Exophytic/Fungating"),
    *("Warty/Papillomatous", "Dome-shaped", "Flat topped", "Brown(Hyperpigmentation)", "Translucent"),
    *("White(Hypopigmentation)", "Purple", "Yellow", "Black", "Erythema", "Comedo", "Lichenification", "Blue"),
    *("Umbilicated", "Poikiloderma", "Salmon", "Wheal", "Acuminate", "Burrow", "Gray", "Pigmented", "Cyst"),
)


def read(request: SourceRequest) -> RawRows:
    """Read the annotations and find the images under `request.input`.

    Raises:
        CorpusError: the table, its ImageID or every concept column is missing, or an archive is cut off.
    """
    cells = read_table(request, *TABLE_NAMES)
    cells.require("ImageID")
    names = concept_columns(cells)
    if not names:
        known = ", ".join(cells.table.column_names)
        raise CorpusError(f"{cells.uri} has no column 'Papule' or another of the concepts; its columns are: {known}")
    cells, rejected = without_rejected(cells, "ImageID", request.findings)
    concepts = marked(cells, names, request.findings)
    sentences = pa.array([concept_caption(row) for row in concepts.to_pylist()], pa.string())
    images = text(cells["ImageID"])
    nameless = {name for name in cells.table.column_names if name.startswith("column ")}
    others = leftover(cells.table, {*nameless, "ImageID", REJECTED, *names.values()})
    request.findings.extra_columns.extend(others)
    labels, hierarchy, types, ontology = _diagnoses(request, images)
    said = of_patients(len(cells.rows), skin_type=types)
    table = assemble(
        row=cells.rows,
        source="skincon",
        source_id=cells["ImageID"],
        image=locate(request, images, lambda name: name),
        captions=raw_captions(sentences),
        labels=listed(labels, separator=None),
        hierarchy=hierarchy,
        concepts=concepts,
        skin_type=said.skin_type,
        modality="clinical",
        meta=meta(len(cells.rows), extra=extras({**others, **said.as_written})),
    )
    dropped = (*cells.dropped, *rejected)
    return RawRows(table, dropped, ontology, {"raw": "the published sentence over the concepts"}, said.not_understood)


def concept_columns(cells: StringTable) -> dict[str, str]:
    """The concepts that a table has, in lower case, with the names of their columns."""
    columns = {name.strip().lower(): name for name in cells.table.column_names}
    return {concept.lower(): columns[concept.lower()] for concept in CONCEPTS if concept.lower() in columns}


def marked(cells: StringTable, names: dict[str, str], findings: Findings) -> pa.Array:
    """The concepts marked in each row ("1", "1.0", "True", "yes"), as a list column; other texts are counted."""
    found: list[list[str]] = [[] for _ in range(len(cells.rows))]
    for concept, name in names.items():
        yes, unread = marks.read(cells[name])
        marks.note(findings.unused, f"column {name}", unread)
        for row in yes:
            found[row].append(concept)
    return pa.array(found, pa.list_(pa.string()))


def without_rejected(cells: StringTable, image: str, findings: Findings) -> tuple[StringTable, list[DroppedRow]]:
    """The table without the rows that say not to consider the image, and those rows."""
    if REJECTED not in cells:
        return cells, []
    yes, unread = marks.read(cells[REJECTED])
    marks.note(findings.unused, f"column {REJECTED}", unread)
    rejected = pa.array(yes, pa.int64())
    numbers, ids = cells.rows.take(rejected).to_pylist(), cells[image].take(rejected).to_pylist()
    detail = f"the table says: {REJECTED}"
    dropped = [DroppedRow(row, name, name, EXCLUDED, detail) for row, name in zip(numbers, ids, strict=True)]
    kept = pc.invert(pc.is_in(cells.rows, value_set=pa.array(numbers, cells.rows.type)))
    return replace(cells, table=cells.table.filter(kept), rows=cells.rows.filter(kept)), dropped


def _diagnoses(request: SourceRequest, images: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array, Ontology | None]:
    """`(label, path, skin type as written, tree)` of each image from the table of diagnoses; or nulls."""
    nothing = pa.nulls(len(images), pa.string())
    stems = pa.array([posixpath.splitext(name)[0] if name else None for name in images.to_pylist()], pa.string())
    for name, key, levels, skin in DIAGNOSES:
        if not storage.exists(storage.join(request.input, name)):
            continue
        cells = read_beside(request, name)
        cells.require(key, *levels)
        keys = [posixpath.splitext(cell.strip())[0] for cell in cells[key].to_pylist()]
        places = pc.index_in(stems, value_set=pa.array(keys, pa.string()))
        unused = request.findings.unused
        if places.null_count == len(places):
            unused[f"{name}, which names none of the images"] += 1
            continue
        unused[f"rows of {name} for an image that one above names"] += len(keys) - len(set(keys))
        unused[f"images that {name} says nothing of"] += places.null_count
        request.findings.count_placeholders(cells[levels[-1]].take(places))
        labels, hierarchy, ontology = tree_columns([cells[level].take(places) for level in levels])
        types = cells[skin].take(places) if skin and skin in cells else nothing
        return labels, hierarchy, types, ontology
    return nothing, nothing, nothing, None
