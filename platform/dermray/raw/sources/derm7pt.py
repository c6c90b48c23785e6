"""Derm7pt (Kawahara et al., 2018, doi 10.1109/JBHI.2018.2824327): clinical and dermoscopic image of each lesion.

Expects the release's folders: `meta/meta.csv` with case_num, diagnosis, the seven criteria, location, sex, clinic and
derm (paths below `images/`), and `meta/train_indexes.csv`, `valid_indexes.csv`, `test_indexes.csv` (column `indexes`:
rows of meta.csv from 0), which prescribe the splits train, val and test; without all three nothing is prescribed, with
them a row that none or several list is dropped. One row of the table gives two images, numbered alike. The criteria
that are there become concepts. The set has no captions, so each image gets the published sentence over its diagnosis.
The images of one case are a group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.ontology import ROOT, Ontology
from dermray.errors import CorpusError
from dermray.raw.sources.places import unpacked_or_archived
from dermray.raw.sources.rows import (
    FROM_DIAGNOSIS,
    DroppedRow,
    RawRows,
    SourceRequest,
    assemble,
    diagnosis_sentences,
    extras,
    first_of,
    leftover,
    listed,
    map_values,
    meta,
    of_patients,
    text,
)
from dermray.raw.sources.split_files import UNCLEAR
from dermray.raw.sources.tables import StringTable, read_beside, read_table

TABLE_NAME = "meta/meta.csv"
IMAGES = "images"
KINDS = {"derm": "dermoscopic", "clinic": "clinical"}
CRITERIA = (
    "pigment_network",
    "streaks",
    "pigmentation",
    "regression_structures",
    "dots_and_globules",
    "blue_whitish_veil",
    "vascular_structures",
)
REQUIRED = ("case_num", "diagnosis", *CRITERIA, "location", "sex", *KINDS)
_NUMBER = re.compile(r"[0-9]{1,9}(\.0+)?")
SPLITS = {"train": "train", "valid": "val", "test": "test"}
# The groups of diagnoses of the publication.
TREE = {
    ROOT: [
        *("basal cell carcinoma", "nevus", "melanoma", "seborrheic keratosis", "dermatofibroma", "lentigo"),
        *("melanosis", "vascular lesion", "miscellaneous"),
    ],
    "nevus": [
        *("blue nevus", "clark nevus", "combined nevus", "congenital nevus", "dermal nevus", "recurrent nevus"),
        "reed or spitz nevus",
    ],
    "melanoma": [
        *("melanoma (in situ)", "melanoma (less than 0.76 mm)", "melanoma (0.76 to 1.5 mm)"),
        *("melanoma (more than 1.5 mm)", "melanoma metastasis"),
    ],
}


def read(request: SourceRequest) -> RawRows:
    """Read the metadata and the split indexes under `request.input`.

    Raises:
        CorpusError: a table or one of its columns is missing, or an index is no number.
    """
    cells = read_table(request, TABLE_NAME)
    cells.require(*REQUIRED)
    split, unclear = _splits(request, cells)
    if unclear:
        kept = split.is_valid()
        cells, split = replace(cells, table=cells.table.filter(kept), rows=cells.rows.filter(kept)), split.drop_null()
    case = text(cells["case_num"])
    request.findings.count_placeholders(cells["diagnosis"])
    labels = text(cells["diagnosis"], lower=True)
    said = of_patients(len(cells.rows), sex=cells["sex"])
    shared = {
        "row": cells.rows,
        "source": "derm7pt",
        "captions": diagnosis_sentences(labels),
        "labels": listed(labels, separator=None),
        "concepts": _concepts(cells),
        "group": first_of(text(cells["case_id"]) if "case_id" in cells else None, case),
        "split": split,
        "meta": meta(
            len(cells.rows),
            sex=said.sex,
            body_site=text(cells["location"], lower=True),
            lesion_id=case,
            extra=extras({**leftover(cells.table, REQUIRED), **said.as_written}),
        ),
    }
    tables = [
        assemble(
            **shared,
            source_id=pc.binary_join_element_wise(cells["case_num"], kind, "-"),
            image=_images(request, cells[kind]),
            origin=name,
            modality=name,
        )
        for kind, name in KINDS.items()
    ]
    both = pa.concat_tables(tables)
    request.rows_met[cells.uri] += len(cells.rows) * (len(KINDS) - 1)
    order = np.argsort(both["row"].to_numpy(), kind="stable")
    table = both.take(pa.array(order)).combine_chunks()
    return RawRows(table, (*cells.dropped, *unclear), Ontology(TREE), FROM_DIAGNOSIS, said.not_understood)


def _images(request: SourceRequest, paths: pa.Array) -> pa.Array:
    below = map_values(text(paths), lambda path: f"{IMAGES}/{path}", pa.string())
    return unpacked_or_archived(request, below)


def _concepts(cells: StringTable) -> pa.Array:
    """The criteria that are not absent, with their kind: "atypical pigment network", "blue whitish veil"."""
    columns = []
    for criterion in CRITERIA:
        name = criterion.replace("_", " ")

        def concept(value: str, name: str = name) -> str:
            return "" if value == "absent" else name if value == "present" else f"{value} {name}"

        columns.append(map_values(text(cells[criterion], lower=True), concept, pa.string()).to_pylist())
    rows = zip(*columns, strict=True)
    return pa.array([[concept for concept in row if concept] for row in rows], pa.list_(pa.string()))


def _splits(request: SourceRequest, cells: StringTable) -> tuple[pa.Array, list[DroppedRow]]:
    """The split of each row by the three index tables, null where they are not all there; and rows that none, or
    several of them, list, as dropped.
    """
    names = {split: f"meta/{kind}_indexes.csv" for kind, split in SPLITS.items()}
    here = [name for name in names.values() if storage.exists(storage.join(request.input, name))]
    if len(here) < len(names):
        request.findings.unused.update({f"{name} without the other two": 1 for name in here})
        return pa.nulls(len(cells.rows), pa.string()), []
    splits_of: dict[int, list[str]] = defaultdict(list)
    known = {*cells.rows.to_pylist(), *(row.row for row in cells.dropped)}
    for split, name in names.items():
        rows = _indexes(read_beside(request, name))
        if request.limit is None:
            request.findings.unused[f"numbers in {name} that no row has"] += len(rows.difference(known))
        for row in rows:
            splits_of[row].append(split)
    said = [splits_of[row] for row in cells.rows.to_pylist()]
    dropped = []
    for row, case, splits in zip(cells.rows.to_pylist(), cells["case_num"].to_pylist(), said, strict=True):
        if len(splits) != 1:
            detail = f"the indexes of {' and of '.join(splits)} list it" if splits else "none of the indexes lists it"
            dropped.append(DroppedRow(row, case, "", UNCLEAR, detail))
    return pa.array([splits[0] if len(splits) == 1 else None for splits in said], pa.string()), dropped


def _indexes(cells: StringTable) -> set[int]:
    """The rows of the metadata, counted from 1, that an index table lists, counted from 0."""
    cells.require("indexes")
    rows: set[int] = set()
    for row, index in zip(cells.rows.to_pylist(), cells["indexes"].to_pylist(), strict=True):
        if not _NUMBER.fullmatch(index.strip()):
            raise CorpusError(f"{cells.uri}, column 'indexes', row {row}: {index[:40]!r} is no number of a row, from 0")
        rows.add(int(index.strip().partition(".")[0]) + 1)
    return rows
