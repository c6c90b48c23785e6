"""Derm7pt (Kawahara et al., 2018, doi 10.1109/JBHI.2018.2824327): clinical and dermoscopic image of each lesion.

Expects the release's folders: `meta/meta.csv` with case_num, diagnosis, the seven criteria, location, sex, clinic and
derm (paths below `images/`), and `meta/train_indexes.csv`, `valid_indexes.csv`, `test_indexes.csv` (column `indexes`:
rows of meta.csv from 0), which prescribe the splits train, val and test; without all three nothing is prescribed. One
row of the table gives two images, numbered alike. The criteria that are there become concepts. The set has no
captions, so each image gets the published sentence over its diagnosis. The images of one case are a group.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.ontology import ROOT, Ontology
from dermray.errors import CorpusError
from dermray.prepare.sources.places import unpacked_or_archived
from dermray.prepare.sources.rows import (
    FROM_DIAGNOSIS,
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
    text,
)
from dermray.prepare.sources.tables import StringTable, read_table

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
        CorpusError: a table or one of its columns is missing, or an index names no row.
    """
    cells = read_table(request, TABLE_NAME)
    cells.require(*REQUIRED)
    case = text(cells["case_num"])
    labels = text(cells["diagnosis"], lower=True)
    split = _splits(request, cells)
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
            sex=text(cells["sex"], lower=True),
            body_site=text(cells["location"], lower=True),
            lesion_id=case,
            extra=extras(leftover(cells.table, REQUIRED)),
        ),
    }
    tables = [
        assemble(
            **shared,
            source_id=pc.binary_join_element_wise(cells["case_num"], kind, "-"),
            image=_images(request, cells[kind]),
            origin=name,
        )
        for kind, name in KINDS.items()
    ]
    both = pa.concat_tables(tables)
    order = np.argsort(both["row"].to_numpy(), kind="stable")
    return RawRows(both.take(pa.array(order)).combine_chunks(), cells.dropped, Ontology(TREE), FROM_DIAGNOSIS)


def _images(request: SourceRequest, paths: pa.Array) -> pa.Array:
    below = map_values(text(paths), lambda path: f"{IMAGES}/{path}", pa.string())
    return unpacked_or_archived(request.input, below)


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


def _splits(request: SourceRequest, cells: StringTable) -> pa.Array:
    """The split of each row by the three index tables; null where they are not all there."""
    names = {split: f"meta/{kind}_indexes.csv" for kind, split in SPLITS.items()}
    nothing = pa.nulls(len(cells.rows), pa.string())
    if not all(storage.exists(storage.join(request.input, name)) for name in names.values()):
        return nothing
    split_of: dict[int, str] = {}
    for split, name in names.items():
        indexes = read_table(request.beside(name))
        indexes.require("indexes")
        try:
            split_of.update((int(float(index)) + 1, split) for index in indexes["indexes"].to_pylist())
        except ValueError as error:
            raise CorpusError(f"{indexes.uri}, column 'indexes': {error}; row numbers from 0 are expected") from None
    return pa.array([split_of.get(row) for row in cells.rows.to_pylist()], pa.string())
