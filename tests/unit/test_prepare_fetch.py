"""Raw images by path: local and S3, what is there, what is not, and what stops a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dermray import storage
from dermray.errors import StorageError
from dermray.prepare.fetch import NO_STAMP, ImageStore, ahead
from dermray.prepare.sources import READERS, SourceRequest
from tests.raw_sources import LAYOUTS
from tests.s3 import BUCKET, FaultyProxy, faulty_s3
from tests.unit.test_prepare_archives import write_tar, write_zip


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_s3() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setattr(storage, "FIRST_BACKOFF_S", 0.01)
        storage._remote_filesystem.cache_clear()
        storage.write_bytes(f"s3://{BUCKET}/raw/a b/ü,#%?.jpg", b"content")
        proxy.reset()
        yield proxy
        storage._remote_filesystem.cache_clear()


def store(root: str | Path, *, max_bytes: int = 1000, follow_links: bool = False) -> ImageStore:
    return ImageStore(str(root), max_bytes=max_bytes, follow_links=follow_links)


def test_local_answers(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    (root / "folder").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"content")
    (root / "big.jpg").write_bytes(bytes(1001))
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", root / "leaving.jpg")
    os.symlink(tmp_path, root / "leaving")
    os.symlink("a.jpg", root / "staying.jpg")
    found = {
        path: store(root).fetch(path)
        for path in (
            *("a.jpg", "nowhere.jpg", "folder", "a.jpg/b.jpg", "big.jpg", "x" * 300),
            *("leaving.jpg", "leaving/secret", "staying.jpg"),
        )
    }
    assert {path: fetched.reason for path, fetched in found.items()} == {
        "a.jpg": "",
        "nowhere.jpg": "missing_file",
        "folder": "missing_file",
        "a.jpg/b.jpg": "missing_file",
        "big.jpg": "too_many_bytes",
        "x" * 300: "unreadable",
        "leaving.jpg": "path_outside_root",
        "leaving/secret": "path_outside_root",
        "staying.jpg": "",
    }
    assert found["a.jpg"].data == found["staying.jpg"].data == b"content"
    assert all((fetched.data is None) == bool(fetched.reason) for fetched in found.values())
    assert store(root, follow_links=True).fetch("leaving.jpg").data == b"secret"


def test_stamps_agree_with_what_was_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"content")
    os.symlink("/etc/hostname", tmp_path / "leaving.jpg")
    images = store(tmp_path)
    for path in ("a.jpg", "nowhere.jpg", "x" * 300, "leaving.jpg", "."):
        assert images.stamp(path) == images.fetch(path).stamp
    before = images.stamp("a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(0, 5))
    assert images.stamp("a.jpg") != before


def test_s3_objects_with_difficult_names(s3: FaultyProxy) -> None:
    images = store(f"s3://{BUCKET}/raw")
    assert images.fetch("a b/ü,#%?.jpg").data == b"content"
    assert images.fetch("a b/nothing.jpg").reason == "missing_file"
    assert images.stamp("a b").num_bytes == NO_STAMP.num_bytes


@pytest.mark.parametrize("client", ["pyarrow", "s3fs"])
def test_s3_members_of_archives(s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    monkeypatch.setenv("DERMRAY_S3_CLIENT", client)
    storage._remote_filesystem.cache_clear()
    files = {f"edu/皮肤 {number}.jpg": bytes([number]) * 900 for number in range(12)}
    for name, write in (("a b.zip", write_zip), ("c.tar", write_tar)):
        storage.write_bytes(f"s3://{BUCKET}/raw/{name}", write(tmp_path / name, files).read_bytes())
        images = store(f"s3://{BUCKET}/raw")
        s3.reset()
        s3.inject(503, 1, method="GET", key="raw/")
        assert {path: images.fetch(f"{name}!/{path}").data for path in files} == files
        assert s3.fired == 1
        # The directory once, then one range an image (each opened with a HEAD).
        assert len([method for method, _ in s3.requests if method == "GET"]) <= len(files) + 4
        assert images.fetch(f"{name}!/nothing.jpg").reason == "missing_file"


def test_s3_release_is_read_without_unpacking(s3: FaultyProxy, tmp_path: Path) -> None:
    LAYOUTS["derm1m"].write(tmp_path)
    root = f"s3://{BUCKET}/derm1m v2"
    for file in sorted(tmp_path.iterdir()):
        if file.is_file():
            storage.write_bytes(f"{root}/{file.name}", file.read_bytes())
        else:
            members = {f"{file.name}/{image.name}": image.read_bytes() for image in file.iterdir()}
            packed = write_zip(tmp_path / f"{file.name}.zip", members)
            storage.write_bytes(f"{root}/{packed.name}", packed.read_bytes())
    raw = READERS["derm1m"](SourceRequest(root))
    images = store(root, max_bytes=1 << 20)
    for row in raw.table.to_pylist():
        assert ".zip!/" in row["image"]
        assert images.fetch(row["image"]).data == (tmp_path / row["source_id"]).read_bytes()


@pytest.mark.parametrize("fault", [500, 503])
def test_s3_that_stumbles_is_asked_again(s3: FaultyProxy, fault: int) -> None:
    s3.inject(fault, 2, method="GET", key="raw/")
    assert store(f"s3://{BUCKET}/raw").fetch("a b/ü,#%?.jpg").data == b"content"
    assert s3.fired == 2


def test_s3_that_refuses_stops_the_run(s3: FaultyProxy) -> None:
    s3.inject(403, 100, method="GET", key="raw/")
    with pytest.raises(StorageError, match=r"s3://corpora/raw/a b/"):
        store(f"s3://{BUCKET}/raw").fetch("a b/ü,#%?.jpg")


def test_reading_ahead_keeps_order_and_is_bounded() -> None:
    seen: list[int] = []

    def function(item: int) -> int:
        seen.append(item)
        return item * 10

    results = ahead(range(100), function, num_threads=2)
    assert next(results) == 0
    assert len(seen) <= 5
    assert list(results) == [item * 10 for item in range(1, 100)]


def test_reading_ahead_passes_errors_on() -> None:
    def function(item: int) -> int:
        raise StorageError(f"no {item}")

    with pytest.raises(StorageError, match="no 0"):
        list(ahead(range(50), function, num_threads=2))
