"""The local spool: what a run has said and MLflow may not have taken yet, one append-only file a process and run.

    SPOOL/RUN_KEY-STARTED_NS.jsonl    a record a line; its writer holds a lock on it
    SPOOL/RUN_KEY-STARTED_NS.taken    bytes of it that MLflow has taken; behind the truth after a crash, never ahead

A record is with the operating system when `append` returns, so that SIGKILL loses none. It is on the disk at the
latest a second later (`SYNC_INTERVAL_S`), and at once where `durable` is asked for: what a machine that loses its
power loses is that second. A file goes away when all of it has been taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from dermray.documents import MAX_JSON_BYTES, parse_json
from dermray.errors import DocumentError, TrackingError

SUFFIX = ".jsonl"
TAKEN_SUFFIX = ".taken"
SYNC_INTERVAL_S = 1.0
ENVIRONMENT = "DERMRAY_SPOOL"

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def spool_folder(configured: str | None) -> Path:
    """Where spools are: the key, else `$DERMRAY_SPOOL`, else `dermray/spool` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(configured or os.environ.get(ENVIRONMENT) or Path(cache) / "dermray" / "spool").absolute()


class Spool:
    """One file of records, held by this process; threads may share it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Wrap a file that is open and locked; use `begin` or `left_over`."""
        self.path = path
        self._file = file
        self._lock = threading.Lock()
        self._dirty = False
        self._closed = False
        try:
            self._taken = int(self._taken_path.read_text())
        except (FileNotFoundError, ValueError):
            self._taken = 0
        self._size = os.fstat(file.fileno()).st_size

    @classmethod
    def begin(cls, folder: Path, key: str) -> Spool:
        """A new file for records of the run `key`.

        Raises:
            TrackingError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = folder / f"{key}-{time.time_ns():020d}{SUFFIX}"
            # Nobody else reads what a run says before it is in MLflow.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise TrackingError(
                f"spool {folder}: {error.strerror}; give another folder by tracking.spool or ${ENVIRONMENT}"
            ) from None
        file = os.fdopen(descriptor, "r+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(path, file)

    @classmethod
    def left_over(cls, path: Path) -> Spool | None:
        """A file that its writer has left behind; None while a process still holds it, or if it is gone."""
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if not path.exists():
            # Whoever held it has removed it between the two calls.
            file.close()
            return None
        return cls(path, file)

    @property
    def key(self) -> str:
        """Of the run whose records it holds."""
        return self.path.name.rpartition("-")[0]

    @property
    def _taken_path(self) -> Path:
        return self.path.with_suffix(TAKEN_SUFFIX)

    def append(self, record: Record, *, durable: bool = False) -> None:
        """Add a record; with `durable` it is on the disk afterwards.

        A disk that is full costs the record, with a warning, and never the training.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._closed:
                return
            try:
                os.pwrite(self._file.fileno(), line, self._size)
            except OSError as error:
                # What was written of it lies behind the end and is overwritten by the next record.
                logger.warning("%s: a record is lost: %s", self.path, error)
                return
            self._size += len(line)
            self._dirty = True
        if durable:
            self.sync()

    def sync(self) -> None:
        """Have the disk hold all records."""
        with self._lock:
            if not self._dirty or self._closed:
                return
            self._dirty = False
            descriptor = os.dup(self._file.fileno())
        try:
            os.fsync(descriptor)
        except OSError as error:
            logger.warning("%s: not on the disk yet: %s", self.path, error)
        finally:
            os.close(descriptor)

    def pending(self, max_bytes: int) -> list[tuple[Record, int]]:
        """The next records that have not been taken, each with the offset behind it; at least one, if there is one."""
        with self._lock:
            begin, end = self._taken, self._size
        data = os.pread(self._file.fileno(), min(end - begin, max_bytes), begin)
        while not data.count(b"\n") and begin + len(data) < end:
            data += os.pread(self._file.fileno(), min(end - begin - len(data), max_bytes), begin + len(data))
        found, offset = [], begin
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            found.append((self._parsed(line), offset))
        return found

    def _parsed(self, line: bytes) -> Record:
        try:
            record = parse_json(line, self.path.name)
            if isinstance(record, dict):
                return record
        except DocumentError:
            pass
        logger.warning("%s: a line is no record (a disk that lost power?); left out", self.path)
        return {"kind": "nothing"}

    @property
    def has_been_read(self) -> bool:
        """Whether MLflow has taken something of it."""
        return self._taken > 0

    def acknowledge(self, offset: int) -> None:
        """MLflow has taken everything before `offset`."""
        with self._lock:
            self._taken = offset
        aside = self._taken_path.with_suffix(".part")
        with contextlib.suppress(OSError):
            # Lost on a full disk, records come again: delivery can stand that.
            aside.write_text(str(offset))
            aside.replace(self._taken_path)

    @property
    def num_pending_bytes(self) -> int:
        """How much has not been taken."""
        return self._size - self._taken

    def close(self) -> None:
        """Let go of the file; it goes away when nothing in it is pending."""
        self.sync()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._taken >= self._size:
                self.path.unlink(missing_ok=True)
                self._taken_path.unlink(missing_ok=True)
            self._file.close()


def header(path: Path) -> Record:
    """The first record of a file, whoever holds it; an empty one if it is gone or has none."""
    try:
        with path.open("rb") as file:
            found = parse_json(file.readline(MAX_JSON_BYTES), path.name)
    except (FileNotFoundError, DocumentError):
        return {}
    return found if isinstance(found, dict) else {}


def left_over(folder: Path, key: str | None = None) -> list[Path]:
    """Spool files in a folder, of one run or of all, oldest first; some may still be held by their writers."""
    pattern = f"{key or '*'}-*{SUFFIX}"
    return sorted(folder.glob(pattern), key=lambda path: path.stem.rpartition("-")[2])
