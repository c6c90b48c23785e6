"""The nearest vectors by cosine: every one compared below a limit, an HNSW graph (arXiv 1603.09320, faiss) beyond.

A folder: `index.json` (written last), and the files that it names: `images-DIGEST.npy` or `images-DIGEST.faiss`,
`images-DIGEST.parquet` (captions, labels, thumbnails), and the same for `texts`. The index that was there before is
whole until then, and its files stay until the next one is made, for services that have it open. An index belongs to the
model that made its vectors and refuses any other.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from dermray import documents, ledger, parquet_bounds, storage
from dermray.corpus.accounts import require_balance
from dermray.corpus.manifest import Inside
from dermray.errors import StorageError, VectorIndexError
from dermray.progress import Progress, busy
from dermray.vectors.index import graphs
from dermray.vectors.index.embeddings import Embeddings, Kind, Maker, to_parquet, vectors_of

FORMAT_VERSION = 1
MANIFEST_NAME = "index.json"
# Also those of earlier builds, whose names said nothing of their content.
FILE = re.compile(r"(images|texts)(-[0-9a-f]{16})?\.(npy|faiss|parquet)")
Target = Literal["image", "text"]
# A hit reads the whole group that its row is in, thumbnails included.
ROWS_PER_GROUP = 32
HNSW_NEIGHBOURS = 32
HNSW_CONSTRUCTION = 100
HNSW_SEARCH = 128
# A graph grows by so many at a time: some seconds' work, after which it is told how far it is.
VECTORS_PER_STEP = 8192
# A vector of 2,048 values with its neighbours in the graph has half of it.
MAX_BYTES_PER_VECTOR = 1 << 14
MIN_FILE_BYTES = 1 << 20
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
    # names of the file of vectors or of the graph, and of the rows; none: those of earlier builds, `images.npy`, …
    vectors: Inside | None = None
    rows: Inside | None = None
    # of the file of rows; none: an earlier build's
    rows_sha256: str | None = None

    def files(self, kind: Kind) -> tuple[str, str]:
        """Names of the files of vectors and of rows."""
        suffix = "npy" if self.method == "exact" else "faiss"
        return self.vectors or f"{kind}.{suffix}", self.rows or f"{kind}.parquet"


class IndexManifest(_Record):
    """What an index folder holds, and who made its vectors."""

    format_version: int = FORMAT_VERSION
    maker: Maker
    embeddings_digest: str
    corpus_digest: str
    images: Side
    texts: Side | None
    # what became of the corpus's samples, as `accounts.require_balance` gives it; none: an earlier build's
    samples: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: the version of the index."""
        sides = {"images": self.images, "texts": self.texts}
        # A manifest of an earlier build names no files or no digest of rows, and keeps its own digest.
        later = ("vectors", "rows", "rows_sha256")
        unsaid: dict[str, Any] = {
            kind: {name for name in later if getattr(side, name) is None} for kind, side in sides.items() if side
        }
        if self.samples is None:
            unsaid["samples"] = True
        return hashlib.sha256(self.model_dump_json(exclude=unsaid).encode()).hexdigest()

    @property
    def files(self) -> set[str]:
        """Names of its files, but for the manifest itself."""
        sides: dict[Kind, Side | None] = {"images": self.images, "texts": self.texts}
        return {name for kind, side in sides.items() if side is not None for name in side.files(kind)}


def build(embeddings_uri: str, output: str, *, exact_below: int = 100_000, wait_s: float = 0.0) -> IndexManifest:
    """Index embeddings; what was at `output` before is whole until `index.json` is written.

    Args:
        wait_s: how long to wait for another run that writes into `output`.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        VectorIndexError: the embeddings are missing or damaged, or hold no image.
    """
    with ledger.claim(output, wait_s=wait_s) as claim:
        embeddings = Embeddings.load(embeddings_uri)
        if not embeddings.num_images:
            raise VectorIndexError(f"{embeddings_uri} holds no embedded image: {embeddings.failures}")
        before = _files_of(output)
        images = _build_side(embeddings, embeddings_uri, output, "images", exact_below)
        manifest = IndexManifest(
            maker=embeddings.maker,
            embeddings_digest=embeddings.digest,
            corpus_digest=embeddings.corpus_digest,
            images=images,
            texts=_build_side(embeddings, embeddings_uri, output, "texts", exact_below)
            if embeddings.num_texts
            else None,
            samples=_accounted(embeddings, images.num_vectors),
        )
        claim.confirm()
        storage.write_text(storage.join(output, MANIFEST_NAME), manifest.model_dump_json(indent=1))
        keep = before | manifest.files | {MANIFEST_NAME}
        others = ledger.remove_ours(output, _is_ours, keep=keep, recursive=False)
        ledger.say_kept(output, others)
    return manifest


