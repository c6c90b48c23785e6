"""Names of files and folders: a path, `file://` or `s3://` URI, taken apart and put together; no byte is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dermray.errors import StorageError

# Windows' and URI's ways to begin somewhere else (`C:`, `file:`).
DRIVE = re.compile(r"(?:[A-Za-z]|file|s3):")


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
    return Path(absolute(uri))


def absolute(uri: str | os.PathLike[str]) -> str:
    """As `local_path`, as text: a million of them cost less.

    Raises:
        StorageError: the URI is remote.
    """
    text = os.fspath(uri)
    if not is_local(text):
        raise StorageError(f"{text} is not a local path; download it or give a local one")
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    if "\0" in text:
        raise StorageError(f"{text!r} is no path: it holds a null character")
    return os.path.abspath(os.path.expanduser(text))


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """Join path segments onto a URI."""
    text = os.fspath(uri)
    return "/".join([text.rstrip("/") if text != "/" else "", *[part.strip("/") for part in parts]])


def relative(name: str) -> str:
    """A name from a record, a table or an archive, if it stays in the folder that it belongs to.

    Raises:
        ValueError: it is absolute, a URI or a drive, climbs by `..`, has an empty segment, a backslash or a NUL.
    """
    strange = "\\" in name or "\0" in name or "://" in name or DRIVE.match(name)
    if strange or not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of a file inside a folder")
    return name


def inside(folder: str | os.PathLike[str], name: str) -> str:
    """The URI of what a record, a table or an archive names: as `join`, for names that this program did not choose.

    Raises:
        StorageError: the name leads out of the folder, see `relative`.
    """
    text = os.fspath(folder)
    try:
        # Of a file URI, escapes are resolved before the name comes: it has none.
        return join(absolute(text) if text.startswith("file:") else text, relative(name))
    except ValueError as error:
        raise StorageError(f"{text}: {error}") from None


def name_of(uri: str | os.PathLike[str]) -> str:
    """The last segment of a URI."""
    return os.fspath(uri).rstrip("/").rpartition("/")[2]
