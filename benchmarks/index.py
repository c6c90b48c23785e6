"""Nearest neighbours by the graph over comparing all: `python benchmarks/index.py [vectors=120000] [dimension=128]`.

Random unit vectors in clusters, as embeddings of a corpus with some hundred conditions lie, with captions and
thumbnails beside them; queries are further vectors of the same clusters. The same folder of embeddings is indexed both
ways by what jobs/index.py calls. One query at a time, in turns, on one thread: milliseconds to ten whole hits, with
captions and thumbnails; recall@10 of the graph over the queries. `spread=2` leaves hardly any clusters: harder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from dermray import entry, storage
from dermray.vectors.index import VectorIndex
from dermray.vectors.index.embeddings import MANIFEST_NAME, Embeddings, Maker, Part, images_table, part_file, to_parquet
from dermray.vectors.index.vectors import build

NUM_CLUSTERS = 400
NUM_QUERIES = 300
THUMBNAIL_BYTES = 4000
K = 10
PART_ROWS = 30_000


@dataclass
class Options:
    """What the command line may change."""

    vectors: int = 120_000
    dimension: int = 128
    # length of what a vector has of its own beside its cluster's unit centre
    spread: float = 0.7


def main() -> int:
    options = Options()
    for key, _, value in (text.partition("=") for text in sys.argv[1:]):
        setattr(options, key, type(getattr(options, key))(value))
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(0)
    centres = unit(random.normal(size=(NUM_CLUSTERS, options.dimension)))
    vectors = clustered(random, centres, options.vectors, options.spread)
    queries = clustered(random, centres, NUM_QUERIES, options.spread)
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        write(Path(folder) / "embeddings", vectors)
        exact = built(folder, "exact", exact_below=options.vectors + 1)
        graph = built(folder, "hnsw", exact_below=options.vectors)
        compare(exact, graph, queries)
    return 0


def built(folder: str, method: str, *, exact_below: int) -> VectorIndex:
    """The index of the embeddings in `folder`, loaded again; prints what it took."""
    began = time.perf_counter()
    manifest = build(f"{folder}/embeddings", f"{folder}/{method}", exact_below=exact_below)
    seconds = time.perf_counter() - began
    assert manifest.images.method == method
    (file,) = Path(folder, method).glob("images.[nf]*")
    began = time.perf_counter()
    index = VectorIndex.load(f"{folder}/{method}")
    loaded_s = time.perf_counter() - began
    print(
        f"{method}: {manifest.images.num_vectors:,} vectors indexed in {seconds:.1f} s, "
        f"{file.stat().st_size / 2**20:.0f} MiB, loaded in {loaded_s:.1f} s; "
        f"its own figure of recall@10: {manifest.images.recall_at_10:.4f}",
        flush=True,
    )
    return index


def compare(exact: VectorIndex, graph: VectorIndex, queries: np.ndarray) -> None:
    """Ask both the same, in turns."""
    seconds: dict[str, list[float]] = {"exact": [], "hnsw": []}
    found: dict[str, list[set[str]]] = {"exact": [], "hnsw": []}
    for query in queries:
        for name, index in (("exact", exact), ("hnsw", graph)):
            began = time.perf_counter()
            hits = index.search(query, K)
            seconds[name].append(time.perf_counter() - began)
            found[name].append({hit.sample_id for hit in hits})
    recall = np.mean([len(a & b) / K for a, b in zip(found["exact"], found["hnsw"], strict=True)])
    for name, taken in seconds.items():
        print(f"{name}: a search takes {np.median(taken) * 1000:.2f} ms (p99 {np.percentile(taken, 99) * 1000:.2f})")
    times = np.median(seconds["exact"]) / np.median(seconds["hnsw"])
    print(f"{len(queries)} new queries: recall@10 {recall:.4f}; {times:.1f} times as fast as comparing all")


def clustered(random: np.random.Generator, centres: np.ndarray, count: int, spread: float) -> np.ndarray:
    """Unit vectors around the centres, float32 `[count, D]`."""
    own = unit(random.normal(size=(count, centres.shape[1])))
    return unit(centres[random.integers(len(centres), size=count)] + spread * own).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, vectors: np.ndarray) -> None:
    """A folder of embeddings as jobs/embed.py leaves them."""
    maker = Maker(name="random", embedding_dim=vectors.shape[1], model_digest="0" * 64, preprocessing_digest="0" * 64)
    thumbnail = b"\0" * THUMBNAIL_BYTES
    parts = []
    for number, start in enumerate(range(0, len(vectors), PART_ROWS)):
        own = vectors[start : start + PART_ROWS]
        ids = [f"{start + row}" for row in range(len(own))]
        table = images_table(ids, own, ["a caption"] * len(own), [["psoriasis"]] * len(own), [thumbnail] * len(own))
        name = f"part-{number:05d}"
        storage.write_bytes(part_file(str(folder), "images", name), to_parquet(table, row_group_size=256))
        parts.append(Part(name=name, num_images=len(own), num_texts=0, failures={}))
    manifest = Embeddings(maker=maker, corpus_uri="none", corpus_digest="none", content={}, parts=tuple(parts))
    storage.write_text(storage.join(str(folder), MANIFEST_NAME), manifest.model_dump_json())


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
