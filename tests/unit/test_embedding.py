"""Vectors that are kept: parts appear whole, are used only for what made them, and a damaged one is made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.errors import EvaluationError, ModelError, StorageError
from dermray.evaluate import features
from dermray.evaluate.samples import Samples
from dermray.vectors.embedding import pipeline, store
from dermray.vectors.embedding.actor import EncodeActor, Work
from dermray.vectors.embedding.store import Store, key_of
from dermray.vectors.embedding.units import ImageFiles, RowGroup
from dermray.vectors.encoder import Encoder
from tests.corpora import jpeg, write_model, write_prepared_corpus
from tests.s3 import BUCKET, faulty_s3

BROKEN = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write_prepared_corpus(folder, {"val": 24}, broken=[BROKEN])
    return Samples.load(str(folder), "val")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What was encoded, by an actor in this process in the place of Ray Data."""
    done: list[Work] = []

    def encode(work: list[Work], store: Store, *, model_uri: str, batch_size: int, precision: str, **_: object) -> int:
        actor = EncodeActor(model_uri, precision, batch_size, store.info)  # type: ignore[arg-type]
        for one in work:
            actor(one)
        done.extend(work)
        return 1

    monkeypatch.setattr(pipeline, "encode", encode)
    return done


def parts_of(root: Path, kind: str) -> list[Path]:
    return sorted(root.glob(f"*/{kind}/**/*.parquet"))


def test_what_is_kept_is_not_encoded_again(tmp_path: Path, model: str, corpus: Samples, encoded: list[Work]) -> None:
    cache, said = str(tmp_path), list[str]()
    (first,) = features.compute([corpus], ["a red patch", "a nevus"], model_uri=model, cache=cache, say=said.append)
    assert (first.num_encoded, len(encoded)) == (24, 4)
    encoder = Encoder.load(model, device="cpu")
    images = corpus.read_images([0, 1, 2])
    np.testing.assert_allclose(first.images[:3], encoder.encode_images([images[row] for row in range(3)]), atol=1e-6)
    assert first.failures == {"not_an_image": 1}
    encoded.clear()
    # Another task asks for one more text, in another order, and for the images in the other order.
    texts = ["a melanoma", "a nevus", "a red patch"]
    again = features.compute([corpus, corpus], texts, model_uri=model, cache=cache, batch_size=3, say=said.append)
    assert [work.source for work in encoded] == [("a melanoma",)]
    assert [one.num_encoded for one in again] == [0, 0]
    np.testing.assert_array_equal(again[1].images, first.images)
    np.testing.assert_array_equal(again[0].of_texts(["a nevus"]), first.of_texts(["a nevus"]))
    assert again[0].failures == first.failures
    assert any("vectors of 48 images and 2 texts are kept" in line for line in said)


