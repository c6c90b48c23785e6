"""Files that only one of several runs can make.

A disk and S3 (`If-None-Match: *`, through boto3: pyarrow has no words for it) refuse the second. Of a store that does
not, one line tells; there the last of two that write at the same moment has made it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dermray import object_stores, storage

REFUSED, CONFLICT, UNKNOWN = 412, 409, 501
# Without conditional writes: how long after its own write a run looks whether another has written too.
SETTLE_S = 2.0
MAX_BYTES = 4096


def create(uri: str, data: bytes) -> bool:
    """Write a small file that is not there yet, with bytes that nobody else writes; False if it is there.

    Raises:
        StorageError: the disk or the store fails for good.
    """
    if storage.is_local(uri):
        return storage.with_retries(lambda: _create_local(uri, data), uri)
    if uri.startswith("s3://"):
        created = _put_if_absent(uri, data)
        # A store that does not know the condition writes over what is there, and says so by succeeding.
        if created is False or (created and _put_if_absent(uri, data) is False):
            # Also of the first try's own object, when its answer was lost.
            return _holds(uri, data)
    print(
        f"{uri}: this store has no conditional writes, so two runs that begin in the same second could both start",
        flush=True,
    )
    if storage.exists(uri) and not _holds(uri, data):
        return False
    storage.write_bytes(uri, data)
    time.sleep(SETTLE_S)
    return _holds(uri, data)


def _holds(uri: str, data: bytes) -> bool:
    try:
        return storage.read_bytes(uri, max_bytes=MAX_BYTES) == data
    except FileNotFoundError:
        return False


def _create_local(uri: str, data: bytes) -> bool:
    path = storage.local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # Of nobody, it would stand in everybody's way.
        path.unlink()
        raise
    return True


@lru_cache(maxsize=4)
def _client(endpoint: str | None) -> Any:
    return object_stores.s3_client(endpoint)


def _s3() -> Any:
    return _client(object_stores.s3_endpoint())


def _address(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _put_if_absent(uri: str, data: bytes) -> bool | None:
    """Whether an object was made: False if it is there; None if the store does not know the condition.

    Raises:
        StorageError: the store fails for good.
    """

    def put() -> bool | None:
        status = _status(lambda: _s3().put_object(**_address(uri), Body=data, IfNoneMatch="*"))
        return None if status == UNKNOWN else status != REFUSED

    return storage.with_retries(put, uri)


def _status(request: Callable[[], Any]) -> int:
    """What the store says to a request: 200, or one of the answers that mean something here.

    Raises:
        OSError: any other answer.
    """
    from botocore.exceptions import ClientError, HTTPClientError

    try:
        request()
    except HTTPClientError as error:
        raise ConnectionError(str(error)) from error
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status in (REFUSED, UNKNOWN):
            return status
        # Another run's PUT of the same object is under way: that one will be there a moment later.
        raise OSError(f"status {503 if status == CONFLICT else status}: {error}") from error
    return 200


def remove(uri: str) -> None:
    """Remove a file, or none. pyarrow would leave an object in S3 that stands for the empty folder."""
    if uri.startswith("s3://"):
        storage.with_retries(lambda: _status(lambda: _s3().delete_object(**_address(uri))), uri)
    else:
        storage.remove(uri)
