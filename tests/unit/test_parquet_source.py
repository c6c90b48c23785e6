"""Images inside Parquet files: found in place where that can be done, read by row group where not, never guessed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dermray.errors import CorpusError, StorageError
from dermray.raw import parquet_images
from dermray.raw.fetch import Fetched, ImageStore
from dermray.raw.sources import READERS, RawRows, SourceRequest
from dermray.raw.sources.rows import Columns
from tests.raw_corpus import photograph
from tests.raw_sources import write_images

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PLAIN: dict[str, Any] = {"use_dictionary": False, "compression": "NONE"}
ENCODINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "pages of version 2": {**PLAIN, "data_page_version": "2.0"},
    "many pages": {**PLAIN, "data_page_size": 64, "write_batch_size": 1},
    "page index and checksums": {**PLAIN, "write_page_index": True, "write_page_checksum": True},
    "compressed": {"use_dictionary": False, "compression": "ZSTD"},
    "dictionary": {"compression": "NONE"},
    "as pyarrow writes by default": {},
}


def read(folder: Path, **request: Any) -> RawRows:
    return READERS["parquet"](SourceRequest(str(folder), **request))


def fetch(folder: Path, raw: RawRows, max_bytes: int = 1 << 20) -> list[Fetched | None]:
    store = ImageStore(str(folder), max_bytes=max_bytes, follow_links=False)
    fetched = [store.fetch(path) if path else None for path in raw.table["image"].to_pylist()]
    assert all(store.stamp(each.path) == each.stamp for each in fetched if each)
    return fetched


def write(file: Path, images: list[Any], kind: pa.DataType, encoding: dict[str, Any], row_group_size: int = 3) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    captions = pa.array([f"caption {row}" for row in range(len(images))])
    table = pa.table({"image": pa.array(images, kind), "caption": captions})
    pq.write_table(table, file, row_group_size=row_group_size, **encoding)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS.keys())
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT], ids=str)
@examples(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(st.none() | st.binary(max_size=200), min_size=1, max_size=20))
def test_every_image_is_found(
    tmp_path: Path, kind: pa.DataType, encoding: dict[str, Any], images: list[bytes | None]
) -> None:
    cells: list[Any] = images
    if pa.types.is_struct(kind):
        # A struct may be null, and so may its bytes.
        cells = [None if image is None and row % 2 else {"bytes": image} for row, image in enumerate(images)]
    write(tmp_path / "a.parquet", cells, kind, encoding)
    raw = read(tmp_path)
    direct = encoding["compression"] == "NONE" and encoding.get("use_dictionary") is False if encoding else False
    found = fetch(tmp_path, raw)
    assert [each.data if each else None for each in found] == images
    for path, image in zip(raw.table["image"].to_pylist(), images, strict=True):
        if direct:
            assert (path is None) == (image is None)
            assert path is None or ("+" in path and "!g" not in path)
        else:
            assert "!g" in path
    (tmp_path / "a.parquet").unlink()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for content in (b"one", b"two and more"):
        write(tmp_path / "a.parquet", [content], pa.binary(), {"compression": "ZSTD"})
        (found,) = fetch(tmp_path, read(tmp_path))
        assert found is not None
        assert found.data == content


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "MAX_KEPT_BYTES", 5000)
    columns = parquet_images._Columns()
    monkeypatch.setattr(parquet_images, "_COLUMNS", columns)
    write(tmp_path / "a.parquet", [bytes([row]) * 1000 for row in range(12)], pa.binary(), {"compression": "ZSTD"})
    found = fetch(tmp_path, read(tmp_path))
    assert [each.data[:1] for each in found if each and each.data] == [bytes([row]) for row in range(12)]
    assert len(columns._kept) == 1


def test_too_large_images_and_places_beyond_the_end(tmp_path: Path) -> None:
    for number, encoding in enumerate((PLAIN, {"compression": "ZSTD"})):
        folder = tmp_path / str(number)
        write(folder / "a.parquet", [b"x" * 100, b"y"], pa.binary(), encoding)
        large, small = fetch(folder, read(folder), max_bytes=50)
        assert large is not None
        assert (large.data, large.reason, large.detail) == (
            None,
            "too_many_bytes",
            "100 bytes are more than the 50 allowed",
        )
        assert small is not None
        assert small.data == b"y"
    store = ImageStore(str(tmp_path / "1"), max_bytes=1 << 20, follow_links=False)
    for path, reason in {
        "a.parquet!g0r2/image/x": "unreadable",
        "a.parquet!g1r0/image/x": "unreadable",
        "a.parquet!g0r0/caption2/x": "unreadable",
        "a.parquet!999999+5/image/x": "unreadable",
        "b.parquet!g0r0/image/x": "missing_file",
    }.items():
        fetched = store.fetch(path)
        assert (fetched.data, fetched.reason) == (None, reason), path
        assert fetched.detail


def features(**described: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def test_columns_of_every_kind(tmp_path: Path) -> None:
    table = pa.table(
        {
            "img": pa.array(
                [{"bytes": photograph(0), "path": "折/图 1.png"}, {"bytes": photograph(1), "path": None}], STRUCT
            ),
            "mask": pa.array([b"m", None]),
            "captions": pa.array([["one", "two"], []], pa.list_(pa.string())),
            "dx": pa.array([1, -1]),
            "concepts": pa.array([["Red", "scaly"], None]),
            "age": pa.array([45.5, None]),
            "fitzpatrick": pa.array([3, None], pa.int32()),
            "score": pa.array([{"x": 1}, None]),
        }
    )
    table = table.replace_schema_metadata(features(dx={"names": ["nevus", "psoriasis"], "_type": "ClassLabel"}))
    (tmp_path / "validation").mkdir()
    pq.write_table(table, tmp_path / "validation" / "0000.parquet", **PLAIN)
    pq.write_table(pa.table({"text": ["no images"]}), tmp_path / "other.parquet")
    columns = Columns(image="img", caption="captions", label="dx", skin_type="fitzpatrick")
    raw = read(tmp_path, columns=columns)
    first, again, second = raw.table.to_pylist()
    assert first["image"].startswith("validation/0000.parquet!")
    assert first["image"].endswith("/img/图 1.png")
    assert second["image"].endswith("/img/1")
    assert [row["row"] for row in (first, again, second)] == [1, 1, 2]
    assert [row["captions"] for row in (first, again, second)] == [
        [{"aspect": "raw", "text": "one"}],
        [{"aspect": "raw", "text": "two"}],
        [],
    ]
    assert {**first, "captions": again["captions"]} == again
    assert (first["labels"], first["concepts"], first["skin_type"]) == (["psoriasis"], ["red", "scaly"], 3)
    assert (second["labels"], second["concepts"], second["skin_type"]) == ([], [], None)
    assert (first["split"], first["source"], first["prepared"]) == ("val", "parquet", None)
    assert first["meta"]["age"] == 45.5
    assert json.loads(first["meta"]["extra"]) == {"score": '{"x": 1}'}
    assert read(tmp_path, columns=columns, limit=1).table.to_pylist() == [first, again]
    assert read(tmp_path, columns=columns, table="validation/0000.parquet").table.equals(raw.table)


def test_files_of_different_columns_come_together(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [photograph(0)], pa.binary(), PLAIN)
    table = pa.table({"image": [photograph(1)], "label": ["nevus"], "split": ["test"]})
    pq.write_table(table, tmp_path / "train.parquet", **PLAIN)
    rows = read(tmp_path).table.to_pylist()
    assert [(row["row"], row["labels"], row["split"]) for row in rows] == [(1, [], None), (2, ["nevus"], "test")]


def test_an_image_that_is_not_embedded_is_a_file(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a.jpg")
    cells = [{"bytes": None, "path": "images/a.jpg"}, {"bytes": None, "path": "/etc/passwd"}]
    write(tmp_path / "a.parquet", cells, STRUCT, PLAIN)
    raw = read(tmp_path)
    assert raw.table["image"].to_pylist() == ["images/a.jpg", "/etc/passwd"]


def test_names_lead_nowhere(tmp_path: Path) -> None:
    cells = [{"bytes": b"x", "path": path} for path in ("../../up.jpg", "..", "a\0b", "dir/", "https://host/a.jpg?x=1")]
    write(tmp_path / "a.parquet", cells, STRUCT, PLAIN)
    raw = read(tmp_path)
    names = [path.rpartition("/")[2] for path in raw.table["image"].to_pylist()]
    assert names == ["up.jpg", "1", "2", "0", "a.jpg?x=1"]
    assert all(each and each.data == b"x" for each in fetch(tmp_path, raw))


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no \.parquet file"):
        read(tmp_path)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"column 'image' of images; name the column with columns\.image="):
        read(tmp_path)
    with pytest.raises(CorpusError, match=r"b\.parquet does not exist"):
        read(tmp_path, table="b.parquet")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="neither captions"):
        read(tmp_path)
    with pytest.raises(CorpusError, match=r"has no column 'words'"):
        read(tmp_path, columns=Columns(caption="words"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(CorpusError, match=r"a\.parquet is no whole Parquet file .*get it again"):
        read(tmp_path)


def damaged(flip: Callable[[bytearray], None]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"image": [b"first" * 20, None, b"second" * 20], "caption": ["a", "b", "c"]})
    pq.write_table(table, sink, **PLAIN)
    data = bytearray(sink.getvalue())
    flip(data)
    return bytes(data)


@examples(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(4, 160), value=st.integers(0, 255), width=st.integers(1, 12))
@example(place=13, value=2, width=2)
def test_damaged_pages_end_in_one_clear_error_or_in_other_bytes(
    tmp_path: Path, place: int, value: int, width: int
) -> None:
    def flip(data: bytearray) -> None:
        data[place : place + width] = bytes([value]) * width

    (tmp_path / "a.parquet").write_bytes(damaged(flip))
    try:
        raw = read(tmp_path)
    except (CorpusError, StorageError) as error:
        assert "a.parquet" in str(error)  # noqa: PT017
        return
    assert raw.table.num_rows == 3
    store = ImageStore(str(tmp_path), max_bytes=1 << 20, follow_links=False)
    for path in raw.table["image"].drop_null().to_pylist():
        fetched = store.fetch(path)
        assert fetched.data is not None or fetched.reason == "unreadable"


def test_what_datasets_writes_is_read_in_place(tmp_path: Path) -> None:
    import datasets

    pictures = [photograph(number) for number in range(5)]
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture, "path": None} for picture in pictures], "label": [0, 1, 0, 1, 0]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["nevus", "eczema"])}
        ),
    )
    data.to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    raw = read(tmp_path)
    assert raw.table["split"].to_pylist() == ["test"] * 5
    assert raw.table["labels"].to_pylist() == [["nevus"], ["eczema"], ["nevus"], ["eczema"], ["nevus"]]
    assert [each.data for each in fetch(tmp_path, raw) if each] == pictures
