"""Leakage end to end on Ray: planted copies are found with their ids and pictures, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray import images
from dermray.audit import duplicates, leakage
from dermray.audit.duplicates import matches, near_groups
from dermray.commands import leakage as job
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.schema import SAMPLE
from dermray.errors import CorpusError
from tests import corpora

pytestmark = pytest.mark.ray

WITHOUT_PHASH = SAMPLE.remove(SAMPLE.get_field_index("phash"))
ROW_GROUP_SIZE = 4


def photograph(seed: int) -> np.ndarray:
    """A smooth picture with some grain, uint8 `[96, 128, 3]`."""
    random = np.random.default_rng(seed)
    coarse = random.integers(40, 220, (6, 8, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def row(index: int, split: str, image: bytes) -> dict[str, Any]:
    phash = images.perceptual_hash(image)
    return {**corpora.sample(index, split, image=image), "phash": phash, "duplicate_group": None}


def write_corpus(folder: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SAMPLE) -> list[str]:
    """Write rows as a corpus, two shards a split; returns their sample ids in manifest order."""
    (folder / "data").mkdir(parents=True)
    shards, ids = [], []
    for split in dict.fromkeys(each["split"] for each in rows):
        members = [each for each in rows if each["split"] == split]
        half = -(-len(members) // 2)
        for number, part in enumerate((members[:half], members[half:])):
            path = folder / "data" / f"{split}-{number:05d}.parquet"
            table = pa.Table.from_pylist([{name: each[name] for name in schema.names} for each in part], schema=schema)
            pq.write_table(table, path, row_group_size=ROW_GROUP_SIZE)
            sizes = [len(part[start : start + ROW_GROUP_SIZE]) for start in range(0, len(part), ROW_GROUP_SIZE)]
            shards.append(
                Shard(
                    path=f"data/{path.name}",
                    split=split,
                    num_samples=len(part),
                    num_bytes=path.stat().st_size,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    row_groups=tuple(sizes),
                )
            )
            ids.extend(each["sample_id"] for each in part)
    Manifest(shards=tuple(shards)).save(str(folder))
    return ids


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training corpus; one with copies of training images and without hashes; one without copies."""
    folder = tmp_path_factory.mktemp("leakage")
    originals = [photograph(seed) for seed in range(20)]
    training = [row(n, "train", images.encode_jpeg(pixels, 90)) for n, pixels in enumerate(originals)]
    training += [row(50 + n, "val", images.encode_jpeg(photograph(50 + n), 90)) for n in range(4)]
    training[-1] = row(53, "val", images.encode_jpeg(originals[2], 70))
    half = cv2.resize(originals[7], (64, 48), interpolation=cv2.INTER_AREA)
    copies = {3: images.encode_jpeg(originals[3], 40), 7: images.encode_jpeg(half, 85), 11: training[11]["image"]}
    leaked = [row(100 + n, "test", images.encode_jpeg(photograph(100 + n), 90)) for n in range(8)]
    leaked[1], leaked[4], leaked[6] = (row(200 + n, "test", image) for n, image in copies.items())
    clean = [row(300 + n, "test", images.encode_jpeg(photograph(300 + n), 90)) for n in range(5)]
    write_corpus(folder / "training", training)
    write_corpus(folder / "leaked", leaked, WITHOUT_PHASH)
    write_corpus(folder / "clean", clean)
    pairs = {(training[n]["sample_id"], leaked[place]["sample_id"]) for n, place in {3: 1, 7: 4, 11: 6}.items()}
    return {"folder": folder, "pairs": pairs, "within": (training[2]["sample_id"], training[-1]["sample_id"])}


