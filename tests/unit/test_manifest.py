"""Manifest: digest over content alone, splits, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.corpus.manifest import MANIFEST_NAME, Manifest, Shard
from dermray.errors import CorpusError, StorageError


def shard(number: int, split: str = "train", **changes: Any) -> Shard:
    fields = {
        "path": f"data/{split}-{number}.parquet",
        "split": split,
        "num_samples": 5,
        "num_bytes": 100,
        "sha256": f"{number:064x}",
        "row_groups": (3, 2),
    }
    return Shard(**(fields | changes))


def manifest(**changes: Any) -> Manifest:
    fields = {
        "shards": (shard(0), shard(1, "val", num_samples=4, row_groups=(4,)), shard(2)),
        "ontology_sha256": "aa",
        "provenance": {"source": "csv"},
    }
    return Manifest(**(fields | changes))


def test_digest_is_of_the_content_and_not_of_its_provenance() -> None:
    original = manifest()
    assert manifest(provenance={"source": "other", "at": 3}).digest == original.digest
    changed = [
        manifest(ontology_sha256="bb"),
        manifest(ontology_sha256=None),
        manifest(shards=original.shards[::-1]),
        manifest(shards=original.shards[:2]),
        manifest(shards=(shard(0, sha256="f" * 64), *original.shards[1:])),
        manifest(shards=(shard(0, row_groups=(2, 3)), *original.shards[1:])),
    ]
    assert len({original.digest, *(each.digest for each in changed)}) == len(changed) + 1


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    original = manifest()
    original.save(str(tmp_path))
    assert Manifest.load(str(tmp_path)) == Manifest.load(str(tmp_path / MANIFEST_NAME)) == original
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert document["digest"] == original.digest
    assert document["num_samples"] == original.num_samples == 14


def test_a_split_keeps_the_order_of_its_shards() -> None:
    original = manifest()
    assert original.splits == {"train": 10, "val": 4}
    train = original.select("train")
    assert [each.path for each in train.shards] == ["data/train-0.parquet", "data/train-2.parquet"]
    assert train.num_samples == 10
    assert train.row_group_sizes().tolist() == [3, 2, 3, 2]
    assert train.row_group_locations() == [(each.path, number) for each in train.shards for number in (0, 1)]
    with pytest.raises(CorpusError, match=r"no split 'test'; it has: train \(10\), val \(4\)"):
        original.select("test")


@given(
    st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), st.lists(st.integers(1, 9), min_size=1)), min_size=1)
)
def test_splits_part_the_samples(content: list[tuple[str, list[int]]]) -> None:
    shards = [
        shard(number, split, num_samples=sum(groups), row_groups=tuple(groups))
        for number, (split, groups) in enumerate(content)
    ]
    whole = Manifest(shards=tuple(shards))
    parts = {split: whole.select(split) for split in whole.splits}
    assert whole.splits == {split: part.num_samples for split, part in parts.items()}
    assert sum(part.num_samples for part in parts.values()) == whole.num_samples == whole.row_group_sizes().sum()


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        (None, CorpusError, r"is not a prepared corpus: it has no manifest\.json; run jobs/prepare\.py with output="),
        ("{", StorageError, "is not valid JSON"),
        ("[]", CorpusError, "has schema version None, this code reads 1"),
        ('{"schema_version": 7, "shards": []}', CorpusError, "has schema version 7, this code reads 1"),
        ('{"schema_version": 1}', CorpusError, r"manifest\.json: shards: Field required"),
        ('{"schema_version": 1, "shards": [{"path": "x"}]}', CorpusError, r"manifest\.json: shards\.0\.split"),
        ('{"schema_version": 1, "shards": [], "surprise": 1}', CorpusError, r"manifest\.json: surprise"),
    ],
)
def test_what_is_no_manifest_is_named(
    tmp_path: Path, document: str | None, error: type[Exception], message: str
) -> None:
    if document is not None:
        (tmp_path / MANIFEST_NAME).write_text(document)
    with pytest.raises(error, match=message) as caught:
        Manifest.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
