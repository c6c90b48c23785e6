"""One way to touch bytes: a path, `file://` or `s3://` URI is the same to every caller.

Local paths and S3 go through pyarrow's file systems (`DERMRAY_S3_CLIENT=s3fs` swaps in s3fs); any other scheme goes
through fsspec. Endpoint, region and credentials come from the usual AWS variables. Publication is atomic: a local
file is written aside and renamed, an object appears when its upload completes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from dermray.errors import StorageError

MAX_ATTEMPTS = 5
FIRST_BACKOFF_S = 0.2
# A full or read-only disk stays so, whatever the path in the message reads like.
FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What object stores and networks say when the same request may go through a moment later.
TRANSIENT_MARKS = (
    "slow_down",
    "slowdown",
    "slow down",
    "internal_failure",
    "internalerror",
    "internal error",
    "service_unavailable",
    "serviceunavailable",
    "service unavailable",
    "status 500",
    "status 502",
    "status 503",
    "status 504",
    "(500)",
    "(502)",
    "(503)",
    "(504)",
    "network_connection",
    "request_timeout",
    "requesttimeout",
    "timed out",
    "timeout",
    "connection reset",
    "connection refused",
    "connection aborted",
    "broken pipe",
    "could not connect",
    "incomplete",
    "unexpected end",
    "not completed",
)

# s3fs translates 503 and 500 to these; a network file system uses the others.
TRANSIENT_ERRNOS = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT, errno.ESTALE}

ResultT = TypeVar("ResultT")


def normalise(uri: str | os.PathLike[str]) -> str:
    """A local path becomes absolute (Ray workers change directory); a URI loses its trailing slash."""
    text = os.fspath(uri)
    if is_local(text):
        return str(local_path(text))
    return text.rstrip("/")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """True for a plain path or a `file://` URI."""
    scheme = urlsplit(os.fspath(uri)).scheme
    return scheme in ("", "file") or "://" not in os.fspath(uri)


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The absolute path of a local URI.

    Raises:
        StorageError: the URI is remote.
    """
    text = os.fspath(uri)
    if not is_local(text):
        raise StorageError(f"{text} is not a local path; download it or give a local one")
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    return Path(os.path.abspath(os.path.expanduser(text)))


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """Join path segments onto a URI."""
    text = os.fspath(uri)
    return "/".join([text.rstrip("/") if text != "/" else "", *[part.strip("/") for part in parts]])


def name_of(uri: str | os.PathLike[str]) -> str:
    """The last segment of a URI."""
    return os.fspath(uri).rstrip("/").rpartition("/")[2]


def filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a URI and the path inside it.

    Raises:
        StorageError: the scheme is unknown or its package is not installed.
    """
    text = os.fspath(uri)
    if is_local(text):
        return pafs.LocalFileSystem(), str(local_path(text))
    scheme, _, rest = text.partition("://")
    return _remote_filesystem(scheme), rest.rstrip("/")


@lru_cache(maxsize=16)
def _remote_filesystem(scheme: str) -> pafs.FileSystem:
    if scheme == "s3" and os.environ.get("DERMRAY_S3_CLIENT", "pyarrow") == "pyarrow":
        return pafs.S3FileSystem(
            endpoint_override=_s3_endpoint(),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            connect_timeout=10,
            request_timeout=60,
            allow_bucket_creation=True,
        )
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        options = {"endpoint_url": _s3_endpoint(), "use_listings_cache": False}
    try:
        return pafs.PyFileSystem(_FsspecHandler(fsspec.filesystem(scheme, **options)))
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {scheme}:// URIs: {error}") from None


class _FsspecHandler(pafs.FSSpecHandler):
    """pyarrow's handler asks `isfile` and `isdir`, which take any failure for absence; this one does not."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        if self.fs.info(path)["type"] != "file":
            raise FileNotFoundError(path)
        # What is asked for is read; fsspec would fetch megabytes ahead of every small part.
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        try:
            self.fs.info(selector.base_dir)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        return super().get_file_info_selector(selector)


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def with_retries(action: Callable[[], ResultT], uri: str | os.PathLike[str]) -> ResultT:
    """Run `action`, trying again with exponential backoff and jitter while the error looks transient.

    Raises:
        FileNotFoundError: the object is not there.
        StorageError: any other failure, after the last attempt.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except _store_errors() as error:
            last = attempt == MAX_ATTEMPTS - 1
            if last or not _is_transient(error):
                tries = f" after {attempt + 1} attempts" if attempt else ""
                raise StorageError(f"{os.fspath(uri)}: {_one_line(error)}{tries}") from error
            time.sleep(FIRST_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


@cache
def _store_errors() -> tuple[type[Exception], ...]:
    """What the clients raise when a request fails; s3fs lets some errors of its own packages through."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return OSError, BotoCoreError, ClientError


def _is_transient(error: Exception) -> bool:
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in FINAL_ERRNOS:
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    text = str(error).lower()
    return any(mark in text for mark in TRANSIENT_MARKS)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def exists(uri: str | os.PathLike[str]) -> bool:
    """True if a file, an object or a folder is there."""
    fs, path = filesystem(uri)
    return with_retries(lambda: fs.get_file_info(path).type, uri) != pafs.FileType.NotFound


