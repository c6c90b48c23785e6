"""open_clip's tables: `train.tsv` with filepath and title for each pair, and the images as files beside it.

Paths are relative, so open_clip is to be started in the folder. These tables say only what it reads; `metadata.csv`
holds the whole samples, an image a row, for `jobs/prepare.py source=csv`.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from dermray import storage
from dermray.corpus.exchange import to_document
from dermray.export.manifest import ExportedFile, PartRecord
from dermray.export.parts import CAPTIONS, SAMPLES, UNCAPTIONED, Part, Samples, key, published, ranges, titles
from dermray.export.settings import ExportConfig

IMAGES, PAIRS, WHOLE = "images", "pairs", "samples"
# What open_clip calls them unless told otherwise.
IMAGE_KEY, CAPTION_KEY = "filepath", "title"
# What the reader of source=csv looks for.
TABLE_NAME, IMAGE_COLUMN, SAMPLE_COLUMN = "metadata.csv", "image", "dermray_sample"
NUM_WRITE_THREADS = 16


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """The folders of images of a split, and its table."""
    parts = [
        Part(IMAGES, split, index, first, last, (_folder(split, index),))
        for index, (first, last) in enumerate(ranges(num_samples, config.samples_per_file))
    ]
    return [*parts, Part(PAIRS, split, 0, 0, num_samples, (f"{split}.tsv",))]


def plan_whole(num_samples: int) -> Part:
    """The table of whole samples."""
    return Part(WHOLE, None, 0, 0, num_samples, (TABLE_NAME,))


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a folder of images or a table; the same bytes each time.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    if part.kind == IMAGES:
        return _write_images(part, samples, config)
    (path,) = part.paths
    with storage.staged(storage.join(config.output, path)) as aside:
        with aside.open("w", encoding="utf-8", newline="") as sink:
            counts = (_write_pairs if part.kind == PAIRS else _write_whole)(sink, part, samples, config)
        return PartRecord(files=(published(path, aside),), counts=counts)


def image_paths(split: str, num_samples: int, config: ExportConfig) -> Iterator[str]:
    """Where each image of a split is, relative to the output."""
    for index, (first, last) in enumerate(ranges(num_samples, config.samples_per_file)):
        for place in range(last - first):
            yield f"{_folder(split, index)}/{key(index, place, config.samples_per_file)}.jpg"


def _folder(split: str, index: int) -> str:
    return f"{IMAGES}/{split}/{index:05d}"


def _write_images(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    assert part.split is not None
    (folder,) = part.paths
    lines = hashlib.sha256()
    num_bytes = place = 0
    with ThreadPoolExecutor(NUM_WRITE_THREADS, thread_name_prefix="write") as pool:
        for table in samples.tables(part.split, part.first, part.last, ["image"]):
            images = table["image"].to_pylist()
            names = [f"{key(part.index, place + row, config.samples_per_file)}.jpg" for row in range(len(images))]
            uris = [storage.join(config.output, folder, name) for name in names]
            # All of a row group are written before the next is read; the first error is raised.
            list(pool.map(storage.write_bytes, uris, images))
            for name, image in zip(names, images, strict=True):
                lines.update(f"{hashlib.sha256(image).hexdigest()}  {name}\n".encode())
                num_bytes += len(image)
            place += len(images)
    file = ExportedFile(path=folder, num_bytes=num_bytes, sha256=lines.hexdigest(), num_files=place)
    return PartRecord(files=(file,), counts={SAMPLES: place})


def _write_pairs(sink: TextIO, part: Part, samples: Samples, config: ExportConfig) -> dict[str, int]:
    assert part.split is not None
    writer = csv.writer(sink, delimiter="\t", lineterminator="\n")
    writer.writerow([IMAGE_KEY, CAPTION_KEY])
    paths = image_paths(part.split, part.last, config)
    num_captions = num_without = 0
    rows = samples.rows(part.split, part.first, part.last, ["captions"])
    for path, sample in zip(paths, rows, strict=True):
        texts = titles(sample["captions"], config.aspects)
        texts = texts[:1] if config.titles == "first" else texts
        writer.writerows([path, text] for text in texts)
        num_captions += len(texts)
        num_without += not texts
    return {CAPTIONS: num_captions, UNCAPTIONED: num_without}


def _write_whole(sink: TextIO, part: Part, samples: Samples, config: ExportConfig) -> dict[str, int]:
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([IMAGE_COLUMN, "split", SAMPLE_COLUMN])
    texts = [name for name in samples.columns.names if name != "image"]
    for split, num_samples in samples.splits.items():
        rows = samples.rows(split, 0, num_samples, texts)
        for path, sample in zip(image_paths(split, num_samples, config), rows, strict=True):
            writer.writerow([path, split, json.dumps(to_document(sample), ensure_ascii=False)])
    return {}