def _accounted(embeddings: Embeddings, num_vectors: int) -> dict[str, Any]:
    """The account that the embeddings give of the corpus's samples, with what is indexed of them."""
    before = embeddings.samples or {"in": embeddings.num_images + sum(embeddings.failures.values())}
    try:
        told = before.get("told", embeddings.failures)
        require_balance("embeddings", before["in"], embeddings.num_images, told)
    # The account is a record's, which somebody else may have written; a vector that is lost here is a fault of ours.
    except (AssertionError, KeyError, TypeError, AttributeError, ValueError):
        raise VectorIndexError(
            f"the embeddings' account of their samples ({str(before)[:200]}) does not fit their "
            f"{embeddings.num_images:,} images; embed again with replace=true"
        ) from None
    return require_balance("index", before["in"], num_vectors, told)


def _files_of(output: str) -> set[str]:
    """Names of the files of the index that is there; none where there is none, or it cannot be read."""
    try:
        return read_manifest(output).files
    except VectorIndexError:
        return set()


def _is_ours(name: str) -> bool:
    return FILE.fullmatch(name) is not None


def read_manifest(uri: str) -> IndexManifest:
    """What an index folder says of itself.

    Raises:
        VectorIndexError: there is none, or it cannot be read.
    """
    file = storage.join(uri, MANIFEST_NAME)
    try:
        return IndexManifest.model_validate(storage.read_json(file))
    except FileNotFoundError:
        raise VectorIndexError(f"{uri} is no index: it has no {MANIFEST_NAME}; run jobs/index.py") from None
    except ValidationError as error:
        said = documents.first_fault(error)
        raise VectorIndexError(f"{file} cannot be read ({said}); run jobs/index.py again") from None
    except StorageError as error:
        raise VectorIndexError(f"{file} cannot be read ({error}); run jobs/index.py again") from None


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
        manifest = read_manifest(uri)
        dim = manifest.maker.embedding_dim
        texts = _Neighbours(uri, "texts", manifest.texts, dim) if manifest.texts is not None else None
        return cls(manifest, _Neighbours(uri, "images", manifest.images, dim), texts)

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

    def __init__(self, uri: str, kind: Kind, side: Side, dim: int) -> None:
        vectors, rows = side.files(kind)
        file = storage.inside(uri, vectors)
        try:
            data = storage.read_bytes(file, max_bytes=max(MIN_FILE_BYTES, side.num_vectors * MAX_BYTES_PER_VECTOR))
            # Held open: the rows of a hit are read when they are asked for.
            self._file = storage.inside(uri, rows)
            rows_sha256 = storage.sha256(self._file) if side.rows_sha256 is not None else None
            self._rows = parquet_bounds.opened(storage.open_file(self._file))
        except (OSError, StorageError, pa.ArrowException) as error:
            said = " ".join(str(error).split())
            raise VectorIndexError(f"{uri}: {kind} cannot be read ({said}); run jobs/index.py again") from None
        for name, named, sha256 in (
            (file, side.sha256, hashlib.sha256(data).hexdigest()),
            (self._file, side.rows_sha256, rows_sha256),
        ):
            if named != sha256:
                raise VectorIndexError(f"{name} is not what {MANIFEST_NAME} says; run jobs/index.py again")
        metadata = self._rows.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        # First row of each group, and of the one after the last.
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._side = side
        self._lock = threading.Lock()
        if int(self._starts[-1]) != side.num_vectors:
            raise VectorIndexError(
                f"{uri}: {kind}.parquet has {int(self._starts[-1]):,} rows for {side.num_vectors:,} vectors; run "
                "jobs/index.py again"
            )
        self._vectors = _opened(data, side, dim, file)

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
        try:
            with self._lock:
                rows = self._rows.read_row_group(group)
            found = rows.slice(position - int(self._starts[group]), 1).to_pylist()[0]
            caption, labels = found.get("caption", found.get("text")), tuple(found.get("labels") or ())
            return Hit(found["sample_id"], score, caption, labels, found.get("thumbnail"))
        # Whoever wrote the manifest may have written the rows: letters, names and types may be others, too.
        except (OSError, pa.ArrowException, LookupError, ValueError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise VectorIndexError(f"{self._file} cannot be read ({reason}); run jobs/index.py again") from None


def _opened(data: bytes, side: Side, dim: int, file: str) -> Any:
    """The vectors or the graph in `data`, whose digest has been compared; refused unless it is as large as said."""
    try:
        if side.method == "exact":
            found: Any = np.load(io.BytesIO(data), allow_pickle=False)
            fits = isinstance(found, np.ndarray) and found.dtype == np.float32
            shape = found.shape if fits else None
        else:
            found = graphs.read(data)
            shape = (found.ntotal, found.d)
    except Exception as error:  # what the readers raise on odd content has no common base
        said = " ".join(str(error).split())[:200]
        raise VectorIndexError(f"{file} cannot be read ({said}); run jobs/index.py again") from None
    if shape != (side.num_vectors, dim):
        raise VectorIndexError(f"{file} holds no {side.num_vectors:,} vectors of {dim}; run jobs/index.py again")
    return found


def _exact(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = vectors @ query
    best = np.argpartition(-scores, k - 1)[:k]
    order = best[np.argsort(-scores[best], kind="stable")]
    return order, scores[order]


def _build_side(embeddings: Embeddings, uri: str, output: str, kind: Kind, exact_below: int) -> Side:
    with busy(f"index: reading vectors of {kind}"):
        tables = list(embeddings.tables(uri, kind))
        vectors = np.concatenate([vectors_of(table) for table in tables])
        rows = pa.concat_tables([table.drop_columns(["vector"]) for table in tables])
    if len(vectors) < exact_below:
        buffer = io.BytesIO()
        np.save(buffer, vectors, allow_pickle=False)
        data, method, recall = buffer.getvalue(), "exact", 1.0
    else:
        graph = _graph(vectors, kind)
        import faiss

        with busy(f"index: measuring how well the graph of {kind} finds"):
            data, method, recall = faiss.serialize_index(graph).tobytes(), "hnsw", _recall(graph, vectors)
    suffix = "npy" if method == "exact" else "faiss"
    with busy(f"index: writing {kind}"):
        vectors_name, sha256 = _publish(output, kind, suffix, data)
        rows_name, rows_sha256 = _publish(output, kind, "parquet", to_parquet(rows, row_group_size=ROWS_PER_GROUP))
        return Side.model_validate(
            {
                "method": method,
                "num_vectors": len(vectors),
                "sha256": sha256,
                "recall_at_10": recall,
                "vectors": vectors_name,
                "rows": rows_name,
                "rows_sha256": rows_sha256,
            }
        )


def _publish(output: str, kind: Kind, suffix: str, data: bytes) -> tuple[str, str]:
    """Write a file under a name that says what is in it, so that it replaces no other; its name and its SHA-256."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{kind}-{digest[:16]}.{suffix}"
    storage.write_bytes(storage.join(output, name), data)
    return name, digest


def _graph(vectors: np.ndarray, kind: Kind) -> Any:
    import faiss

    graph = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = HNSW_CONSTRUCTION
    graph.hnsw.efSearch = HNSW_SEARCH
    with Progress(f"index: graph of {kind}", len(vectors), "vectors") as progress:
        for start in range(0, len(vectors), VECTORS_PER_STEP):
            step = np.ascontiguousarray(vectors[start : start + VECTORS_PER_STEP], dtype=np.float32)
            graph.add(step)
            progress.advance(len(step))
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
