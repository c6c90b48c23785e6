"""open_clip's tables: `train.tsv` with filepath and title for each pair, and the images as files beside it.

Paths are relative, so open_clip is to be started in the folder. These tables say only what it reads; `metadata.csv`
holds the whole samples, an image a row, for `jobs/prepare.py source=csv`.
"""

from __future__ import annotations

import csv
import json
from typing import TextIO

from dermray.corpus.exchange import to_document
from dermray.export import image_files
from dermray.export.manifest import PartRecord
from dermray.export.parts import CAPTIONS, UNCAPTIONED, Part, Samples, publish_text, titles
from dermray.export.settings import ExportConfig

PAIRS, WHOLE = "pairs", "samples"
# What open_clip calls them unless told otherwise.
IMAGE_KEY, CAPTION_KEY = "filepath", "title"
# What the reader of source=csv looks for.
TABLE_NAME, IMAGE_COLUMN, SAMPLE_COLUMN = "metadata.csv", "image", "dermray_sample"


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """The folders of images of a split, and its table."""
    return [*image_files.plan(split, num_samples, config), Part(PAIRS, split, 0, 0, num_samples, (f"{split}.tsv",))]


def plan_whole(num_samples: int) -> Part:
    """The table of whole samples."""
    return Part(WHOLE, None, 0, 0, num_samples, (TABLE_NAME,))


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a folder of images or a table; the same bytes each time.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    if part.kind == image_files.IMAGES:
        return image_files.write(part, samples, config)
    (path,) = part.paths
    fill = _write_pairs if part.kind == PAIRS else _write_whole
    return publish_text(config.output, path, lambda sink: fill(sink, part, samples, config))


def _write_pairs(sink: TextIO, part: Part, samples: Samples, config: ExportConfig) -> dict[str, int]:
    assert part.split is not None
    writer = csv.writer(sink, delimiter="\t", lineterminator="\n")
    writer.writerow([IMAGE_KEY, CAPTION_KEY])
    paths = image_files.paths(part.split, part.last, config)
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
        for path, sample in zip(image_files.paths(split, num_samples, config), rows, strict=True):
            writer.writerow([path, split, json.dumps(to_document(sample), ensure_ascii=False)])
    return {}