def size_bytes(uri: str | os.PathLike[str]) -> int:
    """Size of a file or object.

    Raises:
        FileNotFoundError: it is not there.
    """
    fs, path = filesystem(uri)
    info = with_retries(lambda: fs.get_file_info(path), uri)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(f"{os.fspath(uri)} is not a file")
    return int(info.size)


def read_bytes(uri: str | os.PathLike[str], *, max_bytes: int | None = None) -> bytes:
    """Read a whole file or object and check that as many bytes came as the store announced.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is larger than `max_bytes`, came short, or the store failed for good.
    """
    if is_local(uri):
        # A million small files: the file system layer would cost more than the reading.
        local = local_path(uri)
        return with_retries(lambda: _read_whole(local.open("rb"), os.stat(local).st_size, uri, max_bytes), uri)
    fs, path = filesystem(uri)

    def read() -> bytes:
        file = fs.open_input_file(path)
        return _read_whole(file, file.size(), uri, max_bytes)

    return with_retries(read, uri)


def _read_whole(file: Any, size: int, uri: str | os.PathLike[str], max_bytes: int | None) -> bytes:
    """Read and close an open file of an announced size."""
    with file:
        if max_bytes is not None and size > max_bytes:
            raise StorageError(f"{os.fspath(uri)} has {size:,} bytes, more than the {max_bytes:,} allowed")
        data = file.read()
    if len(data) != size:
        raise OSError(f"incomplete read: {len(data)} of {size} bytes")
    return bytes(data)


def read_range(uri: str | os.PathLike[str], offset: int, num_bytes: int) -> bytes:
    """Read part of a file or object: `num_bytes` from `offset`, fewer only where the file ends before.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the part came short, or the store failed for good.
    """
    fs, path = filesystem(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            wanted = max(0, min(num_bytes, file.size() - offset))
            file.seek(min(offset, file.size()))
            data = file.read(wanted)
        if len(data) != wanted:
            raise OSError(f"incomplete read: {len(data)} of {wanted} bytes at {offset}")
        return bytes(data)

    return with_retries(read, uri)


def read_text(uri: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file (a byte order mark is dropped)."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{os.fspath(uri)} is not UTF-8 text: {error}") from None


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Read a JSON document.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is not JSON.
    """
    try:
        return json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise StorageError(f"{os.fspath(uri)} is not valid JSON: {error}") from None


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Publish bytes atomically: a reader sees the old content or the new, never a part.

    Raises:
        StorageError: the disk is full, the store refuses, …; nothing is published then.
    """
    if is_local(uri):
        with_retries(lambda: _write_local(local_path(uri), data), uri)
        return
    fs, path = filesystem(uri)

    def write() -> None:
        with fs.open_output_stream(path) as stream:
            stream.write(data)

    with_retries(write, uri)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def write_text(uri: str | os.PathLike[str], text: str) -> None:
    """Publish UTF-8 text atomically."""
    write_bytes(uri, text.encode("utf-8"))


def write_json(uri: str | os.PathLike[str], document: Any) -> None:
    """Publish a JSON document atomically; keys keep their order."""
    write_text(uri, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def staged(uri: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local path to write a large file to; it is published at `uri` when the block ends without error."""
    if is_local(uri):
        target = local_path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}-{random.getrandbits(32):08x}.part")
        try:
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
        aside = Path(folder) / name_of(uri)
        yield aside
        upload(aside, uri)


def upload(path: str | os.PathLike[str], uri: str | os.PathLike[str]) -> None:
    """Copy one local file to a URI atomically."""
    if is_local(uri):
        with staged(uri) as aside:
            shutil.copyfile(path, aside)
        return
    fs, target = filesystem(uri)
    with_retries(lambda: pafs.copy_files(os.fspath(path), target, pafs.LocalFileSystem(), fs, use_threads=False), uri)


def list_files(uri: str | os.PathLike[str], *, recursive: bool = False) -> list[str]:
    """URIs of the files under a folder, sorted; an absent folder has none."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    infos = with_retries(lambda: fs.get_file_info(selector), uri)
    names = [info.path[len(path) :] for info in infos if info.type == pafs.FileType.File]
    return sorted(join(os.fspath(uri), name) for name in names)


def list_folders(uri: str | os.PathLike[str]) -> list[str]:
    """URIs of the folders directly under a folder, sorted."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    infos = with_retries(lambda: fs.get_file_info(selector), uri)
    return sorted(
        join(os.fspath(uri), info.path[len(path) :]) for info in infos if info.type == pafs.FileType.Directory
    )


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file or a folder with all it holds; an absent one is no error."""
    fs, path = filesystem(uri)
    kind = with_retries(lambda: fs.get_file_info(path).type, uri)
    if kind == pafs.FileType.Directory:
        with_retries(lambda: fs.delete_dir(path), uri)
    elif kind == pafs.FileType.File:
        with_retries(lambda: fs.delete_file(path), uri)


def copy_tree(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy every file of a folder, keeping relative names."""
    base = os.fspath(source)
    for file in list_files(base, recursive=True):
        write_bytes(join(os.fspath(target), file[len(base.rstrip("/")) :]), read_bytes(file))


@contextlib.contextmanager
def local_folder(uri: str | os.PathLike[str]) -> Iterator[Path]:
    """A local view of a folder: the folder itself, or a temporary copy of a remote one."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
        copy_tree(uri, folder)
        yield Path(folder)
