"""Leakage without Ray: the keys, hashes of shards with and without them, and which pairs are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dermray import images
from dermray.audit import leakage_report
from dermray.audit.leakage import (
    PAIRS_PER_SAMPLE,
    Comparison,
    CorpusHashes,
    JoinedHashes,
    Leakage,
    check_inputs,
    find_leakage,
    group_hashes,
    select,
)
from dermray.audit.leakage_report import shown_pairs, summarise
from dermray.audit.leakage_settings import CorpusPart, LeakageConfig, corpus_part
from dermray.audit.matches import Matches, Members
from dermray.config import parse
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.shards import ShardIndex
from dermray.errors import ConfigError, CorpusError
from dermray.evaluate.leakage import Leakage as Scored
from tests import without_ray
from tests.corpora import RGB, jpeg, write_prepared_corpus


def config(*arguments: str) -> LeakageConfig:
    return parse(LeakageConfig, ["corpus=/data/a", "output=/data/report", *arguments])


def test_a_corpus_or_one_split_of_it() -> None:
    assert config("against=s3://bucket/b/").parts() == [CorpusPart("s3://bucket/b", None)]
    parts = config("against=[/data/b#test,/data/a#val,/data/b#test]").parts()
    assert [(part.uri, part.split, part.short_name) for part in parts] == [
        ("/data/b", "test", "b#test"),
        ("/data/a", "val", "a#val"),
    ]
    assert corpus_part("/data/no #1/b") == CorpusPart("/data/no #1/b", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "against is required"),
        (["against=[]"], "against"),
        (["against=/data/a"], r"shares samples .* name another split"),
        (["against=/data/a#train"], "shares samples"),
        (["against=/data/a#val", "splits=[train,val]"], "shares samples"),
        (["against=/data/c", "corpus=[/data/b, /data/c]"], "shares samples"),
        (["against=/data/c", "corpus=[{uri: /data/b, weight: 2}, {uri: /data/report, weight: 1}]"], "another folder"),
        (["against=/data/b", "corpus=/data/a#train"], r"write splits=\[train\]"),
        (["against=/data/b", "output=/data/b/"], "another folder"),
        (["against=/data/b", "max_distance=16"], "max_distance"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*arguments)


def test_a_split_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_prepared_corpus(tmp_path / name, {"train": 3, "val": 2})
    common = {"corpus": str(tmp_path / "a"), "output": str(tmp_path / "out")}
    check_inputs(LeakageConfig(against=(str(tmp_path / "b#val"),), **common))
    with pytest.raises(CorpusError, match="no split 'test'"):
        check_inputs(LeakageConfig(against=(str(tmp_path / "b#test"),), **common))
    write_prepared_corpus(tmp_path / "untrained", {"val": 2})
    both = (str(tmp_path / "b"), str(tmp_path / "untrained"))
    with pytest.raises(CorpusError, match=f"^{both[1]}: .*no split 'train'"):
        check_inputs(LeakageConfig(against=(str(tmp_path / "a"),), **{**common, "corpus": both}))
    with pytest.raises(CorpusError, match="no split 'test'"):
        check_inputs(LeakageConfig(against=(str(tmp_path / "b"),), splits=("test",), **common))
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        check_inputs(LeakageConfig(against=(str(tmp_path / "c"),), **common))


def test_several_splits_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    manifest = write_prepared_corpus(tmp_path / "a", {"train": 3, "val": 2, "test": 1}, samples_per_shard=2)
    chosen = select(manifest, ("test", "train"))
    assert [shard.split for shard in chosen.shards] == ["train", "train", "test"]
    assert select(manifest, None) is manifest


def test_hashes_that_a_corpus_lacks_are_made_and_bad_images_have_none(tmp_path: Path) -> None:
    manifest = write_prepared_corpus(tmp_path / "a", {"train": 12}, row_group_size=6, broken=[7])
    index = ShardIndex.of(str(tmp_path / "a"), manifest)
    every = group_hashes(index, 1, ["sample_id"])
    assert every["sample"].to_pylist() == [6, 7, 8, 9, 10, 11]
    table = every.filter(every["phash"].is_valid())
    assert table["sample"].to_pylist() == [6, 8, 9, 10, 11]
    kept = index.read(table["sample"].to_numpy(), ["image", "sample_id"])
    assert table["sample_id"].to_pylist() == kept["sample_id"].to_pylist()
    assert table["phash"].to_pylist() == [images.perceptual_hash(image.as_py()) for image in kept["image"]]


def compared(pairs: list[tuple[int, int, int]]) -> Comparison:
    """A comparison with pairs of (training sample, evaluation sample, distance)."""
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 3)
    alone = Members.of(np.arange(10), 10)
    found = Matches.of(columns[:, :2], columns[:, 2], alone, alone)
    nothing = CorpusHashes("/data/b", "digest", Manifest(shards=()), np.zeros(0, np.int64), np.zeros(0, np.uint64))
    return Comparison(CorpusPart("/data/b", None), nothing, found, columns[:, :2], columns[:, 2])


def test_every_distance_is_shown_and_each_image_once_with_its_nearest() -> None:
    comparison = compared([(0, 0, 4), (1, 0, 0), (2, 1, 0), (3, 2, 0), (4, 3, 0), (5, 4, 2), (6, 5, 6), (7, 5, 6)])
    shown = comparison.pairs[shown_pairs(comparison, 4)].tolist()
    assert shown == [[1, 0], [2, 1], [5, 4], [6, 5]]
    assert comparison.pairs[shown_pairs(comparison, 100)].tolist() == [[1, 0], [2, 1], [3, 2], [4, 3], [5, 4], [6, 5]]
    assert shown_pairs(comparison, 0).tolist() == []
    assert shown_pairs(compared([]), 4).tolist() == []


def test_counts_by_evaluation_and_by_training_corpus() -> None:
    """Of two training corpora of two samples each, sample 1 is the first one's and sample 3 the second one's."""
    first = compared([(0, 0, 4), (1, 0, 0), (1, 1, 2), (3, 1, 4), (1, 2, 2)])
    second = compared([(3, 0, 6)])
    shard = Shard(path="data/a.parquet", split="train", num_samples=2, num_bytes=1, sha256="0", row_groups=(2,))
    hashes = CorpusHashes("/data/a", "a", Manifest(shards=(shard,)), np.arange(2), np.zeros(2, np.uint64))
    training = JoinedHashes((hashes, replace(hashes, uri="/data/c", corpus_digest="c", num_unreadable=0)))
    assert training.samples.tolist() == [0, 1, 2, 3]
    split = [(part.uri, members.tolist()) for part, members in training.split(np.array([0, 1, 3]))]
    assert split == [("/data/a", [0, 1]), ("/data/c", [1])]
    document = summarise(config("against=/data/b"), Leakage(training, (first, second, compared([]))))
    of_training = document["training"]
    assert (of_training["uri"], of_training["digest"], of_training["num_samples"]) == ("/data/a, /data/c", "a+c", 4)
    assert of_training["num_samples_found"] == 3
    assert [(one["digest"], one["num_samples_found"]) for one in of_training["corpora"]] == [("a", 2), ("c", 1)]
    assert (document["num_pairs"], document["num_pairs_left_out"]) == (6, 0)
    short = summarise(config("against=/data/b"), Leakage(training, (replace(first, pairs=first.pairs[:2]), second)))
    assert (short["num_pairs"], short["num_pairs_left_out"]) == (6, 3)
    assert [one["num_samples_found"] for one in document["evaluations"]] == [3, 1, 0]
    assert [one["num_training_samples"] for one in document["evaluations"]] == [3, 1, 0]
    assert [[one["num_samples_found"] for one in each["by_training_corpus"]] for each in document["evaluations"]] == [
        [3, 1],
        [0, 1],
        [0, 0],
    ]
    assert document["evaluations"][0]["distances"] == {"0": 1, "1": 0, "2": 2, "3": 0, "4": 0, "5": 0, "6": 0}


def test_of_one_picture_that_stands_everywhere_the_nearest_are_listed_and_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray.use(monkeypatch)
    monkeypatch.setattr(leakage_report, "PAIRS_PER_ROW_GROUP", 64)
    empty, said = jpeg(RGB["red"]), list[str]()
    write_prepared_corpus(tmp_path / "a", {"train": PAIRS_PER_SAMPLE + 5}, draw=lambda index: empty)
    write_prepared_corpus(tmp_path / "b", {"test": 3}, draw=lambda index: empty, broken=[1])
    settings = LeakageConfig(corpus=str(tmp_path / "a"), against=(str(tmp_path / "b"),), output=str(tmp_path / "out"))
    document = leakage_report.write(settings, find_leakage(settings, say=said.append))
    (counted,) = document["evaluations"]
    assert [counted[name] for name in ("num_samples_found", "num_training_samples", "num_pairs")] == [2, 105, 210]
    assert counted["by_training_corpus"][0]["num_pairs"] == 210
    assert (counted["num_pairs_left_out"], counted["distances"]["0"]) == (10, 2)
    assert said[-1].endswith(": 10 pairs beyond a sample's 100 nearest are counted, not listed")
    pairs = pq.ParquetFile(tmp_path / "out" / "leakage.parquet")
    assert (pairs.metadata.num_rows, pairs.num_row_groups) == (200, 4)
    table = pairs.read().to_pylist()
    assert len({(each["sample_id"], each["evaluation_sample_id"]) for each in table}) == 200
    found = {each["evaluation_sample_id"] for each in table}
    assert len(found) == 2
    assert {each for _, _, each in Scored.load(str(tmp_path / "out")).found} == found
    assert "The other 10 are counted alone" in (tmp_path / "out" / "leakage.html").read_text()
