"""One way to touch bytes: a path, `file://` or `s3://` URI is the same to every caller.

Local paths and S3 go through pyarrow's file systems (`DERMRAY_S3_CLIENT=s3fs` swaps in s3fs); any other scheme goes
through fsspec (`dermray.object_stores`). Publication is atomic: a local file is written aside and renamed, an object
appears when its upload completes. Names are put together by `dermray.uris`, whose functions are here too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from dermray import documents, object_stores, redaction
from dermray.errors import StorageError
from dermray.uris import absolute, is_local, join, local_path, name_of
from dermray.uris import inside as inside
from dermray.uris import normalise as normalise
from dermray.uris import relative as relative

MAX_ATTEMPTS = 5
HASH_BYTES = 1 << 22
FIRST_BACKOFF_S = 0.2
# How the name of a local file ends while it is being written; it begins with a dot.
PART = ".part"
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)

ResultT = TypeVar("ResultT")


def filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a URI and the path inside it.

    Raises:
        StorageError: the scheme is unknown, its package is not installed, or the URI holds credentials.
    """
    text = os.fspath(uri)
    if redaction.holds_credentials(text):
        raise StorageError(
            f"{redaction.without_secrets(text)}: a URI must hold no user, password or signature; credentials come from "
            "the environment"
        )
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
    number = getattr(error, "errno", None)
    remedy = "; free some space there" if number in FULL_ERRNOS else ""
    if is_local(uri) and number in FORBIDDEN_ERRNOS:
        remedy = "; this account may not: change the rights there, or give another place"
    if object_stores.is_expired(error):
        remedy = "; the credentials have expired: renew them and run the same command again"
    elif object_stores.is_unexplained(error):
        remedy = "; the store does not say why: the credentials may be wrong, lack a right, or have expired"
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
        return with_retries(lambda: _read_local(absolute(uri), uri, max_bytes), uri)

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


def read_object(uri: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON document that is an object.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is not JSON, or no object.
    """
    return documents.as_object(read_json(uri), os.fspath(uri))


def parse_json(data: bytes, uri: str | os.PathLike[str]) -> Any:
    """The JSON document in the bytes of the file at `uri`.

    Raises:
        DocumentError: it is not JSON, or exceeds the limits of `dermray.documents`.
    """
    return documents.parse_json(data, os.fspath(uri))


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Publish bytes atomically: a reader sees the old content or the new, never a part.

    Raises:
        StorageError: the disk is full, the store refuses, …; nothing is published then.
    """
    if is_local(uri):
        with_retries(lambda: _write_local(local_path(uri), data), uri)
    else:
        _put(uri, data)


def _put(uri: str | os.PathLike[str], source: bytes | Path) -> None:
    """Write an object of a store, which has confirmed it then."""
    fs, path = filesystem(uri)
    with_retries(lambda: object_stores.put(fs, path, source), uri)


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
    write_text(uri, documents.json_text(document))


@contextlib.contextmanager
def staged(uri: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local path to write a large file to; it is published at `uri` when the block ends without error.

    Raises:
        StorageError: the disk is full, or may not be written to.
    """
    if is_local(uri):
        target = local_path(uri)
        aside = target.with_name(f".{target.name}.{os.getpid()}-{random.getrandbits(32):08x}{PART}")
        try:
            with _place_named(uri):
                target.parent.mkdir(parents=True, exist_ok=True)
                yield aside
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
        aside = Path(folder) / name_of(uri)
        with _place_named(f"{os.fspath(uri)}, being made in {folder}"):
            yield aside
        upload(aside, uri)


@contextlib.contextmanager
def _place_named(place: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL_ERRNOS, *FORBIDDEN_ERRNOS):
            raise _final(error, place, 1) from error
        raise


def upload(path: str | os.PathLike[str], uri: str | os.PathLike[str]) -> None:
    """Copy one local file to a URI atomically.

    Raises:
        StorageError: the disk is full, the store refuses, …; nothing is published then.
    """
    if is_local(uri):
        with staged(uri) as aside:
            shutil.copyfile(path, aside)
        return
    _put(uri, Path(path))


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


def copy_tree(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, with_names: Collection[str] = ()
) -> None:
    """Copy every file of a folder, keeping relative names; those `with_names` also where they are not listed yet.

    Raises:
        StorageError: one cannot be read or written, or is listed and not there.
    """
    base = os.fspath(source)
    listed = list_files(base, recursive=True)
    for file in [*listed, *sorted({join(base, name) for name in with_names if exists(join(base, name))} - {*listed})]:
        try:
            data = read_bytes(file)
        except FileNotFoundError:
            raise StorageError(f"{file} is listed and not there: it was removed a moment ago; run again") from None
        write_bytes(join(os.fspath(target), file[len(base.rstrip("/")) :]), data)


@contextlib.contextmanager
def local_folder(uri: str | os.PathLike[str], *, with_names: Collection[str] = ()) -> Iterator[Path]:
    """A local view of a folder: the folder itself, or a temporary copy of a remote one, made as by `copy_tree`."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
        copy_tree(uri, folder, with_names=with_names)
        yield Path(folder)
