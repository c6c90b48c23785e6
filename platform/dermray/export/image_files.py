"""Images as files: `images/train/00000/000000000.jpg`, a folder for every so many of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from dermray import storage
from dermray.export.manifest import ExportedFile, PartRecord
from dermray.export.parts import SAMPLES, Part, Samples, key, ranges
from dermray.export.settings import ExportConfig

IMAGES = "images"
NUM_WRITE_THREADS = 16


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """One part a folder."""
    return [
        Part(IMAGES, split, index, first, last, (_folder(split, index),))
        for index, (first, last) in enumerate(ranges(num_samples, config.samples_per_file))
    ]


def paths(split: str, num_samples: int, config: ExportConfig) -> Iterator[str]:
    """Where each image of a split is, relative to the output."""
    for index, (first, last) in enumerate(ranges(num_samples, config.samples_per_file)):
        for place in range(last - first):
            yield f"{_folder(split, index)}/{key(index, place, config.samples_per_file)}.jpg"


def _folder(split: str, index: int) -> str:
    return f"{IMAGES}/{split}/{index:05d}"


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a folder of images.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
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
