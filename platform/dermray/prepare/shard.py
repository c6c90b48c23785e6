"""Making one shard: read its images, standardise them, write one Parquet file and a record of what happened.

A shard's name carries a digest of everything that decides its bytes: its rows, the transform's settings, the disease
tree, the versions of the codecs. So a finished shard is recognised by name after any crash, and making it twice gives
the same file. The record, written after the shard, is what says that it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import __version__, images, storage
from dermray.corpus.manifest import Shard
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import SAMPLE, SCHEMA_VERSION
from dermray.errors import ImageError
from dermray.prepare.fetch import Fetched, ImageStore, Stamp, ahead
from dermray.prepare.plan import ShardSpec
from dermray.prepare.samples import Counts, RawRow, build_sample, count_sample
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.sources.rows import DroppedRow

# To be raised when this package makes other bytes from the same input.
FORMAT = 1
DATA = "data"
RECORDS = "records"
# Progress is told every so many images.
STEP = 32
IMAGE_COLUMN = "image"


@dataclass(frozen=True)
class ShardRecord:
    """What making a shard came to; the same whenever and wherever it is made."""

    key: str
    shard: Shard | None
    num_rows: int
    inputs: str
    dropped: tuple[DroppedRow, ...]
    counts: dict[str, dict[str, int]]
    sample_ids: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` reads."""
        document = asdict(self)
        document["shard"] = self.shard.model_dump(mode="json") if self.shard else None
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ShardRecord:
        """Rebuild a record."""
        return cls(
            key=document["key"],
            shard=Shard.model_validate(document["shard"]) if document["shard"] else None,
            num_rows=document["num_rows"],
            inputs=document["inputs"],
            dropped=tuple(DroppedRow(**row) for row in document["dropped"]),
            counts=document["counts"],
            sample_ids=tuple(document["sample_ids"]),
        )


