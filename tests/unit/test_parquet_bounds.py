"""Parquet files of some kilobytes that unpack to gigabytes: refused by every reader before anything is unpacked."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray import parquet_bounds
from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.errors import CorpusError, DermRayError
from dermray.raw import parquet_images, tables
from dermray.vectors.index import VectorIndex
from dermray.vectors.index.embeddings import Embeddings
from dermray.vectors.index.vectors import build
from tests.corpora import write_prepared_corpus
from tests.serving import save_embeddings

MANY = parquet_bounds.FREE_BYTES + (1 << 20)


def with_long_value(file: Path, column: str) -> None:
    """Give the first row a value of some 70 MB that packs to nothing."""
    table = pq.read_table(file)
    place = table.column_names.index(column)
    kind = table.schema.field(column).type
    long = b"a" * MANY if pa.types.is_binary(kind) else "a" * MANY
    values = pa.array([long, *table[column].to_pylist()[1:]], kind)
    group = pq.ParquetFile(file).metadata.row_group(0).num_rows
    pq.write_table(table.set_column(place, column, values), file, row_group_size=group, compression="zstd")
    assert file.stat().st_size < 200_000


def of_index(folder: Path) -> None:
    save_embeddings(folder / "embeddings", rows=64)
    build(str(folder / "embeddings"), str(folder / "index"))
    manifest = json.loads((folder / "index" / "index.json").read_text())
    file = folder / "index" / manifest["images"]["rows"]
    with_long_value(file, "caption")
    manifest["images"]["rows_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "index" / "index.json").write_text(json.dumps(manifest))
    VectorIndex.load(str(folder / "index"))


def of_embeddings(folder: Path) -> None:
    save_embeddings(folder, rows=64)
    with_long_value(folder / "texts" / "part-00000.parquet", "text")
    list(Embeddings.load(str(folder)).tables(str(folder), "texts"))


def of_a_corpus(folder: Path) -> None:
    write_prepared_corpus(folder, 24)
    file = folder / Manifest.load(str(folder)).shards[0].path
    with_long_value(file, "image")
    shards.read_row_group(str(file), 0, ["image"], sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def of_images(folder: Path) -> None:
    file = folder / "images.parquet"
    pq.write_table(pa.table({"image": pa.array([b"x"] * 8)}), file)
    with_long_value(file, "image")
    with parquet_images.open_file(str(file)):
        raise AssertionError("opened")


def of_a_table(folder: Path) -> None:
    file = folder / "table.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"] * 8}), file)
    with_long_value(file, "image")
    tables.parse("table.parquet", file.read_bytes())


def of_rows_without_end(folder: Path) -> None:
    sink = io.BytesIO()
    codes = pa.DictionaryArray.from_arrays(pa.array(np.zeros(parquet_bounds.FREE_CELLS + 1, np.int8)), ["a.jpg"])
    pq.write_table(pa.table({"image": codes}), sink, compression="zstd", row_group_size=1 << 20)
    assert sink.tell() < 100_000
    tables.parse("table.parquet", sink.getvalue())


@pytest.mark.parametrize(
    "read",
    [of_index, of_embeddings, of_a_corpus, of_images, of_a_table, of_rows_without_end],
    ids=lambda one: one.__name__,
)
def test_what_unpacks_to_many_times_its_size_is_refused(read: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(DermRayError, match=r"unpack to [\d,]+ in [\d,]+ cells, too many times more") as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_long_value_that_a_dictionary_repeats_is_in_memory_once() -> None:
    long, sink = pa.array(["a" * (1 << 20)]), io.BytesIO()
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 32, pa.int8()), long)
    labels = pa.ListArray.from_arrays(pa.array(range(33), pa.int32()), repeated)
    table = pa.table({"number": range(32), "caption": repeated, "labels": labels})
    pq.write_table(table, sink, dictionary_pagesize_limit=1 << 30, store_schema=False, write_page_checksum=True)
    assert pq.read_table(sink).nbytes > 60 << 20
    read = parquet_bounds.opened(sink).read_row_group(0)
    assert read.nbytes < 4 << 20
    assert read.slice(3, 1).to_pylist() == [{"number": 3, "caption": "a" * (1 << 20), "labels": ["a" * (1 << 20)]}]


def test_labels_that_repeat_and_pictures_pass(tmp_path: Path) -> None:
    """Two million rows of one label, and as much of noise as is free."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(2_000_000)], "label": ["nevus"] * 2_000_000}), sink)
    assert parquet_bounds.read_table(io.BytesIO(sink.getvalue())).num_rows == 2_000_000
    sink = io.BytesIO()
    noise = np.random.default_rng(0).bytes(1 << 20)
    pq.write_table(pa.table({"image": pa.array([noise + b"%d" % n for n in range(80)], pa.binary())}), sink)
    parquet_bounds.require_bounded(pq.ParquetFile(sink).metadata, whole=True)


def test_a_damaged_file_is_named_as_before() -> None:
    with pytest.raises(CorpusError, match="is not a Parquet table of plain columns"):
        tables.parse("t.parquet", b"PAR1")
