"""Derm1M (Yan et al., 2025, arXiv 2503.14911): the release's CSV, `ontology.json` and image files.

The raw caption is `truncated_caption`, on which the published recipes train. Frames of one video, pictures of one
forum post, figures of one article and cuts of one book page show the same patient, so each of these is a group.
"""

from __future__ import annotations

import re

import pyarrow as pa

from dermray.corpus.ontology import Ontology
from dermray.prepare.sources.rows import (
    RawRows,
    SourceRequest,
    assemble,
    extras,
    listed,
    map_values,
    meta,
    path,
    raw_captions,
    text,
    years,
)
from dermray.prepare.sources.tables import read_table

TABLE_NAME = "Derm1M_v2_pretrain.csv"
REQUIRED = (
    "filename",
    "truncated_caption",
    "source",
    "source_type",
    "disease_label",
    "hierarchical_disease_label",
    "skin_concept",
    "body_location",
    "symptoms",
    "age",
    "gender",
)

# What file names of one patient share: `group` of the first pattern that fits.
GROUPS = (
    re.compile(r"(?P<group>youtube/.+)_frame_\d+.*"),
    re.compile(r"(?P<group>IIYI/\d+)_\d+\.\w+"),
    re.compile(r"pubmed/.*(?P<group>PMC\d+).*"),
    re.compile(r"(?P<group>(?:edu|note)/.+_\d{5})_\d{5}(?:_\d+)?\.\w+"),
)


def read(request: SourceRequest) -> RawRows:
    """Read the release's table and disease tree under `request.input`.

    Raises:
        CorpusError: the table, one of its columns or the tree is missing.
        OntologyError: the tree is malformed.
    """
    cells = read_table(request, TABLE_NAME)
    cells.require(*REQUIRED)
    origin = text(cells["source"])
    extra = extras({"source": origin, "source_type": text(cells["source_type"])})
    table = assemble(
        row=cells.rows,
        source="derm1m",
        source_id=cells["filename"],
        image=path(cells["filename"]),
        captions=raw_captions(text(cells["truncated_caption"])),
        labels=listed(text(cells["disease_label"]), separator=None),
        hierarchy=text(cells["hierarchical_disease_label"]),
        concepts=listed(text(cells["skin_concept"], lower=True)),
        group=map_values(cells["filename"], group_of, pa.string()),
        origin=origin,
        meta=meta(
            len(cells.rows),
            age=years(cells["age"]),
            sex=text(cells["gender"], lower=True),
            body_site=text(cells["body_location"], lower=True),
            symptoms=text(cells["symptoms"], lower=True),
            extra=extra,
        ),
    )
    return RawRows(table, cells.dropped, Ontology.load(request.input))


def group_of(filename: str) -> str | None:
    """The video, post, article or book page that a file name tells; None if it tells none."""
    for pattern in GROUPS:
        match = pattern.fullmatch(filename)
        if match:
            return match["group"]
    return None
