"""Storage: a path, file:// and s3:// alike; atomic publication; transient faults are tried again, others are not."""

from __future__ import annotations

import io
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray import object_stores, storage
from dermray.corpus.shards import read_row_group
from dermray.errors import ConfigError, StorageError
from tests.s3 import BUCKET, HALF, RESET, SHORT_BODY, SLOW_DOWN, STALLED, FaultyProxy, faulty_s3


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with faulty_s3() as running:
        yield running


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # botocore's own attempts: the fewer, the sooner it is our turn.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(storage, "FIRST_BACKOFF_S", 0.01)
    storage._remote_filesystem.cache_clear()
    yield monkeypatch
    storage._remote_filesystem.cache_clear()


@pytest.fixture(params=["pyarrow", "s3fs"])
def s3(request: pytest.FixtureRequest, proxy: FaultyProxy, s3_environment: pytest.MonkeyPatch) -> FaultyProxy:
    s3_environment.setenv("DERMRAY_S3_CLIENT", request.param)
    s3_environment.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    s3_environment.setenv("DERMRAY_S3_TIMEOUT_S", "1")
    proxy.reset()
    return proxy


@pytest.fixture(params=["path", "file", "s3-pyarrow", "s3-s3fs"])
def base(request: pytest.FixtureRequest, tmp_path: Path, proxy: FaultyProxy, s3_environment: pytest.MonkeyPatch) -> str:
    """An empty folder of each kind."""
    if request.param == "path":
        return str(tmp_path)
    if request.param == "file":
        return tmp_path.as_uri()
    s3_environment.setenv("DERMRAY_S3_CLIENT", request.param.removeprefix("s3-"))
    s3_environment.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    proxy.reset()
    return f"s3://{BUCKET}/{tmp_path.name}-{request.param}"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses to let files grow beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_round_trip_is_the_same_for_every_kind_of_uri(base: str) -> None:
    uri = storage.join(base, "nested", "folder", "a b.json")
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        storage.size_bytes(uri)
    storage.write_json(uri, {"größe": [1, 2.5, None]})
    assert storage.exists(uri)
    assert storage.exists(storage.join(base, "nested"))
    assert storage.read_json(uri) == {"größe": [1, 2.5, None]}
    assert storage.size_bytes(uri) == len(storage.read_bytes(uri))
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    storage.write_text(uri, "\ufeffwith a mark")
    assert storage.read_text(uri) == "with a mark"


