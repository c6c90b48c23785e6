"""MAKE's training table (Yan et al., 2025, arXiv 2505.09372): Derm1M's images with captions taken apart.

Expects filename, truncated_caption, ontology_caption, visual_concept_caption, subcaption_1 to subcaption_8,
sub_caption_mask (a list of eight 0 and 1) and knowledge_masks (a list of three: caption, ontology, visual, the order
of the published rows, whatever the repository's data guide says). A caption whose mask is 0, or which is empty or
"nan", is none. All of them are taken as they are, and this reader makes none. Taken where they are there:
standardized_disease and ontology_final (Derm1M: disease_label, hierarchical_disease_label), skin_concept_standarized
(skin_concept), source, body_location, symptoms, age, gender. Paths of the authors' machine (`/VL_Data/…`,
`data/pretrain/images/…`) are taken as relative to the input. `ontology.json` is taken if it lies there. With
`MAKE_val.csv` or `MAKE_test.csv` beside it the tables prescribe the splits, and the rows of each are numbered after
those of the one before.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa

from dermray import storage
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.raw.sources.derm1m import group_of
from dermray.raw.sources.interpreting import interpreted, successive
from dermray.raw.sources.joining import joined_rows
from dermray.raw.sources.places import with_images_placed
from dermray.raw.sources.rows import (
    Findings,
    RawRows,
    SourceRequest,
    assemble,
    caption_lists,
    extras,
    listed,
    map_values,
    meta,
    of_patients,
    path,
    text,
)
from dermray.raw.sources.tables import StringTable, read_blocks, read_tree

# What the table of a split may be called.
TABLE_NAMES = {
    "train": ("MAKE_train.csv", "MAKE_training.csv", "MAKE_training_example.csv"),
    "val": ("MAKE_val.csv", "MAKE_valid.csv", "MAKE_validation.csv"),
    "test": ("MAKE_test.csv",),
}
SUB_CAPTIONS = tuple(f"subcaption_{number}" for number in range(1, MAX_SUB_CAPTIONS + 1))
# In the order of knowledge_masks.
KNOWLEDGE: tuple[tuple[CaptionAspect, str], ...] = (
    ("raw", "truncated_caption"),
    ("ontology", "ontology_caption"),
    ("concept", "visual_concept_caption"),
)
REQUIRED = (
    *("filename", *(name for _, name in KNOWLEDGE)),
    *(*SUB_CAPTIONS, "sub_caption_mask", "knowledge_masks"),
)
# All columns of the released table, in its order; its (sic) is theirs.
RELEASED = (
    *("filename", "caption", "truncated_caption", "source", "source_type", "standardized_disease", "ontology_final"),
    *("skin_concept_standarized", "augmented_caption", "body_location", "symptoms", "age", "gender"),
    *("visual_concept_caption", "ontology_caption", "sub_captions", *SUB_CAPTIONS),
    *("sub_caption_mask", "knowledge_masks"),
)
DIAGNOSES = ("standardized_disease", "disease_label")
OTHER_ROOTS = ("/VL_Data/", "data/pretrain/images/")
CAPTIONS_FROM: dict[CaptionAspect, str] = {
    **{aspect: f"column {name}" for aspect, name in KNOWLEDGE},
    "sub": "columns subcaption_1 to subcaption_8",
}


def read(request: SourceRequest) -> RawRows:
    """Read the tables under `request.input`; `request.table` reads that one alone, `request.limit` counts for each.

    Raises:
        CorpusError: a table or one of its columns is missing, or a mask is not a list of so many 0 and 1.
        OntologyError: the tree is malformed.
    """
    raw = joined_rows(successive(read_splits(request, TABLE_NAMES, interpret)))
    return replace(raw, table=with_images_placed(request, raw.table), ontology=read_tree(request))


def read_splits(
    request: SourceRequest, names: Mapping[str, Sequence[str]], interpret: Callable[..., RawRows]
) -> Iterator[Iterator[RawRows]]:
    """The rows of the table of each split that lies there, by `interpret(cells, findings, split=…)`.

    Where only the first split's is there, or `request.table` names another, the rows tell no split.

    Args:
        names: split → what its table may be called.

    Raises:
        CorpusError: none is there; or as `read_blocks`.
    """
    first, *others = names
    beside = {} if request.table else {split: _there(request, names[split]) for split in others}
    found = {split: name for split, name in beside.items() if name}
    if not found or _there(request, names[first]):
        yield interpreted(
            request, read_blocks(request, *names[first]), partial(interpret, split=first if found else None)
        )
    for split, name in found.items():
        yield interpreted(request, read_blocks(request, name), partial(interpret, split=split))


def _there(request: SourceRequest, names: Sequence[str]) -> str | None:
    return next((name for name in names if storage.exists(storage.join(request.input, name))), None)


def interpret(cells: StringTable, findings: Findings, split: str | None = None) -> RawRows:
    """The raw rows of a block of a table.

    Raises:
        CorpusError: a column is missing, or a mask is not a list of so many 0 and 1.
    """
    cells.require(*REQUIRED)

    def column(*names: str, lower: bool = False) -> pa.Array:
        name = next((each for each in names if each in cells), None)
        return text(cells[name], lower=lower) if name else pa.nulls(len(cells.rows), pa.string())

    said = of_patients(len(cells.rows), age=column("age"), sex=column("gender"))
    diagnoses = next((name for name in DIAGNOSES if name in cells), None)
    if diagnoses:
        findings.count_placeholders(cells[diagnoses])
    names = relative_paths(cells)
    images = path(names)
    origin = column("source")
    table = assemble(
        row=cells.rows,
        source="derm1m",
        source_id=names,
        image=images,
        captions=masked_captions(cells),
        labels=listed(column(*DIAGNOSES), separator=None),
        hierarchy=column("ontology_final", "hierarchical_disease_label"),
        concepts=listed(column("skin_concept_standarized", "skin_concept", lower=True)),
        group=map_values(images, group_of, pa.string()),
        split=split,
        origin=origin,
        meta=meta(
            len(cells.rows),
            age=said.age,
            sex=said.sex,
            body_site=column("body_location", lower=True),
            symptoms=column("symptoms", lower=True),
            extra=extras({"source": origin, "source_type": column("source_type"), **said.as_written}),
        ),
    )
    return RawRows(table, cells.dropped, None, CAPTIONS_FROM, said.not_understood)


def relative_paths(cells: StringTable) -> pa.Array:
    """The column `filename` without the folders of the authors' machine."""
    return map_values(cells["filename"], _relative, pa.string())


