"""What making one shard came to: a small Parquet file beside it, written after it, that says that it is finished.

One row a sample tells what later decisions hang on (duplicates, groups, what is known already), so that none of them
has to read the shard again; figures for the report are in the file's metadata.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from dermray import documents, parquet_bounds, storage
from dermray.corpus.manifest import Shard
from dermray.errors import CorpusError, DocumentError
from dermray.raw.sources.rows import DroppedRow

RECORDS = "records"
_METADATA = b"dermray.record"

NOTES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        # 96 bits of SHA-256 over the stored image, in hex: equal for exact duplicates of any source.
        pa.field("digest", pa.string(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        # Path of the image under its input, and the number of its first row.
        pa.field("image", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        # Digests of the rows of each image in the sample (`digests.image_digests`).
        pa.field("known", pa.list_(pa.field("element", pa.uint64())), nullable=False),
        pa.field("groups", pa.list_(pa.field("element", pa.uint64())), nullable=False),
        # True where the split is the source's or the user's word, not a draw.
        pa.field("prescribed", pa.bool_(), nullable=False),
        pa.field("duplicate_group", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Figures:
    """What a record holds in its metadata."""

    key: str
    shard: Shard | None
    num_rows: int
    inputs: str
    dropped: tuple[DroppedRow, ...]
    dropped_images: tuple[int, ...]
    row_counts: dict[str, dict[str, int]]
    sample_counts: dict[str, dict[str, int]]


_FIGURES = TypeAdapter(_Figures)


@dataclass(frozen=True)
class ShardRecord(_Figures):
    """The outcome of one shard; the same whenever and wherever it is made.

    Attributes:
        key: name of the shard and of this record, without ending.
        shard: the file, or None if no sample is left.
        num_rows: rows of the table that went in.
        inputs: digest of the input files' sizes and times.
        dropped: rows whose image is no good.
        dropped_images: digests of these images' rows, as `known` has them for the others.
        row_counts: figures of the rows and originals, by kind.
        sample_counts: figures of the samples as they are stored, by kind.
        notes: one row a sample, of schema NOTES.
    """

    notes: pa.Table

    def to_bytes(self) -> bytes:
        """The record's file, which `from_bytes` reads."""
        document: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "notes"}
        document["shard"] = self.shard.model_dump(mode="json") if self.shard else None
        document["dropped"] = [asdict(row) for row in self.dropped]
        sink = io.BytesIO()
        table = self.notes.replace_schema_metadata({_METADATA: json.dumps(document, ensure_ascii=False)})
        pq.write_table(table, sink, compression="ZSTD", write_page_checksum=True)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardRecord:
        """Rebuild a record."""
        table = parquet_bounds.read_table(pa.BufferReader(data))
        document = documents.parse_json(table.schema.metadata[_METADATA], "its document")
        figures = _FIGURES.validate_python(document)
        storage.relative(figures.key)
        return cls(**vars(figures), notes=table.replace_schema_metadata(None).cast(NOTES))

    @property
    def num_images(self) -> int:
        """Images looked at, good or not."""
        return self.notes.num_rows + len(self.dropped_images)

    @property
    def place(self) -> tuple[str, int]:
        """Split and number of the shard."""
        split, number, _ = self.key.rsplit("-", 2)
        return split, int(number)


def record_uri(output: str, key: str) -> str:
    """Where a record lies."""
    return storage.inside(storage.join(output, RECORDS), f"{key}.parquet")


def write_record(output: str, record: ShardRecord) -> None:
    """Publish a record: from here on its shard is finished."""
    storage.write_bytes(record_uri(output, record.key), record.to_bytes())


def read_record(output: str, key: str) -> ShardRecord:
    """Read a record.

    Raises:
        FileNotFoundError: there is none.
        CorpusError: it is damaged.
    """
    uri = record_uri(output, key)
    data = storage.read_bytes(uri)
    try:
        return ShardRecord.from_bytes(data)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, DocumentError) as error:
        reason = documents.first_fault(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise CorpusError(f"{uri} is damaged ({reason}); remove it and run again to make its shard anew") from None
