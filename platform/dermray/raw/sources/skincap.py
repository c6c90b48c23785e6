"""SkinCAP (Zhou et al., 2024, arXiv 2405.18004): 4,000 images of Fitzpatrick17k and DDI with dermatologists' captions.

Expects `skincap_v240623.csv` (the .xlsx of the release must be saved as CSV) with skincap_file_path and
caption_zh_polish_en (or caption_en), images of these names anywhere below the input (the release: `skincap/`). Taken
where they are there: id, disease, fitzpatrick_scale, SkinCon's concept columns and its "Do not consider this image".
The Chinese originals and what else the table holds are kept in `meta.extra`.
"""

from __future__ import annotations

from dermray import storage
from dermray.errors import CorpusError
from dermray.raw.sources.places import locate
from dermray.raw.sources.rows import (
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
)
from dermray.raw.sources.skincon import REJECTED, concept_columns, marked, without_rejected
from dermray.raw.sources.tables import read_table

TABLE_NAME = "skincap_v240623.csv"
IMAGE = "skincap_file_path"
CAPTIONS = ("caption_zh_polish_en", "caption_en", "caption")
SKIN_TYPE = "fitzpatrick_scale"


def read(request: SourceRequest) -> RawRows:
    """Read the table and find the images under `request.input`.

    Raises:
        CorpusError: the table is missing or a spreadsheet, one of its columns is missing, or an archive is cut off.
    """
    _refuse_spreadsheet(request)
    cells = read_table(request, TABLE_NAME)
    caption = next((name for name in CAPTIONS if name in cells), CAPTIONS[0])
    cells.require(IMAGE, caption)
    cells, rejected = without_rejected(cells, IMAGE, request.findings)
    if "disease" in cells:
        request.findings.count_placeholders(cells["disease"])
    concepts = concept_columns(cells)
    images = text(cells[IMAGE])
    used = {"column 1", IMAGE, caption, "id", "disease", SKIN_TYPE, REJECTED, *concepts.values()}
    said = of_patients(len(cells.rows), skin_type=cells.get(SKIN_TYPE))
    table = assemble(
        row=cells.rows,
        source="skincap",
        source_id=cells["id"] if "id" in cells else cells[IMAGE],
        image=locate(request, images, lambda name: f"skincap/{name}", folders=("skincap",)),
        captions=raw_captions(text(cells[caption])),
        labels=listed(text(cells["disease"], lower=True), separator=None) if "disease" in cells else None,
        concepts=marked(cells, concepts, request.findings),
        skin_type=said.skin_type,
        modality="clinical",
        meta=meta(
            len(cells.rows),
            extra=extras({**leftover(cells.table, used), **said.as_written}),
        ),
    )
    return RawRows(table, (*cells.dropped, *rejected), None, {"raw": f"column {caption}"}, said.not_understood)


def _refuse_spreadsheet(request: SourceRequest) -> None:
    uri = storage.join(request.input, request.table or TABLE_NAME)
    sheet = storage.join(request.input, "skincap_v240623.xlsx")
    if uri.endswith(".xlsx") or (not request.table and not storage.exists(uri) and storage.exists(sheet)):
        found = uri if request.table else sheet
        raise CorpusError(f"{found} is a spreadsheet: save it as CSV in UTF-8, as {TABLE_NAME} beside it")
