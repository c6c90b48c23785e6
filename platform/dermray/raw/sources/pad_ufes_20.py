"""PAD-UFES-20 (Pacheco et al., 2020, doi 10.17632/zr7vgbcyr2.1): `metadata.csv` and smartphone photographs.

The six diagnostic codes become the names of the published zero-shot benchmark. The set has no captions, so each
image gets the published sentence over its diagnosis. Images of one patient are a group.
"""

from __future__ import annotations

import pyarrow as pa

from dermray.corpus.ontology import Ontology
from dermray.raw.sources import marks
from dermray.raw.sources.places import locate, unpacked_or_archived
from dermray.raw.sources.rows import (
    FROM_DIAGNOSIS,
    Findings,
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
    path,
    text,
)
from dermray.raw.sources.tables import read_table

TABLE_NAME = "metadata.csv"
REQUIRED = ("img_id", "patient_id", "lesion_id", "diagnostic", "fitspatrick", "region", "age", "gender")
DIAGNOSES = {
    "NEV": "nevus",
    "BCC": "basal cell carcinoma",
    "ACK": "actinic keratosis",
    "SEK": "seborrheic keratosis",
    "SCC": "squamous cell carcinoma",
    "MEL": "melanoma",
}
FOLDERS = ("images", "imgs_part_1", "imgs_part_2", "imgs_part_3")
SYMPTOMS = ("itch", "grew", "hurt", "changed", "bleed", "elevation")


def read(request: SourceRequest) -> RawRows:
    """Read `metadata.csv`; images are named by its `filename` column, or else `{img_id}` anywhere below the input.

    Raises:
        CorpusError: the table or one of its columns is missing, or an archive is cut off.
    """
    cells = read_table(request, TABLE_NAME)
    cells.require(*REQUIRED)
    num_rows = len(cells.rows)
    if "filename" in cells:
        images = unpacked_or_archived(request, path(cells["filename"]))
    else:
        images = locate(request, text(cells["img_id"]), lambda name: f"images/{name}", folders=FOLDERS)
    request.findings.count_placeholders(cells["diagnostic"])
    labels = map_values(text(cells["diagnostic"]), lambda code: DIAGNOSES.get(code.upper(), code), pa.string())
    patients = text(cells["patient_id"])
    said = of_patients(num_rows, age=cells["age"], sex=cells["gender"], skin_type=cells["fitspatrick"])
    symptoms = [name for name in SYMPTOMS if name in cells]
    used = {*REQUIRED, *symptoms, "filename", "mask"}
    table = assemble(
        row=cells.rows,
        source="pad_ufes_20",
        source_id=cells["img_id"],
        image=images,
        captions=diagnosis_sentences(labels),
        labels=listed(labels, separator=None),
        skin_type=said.skin_type,
        group=patients,
        modality="clinical",
        meta=meta(
            num_rows,
            age=said.age,
            sex=said.sex,
            body_site=text(cells["region"], lower=True),
            symptoms=_symptoms({name: cells[name] for name in symptoms}, num_rows, request.findings),
            patient_id=patients,
            lesion_id=text(cells["lesion_id"]),
            extra=extras({**leftover(cells.table, used), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, Ontology.flat(DIAGNOSES.values()), FROM_DIAGNOSIS, said.not_understood)


def _symptoms(answers: dict[str, pa.Array], num_rows: int, findings: Findings) -> pa.Array:
    """Names of the questions answered "True", separated by commas; null where there is none."""
    named: list[list[str]] = [[] for _ in range(num_rows)]
    for name, column in answers.items():
        yes, unread = marks.read(column)
        marks.note(findings.unused, f"column {name}", unread)
        for row in yes:
            named[row].append(name)
    return pa.array([", ".join(row) or None for row in named], pa.string())
