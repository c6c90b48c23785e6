"""Clients of object stores, and what their failures mean; `dermray.storage` is how the rest of the package uses them.

S3 goes through pyarrow's own client, or through s3fs where `DERMRAY_S3_CLIENT=s3fs`. `DERMRAY_S3_TIMEOUT_S` (60) is how
long a connection may be silent before the request is given up and tried again. Endpoint, region and credentials come
from the usual AWS variables.
"""

from __future__ import annotations

import errno
import os
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dermray.errors import ConfigError, StorageError

CONNECT_TIMEOUT_S = 10
DEFAULT_TIMEOUT_S = 60
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
)
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
            endpoint_override=_s3_endpoint(),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=_timeout_s(),
            allow_bucket_creation=True,
        )
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": _timeout_s()}
        options = {"endpoint_url": _s3_endpoint(), "use_listings_cache": False, "config_kwargs": timeouts}
    try:
        return pafs.PyFileSystem(_FsspecHandler(fsspec.filesystem(scheme, **options)))
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {scheme}:// URIs: {error}") from None


def _s3_endpoint() -> str | None:
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
