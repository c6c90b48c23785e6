"""Clients of object stores, and what their failures mean; `dermray.storage` is how the rest of the package uses them.

S3 goes through pyarrow's own client, or through s3fs where `DERMRAY_S3_CLIENT=s3fs`. `DERMRAY_S3_TIMEOUT_S` (60) is how
long a connection may be silent before the request is given up and tried again. Endpoint, region and credentials come
from the usual AWS variables.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dermray.errors import ConfigError, StorageError

CONNECT_TIMEOUT_S = 10
DEFAULT_TIMEOUT_S = 60
# Attempts of pyarrow's client itself, before those of `storage.with_retries`.
CLIENT_ATTEMPTS = 3
# pyarrow's client sends larger objects in parts of this size; s3fs is told to.
PART_BYTES = 10 << 20
MARKS = (0xA5, 0x5A)
# A full or read-only disk stays so, whatever the path in the message reads like.
FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# s3fs translates 503 and 500 to these; a network file system uses the others.
TRANSIENT_ERRNOS = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT, errno.ESTALE}
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
    "did not match calculated checksum",
    # A part of an object that the store took and does not have.
    "specified parts could not be found",
    # The answer to the request that completed an object was lost, and the client has asked again.
    "specified upload does not exist",
)
EXPIRED_MARKS = ("expiredtoken", "expired_token", "token has expired", "token included in the request is expired")
# pyarrow's words for what the store says itself, and for an answer to HEAD, which has no place for a reason.
REFUSAL_MARK = "aws error"
UNEXPLAINED_MARKS = ("http status 400) during headobject", "access_denied during headobject")
# pyarrow's words for an object that has gone between being looked at and being read.
GONE_MARKS = ("no_such_key during getobject", "resource_not_found during getobject")


def connect(scheme: str) -> pafs.FileSystem:
    """The pyarrow file system of a URI scheme other than `file`.

    Raises:
        ConfigError: `DERMRAY_S3_TIMEOUT_S` is no number of seconds.
        StorageError: the scheme is unknown or its package is not installed.
    """
    if scheme == "s3" and os.environ.get("DERMRAY_S3_CLIENT", "pyarrow") == "pyarrow":
        return pafs.S3FileSystem(
            endpoint_override=s3_endpoint(),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=_timeout_s(),
            allow_bucket_creation=True,
            # Else a large upload that the store will not begin ends as an empty object in the place of the old one.
            allow_delayed_open=False,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS),
        )
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": _timeout_s()}
        options = {"endpoint_url": s3_endpoint(), "use_listings_cache": False, "config_kwargs": timeouts}
    try:
        return pafs.PyFileSystem(_FsspecHandler(fsspec.filesystem(scheme, **options)))
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {scheme}:// URIs: {error}") from None


def s3_endpoint() -> str | None:
    """Where S3 is when it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _timeout_s() -> float:
    text = os.environ.get("DERMRAY_S3_TIMEOUT_S") or str(DEFAULT_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"DERMRAY_S3_TIMEOUT_S must be a number of seconds above 0, got {text!r}")
    return seconds


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


def put(fs: pafs.FileSystem, path: str, source: bytes | Path) -> None:
    """Write bytes or a local file as one object, and return once the store has said that it holds just that.

    It says so by the length and by an ETag that is the content's MD5. Where its ETags are something else (encrypted
    buckets, other stores than S3) the object is read back and compared.

    Raises:
        OSError: the store fails or refuses, or holds something else; what was there before may be gone.
    """
    num_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        _send(fs, path, source)
    except FileNotFoundError as error:
        raise OSError(f"the store has no place for it ({error})") from None
    try:
        stored_bytes, etag = _described(fs, path)
        if stored_bytes != num_bytes:
            raise OSError(f"incomplete write: the store holds {stored_bytes:,} of {num_bytes:,} bytes")
        if not _is_digest(etag, source) and not _is_content(fs, path, source):
            raise OSError("incomplete write: the store holds other bytes than were sent")
    except FileNotFoundError:
        raise OSError("incomplete write: the store does not have what it took") from None


def _send(fs: pafs.FileSystem, path: str, source: bytes | Path) -> None:
    """One call hands over all: what a signal's exception cuts short must not be completed when the stream is closed."""
    if isinstance(fs, pafs.PyFileSystem):
        client = fs.handler.fs
        options = {"chunksize": PART_BYTES} if "s3" in client.protocol else {}
        if isinstance(source, bytes):
            client.pipe_file(path, source, **options)
        else:
            client.put_file(os.fspath(source), path, **options)
        return
    content = source if isinstance(source, bytes) else _mapped(source)
    stream = fs.open_output_stream(path)
    try:
        stream.write(content)
    finally:
        # Here the last part is sent and the object completed, so here it turns out what went wrong.
        stream.close()


