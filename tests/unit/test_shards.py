"""Samples by index: in the order asked for, each row group read once, damage named and never read as content."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray import storage
from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import SAMPLE
from dermray.corpus.shards import ShardIndex, Verify, digests_to_check, label_counts
from dermray.errors import CorpusError, StorageError
from dermray.export.parts import Samples
from dermray.prepare.shard import write_shard
from dermray.vectors.embedding.units import row_groups
from tests.corpora import sample, write_prepared_corpus

NUM_SAMPLES = 21
NUM_DAMAGED = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    return folder, write_prepared_corpus(
        folder, {"train": NUM_SAMPLES, "val": 5}, row_group_size=4, samples_per_shard=10, unlabelled=[0]
    )


@pytest.fixture(autouse=True)
def no_open_files() -> None:
    forget()


def forget() -> None:
    """As a process that has read nothing yet."""
    shards._open.cache_clear()
    shards._whole.clear()


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


def written(folder: Path) -> Manifest:
    """A corpus of one shard as preparation writes it."""
    rows = [{**sample(index, "train"), "phash": index, "duplicate_group": None} for index in range(24)]
    return Manifest(shards=(write_shard(str(folder), "train-00000", "train", rows, 8),))


def without_checksums(folder: Path) -> Manifest:
    """The same as earlier builds wrote it."""
    (shard,) = written(folder).shards
    file = folder / shard.path
    pq.write_table(pq.read_table(file), file, row_group_size=8, compression="NONE", use_dictionary=False)
    return Manifest(shards=(shard.model_copy(update={"sha256": storage.sha256(file)}),))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One thing that disks, memories and networks do to a file."""
    data, at = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(6)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == 3:
        del data[at : at + rng.randrange(1, 100)]
    elif kind == 4:
        other = rng.randrange(len(data) - 32)
        data[at : at + 32] = data[other : other + len(data[at : at + 32])]
    else:
        data[-rng.randrange(1, 4_000)] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("verify", ["digests", "pages"])
def test_no_damaged_shard_is_read_with_other_content(tmp_path: Path, verify: Verify) -> None:
    """A digest refuses every damaged shard; checksums of pages those whose content would be another."""
    manifest = written(tmp_path)
    file = tmp_path / manifest.shards[0].path
    content, rng = file.read_bytes(), random.Random(0)
    index = ShardIndex.of(str(tmp_path), manifest, verify)
    truth = [table.to_pylist() for table in index.row_groups(SAMPLE.names)]
    num_damaged, refusals = 0, list[str]()
    while num_damaged < NUM_DAMAGED:
        data = damaged(content, rng)
        if data == content:
            continue
        num_damaged += 1
        file.write_bytes(data)
        forget()
        try:
            assert [table.to_pylist() for table in index.row_groups(SAMPLE.names)] == truth
        except CorpusError as error:
            refusals.append(str(error))
    assert all(str(file) in line and "restore it or prepare again" in line for line in refusals)
    assert len(refusals) == NUM_DAMAGED if verify == "digests" else len(refusals) > NUM_DAMAGED // 2


def _by_index(folder: str, manifest: Manifest) -> Iterator[Any]:
    return ShardIndex.of(folder, manifest).row_groups(["image"])


def _by_unit(folder: str, manifest: Manifest) -> Iterator[Any]:
    return (unit.read() for unit in row_groups(folder, manifest.select("train")))


def _by_export(folder: str, manifest: Manifest) -> Iterator[Any]:
    return Samples.of(folder, manifest, ["train"]).tables("train", 0, 24, ["image"])


@pytest.mark.parametrize("read", [_by_index, _by_unit, _by_export], ids=["training", "evaluate and embed", "export"])
@pytest.mark.parametrize("write", [written, without_checksums])
def test_every_reader_refuses_a_damaged_image(
    tmp_path: Path, read: Callable[[str, Manifest], Iterator[Any]], write: Callable[[Path], Manifest]
) -> None:
    manifest = write(tmp_path)
    assert len(list(read(str(tmp_path), manifest))) == 3
    file = tmp_path / manifest.shards[0].path
    content = bytearray(file.read_bytes())
    image = pq.read_table(file)["image"][20].as_py()
    content[content.index(image) + len(image) // 2] ^= 1
    file.write_bytes(content)
    forget()
    with pytest.raises(CorpusError, match=rf"{file.name} \(.*restore it or prepare again"):
        list(read(str(tmp_path), manifest))


def test_a_digest_is_taken_once_by_a_process(corpus: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    original = storage.sha256

    def counting(uri: str) -> str:
        taken.append(uri)
        return original(uri)

    monkeypatch.setattr(storage, "sha256", counting)
    folder, manifest = corpus
    index = ShardIndex.of(str(folder), manifest)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda group: index.read_row_group(group, ["source_id"]), [*range(len(index.locations))] * 3))
    assert sorted(taken) == sorted(str(folder / shard.path) for shard in manifest.shards)
    list(ShardIndex.of(str(folder), manifest, "pages").row_groups(["source_id"]))
    assert len(taken) == len(manifest.shards)


def test_which_digests_are_checked(corpus: tuple[Path, Manifest]) -> None:
    folder, manifest = corpus
    everything = {shard.path: shard.sha256 for shard in manifest.shards}
    assert digests_to_check(str(folder), manifest) == everything
    assert digests_to_check(str(folder), manifest, "pages") == digests_to_check("s3://b/c", manifest) == {}
    assert digests_to_check("s3://b/c", manifest, "digests") == everything
