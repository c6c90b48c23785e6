"""Embeddings on disk and the index over them, without a model: exact and approximate, whole and damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.errors import ModelError, VectorIndexError
from dermray.vectors.index import VectorIndex, embed
from dermray.vectors.index.embeddings import MANIFEST_NAME, Embeddings
from dermray.vectors.index.settings import EmbedConfig
from dermray.vectors.index.vectors import build
from tests.corpora import write_image_encoder, write_prepared_corpus
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
    file = Path(index) / str(build(uri, index).images.vectors)
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(VectorIndexError, match="is not what"):
        VectorIndex.load(index)
    build(uri, index)
    (Path(uri) / "images" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(VectorIndexError, match=r"part-00001.parquet cannot be read"):
        build(uri, index)
    # A build that failed leaves the index as it was.
    assert VectorIndex.load(index).num_images == 900
    document = storage.read_json(f"{uri}/{MANIFEST_NAME}") | {"surprise": 1}
    (Path(uri) / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(VectorIndexError, match="cannot be read"):
        Embeddings.load(uri)
    storage.remove(f"{uri}/{MANIFEST_NAME}")
    with pytest.raises(VectorIndexError, match="no finished embeddings"):
        Embeddings.load(uri)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_part_of_other_embeddings_is_refused(kind: str, embeddings: tuple[str, np.ndarray], tmp_path: Path) -> None:
    """As many rows of the same samples, by another model: nothing but the digest tells."""
    uri, _ = embeddings
    save_embeddings(tmp_path / "other", num_parts=1, rows=300, seed=7)
    before = Embeddings.load(uri)
    shutil.copyfile(tmp_path / "other" / kind / "part-00000.parquet", Path(uri) / kind / "part-00000.parquet")
    with pytest.raises(VectorIndexError, match=rf"{kind}/part-00000.parquet is not the file that was written there"):
        build(uri, str(tmp_path / "index"))
    # A manifest of an earlier build names no digests: its parts are taken as they are, and its own digest stays.
    document = before.model_dump(mode="json", exclude={"samples"})
    document["parts"] = [
        {key: value for key, value in part.items() if not key.endswith("sha256")} for part in document["parts"]
    ]
    (Path(uri) / MANIFEST_NAME).write_text(json.dumps(document))
    old = Embeddings.load(uri)
    assert old.digest == hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()
    assert build(uri, str(tmp_path / "index")).images.num_vectors == before.num_images


def rebuilt(embeddings: str, index: str, *, seed: int) -> None:
    """Other vectors and captions at the same place, indexed again."""
    shutil.rmtree(embeddings)
    save_embeddings(Path(embeddings), num_parts=1, rows=200, seed=seed)
    build(embeddings, index)


def test_an_index_stays_whole_until_the_next_one_is_there(
    embeddings: tuple[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, vectors = embeddings
    folder = tmp_path / "index"
    first = build(uri, str(folder))
    (folder / "mine.parquet").write_text("not of the index")
    served = VectorIndex.load(str(folder))
    expected = served.search(vectors[417], 5)
    # The vectors of images are written when the captions turn out to be damaged.
    damaged = Path(uri) / "texts" / "part-00002.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"PAR1")
    with pytest.raises(VectorIndexError, match="part-00002.parquet cannot be read"):
        build(uri, str(folder), exact_below=0)
    assert VectorIndex.load(str(folder)).digest == first.digest
    damaged.write_bytes(whole)
    rebuilt(uri, str(folder), seed=1)
    assert VectorIndex.load(str(folder)).num_images == 200
    # What a service has open answers as before, and goes with the build after.
    assert served.search(vectors[417], 5) == expected
    assert VectorIndex(first, served._sides["image"], None).num_images == 900  # type: ignore[arg-type]
    assert all((folder / name).exists() for name in first.files)
    rebuilt(uri, str(folder), seed=2)
    assert not any((folder / name).exists() for name in first.files)
    assert (folder / "mine.parquet").read_text() == "not of the index"
    assert "keeps 1 files that are not of this program's making: 'mine.parquet'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "samples",
    [{"in": 7, "told": {}}, {"told": {}}, {"in": "x"}, {"in": 900, "told": {"a": "b"}}, {"in": 900, "told": []}],
)
def test_an_account_that_does_not_add_up_is_refused(
    samples: dict[str, object], embeddings: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    file = Path(embeddings[0]) / MANIFEST_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"samples": samples}))
    with pytest.raises(
        VectorIndexError, match="account of their samples .* does not fit their 900 images; embed again"
    ):
        build(embeddings[0], str(tmp_path / "index"))


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_whole_rows_that_are_others_are_refused(kind: str, embeddings: tuple[str, np.ndarray], tmp_path: Path) -> None:
    """Vectors and rows belong together by their order alone: the same rows in another one would be others' answers."""
    side = getattr(build(embeddings[0], str(tmp_path / "index")), kind)
    file = tmp_path / "index" / side.rows
    table = pq.read_table(file)
    pq.write_table(table.take(list(reversed(range(table.num_rows)))), file, row_group_size=32, write_page_checksum=True)
    with pytest.raises(VectorIndexError, match=rf"index/{side.rows} is not what index.json says; run jobs/index.py ag"):
        VectorIndex.load(str(tmp_path / "index"))


