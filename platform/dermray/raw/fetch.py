"""Raw image bytes by path: what is there, whether it may be read, and reading ahead of the work."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import pyarrow.fs as pafs

from dermray import links, storage
from dermray.errors import CorpusError, StorageError
from dermray.raw.archives import PARQUET_CELL, Member, find, inside, read_member, split_address
from dermray.raw.spelling import folded, other_spellings

MISSING_FILE = "missing_file"
TOO_MANY_BYTES = "too_many_bytes"
UNREADABLE = "unreadable"
OUTSIDE = "path_outside_root"

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Stamp(NamedTuple):
    """Size and modification time of a file."""

    num_bytes: int
    modified_ns: int


# Items that a thread takes at once: handing over one by one would cost more than reading a small file.
BUNDLE = 4
# Seconds an item may take before threads take over: reading a small file from the page cache takes 0.03 ms.
WORTH_A_THREAD_S = 0.0005
NO_STAMP = Stamp(-1, -1)
NOTHING = b""


class Fetched(NamedTuple):
    """Bytes of an image file, or the reason and detail why there are none."""

    path: str
    stamp: Stamp
    data: bytes | None
    reason: str = ""
    detail: str = ""


class ImageStore:
    """The raw images under an input root: files, or members of archives (`images.zip!/folder/a.jpg`)."""

    def __init__(self, root: str, *, max_bytes: int, follow_links: bool) -> None:
        self.root = storage.normalise(root)
        self.max_bytes = max_bytes
        self._real_root = None if follow_links or not storage.is_local(root) else os.path.realpath(self.root)
        # Whether a folder really lies inside is asked once; images are many.
        self._folder_leaves: dict[str, bool] = {}
        # Names of a folder by their form without case, listed when an image of it is missing.
        self._names: dict[str, dict[str, str]] = {}
        # An archive is asked for its size and time once, not once an image.
        self._archives: dict[str, Stamp] = {}

    def stamp(self, path: str) -> Stamp:
        """Size and modification time of one image; `NO_STAMP` for what is not there or may not be read.

        Raises:
            StorageError: the store failed for good.
        """
        return self._reach(path, lambda uri, member: NOTHING).stamp

    def fetch(self, path: str) -> Fetched:
        """Read one image; a file that is absent, too large or out of bounds is an answer, not an error.

        Raises:
            StorageError: the store failed for good, so that every other image would fail as well.
        """

        def read(uri: str, member: Member | None) -> bytes:
            return read_member(uri, member, self._archives[uri]) if member else storage.read_bytes(uri)

        fetched = self._reach(path, read)
        return self._by_other_spelling(fetched, read) if fetched.reason == MISSING_FILE else fetched

    def _by_other_spelling(self, missing: Fetched, read: Callable[[str, Member | None], bytes]) -> Fetched:
        """The one file that another spelling of the path means (`a\\b.jpg`, accents); else what there is instead."""
        ways = [way for way in other_spellings(missing.path) if inside(way) == way]
        found = [fetched for way in ways if (fetched := self._reach(way, read)).reason != MISSING_FILE]
        if len(found) == 1:
            return found[0]._replace(path=missing.path)
        if found:
            meant = " and ".join(repr(each.path) for each in found)
            return missing._replace(detail=f"{missing.detail}; {meant} are there: write one of them")
        if alike := self._alike(missing.path):
            return missing._replace(detail=f"{missing.detail}; {alike!r} is there: write it like this")
        return missing

    def _alike(self, path: str) -> str | None:
        """A local file whose path differs in upper and lower case alone; only its name, where its folder does not."""
        plain = inside(folded(path))
        if not storage.is_local(self.root) or split_address(path) or plain is None:
            return None
        parts, found = plain.split("/"), list[str]()
        for part in parts:
            names = self._names_in("/".join([self.root, *found]))
            if part.casefold() not in names:
                return None
            found.append(part if part in names.values() else names[part.casefold()])
        return found[-1] if found[:-1] == parts[:-1] else "/".join(found)

    def _names_in(self, folder: str) -> dict[str, str]:
        # With a slash, so that the folder itself is asked about and not the one it lies in.
        if folder not in self._names and not self._leaves_root(f"{folder}/"):
            with contextlib.suppress(OSError):
                self._names[folder] = {each.casefold(): each for each in os.listdir(folder)}
        return self._names.get(folder, {})

    def _reach(self, path: str, read: Callable[[str, Member | None], bytes]) -> Fetched:
        """Find an image and `read` it from its file, or as a member of its archive."""
        address = split_address(path)
        uri = storage.join(self.root, address.archive if address else path)
        if self._leaves_root(uri):
            detail = "a symbolic link leads out of the input folder (follow_links=true allows it)"
            return Fetched(path, NO_STAMP, None, OUTSIDE, detail)
        stamp = NO_STAMP
        try:
            stamp = self._archive_stamp(uri) if address else _stat(uri)
            if stamp == NO_STAMP:
                return Fetched(path, stamp, None, MISSING_FILE, f"there is no file {uri}")
            member = None
            num_bytes = stamp.num_bytes
            if address:
                archive, stamp = stamp, NO_STAMP
                member = find(uri, archive, address)
                if member is None:
                    return Fetched(path, stamp, None, MISSING_FILE, f"{uri} holds no {address.member}")
                stamp = archive if member.method == PARQUET_CELL else Stamp(member.size, archive.modified_ns)
                num_bytes = member.size
            data = read(uri, member) if num_bytes <= self.max_bytes else None
            num_bytes = max(num_bytes, len(data or NOTHING))
            if data is None or num_bytes > self.max_bytes:
                detail = f"{num_bytes:,} bytes are more than the {self.max_bytes:,} allowed"
                return Fetched(path, stamp, None, TOO_MANY_BYTES, detail)
            return Fetched(path, stamp, data)
        except FileNotFoundError:
            return Fetched(path, NO_STAMP, None, MISSING_FILE, f"there is no file {uri}")
        except CorpusError as error:
            # A damaged archive: every member of it is a bad row, and the limit on those stops the run.
            return Fetched(path, stamp, None, UNREADABLE, str(error))
        except StorageError as error:
            if self._is_fatal(error):
                raise
            return Fetched(path, NO_STAMP, None, UNREADABLE, str(error))

    def _archive_stamp(self, uri: str) -> Stamp:
        if uri not in self._archives:
            self._archives[uri] = _stat(uri)
        return self._archives[uri]

    def _is_fatal(self, error: StorageError) -> bool:
        """On a local disk one bad file says nothing about the next one; a store that fails for good fails for all."""
        return not storage.is_local(self.root) or not isinstance(error.__cause__, OSError)

    def _leaves_root(self, uri: str) -> bool:
        if self._real_root is None:
            return False
        folder, _ = os.path.split(uri)
        if folder not in self._folder_leaves:
            self._folder_leaves[folder] = not links.is_within(folder, self._real_root)
        return not links.is_within(uri, self._real_root) if os.path.islink(uri) else self._folder_leaves[folder]


def _stat(uri: str) -> Stamp:
    if storage.is_local(uri):
        return storage.with_retries(lambda: _local_stamp(uri), uri)
    fs, path = storage.filesystem(uri)
    try:
        info = storage.with_retries(lambda: fs.get_file_info(path), uri)
    except (FileNotFoundError, NotADirectoryError):
        return NO_STAMP
    return Stamp(info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else NO_STAMP


def _local_stamp(path: str) -> Stamp:
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return NO_STAMP
    return Stamp(info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else NO_STAMP


def ahead(
    items: Iterable[ItemT], function: Callable[[ItemT], ResultT], *, num_threads: int, local: bool = False
) -> Iterator[ResultT]:
    """`map(function, items)` in order; threads work on `BUNDLE` items at a time, one bundle each ahead at most.

    With `local` the first items are worked on where they are asked for, as long as they take next to no time: threads
    would cost more than they hide of files in the page cache. One item may be slow by chance, two in a row are not.
    """
    remaining = iter(items)
    if local:
        yield from _while_fast(remaining, function)
    waiting: deque[Future[list[ResultT]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="fetch") as pool:
        try:
            while bundle := list(islice(remaining, BUNDLE)):
                waiting.append(pool.submit(_each, function, bundle))
                if len(waiting) >= num_threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _while_fast(items: Iterator[ItemT], function: Callable[[ItemT], ResultT]) -> Iterator[ResultT]:
    slow_in_a_row = 0
    for item in items:
        started = time.perf_counter()
        result = function(item)
        slow_in_a_row = slow_in_a_row + 1 if time.perf_counter() - started > WORTH_A_THREAD_S else 0
        yield result
        if slow_in_a_row == 2:
            return


def _each(function: Callable[[ItemT], ResultT], items: list[ItemT]) -> list[ResultT]:
    return [function(item) for item in items]