def test_another_model_precision_or_corpus_shares_nothing(
    tmp_path: Path, model: str, corpus: Samples, encoded: list[Work]
) -> None:
    cache = str(tmp_path / "cache")
    features.compute([corpus], ["a nevus"], model_uri=model, cache=cache)
    other = str(write_model(tmp_path / "other", seed=1))
    for settings in ({"model_uri": other}, {"model_uri": model, "precision": "bf16"}):
        encoded.clear()
        features.compute([corpus], ["a nevus"], cache=cache, **settings)  # type: ignore[arg-type]
        assert len(encoded) == 4
    encoded.clear()
    features.compute([replace(corpus, corpus_digest="c" * 64)], ["a nevus"], model_uri=model, cache=cache)
    assert len(encoded) == 3
    config = tmp_path / "other" / "open_clip_config.json"
    document = json.loads(config.read_text())
    document["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    config.write_text(json.dumps(document))
    encoded.clear()
    features.compute([corpus], ["a nevus"], model_uri=other, cache=cache)
    assert len(encoded) == 4
    # A part that was carried to where another model's is looked for says whose it is.
    mine, theirs = (Store.of(cache, uri, precision="fp32") for uri in (model, other))
    (part,), (target,) = (one.images(corpus.corpus_digest, corpus.images[:1]) for one in (mine, theirs))
    storage.write_bytes(target.uri, storage.read_bytes(part.uri))
    said: list[str] = []
    assert theirs.read([target], said.append) == [None]
    assert "was made by something else and is not used" in said[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_a_damaged_part_is_made_again(
    tmp_path: Path, model: str, corpus: Samples, encoded: list[Work], damage: str
) -> None:
    (before,) = features.compute([corpus], ["a nevus"], model_uri=model, cache=str(tmp_path))
    said: list[str] = []
    encoded.clear()
    for kind in ("images", "texts"):
        file = parts_of(tmp_path, kind)[0]
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[len(data) // 8] ^= 0x10
        file.write_bytes({"cut": data[:-40], "flipped": data, "emptied": b"", "foreign": b"PAR1 no more"}[damage])
    (after,) = features.compute([corpus], ["a nevus"], model_uri=model, cache=str(tmp_path), say=said.append)
    assert [work.num_rows for work in encoded] == [8, 1]
    assert sum("is damaged and will be made again" in line for line in said) == 2
    np.testing.assert_allclose(after.images, before.images, atol=1e-6)
    np.testing.assert_allclose(after.of_texts(["a nevus"]), before.of_texts(["a nevus"]), atol=1e-6)


def test_nodes_that_share_no_store_are_told(
    tmp_path: Path, model: str, corpus: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encode", lambda *_, **__: 1)
    with pytest.raises(StorageError, match=r"parquet was written and is not there; give a place that all nodes share"):
        features.compute([corpus], [], model_uri=model, cache=str(tmp_path))


def test_files_that_come_or_change_are_encoded_again(tmp_path: Path, model: str, encoded: list[Work]) -> None:
    uris = [str(tmp_path / f"{number}.jpg") for number in range(4)]
    for number, uri in enumerate(uris[:3]):
        Path(uri).write_bytes(jpeg((200, 60, 50), seed=number))
    known = Store.of(str(tmp_path / "cache"), model, precision="fp32")
    units = [ImageFiles(tuple(uris[:2]), 0), ImageFiles(tuple(uris[2:]), 2)]
    before = known.images("d" * 64, units)
    Path(uris[3]).write_bytes(jpeg((20, 20, 20)))
    after = known.images("d" * 64, units)
    assert [one.uri == two.uri for one, two in zip(before, after, strict=True)] == [True, False]
    assert before[0].about["num_rows"] == 2


def test_an_actor_counts_what_it_cannot_read_and_says_what_went_wrong(tmp_path: Path, model: str) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg((200, 60, 50)))
    (tmp_path / "1.jpg").write_bytes(b"no image")
    known = Store.of(str(tmp_path / "cache"), model, precision="fp32")
    unit = ImageFiles(tuple(str(tmp_path / f"{number}.jpg") for number in range(3)), 0)
    (part,) = known.images("d" * 64, [unit])
    EncodeActor(model, "fp32", 2, known.info)(Work(part, unit))
    (content,) = known.read([part])
    assert content is not None
    assert content.words.tolist() == ["", "not_an_image", "missing"]
    assert (np.abs(content.values).sum(axis=1) > 0).tolist() == [True, False, False]
    changed = EncodeActor(model, "fp32", 2, replace(known.info, model_digest="0" * 64))
    with pytest.raises(ModelError, match="folder changed"):
        changed(Work(part, unit))


def test_vectors_that_are_not_finite_are_not_kept(tmp_path: Path, model: str) -> None:
    known = Store.of(str(tmp_path), model, precision="fp32")
    work = Work(known.texts([key_of("a nevus")]), ("a nevus",))
    actor = EncodeActor(model, "fp32", 2, known.info)
    nan = np.full((1, 32), np.nan, dtype=np.float32)
    actor._encoder = SimpleNamespace(info=known.info, encode_texts=lambda *_, **__: nan)  # type: ignore[assignment]
    with pytest.raises(EvaluationError, match="not finite"):
        actor(work)
    assert known.read([work.part]) == [None]


def test_a_store_in_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    with faulty_s3() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        storage._remote_filesystem.cache_clear()
        known = Store.of(f"s3://{BUCKET}/features", model, precision="fp32")
        keys = [key_of(text) for text in ("one", "two")]
        values = np.arange(64, dtype=np.float32).reshape(2, 32)
        known.describe()
        store.write(known.texts(keys), values, keys)
        found = known.read_texts([keys[1], "0" * 32])
        assert list(found) == [keys[1]]
        np.testing.assert_array_equal(found[keys[1]], values[1])
        assert storage.read_json(f"{known.uri}/model.json")["model_digest"] == known.info.model_digest
        storage.write_bytes(f"s3://{BUCKET}/raw/1.jpg", b"12345")
        (size, changed), absent = storage.stamps([f"s3://{BUCKET}/raw/1.jpg", f"s3://{BUCKET}/raw/2.jpg"])  # type: ignore[misc]
        assert (size, changed > 0, absent) == (5, True, None)
    storage._remote_filesystem.cache_clear()


def test_the_fingerprint_of_a_row_group_goes_by_its_place_in_the_corpus() -> None:
    groups = [RowGroup("/a/data/val-0.parquet", 1, position, 8) for position in (0, 80)]
    assert groups[0].fingerprint() == groups[1].fingerprint()
    assert groups[0].fingerprint() == replace(groups[0], uri="s3://b/data/val-0.parquet").fingerprint()
    others = [replace(groups[0], number=2), replace(groups[0], num_rows=7), replace(groups[0], uri="/a/val-1.parquet")]
    assert len({one.fingerprint() for one in [groups[0], *others]}) == 4


def test_the_manifest_digest_goes_with_the_bytes(tmp_path: Path) -> None:
    digests = set()
    for name, broken in (("one", []), ("two", [1])):
        write_prepared_corpus(tmp_path / name, {"val": 8}, broken=broken)
        digests.add(Manifest.load(str(tmp_path / name)).digest)
    assert len(digests) == 2
