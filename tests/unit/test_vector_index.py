"""Embeddings on disk and the index over them, without a model: exact and approximate, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dermray import storage
from dermray.errors import VectorIndexError
from dermray.index import VectorIndex
from dermray.index.embeddings import MANIFEST_NAME, Embeddings
from dermray.index.vectors import build
from tests.serving import save_embeddings


@pytest.fixture
def embeddings(tmp_path: Path) -> tuple[str, np.ndarray]:
    return str(tmp_path / "embeddings"), save_embeddings(tmp_path / "embeddings", num_parts=3, rows=300)


def test_the_nearest_come_in_order_with_their_rows(embeddings, tmp_path):
    uri, vectors = embeddings
    manifest = build(uri, str(tmp_path / "index"))
    index = VectorIndex.load(str(tmp_path / "index"))
    assert (index.num_images, index.num_texts, manifest.images.method) == (900, 900, "exact")
    hits = index.search(vectors[417], 5)
    scores = vectors @ vectors[417]
    assert [hit.sample_id for hit in hits] == [f"sample-{i}" for i in np.argsort(-scores)[:5]]
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert (hits[0].caption, hits[0].labels, hits[0].thumbnail) == ("caption 417", ("psoriasis",), b"jpeg 417")
    text = index.search(vectors[3], 1, "text")[0]
    assert (text.sample_id, text.caption, text.labels, text.thumbnail) == ("sample-3", "caption 3", (), None)
    assert len(index.search(vectors[0], 5000)) == 900


def test_the_graph_finds_what_comparing_all_finds(embeddings, tmp_path):
    uri, vectors = embeddings
    manifest = build(uri, str(tmp_path / "index"), exact_below=100)
    assert manifest.images.method == "hnsw"
    assert manifest.images.recall_at_10 > 0.95
    hits = VectorIndex.load(str(tmp_path / "index")).search(vectors[10], 3)
    assert hits[0].sample_id == "sample-10"
    assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_the_graph_finds_the_nearest_of_queries_it_has_not_seen(tmp_path):
    vectors = save_embeddings(tmp_path / "embeddings", num_parts=2, rows=2500, dim=32)
    manifest = build(str(tmp_path / "embeddings"), str(tmp_path / "index"), exact_below=5000)
    index = VectorIndex.load(str(tmp_path / "index"))
    queries = np.random.default_rng(1).normal(size=(40, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    shares = []
    for query in queries:
        nearest = {f"sample-{i}" for i in np.argsort(-(vectors @ query))[:10]}
        shares.append(len(nearest & {hit.sample_id for hit in index.search(query, 10)}) / 10)
    assert np.mean(shares) > 0.95
    # Its own figure is of vectors that it holds, which are found a little more easily.
    assert manifest.images.recall_at_10 >= np.mean(shares) - 0.02


def test_an_index_refuses_another_model(embeddings, tmp_path):
    build(embeddings[0], str(tmp_path / "index"))
    index = VectorIndex.load(str(tmp_path / "index"))
    index.require_model("d" * 64, "e" * 64)
    for digests in (("x", "e" * 64), ("d" * 64, "x")):
        assert not index.fits(*digests)
        with pytest.raises(VectorIndexError, match=r"run jobs/embed.py"):
            index.require_model(*digests)


def test_unfinished_and_damaged_folders_are_refused_by_name(embeddings, tmp_path):
    uri, _ = embeddings
    index = str(tmp_path / "index")
    with pytest.raises(VectorIndexError, match="is no index"):
        VectorIndex.load(index)
    build(uri, index)
    file = Path(index) / "images.npy"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(VectorIndexError, match="is not what"):
        VectorIndex.load(index)
    (Path(uri) / "images" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(VectorIndexError, match=r"part-00001.parquet cannot be read"):
        build(uri, index)
    # A build that failed leaves no index behind.
    with pytest.raises(VectorIndexError, match="is no index"):
        VectorIndex.load(index)
    document = storage.read_json(f"{uri}/{MANIFEST_NAME}") | {"surprise": 1}
    (Path(uri) / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(VectorIndexError, match="cannot be read"):
        Embeddings.load(uri)
    storage.remove(f"{uri}/{MANIFEST_NAME}")
    with pytest.raises(VectorIndexError, match="no finished embeddings"):
        Embeddings.load(uri)