def as_earlier_builds_wrote_it(folder: Path) -> str:
    """Files without digests in their names, which the manifest does not say, nor one of rows; returns its digest."""
    document = storage.read_json(folder / "index.json")
    for kind in ("images", "texts"):
        del document[kind]["rows_sha256"]
        for name, suffix in (("vectors", "npy"), ("rows", "parquet")):
            (folder / document[kind].pop(name)).rename(folder / f"{kind}.{suffix}")
    storage.write_json(folder / "index.json", document)
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def test_an_index_of_an_earlier_build_is_read_and_replaced(embeddings: tuple[str, np.ndarray], tmp_path: Path) -> None:
    uri, vectors = embeddings
    folder = tmp_path / "index"
    build(uri, str(folder))
    expected = VectorIndex.load(str(folder)).search(vectors[3], 4, "text")
    digest = as_earlier_builds_wrote_it(folder)
    index = VectorIndex.load(str(folder))
    assert index.digest == digest
    assert index.search(vectors[3], 4, "text") == expected
    rebuilt(uri, str(folder), seed=1)
    rebuilt(uri, str(folder), seed=2)
    assert not (folder / "images.npy").exists()
    assert VectorIndex.load(str(folder)).num_images == 200


@pytest.mark.parametrize("name", ["../victim", "/etc/x", "a/../../b"])
def test_names_that_lead_out_of_an_index_or_embeddings_are_refused(
    name: str, embeddings: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    uri, _ = embeddings
    folder = tmp_path / "index"
    build(uri, str(folder))
    document = storage.read_json(folder / "index.json")
    for field in ("vectors", "rows"):
        storage.write_json(folder / "index.json", document | {"images": document["images"] | {field: name}})
        with pytest.raises(VectorIndexError, match="is no name of a file inside a folder"):
            VectorIndex.load(str(folder))
    document = storage.read_json(f"{uri}/{MANIFEST_NAME}")
    document["parts"][0]["name"] = name
    storage.write_json(f"{uri}/{MANIFEST_NAME}", document)
    with pytest.raises(VectorIndexError, match="is no name of a file inside a folder"):
        Embeddings.load(uri)


def test_other_embeddings_are_removed_by_name_and_foreign_files_stay(
    embeddings: tuple[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, _ = embeddings
    write_prepared_corpus(tmp_path / "corpus", {"train": 4})
    manifest = Manifest.load(str(tmp_path / "corpus"))
    maker = Embeddings.load(uri).maker
    storage.write_json(f"{uri}/plan.json", {"key": "of other work"})
    foreign = [Path(uri) / name for name in ("notes.txt", "images/mine.parquet", "deep/er/part-00000.parquet")]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    config = EmbedConfig(model="m", corpus=str(tmp_path / "corpus"), output=uri)
    with pytest.raises(VectorIndexError, match="replace=true"):
        embed._begin(config, maker, manifest)
    assert Embeddings.load(uri).num_images == 900
    embed._begin(config.model_copy(update={"replace": True}), maker, manifest)
    left = [file for file in Path(uri).rglob("*") if file.is_file()]
    assert sorted(left) == sorted([*foreign, Path(uri) / "plan.json"])
    assert "keeps 3 files that are not of this program's making" in capsys.readouterr().out


def test_captions_are_not_asked_of_an_encoder_without_texts(tmp_path: Path) -> None:
    model = write_image_encoder(tmp_path / "tower", "timm")
    write_prepared_corpus(tmp_path / "corpus", {"train": 4})
    output, cache = tmp_path / "out", str(tmp_path / "cache")
    config = EmbedConfig(model=str(model), corpus=str(tmp_path / "corpus"), output=str(output), cache=cache)
    with pytest.raises(ModelError, match="tower is an image encoder and takes no texts: give captions=false"):
        embed.embed(config, str(model))
    assert not (output / "plan.json").exists()