def run(
    planted: dict[str, Any],
    output: Path,
    *against: str,
    training: Sequence[str] = ("training",),
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    parts = ",".join(str(planted["folder"] / name) for name in against)
    corpora = ",".join(f"{{uri: {planted['folder'] / name}, weight: 1}}" for name in training)
    arguments = [f"corpus=[{corpora}]", f"against=[{parts}]", f"output={output}"]
    assert job.main([*arguments, *settings]) == 0
    return json.loads((output / "leakage.json").read_text())


def test_planted_copies_are_found_and_shown(ray_cluster, planted, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    tracking = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    document = run(planted, output, "leaked", "clean", "training#val", settings=[tracking])
    assert [one["num_samples_found"] for one in document["evaluations"]] == [3, 0, 1]
    assert document["training"]["num_samples"] == 20
    assert document["training"]["num_samples_found"] == 4
    table = pq.read_table(output / "leakage.parquet").to_pylist()
    found = {(pair["sample_id"], pair["evaluation_sample_id"]) for pair in table}
    assert found == planted["pairs"] | {planted["within"]}
    assert {pair["evaluation_split"] for pair in table} == {"test", "val"}
    by_id = {pair["source_id"]: pair for pair in table}
    assert by_id["image-11.jpg"]["distance"] == 0
    assert by_id["image-3.jpg"]["evaluation_source_id"] == "image-203.jpg"
    page = (output / "leakage.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2 * len(table)
    assert page.count("same bytes") == 1
    assert "None of its 5 images resembles a training image" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "4 of 17 evaluation samples resemble 4 of 20 training samples" in capsys.readouterr().out
    assert_logged(tmp_path / "mlflow.db")


def assert_logged(database: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    (found,) = client.search_runs([client.get_experiment_by_name("dermray").experiment_id])
    assert found.data.tags["dermray.kind"] == "leakage"
    assert found.data.metrics["num_evaluation_samples_found"] == 4
    assert {file.path for file in client.list_artifacts(found.info.run_id, "report")} == {
        "report/leakage.html",
        "report/leakage.json",
        "report/leakage.parquet",
    }
    contexts = [tag.value for one in found.inputs.dataset_inputs for tag in one.tags]
    assert sorted(contexts) == ["evaluation", "evaluation", "training"]


@pytest.mark.long
def test_pairs_name_the_training_corpus_that_they_lead_to(ray_cluster, planted, tmp_path) -> None:
    settings = ["tracking.enabled=false"]
    write_corpus(
        planted["folder"] / "more",
        [row(100 + n, "train", images.encode_jpeg(photograph(100 + n), 90)) for n in range(8)],
    )
    document = run(planted, tmp_path / "out", "leaked", training=("more", "training"), settings=settings)
    table = pq.read_table(tmp_path / "out" / "leakage.parquet").to_pylist()
    of_training = {
        (each["sample_id"], each["evaluation_sample_id"]) for each in table if each["corpus"].endswith("/training")
    }
    assert of_training == planted["pairs"]
    # The other five evaluation images stand in `more` as they are.
    assert len(table) == 8
    assert [one["num_samples_found"] for one in document["evaluations"][0]["by_training_corpus"]] == [5, 3]
    page = (tmp_path / "out" / "leakage.html").read_text()
    assert "By training corpus" in page
    assert page.count('<img src="data:image/jpeg;base64,') == 2 * len(table)


def test_corpora_without_a_copy_give_an_empty_report(ray_cluster, planted, tmp_path) -> None:
    document = run(planted, tmp_path, "clean", settings=["tracking.enabled=false"])
    assert document["num_pairs"] == 0
    assert pq.read_table(tmp_path / "leakage.parquet").num_rows == 0
    page = (tmp_path / "leakage.html").read_text()
    assert "tile-warn" not in page.partition("<body>")[2]


def test_hashes_come_in_manifest_order(ray_cluster, tmp_path) -> None:
    rows = [row(n, "train", images.encode_jpeg(photograph(n), 90)) for n in range(11)]
    ids = write_corpus(tmp_path / "a", rows)
    manifest = Manifest.load(str(tmp_path / "a"))
    found, phashes = leakage.read_hashes(str(tmp_path / "a"), manifest)
    assert found == ids
    assert phashes.dtype == np.uint64
    assert phashes.tolist() == [each["phash"] for each in rows]


def test_a_missing_shard_is_named(ray_cluster, tmp_path) -> None:
    write_corpus(tmp_path / "a", [row(n, "train", images.encode_jpeg(photograph(n), 90)) for n in range(2)])
    manifest = Manifest.load(str(tmp_path / "a"))
    (tmp_path / "a" / manifest.shards[1].path).unlink()
    with pytest.raises(CorpusError, match=r"train-00001\.parquet is in the manifest but not there; restore it .*$"):
        leakage.read_hashes(str(tmp_path / "a"), manifest)


def test_tasks_find_what_the_driver_alone_finds(ray_cluster, monkeypatch) -> None:
    random = np.random.default_rng(0)
    phashes = random.integers(0, 2**64, 4000, dtype=np.uint64)
    phashes[3000:] = phashes[:1000] ^ np.uint64(5)
    first, others = phashes[:1000], phashes[3000:]
    alone = matches(first, others, max_distance=3).nearest_pairs(1)[0], near_groups(phashes, max_distance=3)
    monkeypatch.setattr(duplicates, "COMPARISONS_WITHOUT_WORKERS", 0)
    assert len(alone[0]) == 1000
    found = matches(first, others, max_distance=3).nearest_pairs(1)[0]
    np.testing.assert_array_equal(found, alone[0])
    np.testing.assert_array_equal(near_groups(phashes, max_distance=3), alone[1])
