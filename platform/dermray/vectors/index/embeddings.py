"""Embeddings of a prepared corpus on disk: Parquet parts, listed by a manifest that is written last.

`images/part-00000.parquet`: `sample_id`, `vector` (unit length), `caption`, `labels`, `thumbnail` (small JPEG or null).
`texts/part-00000.parquet`: `sample_id`, `text`, `vector`. `parts/part-00000.json` says that both are whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dermray import documents, parquet_bounds, storage
from dermray.corpus.manifest import Inside
from dermray.errors import StorageError, VectorIndexError

FORMAT_VERSION = 1
MANIFEST_NAME = "embeddings.json"
Kind = Literal["images", "texts"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Maker(_Record):
    """The model that made vectors; they may be compared with others where both digests agree."""

    name: str
    embedding_dim: int
    model_digest: str
    preprocessing_digest: str


class Part(_Record):
    """One piece of work that is done."""

    name: Inside
    num_images: int
    num_texts: int
    # images left out, by reason
    failures: dict[str, int]
    # hex digests of its files; none: it has no such file, or is an earlier build's
    images_sha256: str | None = None
    texts_sha256: str | None = None


class Embeddings(_Record):
    """What a folder of embeddings holds."""

    format_version: int = FORMAT_VERSION
    maker: Maker
    corpus_uri: str
    corpus_digest: str
    content: dict[str, bool | int | list[str] | None]
    parts: tuple[Part, ...]
    # what became of the corpus's samples, as `accounts.require_balance` gives it; none: an earlier build's
    samples: dict[str, Any] | None = None

    @classmethod
    def load(cls, uri: str) -> Embeddings:
        """Read the manifest of the embeddings at `uri`.

        Raises:
            VectorIndexError: there are none, or it cannot be read.
        """
        file = storage.join(uri, MANIFEST_NAME)
        try:
            found = cls.model_validate(storage.read_json(file))
        except FileNotFoundError:
            raise VectorIndexError(
                f"{uri} holds no finished embeddings: it has no {MANIFEST_NAME}; run jobs/embed.py with output={uri}"
            ) from None
        except ValidationError as error:
            raise VectorIndexError(f"{file} cannot be read ({documents.first_fault(error)}); embed again") from None
        except StorageError as error:
            raise VectorIndexError(f"{file} cannot be read ({error}); embed again") from None
        if found.format_version != FORMAT_VERSION:
            raise VectorIndexError(f"{file} is of format {found.format_version}, this code reads {FORMAT_VERSION}")
        return found

    @property
    def num_images(self) -> int:
        """Embedded images."""
        return sum(part.num_images for part in self.parts)

    @property
    def num_texts(self) -> int:
        """Embedded captions."""
        return sum(part.num_texts for part in self.parts)

    @property
    def failures(self) -> dict[str, int]:
        """Images left out, by reason."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.failures)
        return dict(sorted(total.items()))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest."""
        # A manifest of an earlier build gives no account of samples, or no digests of files, and keeps its own digest.
        unsaid: dict[str, Any] = {} if self.samples is not None else {"samples": True}
        if not any(part.images_sha256 or part.texts_sha256 for part in self.parts):
            unsaid["parts"] = {"__all__": {"images_sha256", "texts_sha256"}}
        return hashlib.sha256(self.model_dump_json(exclude=unsaid).encode()).hexdigest()

    def tables(self, uri: str, kind: Kind) -> Iterator[pa.Table]:
        """The rows of every part, in order.

        Raises:
            VectorIndexError: a part is missing, damaged, holds another number of rows than it should, or is another's.
        """
        for part in self.parts:
            expected = part.num_images if kind == "images" else part.num_texts
            if not expected:
                continue
            file = part_file(uri, kind, part.name)
            try:
                data = storage.read_bytes(file)
                table = parquet_bounds.read_table(pa.BufferReader(data))
            except (FileNotFoundError, OSError, StorageError, pa.ArrowException) as error:
                raise VectorIndexError(f"{file} cannot be read ({error}); embed again with replace=true") from None
            if table.num_rows != expected:
                raise VectorIndexError(f"{file} has {table.num_rows} rows, its manifest says {expected}; embed again")
            said = part.images_sha256 if kind == "images" else part.texts_sha256
            if said is not None and hashlib.sha256(data).hexdigest() != said:
                raise VectorIndexError(f"{file} is not the file that was written there; embed again with replace=true")
            yield table


def part_file(uri: str, kind: Kind, name: str) -> str:
    """Where the rows of a part are."""
    return storage.inside(storage.join(uri, kind), f"{name}.parquet")


def images_table(
    ids: Sequence[str],
    vectors: np.ndarray,
    captions: Sequence[str | None],
    labels: Sequence[Sequence[str]],
    thumbnails: Sequence[bytes | None],
) -> pa.Table:
    """Rows of `images/`; vectors are float32 `[N, D]`."""
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "vector": _vector_column(vectors),
            "caption": pa.array(captions, pa.string()),
            "labels": pa.array(labels, pa.list_(pa.string())),
            "thumbnail": pa.array(thumbnails, pa.binary()),
        }
    )


def texts_table(ids: Sequence[str], texts: Sequence[str], vectors: np.ndarray) -> pa.Table:
    """Rows of `texts/`; vectors are float32 `[N, D]`."""
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "text": pa.array(texts, pa.string()),
            "vector": _vector_column(vectors),
        }
    )


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vectors of a table, float32 `[N, D]`."""
    column = table.column("vector").combine_chunks()
    return np.asarray(column.flatten(), dtype=np.float32).reshape(table.num_rows, -1)


def to_parquet(table: pa.Table, *, row_group_size: int) -> bytes:
    """A table as the bytes of a Parquet file; vectors and JPEGs do not compress."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_size,
        compression="none",
        use_dictionary=["labels"],
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _vector_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
