"""A file of any store, opened to be read once from its beginning, its size and digest known at the end."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from typing import BinaryIO

from dermray import storage
from dermray.errors import CorpusError, StorageError

COPIED_BYTES = 8 << 20


class Digested(io.RawIOBase):
    """A file's bytes; `num_bytes` and `sha256` (hex) are of those that were read, and `plain` is the file, to be read
    at any place without a digest. Closing it closes the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.plain = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Of what was read."""
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self.plain.read(size)
        self._digest.update(data)
        self.num_bytes += len(data)
        return data

    def read_through(self) -> None:
        """Read to the end, a little at a time."""
        while self.read(COPIED_BYTES):
            pass

    def fileno(self) -> int:
        """As `io.IOBase.fileno`, of a local file."""
        return self.plain.fileno()

    def close(self) -> None:
        """As `io.IOBase.close`."""
        self.plain.close()
        super().close()


def changed_ns(file: BinaryIO | Digested) -> int:
    """When a file of this machine was last changed."""
    return os.fstat(file.fileno()).st_mtime_ns


def require_unchanged(uri: str, file: BinaryIO | Digested, since_ns: int) -> None:
    """Check that what is read of a file now is of the bytes that were read before.

    Args:
        uri: where it is from.
        file: itself.
        since_ns: its `changed_ns` before.

    Raises:
        CorpusError: somebody has written into the file meanwhile.
    """
    if changed_ns(file) != since_ns:
        raise CorpusError(f"{uri} has changed while it was read")


def open_once(uri: str, *, max_bytes: int) -> BinaryIO:
    """A file of this machine itself; of an object a copy without a name, so that no lost connection ends the reading.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: it is not there.
        StorageError: it is larger than `max_bytes`, or the store failed for good.
    """
    if storage.is_local(uri):
        path = storage.absolute(uri)
        file = storage.with_retries(lambda: open(path, "rb", buffering=0), uri)  # noqa: SIM115 -- the caller closes it
        _require_size(uri, os.fstat(file.fileno()).st_size, max_bytes)
        return file
    return storage.with_retries(lambda: _copied(uri, max_bytes), uri)


def _copied(uri: str, max_bytes: int) -> BinaryIO:
    copy: BinaryIO = tempfile.TemporaryFile(prefix="dermray-", buffering=0)  # noqa: SIM115 -- the caller closes it
    with storage.open_file(uri) as file:
        _require_size(uri, file.size(), max_bytes)
        while piece := file.read(COPIED_BYTES):
            copy.write(piece)
        if copy.tell() != file.size():
            raise OSError(f"incomplete read: {copy.tell()} of {file.size()} bytes")
    copy.seek(0)
    return copy


def _require_size(uri: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise StorageError(f"{uri} has {num_bytes:,} bytes, more than the {max_bytes:,} allowed")