def _relative(filename: str) -> str:
    for root in OTHER_ROOTS:
        filename = filename.removeprefix(root)
    return filename


def masked_captions(cells: StringTable) -> pa.Array:
    """The captions of each row that its masks let through.

    Raises:
        CorpusError: a mask is not a list of so many 0 and 1.
    """
    knowledge = _mask(cells, "knowledge_masks", len(KNOWLEDGE))
    subs = _mask(cells, "sub_caption_mask", MAX_SUB_CAPTIONS)
    columns = [(aspect, _masked(text(cells[name]), knowledge, place)) for place, (aspect, name) in enumerate(KNOWLEDGE)]
    columns.extend(("sub", _masked(text(cells[name]), subs, place)) for place, name in enumerate(SUB_CAPTIONS))
    return caption_lists(columns)


def _masked(column: pa.Array, masks: list[tuple[int, ...]], place: int) -> pa.Array:
    return pa.array(
        [cell if mask[place] else None for cell, mask in zip(column.to_pylist(), masks, strict=True)], pa.string()
    )


def _mask(cells: StringTable, name: str, length: int) -> list[tuple[int, ...]]:
    """The masks of a column, all ones where the cell is blank."""
    encoded = cells[name].dictionary_encode()
    masks = []
    for cell in encoded.dictionary.to_pylist():
        try:
            values = ast.literal_eval(cell.strip()) if cell.strip() else [1] * length
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = None
        if not isinstance(values, list | tuple) or len(values) != length or any(each not in (0, 1) for each in values):
            row = cells.rows[cells[name].to_pylist().index(cell)]
            raise CorpusError(f"{cells.uri}, row {row}, column {name!r}: {cell[:40]!r} is no list of {length} 0 and 1")
        masks.append(tuple(values))
    return [masks[code] for code in encoded.indices.to_pylist()]
