"""Manifest: digest over content alone, splits, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray import storage
from dermray.corpus.manifest import MANIFEST_NAME, Manifest, Shard
from dermray.errors import CorpusError, DermRayError, SplitError, StorageError
from dermray.prepare import generations, records
from dermray.prepare.records import NOTES, ShardRecord


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


def test_a_shard_that_a_link_leads_outside_is_refused_and_a_linked_corpus_is_not(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    (corpus / "data").mkdir(parents=True)
    outside.mkdir()
    manifest().save(str(corpus))
    (tmp_path / "linked").symlink_to(corpus)
    within = corpus / "data" / "val-1.parquet"
    (corpus / "data" / "kept").write_bytes(b"")
    within.symlink_to("kept")
    assert Manifest.load(str(tmp_path / "linked")) == manifest()
    within.unlink()
    within.symlink_to(outside / "secret.parquet")
    for uri in (corpus, tmp_path / "linked", corpus / MANIFEST_NAME):
        with pytest.raises(CorpusError, match=r"data/val-1.parquet is reached by a symbolic link that leads out"):
            Manifest.load(str(uri))
    within.unlink()
    (corpus / "data").rename(outside / "data")
    (corpus / "data").symlink_to(outside / "data")
    with pytest.raises(CorpusError, match=r"data/train-0.parquet is reached by a symbolic link"):
        Manifest.load(str(corpus))


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
    with pytest.raises(SplitError, match=r"no split 'test'; it has: train \(10\), val \(4\)"):
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
        (None, CorpusError, r"is not a prepared corpus: it is there, but has no manifest\.json; give the folder"),
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


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_samples": 999}, "row_groups of data/0.parquet are not those of 999 samples"),
        ({"row_groups": []}, "are not those of 5 samples"),
        ({"row_groups": [-1, 6]}, "are not those of 5 samples"),
        ({"row_groups": [0, 5]}, "are not those of 5 samples"),
        ({"row_groups": [10**15]}, "are not those of 5 samples"),
        ({"num_samples": 10**15, "row_groups": [10**15]}, "num_samples: Input should be less than or equal to"),
    ],
    ids=str,
)
def test_row_groups_that_no_shard_has_are_refused_before_work_is_planned(
    changed: dict[str, object], told: str, tmp_path: Path
) -> None:
    """Arrays of as many numbers are made of them, and rows counted against them."""
    manifest().save(str(tmp_path))
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["shards"][0] |= changed
    name = document["shards"][0]["path"]
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CorpusError, match=told.replace("data/0.parquet", name)):
        Manifest.load(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("clinic/derm-1m", "{}/clinic has no 'derm-1m'; did you mean {}/clinic/derm1m?"),
        ("clinik/derm1m", "{} has no 'clinik'; did you mean {}/clinic?"),
        ("clinic/zebra/corpus", "{}/clinic has no 'zebra'"),
        ("/nosuch", "there is no such folder"),
    ],
)
def test_a_misspelt_corpus_is_told_what_is_near_and_not_to_prepare_into_the_typo(
    tmp_path: Path, given: str, told: str
) -> None:
    manifest().save(str(tmp_path / "clinic" / "derm1m"))
    with pytest.raises(CorpusError) as caught:
        Manifest.load(str(tmp_path / given))
    assert str(caught.value) == f"{tmp_path / given} is not a prepared corpus: {told.format(tmp_path, tmp_path)}"


@pytest.mark.parametrize("name", ["../victim", "/etc/x", "a/../../b"])
def test_a_corpus_whose_records_lie_outside_is_refused(name: str, tmp_path: Path) -> None:
    """As preparation reads it when rows are to join."""
    Manifest(shards=(shard(0),), provenance={"generations": [name]}).save(str(tmp_path))
    with pytest.raises(DermRayError, match="is no name of a file inside a folder") as error:
        generations._load(str(tmp_path))
    assert "\n" not in str(error.value)
    record = ShardRecord(name, None, 0, "", (), (), {}, {}, NOTES.empty_table())
    with pytest.raises(DermRayError, match="is no name of a file inside a folder"):
        records.write_record(str(tmp_path), record)
    storage.write_bytes(records.record_uri(str(tmp_path), "train-00000-0"), record.to_bytes())
    with pytest.raises(DermRayError, match="is damaged .*is no name of a file inside a folder"):
        records.read_record(str(tmp_path), "train-00000-0")
