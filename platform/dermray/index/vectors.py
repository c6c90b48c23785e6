"""The nearest vectors by cosine: every one compared below a limit, an HNSW graph (arXiv 1603.09320, faiss) beyond.

A folder: `index.json` (written last), `images.npy` or `images.faiss`, `images.parquet` (captions, labels, thumbnails),
and the same for `texts`. An index belongs to the model that made its vectors and refuses any other.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dermray import storage
from dermray.errors import StorageError, VectorIndexError
from dermray.index.embeddings import Embeddings, Kind, Maker, to_parquet, vectors_of

FORMAT_VERSION = 1
MANIFEST_NAME = "index.json"
Target = Literal["image", "text"]
# A hit reads the whole group that its row is in, thumbnails included.
ROWS_PER_GROUP = 32
HNSW_NEIGHBOURS = 32
HNSW_CONSTRUCTION = 100
HNSW_SEARCH = 128
NUM_RECALL_QUERIES = 200
RECALL_AT = 10


@dataclass(frozen=True, slots=True)
class Hit:
    """One neighbour; `score` is its cosine with the query."""

    sample_id: str
    score: float
    caption: str | None
    labels: tuple[str, ...]
    thumbnail: bytes | None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Record):
    """The vectors of one kind."""

    method: Literal["exact", "hnsw"]
    num_vectors: int
    # of the file of vectors or of the graph
    sha256: str
    # share of the true nearest that the graph finds, over vectors of its own; 1 where every one is compared
    recall_at_10: float


class IndexManifest(_Record):
    """What an index folder holds, and who made its vectors."""

    format_version: int = FORMAT_VERSION
    maker: Maker
    embeddings_digest: str
    corpus_digest: str
    images: Side
    texts: Side | None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: the version of the index."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def build(embeddings_uri: str, output: str, *, exact_below: int = 100_000) -> IndexManifest:
    """Index embeddings; the folder counts as an index when `index.json` is there.

    Raises:
        VectorIndexError: the embeddings are missing or damaged, or hold no image.
    """
    embeddings = Embeddings.load(embeddings_uri)
    if not embeddings.num_images:
        raise VectorIndexError(f"{embeddings_uri} holds no embedded image: {embeddings.failures}")
    storage.remove(storage.join(output, MANIFEST_NAME))
    manifest = IndexManifest(
        maker=embeddings.maker,
        embeddings_digest=embeddings.digest,
        corpus_digest=embeddings.corpus_digest,
        images=_build_side(embeddings, embeddings_uri, output, "images", exact_below),
        texts=_build_side(embeddings, embeddings_uri, output, "texts", exact_below) if embeddings.num_texts else None,
    )
    storage.write_text(storage.join(output, MANIFEST_NAME), manifest.model_dump_json(indent=1))
    return manifest


class VectorIndex:
    """A loaded index. Thread-safe."""

    def __init__(self, manifest: IndexManifest, images: _Neighbours, texts: _Neighbours | None) -> None:
        self.manifest = manifest
        self.digest = manifest.digest
        self.model_digest = manifest.maker.model_digest
        self._sides: dict[Target, _Neighbours | None] = {"image": images, "text": texts}

    @classmethod
    def load(cls, uri: str) -> VectorIndex:
        """Read an index folder.

        Raises:
            VectorIndexError: there is none, or it is damaged.
        """
        file = storage.join(uri, MANIFEST_NAME)
        try:
            manifest = IndexManifest.model_validate(storage.read_json(file))
        except FileNotFoundError:
            raise VectorIndexError(f"{uri} is no index: it has no {MANIFEST_NAME}; run jobs/index.py") from None
        except (ValidationError, StorageError) as error:
            raise VectorIndexError(f"{file} cannot be read ({error}); run jobs/index.py again") from None
        texts = _Neighbours(uri, "texts", manifest.texts) if manifest.texts is not None else None
        return cls(manifest, _Neighbours(uri, "images", manifest.images), texts)

    @property
    def num_images(self) -> int:
        """Indexed images."""
        return self.manifest.images.num_vectors

    @property
    def num_texts(self) -> int:
        """Indexed captions."""
        return self.manifest.texts.num_vectors if self.manifest.texts is not None else 0

    def fits(self, model_digest: str, preprocessing_digest: str) -> bool:
        """Whether vectors of this model may be compared with those of the index."""
        maker = self.manifest.maker
        return (maker.model_digest, maker.preprocessing_digest) == (model_digest, preprocessing_digest)

    def require_model(self, model_digest: str, preprocessing_digest: str) -> None:
        """Refuse another model.

        Raises:
            VectorIndexError: the vectors were made by other weights or other preprocessing.
        """
        if not self.fits(model_digest, preprocessing_digest):
            maker = self.manifest.maker
            raise VectorIndexError(
                f"the index was made by weights {maker.model_digest[:12]} with preprocessing "
                f"{maker.preprocessing_digest[:12]}, the model has {model_digest[:12]} with "
                f"{preprocessing_digest[:12]}: run jobs/embed.py and jobs/index.py with this model"
            )

    def search(self, vector: np.ndarray, k: int, target: Target = "image") -> list[Hit]:
        """The `k` nearest images or captions, nearest first; fewer when the index is smaller.

        Args:
            vector: float32 `[D]`, L2-normalised, of the model that made the index.
            k: how many.
            target: which side to search.

        Raises:
            VectorIndexError: the index holds no captions.
        """
        side = self._sides[target]
        if side is None:
            raise VectorIndexError("this index holds no captions; run jobs/embed.py with captions=true")
        return side.nearest(vector, k)


class _Neighbours:
    """One kind of vectors and the rows that belong to them."""

    def __init__(self, uri: str, kind: Kind, side: Side) -> None:
        suffix = "npy" if side.method == "exact" else "faiss"
        file = storage.join(uri, f"{kind}.{suffix}")
        try:
            data = storage.read_bytes(file)
            # Held open: the rows of a hit are read when they are asked for.
            self._rows = pq.ParquetFile(storage.open_file(storage.join(uri, f"{kind}.parquet")))
        except (FileNotFoundError, StorageError, pa.ArrowException) as error:
            raise VectorIndexError(f"{uri}: {kind} cannot be read ({error}); run jobs/index.py again") from None
        if hashlib.sha256(data).hexdigest() != side.sha256:
            raise VectorIndexError(f"{file} is not what {MANIFEST_NAME} says; run jobs/index.py again")
        metadata = self._rows.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        # First row of each group, and of the one after the last.
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._side = side
        self._lock = threading.Lock()
        if side.method == "exact":
            self._vectors: Any = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            import faiss

            self._vectors = faiss.deserialize_index(np.frombuffer(data, np.uint8))

    def nearest(self, vector: np.ndarray, k: int) -> list[Hit]:
        query = np.ascontiguousarray(vector, dtype=np.float32)
        k = min(k, self._side.num_vectors)
        if self._side.method == "exact":
            positions, scores = _exact(self._vectors, query, k)
        else:
            scores, positions = (one[0] for one in self._vectors.search(query[None], k))
        return [self._hit(int(at), float(score)) for at, score in zip(positions, scores, strict=True) if int(at) >= 0]

    def _hit(self, position: int, score: float) -> Hit:
        group = int(np.searchsorted(self._starts, position, side="right")) - 1
        with self._lock:
            rows = self._rows.read_row_group(group)
        found = rows.slice(position - int(self._starts[group]), 1).to_pylist()[0]
        caption = found.get("caption", found.get("text"))
        return Hit(found["sample_id"], score, caption, tuple(found.get("labels") or ()), found.get("thumbnail"))


def _exact(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = vectors @ query
    best = np.argpartition(-scores, k - 1)[:k]
    order = best[np.argsort(-scores[best], kind="stable")]
    return order, scores[order]


def _build_side(embeddings: Embeddings, uri: str, output: str, kind: Kind, exact_below: int) -> Side:
    tables = list(embeddings.tables(uri, kind))
    vectors = np.concatenate([vectors_of(table) for table in tables])
    rows = pa.concat_tables([table.drop_columns(["vector"]) for table in tables])
    storage.write_bytes(storage.join(output, f"{kind}.parquet"), to_parquet(rows, row_group_size=ROWS_PER_GROUP))
    if len(vectors) < exact_below:
        buffer = io.BytesIO()
        np.save(buffer, vectors, allow_pickle=False)
        data, method, recall = buffer.getvalue(), "exact", 1.0
    else:
        graph = _graph(vectors)
        import faiss

        data, method, recall = faiss.serialize_index(graph).tobytes(), "hnsw", _recall(graph, vectors)
    suffix = "npy" if method == "exact" else "faiss"
    storage.write_bytes(storage.join(output, f"{kind}.{suffix}"), data)
    return Side.model_validate(
        {
            "method": method,
            "num_vectors": len(vectors),
            "sha256": hashlib.sha256(data).hexdigest(),
            "recall_at_10": recall,
        }
    )


def _graph(vectors: np.ndarray) -> Any:
    import faiss

    graph = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = HNSW_CONSTRUCTION
    graph.hnsw.efSearch = HNSW_SEARCH
    graph.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return graph


def _recall(graph: Any, vectors: np.ndarray) -> float:
    """Share of the true nearest `RECALL_AT` that the graph finds for some of its own vectors."""
    chosen = np.random.default_rng(0).choice(len(vectors), min(NUM_RECALL_QUERIES, len(vectors)), replace=False)
    k = min(RECALL_AT, len(vectors))
    _, found = graph.search(vectors[chosen], k)
    shares = [
        len(set(row) & set(_exact(vectors, vectors[at], k)[0])) / k for row, at in zip(found, chosen, strict=True)
    ]
    return float(np.mean(shares))


__all__: Sequence[str] = ["Hit", "IndexManifest", "Target", "VectorIndex", "build"]
