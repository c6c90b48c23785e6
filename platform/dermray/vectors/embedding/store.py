"""Where vectors are kept: Parquet parts at a URI that every node can read and write, usable only by what made them.

    STORE/MODEL/model.json                   what made the vectors, for people
    STORE/MODEL/images/CORPUS/UNIT.parquet   a row an image: `vector`, as the tower gives it, and `word`: why none
    STORE/MODEL/texts/TEXTS.parquet          a row a text: `vector`, of length 1, and `word`: the text's key

MODEL is a digest of the weights, the preprocessing, the architecture and the precision; CORPUS the digest of the
corpus or table; UNIT the fingerprint of a row group or of some files. A part appears whole or not at all, repeats all
of this in its own metadata, and carries checksums: one that is damaged, or was made by something else, is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import documents, parquet_bounds, storage
from dermray.errors import DocumentError
from dermray.progress import Say
from dermray.vectors.embedding.units import Images
from dermray.vectors.encoder_info import EncoderInfo, Precision

FORMAT_VERSION = 1
# Hex digits of a digest in a name; the part's own metadata has all of them.
NAME_DIGITS = 24
TEXTS_PER_PART = 512
MAX_PART_BYTES = 1 << 30
_METADATA_KEY = b"dermray"
_THREADS = 16
# As PyTorch's normalize has it.
_SMALLEST_LENGTH = 1e-12


def default_uri() -> str:
    """`$DERMRAY_CACHE/features`, else `~/.cache/dermray/features`."""
    return storage.normalise(storage.join(os.environ.get("DERMRAY_CACHE") or "~/.cache/dermray", "features"))


@dataclass(frozen=True)
class Part:
    """One file of vectors: where it is, and what it must say of itself to be used. JSON-serialisable."""

    uri: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Vectors:
    """The content of a part: vectors, float32 `[N, D]`, and a word for each, object `[N]`: why none, or a key."""

    values: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Store:
    """The vectors of one model at one URI."""

    uri: str
    model: dict[str, Any]
    info: EncoderInfo

    @classmethod
    def of(cls, uri: str, model_uri: str, *, precision: Precision) -> Store:
        """The store at `uri` as far as it concerns one model, which is loaded once to know its digests.

        Raises:
            ModelError: the model cannot be loaded.
        """
        # What loads torch; tasks that read vectors do without.
        from dermray import models
        from dermray.vectors.encoder import Encoder

        info = Encoder.load(model_uri, device="cpu", precision=precision).info
        model = {
            "format_version": FORMAT_VERSION,
            "model_digest": info.model_digest,
            "preprocessing_digest": info.preprocessing_digest,
            "architecture_digest": digest(models.described(model_uri)),
            "precision": precision,
            "embedding_dim": info.embedding_dim,
        }
        return cls(storage.join(storage.normalise(uri), digest(model)[:NAME_DIGITS]), model, info)

    def describe(self) -> None:
        """Write `model.json` where it is not there yet."""
        file = storage.join(self.uri, "model.json")
        if not storage.exists(file):
            storage.write_json(file, {"info": asdict(self.info), **self.model})

    def images(self, corpus_digest: str, units: Sequence[Images]) -> list[Part]:
        """The parts of units of work of a corpus."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return [
                self._part(
                    f"images/{corpus_digest[:NAME_DIGITS]}/{fingerprint[:NAME_DIGITS]}.parquet",
                    corpus=corpus_digest,
                    unit=fingerprint,
                    num_rows=unit.num_rows,
                )
                for unit, fingerprint in zip(units, pool.map(lambda unit: unit.fingerprint(), units), strict=True)
            ]

    def texts(self, keys: Sequence[str]) -> Part:
        """The part that holds texts of these keys, in this order."""
        name = digest(list(keys))
        return self._part(f"texts/{name[:NAME_DIGITS]}.parquet", texts=name, num_rows=len(keys))

    def read(self, parts: Sequence[Part], say: Say = lambda line: None) -> list[Vectors | None]:
        """The content of some parts; None for one that is not there or not to be trusted, which `say` is told.

        Raises:
            StorageError: the store cannot be read.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda part: _read(part.uri, part.about, say), parts))

    def read_texts(self, keys: Iterable[str], say: Say = lambda line: None) -> dict[str, np.ndarray]:
        """Vectors of those keys that any part holds. A damaged part is removed: its texts come back in another.

        Raises:
            StorageError: the store cannot be read.
        """
        wanted, found = set(keys), dict[str, np.ndarray]()
        files = storage.list_files(storage.join(self.uri, "texts")) if wanted else []
        with ThreadPoolExecutor(_THREADS) as pool:
            for uri, content in zip(files, pool.map(lambda uri: _read(uri, self.model, say), files), strict=True):
                if content is None:
                    storage.remove(uri)
                    continue
                for row, key in enumerate(content.words):
                    if key in wanted:
                        found[key] = content.values[row]
        return found

    def _part(self, name: str, **what: Any) -> Part:
        return Part(storage.join(self.uri, name), {**self.model, **what})


def key_of(text: str) -> str:
    """What stands for a text in a store: the first 32 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest(document: Any) -> str:
    """SHA-256 (hex) of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unit_length(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `[N, D]` in length 1, and the length of each before, `[N]`; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors / np.maximum(lengths, _SMALLEST_LENGTH)[:, None], lengths


def write(part: Part, vectors: np.ndarray, words: Sequence[str]) -> None:
    """Publish a part at once.

    Raises:
        StorageError: it cannot be written.
    """
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    columns = {
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        "word": pa.array(list(words), pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(part.about)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=["word"], write_page_checksum=True)
    storage.write_bytes(part.uri, sink.getvalue().to_pybytes())


def _read(uri: str, about: dict[str, Any], say: Say) -> Vectors | None:
    try:
        data = storage.read_bytes(uri, max_bytes=MAX_PART_BYTES)
    except FileNotFoundError:
        return None
    try:
        table = parquet_bounds.read_table(pa.BufferReader(data))
        said = documents.parse_json((table.schema.metadata or {})[_METADATA_KEY], uri)
        column = table.column("vector").combine_chunks()
        dim = column.type.list_size
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
        words = np.array(table.column("word").to_pylist(), dtype=object)
    # What Arrow raises at damaged bytes has no common base.
    except (pa.ArrowException, DocumentError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"{uri} is damaged and will be made again ({' '.join(str(error).split())[:120]})")
        return None
    if any(said.get(name) != value for name, value in about.items()) or len(values) != said.get("num_rows"):
        say(f"{uri} was made by something else and is not used")
        return None
    return Vectors(values, words)
