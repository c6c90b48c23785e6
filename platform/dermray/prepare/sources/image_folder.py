"""A folder of images, one folder a class: `psoriasis/a.jpg`, or `train/psoriasis/a.jpg` with the split first.

Classes inside classes (`eczema/hand eczema/a.jpg`) become the disease tree. `_` in a name is a space, commas are left
out. A .zip or .tar archive counts as a folder of its own name. There are no captions, so each image gets the published
sentence over its class; an image that lies in no class has none. Row numbers count the images in the order of their
paths. The layout tells nothing of patients: if several images show one, use `csv` and name the patient.
"""

from __future__ import annotations

import posixpath

import pyarrow as pa

from dermray.errors import CorpusError
from dermray.prepare.archives import split_address
from dermray.prepare.sources.places import IMAGE_ENDINGS, SPLITS, images_below
from dermray.prepare.sources.rows import (
    RawRows,
    SourceRequest,
    assemble,
    diagnosis_sentences,
    listed,
    meta,
    tree_columns,
)


def read(request: SourceRequest) -> RawRows:
    """List the images below `request.input` (or below its folder `request.table`).

    Raises:
        CorpusError: there is no image, or an archive is cut off.
        OntologyError: the same class names are above and below each other.
        StorageError: the folder cannot be listed.
    """
    images = sorted(images_below(request.input, request.table or ""))[: request.limit]
    if not images:
        where = "/".join(filter(None, (request.input, request.table)))
        raise CorpusError(f"{where} holds no image: files ending with {', '.join(IMAGE_ENDINGS)} are expected there")
    prefix = f"{request.table.strip('/')}/" if request.table else ""
    splits, classes = zip(*(_placed(image.removeprefix(prefix)) for image in images), strict=True)
    depth = max(1, *map(len, classes))
    levels = [pa.array([path[level] if level < len(path) else "" for path in classes]) for level in range(depth)]
    labels, hierarchy, ontology = tree_columns(levels)
    table = assemble(
        row=pa.array(range(1, len(images) + 1), pa.int64()),
        source="image_folder",
        source_id=pa.array(images),
        image=pa.array(images),
        captions=diagnosis_sentences(labels),
        labels=listed(labels, separator=None),
        hierarchy=hierarchy,
        split=pa.array(splits, pa.string()),
        meta=meta(len(images)),
    )
    return RawRows(table, (), ontology, {"raw": "the published sentence over the folder's name"})


def _placed(path: str) -> tuple[str | None, list[str]]:
    """The split and the classes, coarse to fine, that the folders of an image name."""
    address = split_address(path)
    plain = f"{posixpath.splitext(address.archive)[0]}/{address.member}" if address else path
    folders = [" ".join(part.replace("_", " ").split()) for part in plain.split("/")[:-1]]
    split = SPLITS.get(folders[0].lower()) if folders else None
    return split, folders[1:] if split else folders
