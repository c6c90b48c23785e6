"""HAM10000 (Tschandl et al., 2018, doi 10.7910/DVN/DBW86T): dermoscopic images of seven diagnoses.

Expects `HAM10000_metadata.csv` (as published also without ending, or `.tab`) with lesion_id, image_id, dx, dx_type,
age, sex and localization. The images `{image_id}.jpg` may lie in one folder, in `HAM10000_images_part_1` and `_2`, or
in the .zip archives of that name. The seven codes become the names of the published zero-shot benchmark; the set has
no captions, so each image gets the published sentence over its diagnosis. Images of one lesion are a group.
"""

from __future__ import annotations

import pyarrow as pa

from dermray.corpus.ontology import Ontology
from dermray.raw.sources.places import locate
from dermray.raw.sources.rows import (
    FROM_DIAGNOSIS,
    RawRows,
    SourceRequest,
    assemble,
    diagnosis_sentences,
    extras,
    leftover,
    listed,
    map_values,
    meta,
    of_patients,
    text,
)
from dermray.raw.sources.tables import read_table

TABLE_NAMES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images")
REQUIRED = ("lesion_id", "image_id", "dx", "age", "sex", "localization")
DIAGNOSES = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "nevus",
    "vasc": "vascular",
}


def read(request: SourceRequest) -> RawRows:
    """Read the metadata and find the images under `request.input`.

    Raises:
        CorpusError: the table or one of its columns is missing, or an archive is cut off.
    """
    cells = read_table(request, *TABLE_NAMES)
    cells.require(*REQUIRED)
    names = text(cells["image_id"])
    request.findings.count_placeholders(cells["dx"])
    labels = map_values(text(cells["dx"]), lambda code: DIAGNOSES.get(code.lower(), code), pa.string())
    lesions = text(cells["lesion_id"])
    said = of_patients(len(cells.rows), age=cells["age"], sex=cells["sex"])
    table = assemble(
        row=cells.rows,
        source="ham10000",
        source_id=cells["image_id"],
        image=locate(request, names, lambda name: f"{name}.jpg", folders=FOLDERS),
        captions=diagnosis_sentences(labels),
        labels=listed(labels, separator=None),
        group=lesions,
        modality="dermoscopic",
        meta=meta(
            len(cells.rows),
            age=said.age,
            sex=said.sex,
            body_site=text(cells["localization"], lower=True),
            lesion_id=lesions,
            extra=extras({**leftover(cells.table, REQUIRED), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, Ontology.flat(DIAGNOSES.values()), FROM_DIAGNOSIS, said.not_understood)