def _mapped(path: Path) -> pa.Buffer | bytes:
    # Nothing cannot be mapped.
    return pa.memory_map(os.fspath(path)).read_buffer() if path.stat().st_size else b""


def _described(fs: pafs.FileSystem, path: str) -> tuple[int, str]:
    """Bytes of an object and its ETag, if it has one, from one request."""
    if isinstance(fs, pafs.PyFileSystem):
        info = fs.handler.fs.info(path)
        return int(info["size"]), str(info.get("ETag") or "").strip('"')
    with fs.open_input_file(path) as file:
        return int(file.size()), file.metadata().get("ETag", b"").decode("ascii", "replace").strip('"')


def _is_digest(etag: str, source: bytes | Path) -> bool:
    """Whether an ETag is the MD5 of the content, or of the MD5s of its parts."""
    whole, _, num_parts = etag.partition("-")
    if not num_parts:
        digest = hashlib.md5(usedforsecurity=False)
        for piece in _pieces(source):
            digest.update(piece)
        return whole == digest.hexdigest()
    parts = [hashlib.md5(piece, usedforsecurity=False).digest() for piece in _pieces(source)]
    return num_parts == str(len(parts)) and whole == hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()


def _is_content(fs: pafs.FileSystem, path: str, source: bytes | Path) -> bool:
    """Whether an object holds what `source` does, by reading it."""
    with verified(fs.open_input_file(path)) as file:
        stored = iter(lambda: file.read(PART_BYTES), b"")
        return all(one == other for one, other in zip_longest(stored, _pieces(source)))


def _pieces(source: bytes | Path) -> Iterator[bytes]:
    """The content in pieces as large as the parts that it is sent in."""
    if isinstance(source, bytes):
        yield from (source[start : start + PART_BYTES] for start in range(0, len(source), PART_BYTES))
        return
    with source.open("rb") as file:
        yield from iter(lambda: file.read(PART_BYTES), b"")


def verified(file: pa.NativeFile) -> pa.NativeFile:
    """An open remote file whose reads raise OSError where fewer bytes came than were asked for.

    pyarrow's S3 client takes a part that the store sends short for a whole one and leaves the rest of the memory as it
    was. So the last byte is set before each read; where it is the same afterwards, another value tells whether it came.
    """
    return pa.PythonFile(_VerifiedFile(file), mode="r")


class _VerifiedFile:
    """What `pa.PythonFile` needs of a file."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._size = file.size()

    def read(self, num_bytes: int | None = None) -> bytearray:
        start = self._file.tell()
        left = max(0, self._size - start)
        data = bytearray(left if num_bytes is None or num_bytes < 0 else min(num_bytes, left))
        if not data:
            return data
        for mark in MARKS:
            data[-1] = mark
            self._file.seek(start)
            if self._file.readinto(data) == len(data) and data[-1] != mark:
                return data
        raise OSError(f"incomplete read of {len(data)} bytes at {start}")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def size(self) -> int:
        return self._size

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()


@cache
def store_errors() -> tuple[type[Exception], ...]:
    """What the clients raise when a request fails; s3fs lets some errors of its own packages through."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return OSError, BotoCoreError, ClientError


def is_transient(error: Exception) -> bool:
    """True if the same request may go through a moment later."""
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in FINAL_ERRNOS:
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    text = str(error).lower()
    return any(mark in text for mark in TRANSIENT_MARKS)


def is_gone(error: Exception) -> bool:
    """True if the store says that there is no such object."""
    text = str(error).lower()
    return any(mark in text for mark in GONE_MARKS)


def is_expired(error: Exception) -> bool:
    """True if the store says that the credentials were good until a while ago."""
    text = str(error).lower()
    return any(mark in text for mark in EXPIRED_MARKS)


def is_refusal(error: Exception) -> bool:
    """True if it is the store that says no, whatever it holds."""
    return isinstance(error, PermissionError) or is_expired(error) or REFUSAL_MARK in str(error).lower()


def is_unexplained(error: Exception) -> bool:
    """True if the store refuses in a way that leaves no room for its reason."""
    text = str(error).lower()
    return any(mark in text for mark in UNEXPLAINED_MARKS)


def s3_client(endpoint: str | None) -> Any:
    """boto3's client of an S3 store, for what pyarrow's has no words for. It repeats nothing by itself."""
    import boto3
    from botocore.config import Config

    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": _timeout_s()}
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(**timeouts, retries={"total_max_attempts": 1}),
    )