def test_listing_removing_and_copying(base: str) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt"):
        storage.write_text(storage.join(base, "tree", name), name)
    tree = storage.join(base, "tree")
    assert storage.list_files(tree) == [storage.join(tree, "a.txt"), storage.join(tree, "b.txt")]
    everything = [storage.join(tree, name) for name in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt")]
    assert storage.list_files(tree, recursive=True) == everything
    assert storage.list_files(tree + "/", recursive=True) == everything
    assert storage.list_folders(tree) == [storage.join(tree, "sub")]
    assert storage.list_files(storage.join(base, "absent")) == storage.list_folders(storage.join(base, "absent")) == []

    copy = storage.join(base, "copy")
    storage.copy_tree(tree, copy)
    assert [file.removeprefix(copy) for file in storage.list_files(copy, recursive=True)] == [
        file.removeprefix(tree) for file in everything
    ]
    assert storage.read_text(storage.join(copy, "sub", "deep", "d.txt")) == "sub/deep/d.txt"
    with storage.local_folder(copy) as local:
        assert (local / "sub" / "c.txt").read_text() == "sub/c.txt"

    storage.remove(storage.join(tree, "a.txt"))
    assert storage.list_files(tree) == [storage.join(tree, "b.txt")]
    storage.remove(storage.join(tree, "sub"))
    assert storage.list_files(tree, recursive=True) == [storage.join(tree, "b.txt")]
    storage.remove(storage.join(tree, "sub"))
    assert storage.exists(storage.join(copy, "sub", "c.txt"))


def test_staged_publishes_at_the_end_and_never_after_an_error(base: str) -> None:
    uri = storage.join(base, "large.bin")
    with storage.staged(uri) as path:
        path.write_bytes(b"first")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"first"

    def write_and_break() -> None:
        with storage.staged(uri) as path:
            path.write_bytes(b"second, unfinished")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        write_and_break()
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_files(base) == [uri]


def test_upload_and_size_limit(base: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("source") / "x.bin"
    source.write_bytes(bytes(range(256)) * 40)
    uri = storage.join(base, "copy.bin")
    storage.upload(source, uri)
    assert storage.read_bytes(uri, max_bytes=10_240) == source.read_bytes()
    with pytest.raises(StorageError, match="copy.bin has 10,240 bytes, more than the 10,239 allowed"):
        storage.read_bytes(uri, max_bytes=10_239)


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe\x00"])
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"bad\.json is not"):
        storage.read_json(tmp_path / "bad.json")


def test_a_failing_write_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    uri = tmp_path / "state.bin"
    storage.write_bytes(uri, b"old")
    with file_size_limit(100_000), pytest.raises(StorageError, match=r"state\.bin: .*File too large"):
        storage.write_bytes(uri, bytes(200_000))
    assert uri.read_bytes() == b"old"
    with file_size_limit(100_000), pytest.raises(OSError, match="File too large"), storage.staged(uri) as path:
        path.write_bytes(bytes(200_000))
    assert uri.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["state.bin"]


def test_names_of_local_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.normalise("a/../b/") == storage.normalise("file://" + str(tmp_path / "b")) == str(tmp_path / "b")
    assert storage.normalise("s3://bucket/x/") == "s3://bucket/x"
    assert storage.normalise("~/x") == os.path.expanduser("~/x")
    assert storage.local_path((tmp_path / "50% grün.txt").as_uri()) == tmp_path / "50% grün.txt"
    assert storage.join("/", "a", "/b/") == "/a/b"
    assert storage.join("s3://bucket/", "a") == "s3://bucket/a"
    assert storage.name_of("s3://bucket/a/b/") == "b"
    assert storage.is_local("a:b/c")
    assert not storage.is_local("s3://a")
    with pytest.raises(StorageError, match="s3://a/b is not a local path"):
        storage.local_path("s3://a/b")
    with pytest.raises(StorageError, match="cannot open nosuch:// URIs"):
        storage.read_bytes("nosuch://a/b")


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error SLOW_DOWN during GetObject operation"),
        OSError("incomplete read: 3 of 7 bytes"),
        OSError("When reading: HTTP status 503"),
        ConnectionResetError("peer"),
        TimeoutError(),
    ],
)
def test_transient_errors_are_tried_again_with_growing_pauses(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    outcomes: list[OSError | None] = [error] * (storage.MAX_ATTEMPTS - 1) + [None]

    def action() -> str:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return "done"

    assert storage.with_retries(action, "s3://b/k") == "done"
    assert outcomes == []
    expected = [storage.FIRST_BACKOFF_S * 2**attempt for attempt in range(storage.MAX_ATTEMPTS - 1)]
    assert len(pauses) == len(expected)
    assert all(0.5 * pause <= got <= 1.5 * pause for got, pause in zip(pauses, expected, strict=True))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FileNotFoundError("404, not 503"), FileNotFoundError),
        (IsADirectoryError("x"), IsADirectoryError),
        (PermissionError("timeout of your licence"), StorageError),
        (OSError(28, "No space left on device"), StorageError),
        (OSError(28, "No space left on device", "data/train-00500.parquet"), StorageError),
    ],
)
def test_final_errors_are_not_tried_again(
    error: OSError, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a final error must not be waited for"))
    calls = []

    def action() -> None:
        calls.append(1)
        raise error

    with pytest.raises(raised):
        storage.with_retries(action, "x")
    assert len(calls) == 1


def test_what_stays_transient_fails_in_the_end_and_says_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def action() -> None:
        raise ConnectionResetError("by\npeer")

    with pytest.raises(StorageError, match=r"^s3://b/k: by peer after 5 attempts$"):
        storage.with_retries(action, "s3://b/k")


@pytest.mark.parametrize("kind", [503, SHORT_BODY, RESET, HALF])
def test_reads_survive_faults_of_the_store(s3: FaultyProxy, kind: int | str) -> None:
    uri = f"s3://{BUCKET}/faults/read.bin"
    data = os.urandom(50_000)
    storage.write_bytes(uri, data)
    # More than the client itself puts up with, so that the attempts are storage's own.
    times = 4 if kind == 503 else 2
    s3.inject(kind, times, method="GET", key="read.bin")
    assert storage.read_bytes(uri) == data
    assert s3.fired == times


@pytest.mark.parametrize("length", [1, 2, 5_000])
def test_parts_that_come_short_are_noticed(s3: FaultyProxy, s3_environment: pytest.MonkeyPatch, length: int) -> None:
    """Half of a range, announced as if it were all: pyarrow's client would make up the rest."""
    uri = f"s3://{BUCKET}/faults/part.bin"
    for last in (*object_stores.MARKS, 0):
        data = os.urandom(19_990 + length - 1) + bytes([last]) + os.urandom(20_000)
        storage.write_bytes(uri, data)
        s3.reset()
        s3.inject(HALF, 3, method="GET", key="part.bin")
        assert storage.read_range(uri, 19_990, length) == data[19_990 : 19_990 + length]
        assert s3.fired == 3
    s3.reset()
    s3.inject(HALF, 1000, method="GET", key="part.bin")
    s3_environment.setattr(storage, "MAX_ATTEMPTS", 2)
    with pytest.raises(StorageError, match=rf"incomplete read of {length} bytes at 19990 after 2 attempts"):
        storage.read_range(uri, 19_990, length)


def test_parts_at_the_end_are_as_long_as_what_is_there(s3: FaultyProxy) -> None:
    uri = f"s3://{BUCKET}/faults/part.bin"
    data = os.urandom(50_000)
    storage.write_bytes(uri, data)
    assert storage.read_range(uri, 49_990, 100) == data[49_990:]
    assert storage.read_range(uri, 60_000, 100) == b""


def test_row_groups_that_come_short_are_noticed(s3: FaultyProxy) -> None:
    images = [os.urandom(3_000) for _ in range(8)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), sink, row_group_size=4, compression="NONE")
    uri = f"s3://{BUCKET}/faults/{s3.url.rpartition(':')[2]}-{os.urandom(4).hex()}.parquet"
    storage.write_bytes(uri, sink.getvalue())
    assert read_row_group(uri, 0, ["image"])["image"].to_pylist() == images[:4]
    s3.inject(HALF, 1, method="GET", key=".parquet")
    assert read_row_group(uri, 1, ["image"])["image"].to_pylist() == images[4:]
    assert s3.fired == 1


