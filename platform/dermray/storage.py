"""One way to touch bytes: a path, `file://` or `s3://` URI is the same to every caller.

Local paths and S3 go through pyarrow's file systems (`DERMRAY_S3_CLIENT=s3fs` swaps in s3fs); any other scheme goes
through fsspec (`dermray.object_stores`). Publication is atomic: a local
file is written aside and renamed, an object appears when its upload completes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from dermray import object_stores
from dermray.errors import StorageError

MAX_ATTEMPTS = 5
HASH_BYTES = 1 << 22
FIRST_BACKOFF_S = 0.2
# How the name of a local file ends while it is being written; it begins with a dot.
PART = ".part"
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)

ResultT = TypeVar("ResultT")


def normalise(uri: str | os.PathLike[str]) -> str:
    """A local path becomes absolute (Ray workers change directory); a URI loses its trailing slash."""
    text = os.fspath(uri)
    if is_local(text):
        return str(local_path(text))
    return text.rstrip("/")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """True for a plain path or a `file://` URI."""
    text = os.fspath(uri)
    return "://" not in text or urlsplit(text).scheme in ("", "file")


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The absolute path of a local URI.

    Raises:
        StorageError: the URI is remote.
    """
    return Path(_local(uri))


def _local(uri: str | os.PathLike[str]) -> str:
    text = os.fspath(uri)
    if not is_local(text):
        raise StorageError(f"{text} is not a local path; download it or give a local one")
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    return os.path.abspath(os.path.expanduser(text))


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
    return object_stores.connect(scheme)


def open_file(uri: str | os.PathLike[str]) -> pa.NativeFile:
    """Open a file or object for reading at any place; reads that come short raise OSError. For `with_retries`.

    Raises:
        FileNotFoundError: it is not there.
        OSError: the store fails.
    """
    fs, path = filesystem(uri)
    file = fs.open_input_file(path)
    return file if is_local(uri) else object_stores.verified(file)


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
        except object_stores.store_errors() as error:
            if object_stores.is_gone(error):
                raise FileNotFoundError(f"{os.fspath(uri)} is gone") from error
            last = attempt == MAX_ATTEMPTS - 1
            if last or not object_stores.is_transient(error):
                raise _final(error, uri, attempt + 1) from error
            time.sleep(FIRST_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _final(error: Exception, uri: str | os.PathLike[str], num_attempts: int) -> StorageError:
    tries = f" after {num_attempts} attempts" if num_attempts > 1 else ""
    remedy = "; free some space there" if getattr(error, "errno", None) in FULL_ERRNOS else ""
    return StorageError(f"{os.fspath(uri)}: {_one_line(error)}{tries}{remedy}")


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


def stamps(uris: Sequence[str]) -> list[tuple[int, int] | None]:
    """Size in bytes and time of change in ns of some files of one store; None for one that is not there."""
    if not uris:
        return []
    fs = filesystem(uris[0])[0]
    paths = [filesystem(uri)[1] for uri in uris]
    infos = with_retries(lambda: fs.get_file_info(paths), uris[0])
    return [(int(one.size), int(one.mtime_ns or 0)) if one.type == pafs.FileType.File else None for one in infos]


def read_bytes(uri: str | os.PathLike[str], *, max_bytes: int | None = None) -> bytes:
    """Read a whole file or object and check that as many bytes came as the store announced.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is larger than `max_bytes`, came short, or the store failed for good.
    """
    if is_local(uri):
        # A million small files: the file system layer would cost more than the reading.
        return with_retries(lambda: _read_local(_local(uri), uri, max_bytes), uri)

    def read() -> bytes:
        file = open_file(uri)
        return _read_whole(file, file.size(), uri, max_bytes)

    return with_retries(read, uri)


def _read_local(path: str, uri: str | os.PathLike[str], max_bytes: int | None) -> bytes:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 -- _read_whole closes it
    return _read_whole(file, os.fstat(file.fileno()).st_size, uri, max_bytes)


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

    def read() -> bytes:
        with open_file(uri) as file:
            wanted = max(0, min(num_bytes, file.size() - offset))
            file.seek(min(offset, file.size()))
            data = file.read(wanted)
        if len(data) != wanted:
            raise OSError(f"incomplete read: {len(data)} of {wanted} bytes at {offset}")
        return bytes(data)

    return with_retries(read, uri)


def sha256(uri: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file or object, read in pieces.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the store failed for good.
    """

    def read() -> str:
        digest = hashlib.sha256()
        with open_file(uri) as file:
            while piece := file.read(HASH_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    return with_retries(read, uri)


def read_text(uri: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file (a byte order mark is dropped)."""
    return _text(read_bytes(uri), uri)


def _text(data: bytes, uri: str | os.PathLike[str]) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{os.fspath(uri)} is not UTF-8 text: {error}") from None


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Read a JSON document.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is not JSON.
    """
    return parse_json(read_bytes(uri), uri)


def parse_json(data: bytes, uri: str | os.PathLike[str]) -> Any:
    """The JSON document in the bytes of the file at `uri`.

    Raises:
        StorageError: it is not JSON.
    """
    try:
        return json.loads(_text(data, uri))
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
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
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
    """Yield a local path to write a large file to; it is published at `uri` when the block ends without error.

    Raises:
        StorageError: the disk is full.
    """
    if is_local(uri):
        target = local_path(uri)
        aside = target.with_name(f".{target.name}.{os.getpid()}-{random.getrandbits(32):08x}{PART}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                raise _final(error, uri, 1) from error
            raise
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
    return list(file_sizes(uri, recursive=recursive))


def file_sizes(uri: str | os.PathLike[str], *, recursive: bool = False) -> dict[str, int]:
    """Bytes of each file under a folder, by URI, sorted, from one listing; an absent folder has none."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    infos = with_retries(lambda: fs.get_file_info(selector), uri)
    sizes = {
        join(os.fspath(uri), info.path[len(path) :]): info.size for info in infos if info.type == pafs.FileType.File
    }
    return dict(sorted(sizes.items()))


@dataclass(frozen=True)
class Stored:
    """A file or object: where it is, its size, and when it was last written (Unix time)."""

    uri: str
    num_bytes: int
    written_at: float


def list_stored(uri: str | os.PathLike[str]) -> list[Stored]:
    """All files under a folder and its folders, sorted; an absent folder has none."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=True)
    infos = with_retries(lambda: fs.get_file_info(selector), uri)
    files = (info for info in infos if info.type == pafs.FileType.File)
    found = (Stored(join(os.fspath(uri), i.path[len(path) :]), int(i.size), i.mtime.timestamp()) for i in files)
    return sorted(found, key=lambda stored: stored.uri)


def list_folders(uri: str | os.PathLike[str]) -> list[str]:
    """URIs of the folders directly under a folder, sorted."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    infos = with_retries(lambda: fs.get_file_info(selector), uri)
    return sorted(
        join(os.fspath(uri), info.path[len(path) :]) for info in infos if info.type == pafs.FileType.Directory
    )


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file or a folder with all it holds; an absent one is no error, nor one that goes at the same time."""
    fs, path = filesystem(uri)
    kind = with_retries(lambda: fs.get_file_info(path).type, uri)
    with contextlib.suppress(FileNotFoundError):
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
