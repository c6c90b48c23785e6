"""Arrow schema of a prepared sample: one image with all its captions.

A prepared corpus is a folder of Parquet shards with this schema, listed by `manifest.json`
(see `dermray.corpus.manifest`).
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 1
# Key of the version in a Parquet file's metadata.
VERSION_KEY = "dermray.schema_version"

# What a split may be called, and the one that training reads where nothing else is asked for.
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
TRAIN = "train"

CaptionAspect = Literal["raw", "ontology", "concept", "sub"]
CAPTION_ASPECTS: tuple[CaptionAspect, ...] = ("raw", "ontology", "concept", "sub")
# What Derm1M (arXiv 2503.14911) counts as image-text pairs; sub-captions are parts of a raw caption.
PAIR_ASPECTS: tuple[CaptionAspect, ...] = ("raw", "ontology", "concept")

CAPTION = pa.struct([pa.field("aspect", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])

META = pa.struct(
    [
        pa.field("age", pa.float32()),
        pa.field("sex", pa.string()),
        pa.field("body_site", pa.string()),
        pa.field("symptoms", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("lesion_id", pa.string()),
        # Columns of the source that have no field of their own, as a JSON object.
        pa.field("extra", pa.string()),
    ]
)

SAMPLE = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        # Parquet's own name of list items, so that a shard's schema equals this one.
        pa.field("captions", pa.list_(pa.field("element", CAPTION)), nullable=False),
        pa.field("labels", pa.list_(pa.field("element", pa.string())), nullable=False),
        pa.field("concepts", pa.list_(pa.field("element", pa.string())), nullable=False),
        pa.field("skin_type", pa.int8()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("meta", META),
        pa.field("split", pa.string(), nullable=False),
        # 64-bit perceptual hash of the image (`dermray.images.perceptual_hash`).
        pa.field("phash", pa.uint64()),
        # Samples of near-duplicate images share the smallest `sample_id` among them; null for all others.
        pa.field("duplicate_group", pa.string()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)

# What kind of picture the image is, a word of `corpus.modality.MODALITIES`. Only corpora of which a source says it have
# the column: shards of the others, and of earlier builds, are what they were. `corpus.shards` reads nulls there.
MODALITY = pa.field("modality", pa.string())
# All columns that a shard may have.
WHOLE = SAMPLE.append(MODALITY)


def sample_id(source: str, image: bytes) -> str:
    """Stable id of a sample: 128 bits of SHA-256 over the source's name and the image bytes as published, in hex."""
    digest = hashlib.sha256(source.encode("utf-8"))
    digest.update(b"\0")
    digest.update(image)
    return digest.hexdigest()[:32]
