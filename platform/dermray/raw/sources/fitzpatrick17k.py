"""Fitzpatrick17k (Groh et al., 2021, arXiv 2104.09957): clinical images of 114 conditions with skin types.

Expects `fitzpatrick17k.csv` with md5hash, label, nine_partition_label, three_partition_label and fitzpatrick_scale
(or fitzpatrick; -1 is unknown), and images `{md5hash}.jpg` anywhere below the input. The three label columns become
the disease tree; the set has no captions, so each image gets the published sentence over its diagnosis. It tells
nothing of patients.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import pyarrow as pa

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
    tree_columns,
)
from dermray.raw.sources.tables import read_table

TABLE_NAME = "fitzpatrick17k.csv"
LEVELS = ("three_partition_label", "nine_partition_label", "label")
SKIN_TYPES = ("fitzpatrick_scale", "fitzpatrick")


def read(request: SourceRequest) -> RawRows:
    """Read the table and find the images under `request.input`.

    Raises:
        CorpusError: the table or one of its columns is missing, or an archive is cut off.
        OntologyError: the label columns contradict each other.
    """
    cells = read_table(request, TABLE_NAME)
    skin_type = next((name for name in SKIN_TYPES if name in cells), SKIN_TYPES[0])
    cells.require("md5hash", *LEVELS, skin_type)
    request.findings.count_placeholders(cells[LEVELS[-1]])
    labels, hierarchy, ontology = tree_columns([cells[name] for name in LEVELS])
    said = of_patients(len(cells.rows), skin_type=cells[skin_type])
    used = {"column 1", "md5hash", *LEVELS, skin_type, "url_alphanum"}
    table = assemble(
        row=cells.rows,
        source="fitzpatrick17k",
        source_id=cells["md5hash"],
        image=locate(request, text(cells["md5hash"]), lambda name: f"{name}.jpg"),
        captions=diagnosis_sentences(labels),
        labels=listed(labels, separator=None),
        hierarchy=hierarchy,
        skin_type=said.skin_type,
        origin=map_values(text(cells["url"]), lambda url: urlsplit(url).hostname, pa.string())
        if "url" in cells
        else None,
        modality="clinical",
        meta=meta(
            len(cells.rows),
            extra=extras({**leftover(cells.table, used), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, ontology, FROM_DIAGNOSIS, said.not_understood)
