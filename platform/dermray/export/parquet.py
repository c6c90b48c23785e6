"""Parquet files that `datasets.load_dataset` shows as images: `data/train-00000-of-00004.parquet`.

The image is Hugging Face's struct {bytes, path}, which the schema's `huggingface` metadata declares to be an image.
Then come `caption`, the first of those that are chosen, all columns of the sample, and those of side tables as
`sides.TABLE.COLUMN`. Image bytes are stored as they
are, so that a reader finds each at its place in the file.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import storage
from dermray.corpus.schema import CAPTION
from dermray.corpus.shards import stored_columns
from dermray.corpus.side_tables import AMONG_COLUMNS
from dermray.export.manifest import PartRecord
from dermray.export.parts import CAPTIONS, SAMPLES, UNCAPTIONED, Part, Samples, key, published, ranges, titles
from dermray.export.settings import ExportConfig

KIND = "parquet"
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
IMAGE_LEAF = "image.bytes"
FEATURES = {"image": {"_type": "Image"}}
CAPTIONS_FIELD = pa.field(
    "captions", pa.list_(pa.field("element", pa.struct([field.with_nullable(True) for field in CAPTION])))
)


def exported(columns: pa.Schema) -> pa.Schema:
    """The schema of the files of a corpus with these columns."""
    return pa.schema(
        [
            pa.field("image", IMAGE),
            pa.field("caption", pa.string()),
            # `datasets` knows no fields that must not be null; it takes their features from their types.
            *(
                CAPTIONS_FIELD if field.name == CAPTIONS_FIELD.name else field.with_nullable(True)
                for field in columns
                if field.name != "image"
            ),
        ],
        metadata={**(columns.metadata or {}), b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()},
    )


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """One part a file."""
    files = ranges(num_samples, config.samples_per_file)
    return [
        Part(KIND, split, index, first, last, (f"data/{split}-{index:05d}-of-{len(files):05d}.parquet",))
        for index, (first, last) in enumerate(files)
    ]


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a file, a row group of the corpus as a row group; the same bytes each time.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    assert part.split is not None
    (path,) = part.paths
    captioned = place = 0
    schema = exported(samples.columns)
    with storage.staged(storage.join(config.output, path)) as aside:
        with pq.ParquetWriter(aside, schema, write_page_checksum=True, **_encoding(schema)) as sink:
            for table in samples.tables(part.split, part.first, part.last, samples.columns.names):
                names = [f"{key(part.index, place + row, config.samples_per_file)}.jpg" for row in range(len(table))]
                chosen = [titles(captions, config.aspects) for captions in table["captions"].to_pylist()]
                captioned += sum(map(bool, chosen))
                place += len(table)
                sink.write_table(_exported(table, names, chosen, schema), row_group_size=max(1, len(table)))
        file = published(path, aside)
    return PartRecord(files=(file,), counts={SAMPLES: place, CAPTIONS: captioned, UNCAPTIONED: place - captioned})


def _exported(table: pa.Table, names: list[str], chosen: list[list[str]], schema: pa.Schema) -> pa.Table:
    bytes_and_path = [table["image"].combine_chunks(), pa.array(names, pa.string())]
    columns = {
        "image": pa.StructArray.from_arrays(bytes_and_path, fields=list(IMAGE)),
        "caption": pa.array([texts[0] if texts else None for texts in chosen], pa.string()),
    }
    return pa.Table.from_arrays(
        [columns[field.name] if field.name in columns else table[field.name].cast(field.type) for field in schema],
        schema=schema,
    )


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    leaves = stored_columns(schema)
    # Of a mask, the size of a picture, a dictionary holds nothing twice.
    apart = [IMAGE_LEAF, "image.path", "sample_id", *(name for name in leaves if name.startswith(AMONG_COLUMNS))]
    return {
        "compression": {leaf: "NONE" if leaf == IMAGE_LEAF else "ZSTD" for leaf in leaves},
        "use_dictionary": [leaf for leaf in leaves if leaf not in apart],
        "write_statistics": ["source", "split", "skin_type", "width", "height"],
    }
