"""A folder of images, one folder a class: `psoriasis/a.jpg`, or with the split: `train/psoriasis/a.jpg`.

What stands around a folder that is named after a split (`data.zip!/dermatology/train/psoriasis/a.jpg`) names no class;
where the split is the last folder (`psoriasis/train/a.jpg`), those around it do, unless all images share them.

Classes inside classes (`eczema/hand eczema/a.jpg`) become the disease tree; folders of one level are labels without a
tree, so that `BCC` and `basal cell carcinoma` are one class. `_` in a name is a space, commas are left out. A .zip or
.tar archive counts as a folder of its own name. There are no captions, so each image gets the published sentence over
its class; an image that lies in no class has none. Row numbers count the images in the order of their paths. The layout
tells nothing of patients: if several images show one, use `csv` and name the patient.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from dermray.errors import CorpusError
from dermray.raw.archives import split_address
from dermray.raw.sources.places import PHOTOGRAPH_ENDINGS, images_below
from dermray.raw.sources.rows import RawRows, SourceRequest, assemble, listed, meta, raw_captions, tree_columns
from dermray.raw.sources.sentences import label_sentences
from dermray.raw.splits import known_split


def read(request: SourceRequest) -> RawRows:
    """List the images below `request.input` (or below its folder `request.table`).

    Raises:
        CorpusError: there is no image, or an archive is cut off.
        OntologyError: the same class names are above and below each other.
        StorageError: the folder cannot be listed.
    """
    found = images_below(request, request.table or "", endings=PHOTOGRAPH_ENDINGS, count_others=True)
    images = sorted(found)[: request.limit]
    if not images:
        where = "/".join(filter(None, (request.input, request.table)))
        there = ", ".join(f"{ending} ({count:,})" for ending, count in request.findings.not_read.most_common())
        raise CorpusError(
            f"{where} holds no image: files ending with {', '.join(PHOTOGRAPH_ENDINGS)} are expected there"
            + (f"; there are: {there}" if there else "")
        )
    request.rows_met[request.input] = len(images)
    prefix = f"{request.table.strip('/')}/" if request.table else ""
    splits, classes = _placed(request, [_folders(image.removeprefix(prefix)) for image in images])
    if any(splits):
        beside = Counter(path[0] for split, path in zip(splits, classes, strict=True) if path and not split)
        for folder, count in beside.items():
            request.findings.unused[f"images of {folder!r}, a class beside folders of splits"] += count
    depth = max(1, *map(len, classes))
    levels = [pa.array([path[level] if level < len(path) else "" for path in classes]) for level in range(depth)]
    request.findings.count_placeholders(pa.array([path[-1] if path else "" for path in classes]))
    labels, hierarchy, ontology = tree_columns(levels)
    tree = ontology if depth > 1 else None
    listed_labels = listed(labels, separator=None)
    table = assemble(
        row=pa.array(range(1, len(images) + 1), pa.int64()),
        source="image_folder",
        source_id=pa.array(images),
        image=pa.array(images),
        captions=raw_captions(label_sentences(listed_labels, tree)),
        labels=listed_labels,
        hierarchy=hierarchy if tree else None,
        split=pa.array(splits, pa.string()),
        meta=meta(len(images)),
    )
    return RawRows(table, (), tree, {"raw": "the published sentence over the folder's name"})


def _folders(path: str) -> list[str]:
    """The folders that an image lies in, an archive being one."""
    address = split_address(path)
    plain = f"{posixpath.splitext(address.archive)[0]}/{address.member}" if address else path
    return [" ".join(part.replace("_", " ").split()) for part in plain.split("/")[:-1]]


def _placed(request: SourceRequest, images: Sequence[Sequence[str]]) -> tuple[list[str | None], list[list[str]]]:
    """The split of each image, and its classes, coarse to fine, from the folders that it lies in."""
    at = [next((place for place, name in enumerate(each) if known_split(name)), None) for each in images]
    splits = [None if place is None else known_split(each[place]) for each, place in zip(images, at, strict=True)]
    above = [tuple(each[:place]) if place else () for each, place in zip(images, at, strict=True)]
    below = [list(each) if place is None else list(each[place + 1 :]) for each, place in zip(images, at, strict=True)]
    around = {folders for folders, split in zip(above, splits, strict=True) if split}
    wrappers = {folders for folders, inner, split in zip(above, below, splits, strict=True) if split and inner}
    classes = []
    for folders, inner in zip(above, below, strict=True):
        if folders and not inner and folders not in wrappers and len(around) > 1:
            classes.append(list(folders))
        else:
            classes.append(inner)
            if folders:
                name = "/".join(folders)
                request.findings.unused[f"folder {name!r} around those of splits, which names no class"] += 1
    return splits, classes
