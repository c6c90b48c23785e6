"""Raw images by path: local and S3, what is there, what is not, and what stops a run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dermray import storage
from dermray.errors import StorageError
from dermray.raw import fetch
from dermray.raw.fetch import NO_STAMP, ImageStore, ahead
from dermray.raw.sources import READERS, SourceRequest
from tests.raw_sources import LAYOUTS
from tests.s3 import BUCKET, HALF, RESET, SHORT_BODY, SLOW, SLOW_DOWN, STALLED, FaultyProxy, faulty_s3
from tests.unit.test_prepare_archives import write_tar, write_zip

PHOTOGRAPH = bytes(range(256)) * 157 + b"the end"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def s3(server: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_BACKOFF_S", 0.01)
    storage._remote_filesystem.cache_clear()
    storage.write_bytes(f"s3://{BUCKET}/raw/a b/ü,#%?.jpg", b"content")
    server.reset()
    yield server
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


@pytest.fixture(params=["pyarrow", "s3fs"])
def client(request: pytest.FixtureRequest, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """The store with one image of 40 kB, through either client, whose patience is short."""
    monkeypatch.setenv("DERMRAY_S3_CLIENT", request.param)
    monkeypatch.setenv("DERMRAY_S3_TIMEOUT_S", "1")
    # botocore's own attempts: the fewer, the sooner it is our turn.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage._remote_filesystem.cache_clear()
    storage.write_bytes(f"s3://{BUCKET}/raw/image.jpg", PHOTOGRAPH)
    s3.reset()
    return s3


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        *(("GET", fault) for fault in (500, 503, SLOW_DOWN, SHORT_BODY, RESET, HALF, SLOW, STALLED)),
        # Its answer has no body.
        *(("HEAD", fault) for fault in (500, 503, SLOW_DOWN, STALLED)),
    ],
)
def test_s3_that_stumbles_costs_nothing(client: FaultyProxy, fault: int | str, method: str) -> None:
    """Asked again, where need be, and every byte as it should be."""
    images = store(f"s3://{BUCKET}/raw", max_bytes=len(PHOTOGRAPH))
    images.fetch("image.jpg")
    num_requests = [name for name, _ in client.requests].count(method)
    client.reset()
    client.inject(fault, 1, method=method, key="raw/image.jpg")
    fetched = images.fetch("image.jpg")
    assert (fetched.data == PHOTOGRAPH, fetched.reason, fetched.stamp.num_bytes) == (True, "", len(PHOTOGRAPH))
    assert client.fired == 1
    assert [name for name, _ in client.requests].count(method) == num_requests + (fault != SLOW)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_s3_object_that_has_gone_since_it_was_listed_is_one_bad_row(client: FaultyProxy, method: str) -> None:
    client.inject(404, 1, method=method, key="raw/image.jpg")
    fetched = store(f"s3://{BUCKET}/raw", max_bytes=len(PHOTOGRAPH)).fetch("image.jpg")
    assert (fetched.reason, fetched.data, fetched.stamp) == ("missing_file", None, NO_STAMP)
    assert client.fired == 1


@pytest.mark.parametrize("fault", [403, 503, HALF, RESET])
def test_s3_that_fails_for_good_stops_the_run(
    client: FaultyProxy, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other image would fail as well. A refusal is final, the others are tried again first."""
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 2)
    client.inject(fault, 1000, method="GET", key="raw/image.jpg")
    with pytest.raises(StorageError, match=r"^s3://corpora/raw/image\.jpg: \S.*") as caught:
        store(f"s3://{BUCKET}/raw", max_bytes=len(PHOTOGRAPH)).fetch("image.jpg")
    assert ("after 2 attempts" in str(caught.value)) == (fault != 403)
    assert client.fired == 1 if fault == 403 else client.fired >= 2


def test_reading_ahead_keeps_order_and_is_bounded() -> None:
    seen: list[int] = []

    def function(item: int) -> int:
        seen.append(item)
        return item * 10

    results = ahead(range(100), function, num_threads=2)
    assert next(results) == 0
    assert len(seen) <= 5
    assert list(results) == [item * 10 for item in range(1, 100)]


@pytest.mark.parametrize(("limit_s", "num_here"), [(float("inf"), 100), (-1.0, 2)])
def test_local_files_are_read_by_threads_once_two_in_a_row_were_slow(
    monkeypatch: pytest.MonkeyPatch, limit_s: float, num_here: int
) -> None:
    monkeypatch.setattr(fetch, "WORTH_A_THREAD_S", limit_s)
    here: list[int] = []

    def function(item: int) -> int:
        if threading.current_thread() is threading.main_thread():
            here.append(item)
        return item * 10

    assert list(ahead(range(100), function, num_threads=2, local=True)) == [item * 10 for item in range(100)]
    assert here == list(range(num_here))


def test_reading_ahead_passes_errors_on() -> None:
    def function(item: int) -> int:
        raise StorageError(f"no {item}")

    with pytest.raises(StorageError, match="no 0"):
        list(ahead(range(50), function, num_threads=2))