class ShardMaker:
    """Makes the shards of one corpus; knows nothing of Ray, and travels to where the work is done."""

    def __init__(self, config: PrepareConfig, ontology: Ontology) -> None:
        self.config = config
        self.ontology = ontology
        self._identity = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "transform": config.transform(),
            "ontology": ontology.to_json(),
            "versions": {**images.codec_versions(), "pyarrow": pa.__version__},
        }

    @cached_property
    def _store(self) -> ImageStore:
        return ImageStore(
            self.config.input, max_bytes=self.config.max_image_bytes, follow_links=self.config.follow_links
        )

    def make(self, spec: ShardSpec, on_images: Callable[[int], None]) -> tuple[ShardRecord, bool]:
        """Make a shard, or find it made; `on_images` hears how many images are done as they are.

        Returns the record, and whether the shard had to be made.

        Raises:
            StorageError: the input or the output fails for good.
        """
        rows = spec.rows.to_pylist()
        name = f"{spec.name}-{self._key(rows)}"
        finished = self._finished(name, rows)
        if finished is not None:
            on_images(len(_paths(rows)))
            return finished, False
        record = self._make(name, spec.split, rows, on_images)
        storage.write_json(self._record_uri(name), record.to_json())
        return record, True

    def _key(self, rows: list[RawRow]) -> str:
        content = json.dumps([self._identity, rows], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _record_uri(self, name: str) -> str:
        return storage.join(self.config.output, RECORDS, f"{name}.json")

    def _finished(self, name: str, rows: list[RawRow]) -> ShardRecord | None:
        """The record of a shard made before, if its file and its input images are still as they were."""
        try:
            record = ShardRecord.from_json(storage.read_json(self._record_uri(name)))
        except FileNotFoundError:
            return None
        if record.shard is not None:
            try:
                size = storage.size_bytes(storage.join(self.config.output, record.shard.path))
            except FileNotFoundError:
                return None
            if size != record.shard.num_bytes:
                return None
        paths = _paths(rows)
        stamps = ahead(paths, self._store.stamp, num_threads=self.config.num_fetch_threads)
        return record if record.inputs == _digest_inputs(zip(paths, stamps, strict=True)) else None

    def _make(self, name: str, split: str, rows: list[RawRow], on_images: Callable[[int], None]) -> ShardRecord:
        samples: list[dict[str, Any]] = []
        dropped: list[DroppedRow] = []
        stamps: list[tuple[str, Stamp]] = []
        counts: Counts = defaultdict(Counter)
        for image_rows, fetched in self._fetched(rows):
            stamps.append((fetched.path, fetched.stamp))
            try:
                image = self._standardise(fetched)
            except ImageError as error:
                dropped.extend(_drop(row, error) for row in image_rows)
            else:
                sample = build_sample(
                    image_rows, image, split, self.ontology, num_sub_captions=self.config.sub_captions
                )
                count_sample(counts, image_rows, sample, image, self.ontology)
                samples.append(sample)
            if len(stamps) % STEP == 0:
                on_images(STEP)
        on_images(len(stamps) % STEP)
        return ShardRecord(
            key=name,
            shard=self._write(name, split, samples) if samples else None,
            num_rows=len(rows),
            inputs=_digest_inputs(stamps),
            dropped=tuple(dropped),
            counts={kind: dict(sorted(counter.items())) for kind, counter in sorted(counts.items())},
            sample_ids=tuple(sample["sample_id"] for sample in samples),
        )

    def _fetched(self, rows: list[RawRow]) -> Iterator[tuple[list[RawRow], Fetched]]:
        """The rows of each image with its bytes, reading ahead."""
        by_image = [(path, list(group)) for path, group in groupby(rows, key=lambda row: row["image"])]
        fetched = ahead([path for path, _ in by_image], self._store.fetch, num_threads=self.config.num_fetch_threads)
        return zip((group for _, group in by_image), fetched, strict=True)

    def _standardise(self, fetched: Fetched) -> images.StandardImage:
        if fetched.data is None:
            raise ImageError(fetched.reason, fetched.detail)
        return images.standardise(
            fetched.data,
            image_size=self.config.image_size,
            jpeg_quality=self.config.jpeg_quality,
            max_pixels=self.config.max_pixels,
            min_side=self.config.min_side,
            min_contrast=self.config.min_contrast,
        )

    def _write(self, name: str, split: str, samples: list[dict[str, Any]]) -> Shard:
        path = f"{DATA}/{name}.parquet"
        with storage.staged(storage.join(self.config.output, path)) as aside:
            pq.write_table(
                pa.Table.from_pylist(samples, schema=SAMPLE),
                aside,
                row_group_size=self.config.row_group_size,
                # JPEGs do not get smaller, and a plain column can be read without copying.
                compression={leaf: "NONE" if leaf == IMAGE_COLUMN else "ZSTD" for leaf in _leaves(SAMPLE)},
                use_dictionary=[leaf for leaf in _leaves(SAMPLE) if leaf not in (IMAGE_COLUMN, "sample_id")],
                write_statistics=["source", "split", "skin_type", "width", "height"],
            )
            content = aside.read_bytes()
        group_size = self.config.row_group_size
        return Shard(
            path=path,
            split=split,
            num_samples=len(samples),
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            row_groups=tuple(min(group_size, len(samples) - first) for first in range(0, len(samples), group_size)),
        )


def made_by() -> dict[str, str]:
    """Versions that a corpus's provenance names."""
    return {"dermray": __version__, **images.codec_versions(), "pyarrow": pa.__version__}


def _paths(rows: list[RawRow]) -> list[str]:
    return list(dict.fromkeys(row["image"] for row in rows))


def _drop(row: RawRow, error: ImageError) -> DroppedRow:
    return DroppedRow(row["row"], row["source_id"], row["image"], error.reason, str(error))


def _digest_inputs(stamps: Any) -> str:
    content = json.dumps([[path, *stamp] for path, stamp in stamps])
    return hashlib.sha256(content.encode()).hexdigest()


def _leaves(schema: pa.Schema) -> list[str]:
    """Dotted names of the Parquet columns that a schema is stored in."""
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    stored = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    return [stored.column(number).path for number in range(len(stored))]
