"""Samples by index: in the order asked for, each row group read once, damage named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex, label_counts
from dermray.errors import CorpusError, StorageError
from tests.corpora import write_prepared_corpus

NUM_SAMPLES = 21


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    return folder, write_prepared_corpus(
        folder, {"train": NUM_SAMPLES, "val": 5}, row_group_size=4, samples_per_shard=10, unlabelled=[0]
    )


@pytest.fixture(autouse=True)
def no_open_files() -> None:
    shards._open.cache_clear()


def index_of(corpus: tuple[Path, Manifest], split: str = "train") -> ShardIndex:
    folder, manifest = corpus
    return ShardIndex.of(str(folder), manifest.select(split))


def ids(folder: Path, split: str) -> list[str]:
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return [name for file in files for name in pq.read_table(file)["source_id"].to_pylist()]


@given(st.lists(st.integers(0, NUM_SAMPLES - 1), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_rows_come_in_the_order_asked_for(corpus: tuple[Path, Manifest], wanted: list[int]) -> None:
    expected = ids(corpus[0], "train")
    table = index_of(corpus).read(np.array(wanted), ["source_id", "split"])
    assert table["source_id"].to_pylist() == [expected[sample] for sample in wanted]
    assert set(table["split"].to_pylist()) == {"train"}


def test_indices_of_a_split_count_from_its_own_first_sample(corpus: tuple[Path, Manifest]) -> None:
    table = index_of(corpus, "val").read(np.arange(5), ["source_id"])
    assert table["source_id"].to_pylist() == ids(corpus[0], "val")
    whole = ShardIndex.of(str(corpus[0]), corpus[1])
    assert whole.read(np.array([NUM_SAMPLES]), ["split"])["split"].to_pylist() == ["val"]


def test_a_row_group_is_read_once(corpus: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = ShardIndex.read_row_group

    def counting(self: ShardIndex, group: int, columns: list[str]) -> object:
        read.append(group)
        return original(self, group, columns)

    monkeypatch.setattr(ShardIndex, "read_row_group", counting)
    index_of(corpus).read(np.array([20, 0, 1, 19, 0, 11]), ["source_id"])
    assert sorted(read) == [0, 3, 5, 6]


def test_every_row_group_in_order(corpus: tuple[Path, Manifest]) -> None:
    tables = list(index_of(corpus).row_groups(["source_id"]))
    assert [table.num_rows for table in tables] == [4, 4, 2, 4, 4, 2, 1]
    assert [name for table in tables for name in table["source_id"].to_pylist()] == ids(corpus[0], "train")


def test_label_counts_are_sorted_by_frequency_then_name(corpus: tuple[Path, Manifest]) -> None:
    folder, manifest = corpus
    assert label_counts(str(folder), manifest.select("train")) == {
        "eczema, dermatitis": 5,
        "melanoma": 5,
        "nevus": 5,
        "psoriasis": 5,
    }
    assert list(label_counts(str(folder), manifest.select("val"))) == sorted(
        ["eczema, dermatitis", "melanoma", "nevus", "psoriasis"]
    )


@pytest.mark.parametrize(
    "damage", ["gone", "truncated", "empty", "no parquet", "bad page", "row group missing", "other row groups"]
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "corpus"
    manifest = write_prepared_corpus(folder, {"train": 8}, row_group_size=4)
    file = folder / manifest.shards[0].path
    content = file.read_bytes()
    table = pq.read_table(file)
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "bad page":
        position = pq.read_metadata(file).row_group(1).column(0).data_page_offset
        file.write_bytes(content[:position] + b"\xff" * 40 + content[position + 40 :])
    elif damage == "row group missing":
        pq.write_table(table.slice(0, 4), file)
    elif damage == "no parquet":
        file.write_bytes(b"x" * len(content))
    else:
        pq.write_table(table, file, row_group_size=3)
    index = ShardIndex.of(str(folder), manifest)
    with pytest.raises((CorpusError, StorageError), match=r"train-00000\.parquet") as caught:
        index.read(np.arange(8), ["sample_id"])
    assert "\n" not in str(caught.value)
