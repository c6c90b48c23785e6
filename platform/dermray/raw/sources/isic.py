"""ISIC archive (isic-archive.com): a collection or challenge as downloaded, `metadata.csv` beside its images.

Expects an id column (`isic_id`; in older challenges `image` or `image_name`) and a diagnosis: `diagnosis_1` to
`diagnosis_5`, coarse to fine, or `diagnosis`, or else `benign_malignant`. Taken where they are there: lesion_id,
patient_id, age_approx, sex, anatom_site_special or anatom_site_general, fitzpatrick_skin_type. The diagnosis columns
become the disease tree (commas inside a name are left out: they separate names). The archive has no captions, so each
image gets the published sentence over its diagnosis. Images of one patient, or else of one lesion, are a group.
"""

from __future__ import annotations

import pyarrow as pa

from dermray.errors import CorpusError
from dermray.raw.sources.pictures import modalities
from dermray.raw.sources.places import locate
from dermray.raw.sources.rows import (
    FROM_DIAGNOSIS,
    RawRows,
    SourceRequest,
    assemble,
    diagnosis_sentences,
    extras,
    first_of,
    leftover,
    listed,
    meta,
    of_patients,
    text,
    tree_columns,
)
from dermray.raw.sources.tables import StringTable, read_table

TABLE_NAME = "metadata.csv"
IDS = ("isic_id", "image", "image_name")
LEVELS = ("diagnosis_1", "diagnosis_2", "diagnosis_3", "diagnosis_4", "diagnosis_5")
IMAGE_TYPE = "image_type"
SITES = ("anatom_site_special", "anatom_site_general", "anatom_site_general_challenge")


def read(request: SourceRequest) -> RawRows:
    """Read the metadata and find the images under `request.input`.

    Raises:
        CorpusError: the table, its id or any diagnosis column is missing, or an archive is cut off.
        OntologyError: the diagnosis columns contradict each other.
    """
    cells = read_table(request, TABLE_NAME)
    id_column = next((name for name in IDS if name in cells), IDS[0])
    cells.require(id_column)
    levels = _levels(cells)
    request.findings.count_placeholders(cells[levels[-1]])
    labels, hierarchy, ontology = tree_columns([cells[name] for name in levels])

    def column(*names: str, lower: bool = False) -> pa.Array:
        present = [text(cells[name], lower=lower) for name in names if name in cells]
        values = first_of(*present)
        return pa.nulls(len(cells.rows), pa.string()) if values is None else values

    said = of_patients(
        len(cells.rows), age=column("age_approx"), sex=column("sex"), skin_type=column("fitzpatrick_skin_type")
    )
    patients, lesions = column("patient_id"), column("lesion_id")
    kinds = cells.get(IMAGE_TYPE)
    used = {id_column, *levels, *SITES, "patient_id", "lesion_id", "age_approx", "sex", "fitzpatrick_skin_type"}
    table = assemble(
        row=cells.rows,
        source="isic",
        source_id=cells[id_column],
        image=locate(request, text(cells[id_column]), lambda name: f"{name}.jpg"),
        captions=diagnosis_sentences(labels),
        labels=listed(labels, separator=None),
        hierarchy=hierarchy,
        skin_type=said.skin_type,
        group=first_of(patients, lesions),
        origin=column(IMAGE_TYPE, lower=True),
        modality=modalities(request.findings, IMAGE_TYPE, kinds, cells.rows) if kinds is not None else None,
        meta=meta(
            len(cells.rows),
            age=said.age,
            sex=said.sex,
            body_site=column(*SITES, lower=True),
            patient_id=patients,
            lesion_id=lesions,
            extra=extras({**leftover(cells.table, used), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, ontology, FROM_DIAGNOSIS, said.not_understood)


def _levels(cells: StringTable) -> list[str]:
    for names in (LEVELS, ("diagnosis",), ("benign_malignant",)):
        present = [name for name in names if name in cells]
        if present:
            return present
    known = ", ".join(cells.table.column_names)
    raise CorpusError(f"{cells.uri} has no column 'diagnosis_1' or 'diagnosis'; its columns are: {known}")
