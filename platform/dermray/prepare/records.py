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

from dermray import storage
from dermray.corpus.manifest import Shard
from dermray.errors import CorpusError
from dermray.prepare.sources.rows import DroppedRow

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
        # Digests of the rows of each image in the sample (`plan.image_digests`).
        pa.field("known", pa.list_(pa.field("element", pa.uint64())), nullable=False),
        pa.field("groups", pa.list_(pa.field("element", pa.uint64())), nullable=False),
        # True where the split is the source's or the user's word, not a draw.
        pa.field("prescribed", pa.bool_(), nullable=False),
        pa.field("duplicate_group", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardRecord:
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

    key: str
    shard: Shard | None
    num_rows: int
    inputs: str
    dropped: tuple[DroppedRow, ...]
    dropped_images: tuple[int, ...]
    row_counts: dict[str, dict[str, int]]
    sample_counts: dict[str, dict[str, int]]
    notes: pa.Table

    def to_bytes(self) -> bytes:
        """The record's file, which `from_bytes` reads."""
        document: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "notes"}
        document["shard"] = self.shard.model_dump(mode="json") if self.shard else None
        document["dropped"] = [asdict(row) for row in self.dropped]
        sink = io.BytesIO()
        table = self.notes.replace_schema_metadata({_METADATA: json.dumps(document, ensure_ascii=False)})
        pq.write_table(table, sink, compression="ZSTD")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardRecord:
        """Rebuild a record."""
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        document = json.loads(table.schema.metadata[_METADATA])
        return cls(
            key=document["key"],
            shard=Shard.model_validate(document["shard"]) if document["shard"] else None,
            num_rows=document["num_rows"],
            inputs=document["inputs"],
            dropped=tuple(DroppedRow(**row) for row in document["dropped"]),
            dropped_images=tuple(document["dropped_images"]),
            row_counts=document["row_counts"],
            sample_counts=document["sample_counts"],
            notes=table.replace_schema_metadata(None).cast(NOTES),
        )

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
    return storage.join(output, RECORDS, f"{key}.parquet")


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
    try:
        return ShardRecord.from_bytes(storage.read_bytes(uri))
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(f"{uri} is damaged ({reason}); remove it and run again to make its shard anew") from None