@pytest.mark.parametrize("kind", [503, SLOW_DOWN, STALLED])
def test_writes_survive_faults_of_the_store(s3: FaultyProxy, kind: int | str) -> None:
    uri = f"s3://{BUCKET}/faults/write.bin"
    storage.write_bytes(uri, b"old")
    data = os.urandom(50_000)
    times = 1 if kind == STALLED else 4
    s3.inject(kind, times, method="PUT", key="write.bin")
    storage.write_bytes(uri, data)
    assert s3.fired == times
    assert storage.read_bytes(uri) == data


def test_listings_survive_faults_of_the_store(s3: FaultyProxy) -> None:
    storage.write_bytes(f"s3://{BUCKET}/listed/a", b"a")
    for kind, times in ((503, 4), (SHORT_BODY, 1), (STALLED, 1)):
        s3.reset()
        s3.inject(kind, times, method="GET", key="list-type=2")
        assert storage.list_files(f"s3://{BUCKET}/listed") == [f"s3://{BUCKET}/listed/a"]
        assert s3.fired == times


def test_a_refusal_of_the_store_is_not_tried_again(s3: FaultyProxy) -> None:
    uri = f"s3://{BUCKET}/faults/forbidden.bin"
    storage.write_bytes(uri, b"x")
    for method in ("GET", "HEAD"):
        s3.inject(403, 50, method=method, key="forbidden.bin")
    with pytest.raises(StorageError, match=r"forbidden\.bin"):
        storage.read_bytes(uri)
    assert 1 <= s3.fired <= 3


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_refused(s3_environment: pytest.MonkeyPatch, text: str) -> None:
    s3_environment.setenv("DERMRAY_S3_TIMEOUT_S", text)
    with pytest.raises(ConfigError, match=f"DERMRAY_S3_TIMEOUT_S must be a number of seconds above 0, got '{text}'"):
        storage.read_bytes("s3://b/k")


@pytest.mark.parametrize("client", ["pyarrow", "s3fs"])
def test_a_store_that_does_not_answer_is_one_clear_error(client: str, s3_environment: pytest.MonkeyPatch) -> None:
    s3_environment.setenv("DERMRAY_S3_CLIENT", client)
    s3_environment.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    s3_environment.setattr(storage, "MAX_ATTEMPTS", 2)
    with pytest.raises(StorageError, match=r"^s3://b/k: .* after 2 attempts$"):
        storage.read_bytes("s3://b/k")
