"""Images inside .zip and .tar archives and Parquet files, read where they lie: nothing is unpacked.

A member is addressed as `folder/archive.zip!/path/of/member.jpg`. An archive's directory is read once a process and
kept (bounded); after that an image costs one range read, locally or on an object store. A tar archive has no directory
but headers all over it, so whoever has read them passes the place on: `a.tar!OFFSET+SIZE/member.jpg`. So it is with
Parquet files, `a.parquet!OFFSET+SIZE/column/name.jpg`; where their images are compressed, there is only a row group and
a row in it, `a.parquet!g0r17/column/name.jpg` (`dermray.raw.parquet_images`). Names never touch the disk: a member
called `../x` is simply not in the directory.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import struct
import tarfile
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dermray import storage
from dermray.errors import CorpusError
from dermray.raw.parquet_images import Place, read_cell

ENDINGS = (".zip", ".tar")
# Entries of all directories that a process keeps: 40 bytes each.
MAX_KEPT_ENTRIES = 8_000_000
MAX_DIRECTORY_BYTES = 2 << 30
# Read with a member, so that its local header rarely costs a second request.
HEADER_SLACK = 512
# One read of this size passes over many tar headers.
TAR_BUFFER_BYTES = 4 << 20

_ADDRESS = re.compile(
    r"(?P<archive>.+?\.(?:zip|tar|parquet))!"
    r"(?:(?:(?<=\.tar!)|(?<=\.parquet!))(?P<offset>\d{1,18})\+(?P<size>\d{1,18})"
    r"|(?<=\.parquet!)g(?P<group>\d{1,9})r(?P<row>\d{1,9}))?/(?P<member>.+)",
    re.I | re.S,
)

STORED, DEFLATED = 0, 8
PLAIN_TAR = -1
PARQUET_CELL = -3
_ENCRYPTED = -2

_ENTRY = np.dtype(
    [("key", "<u8"), ("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<i2")]
)

# The records of the .ZIP file format (APPNOTE 4.3), little-endian.
_END = struct.Struct("<4s4H2LH")
_END_MARK = b"PK\x05\x06"
_LOCATOR64 = struct.Struct("<4sLQL")
_LOCATOR64_MARK = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_MARK = b"PK\x06\x06"
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_CENTRAL_MARK = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_MARK = b"PK\x03\x04"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA, _UNICODE_PATH_EXTRA = 0x0001, 0x7075
_MAX_COMMENT = 0xFFFF
# What is in an archive and no file of it.
LEFT_OUT = "links, and names that lead out of the archive"
REPLACED = "files that a later one of the same name in the archive replaces"
_MAX_PLACE = 1 << 62


class Address(NamedTuple):
    """Where a member is: the archive's path and the member's name inside it.

    For tar and Parquet also where its bytes begin and how many they are, or for Parquet its row group and row.
    """

    archive: str
    member: str
    place: Place | None = None
    cell: tuple[int, int] | None = None


class Member(NamedTuple):
    """One file of an archive. `offset` is that of its local header (zip) or of its bytes (tar).

    Of a Parquet cell, whose size nobody knows before it is read, `offset` is its row group and `stored` its row.
    """

    name: str
    offset: int
    stored: int
    size: int
    crc: int
    method: int


def split_address(path: str) -> Address | None:
    """The archive and member of `a.zip!/b.jpg`; None for a plain path."""
    match = _ADDRESS.fullmatch(path)
    if not match:
        return None
    place = Place(int(match["offset"]), int(match["size"])) if match["offset"] else None
    cell = (int(match["group"]), int(match["row"])) if match["group"] else None
    return Address(match["archive"], match["member"], place, cell)


def join_address(archive: str, member: Member) -> str:
    """The path of an archive's member."""
    place = f"{member.offset}+{member.size}" if member.method == PLAIN_TAR else ""
    return f"{archive}!{place}/{member.name}"


def shown(path: str) -> str:
    """A path as people write it: of an archive's member without its place, which only this package reads."""
    address = split_address(path)
    return f"{address.archive}!/{address.member}" if address and address.place else path


def members(uri: str, left_out: Counter[str] | None = None) -> list[Member]:
    """The files of an archive, names normalised; of several of one name, the last one written.

    Args:
        uri: of the archive.
        left_out: counts what is not among them, by what it is; folders are nothing to count.

    Raises:
        CorpusError: the archive is cut off, or no archive of this kind.
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    counts = Counter[str]() if left_out is None else left_out
    found = _zip_members(uri) if uri.lower().endswith(".zip") else _tar_members(uri, counts)
    kept: dict[str, Member] = {}
    for member in found:
        name = inside(member.name)
        if name is not None:
            if name in kept:
                counts[REPLACED] += 1
            kept[name] = member._replace(name=name)
        elif not member.name.endswith("/"):
            counts[LEFT_OUT] += 1
    return list(kept.values())


def inside(name: str) -> str | None:
    """A member's normal name; None for a folder and for what leads out of the archive."""
    normal = posixpath.normpath(name)
    outside = normal in (".", "..") or normal.startswith(("/", "../")) or "\0" in name
    return None if outside or name.endswith("/") else normal


# -- zip ---------------------------------------------------------------------------------------------------------------


def _zip_members(uri: str) -> Iterator[Member]:
    directory, base, count = _central_directory(uri)
    position = 0
    for _ in range(count):
        if directory[position : position + 4] != _CENTRAL_MARK or len(directory) < position + _CENTRAL.size:
            raise CorpusError(f"{uri} is not a complete zip archive: its directory is damaged; download it again")
        fields = _CENTRAL.unpack_from(directory, position)
        flags, method, crc, stored, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = fields[10], fields[11], fields[12], fields[16]
        start = position + _CENTRAL.size
        raw_name = directory[start : start + name_length]
        extra = _extra_fields(directory[start + name_length : start + name_length + extra_length])
        size, stored, offset = _wide(extra.get(_ZIP64_EXTRA, b""), size, stored, offset)
        if max(size, stored, base + offset) > _MAX_PLACE:
            raise CorpusError(
                f"{uri} is not a complete zip archive: a size in its directory is none; download it again"
            )
        method = _ENCRYPTED if flags & 1 else method
        yield Member(_zip_name(raw_name, flags, extra), base + offset, stored, size, crc, method)
        position = start + name_length + extra_length + comment_length


def _central_directory(uri: str) -> tuple[bytes, int, int]:
    """`(bytes, what to add to its offsets, number of entries)` of a zip archive's directory."""
    num_bytes = storage.size_bytes(uri)
    tail_start = max(0, num_bytes - _END.size - _MAX_COMMENT - _LOCATOR64.size)
    tail = storage.read_range(uri, tail_start, num_bytes - tail_start)
    at = tail.rfind(_END_MARK)
    if at < 0 or len(tail) - at < _END.size:
        raise CorpusError(f"{uri} is not a complete zip archive: its end is missing; download it again")
    _, disk, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = tail[max(0, at - _LOCATOR64.size) : at]
    if locator.startswith(_LOCATOR64_MARK):
        end = _LOCATOR64.unpack(locator)[2]
        record = storage.read_range(uri, end, _END64.size)
        if not record.startswith(_END64_MARK) or len(record) < _END64.size:
            raise CorpusError(f"{uri} is not a complete zip archive: its directory is not found; download it again")
        fields = _END64.unpack(record)
        disk, count, size, offset = fields[4], fields[7], fields[8], fields[9]
    if disk not in (0, _FULL16):
        raise CorpusError(f"{uri} is one part of a zip archive in several volumes: join them first (zip -s 0)")
    base = end - size - offset
    if base < 0 or size > MAX_DIRECTORY_BYTES:
        raise CorpusError(f"{uri} is not a complete zip archive: its directory does not fit in; download it again")
    return storage.read_range(uri, end - size, size), base, count


def _extra_fields(data: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(data):
        kind, length = struct.unpack_from("<2H", data, position)
        fields.setdefault(kind, data[position + 4 : position + 4 + length])
        position += 4 + length
    return fields


def _wide(extra: bytes, *values: int) -> Iterator[int]:
    """Values of 32 bits, or their 64 bits from the extra field where they say so."""
    wide = iter(struct.unpack(f"<{len(extra) // 8}Q", extra[: len(extra) // 8 * 8]))
    return (next(wide, value) if value == _FULL32 else value for value in values)


def _zip_name(raw: bytes, flags: int, extra: dict[int, bytes]) -> str:
    """A member's name. Few tools set the flag that says UTF-8, many write it."""
    unicode_path = extra.get(_UNICODE_PATH_EXTRA, b"")
    if not flags & 0x800 and len(unicode_path) > 5:
        raw = unicode_path[5:]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")


# -- tar ---------------------------------------------------------------------------------------------------------------


def _tar_members(uri: str, left_out: Counter[str]) -> Iterator[Member]:
    with open_tar(uri) as archive:
        for info in heads(archive, uri):
            if info.isreg() and not info.issparse():
                yield tar_member(info)
            elif not info.isdir():
                left_out[LEFT_OUT] += 1


def heads(archive: tarfile.TarFile, uri: str) -> Iterator[tarfile.TarInfo]:
    """What an open tar archive holds, from front to back.

    Raises:
        CorpusError: its headers contradict themselves: sizes below zero, numbers that are none, one within the other.
    """
    last = -1
    while True:
        with _contradictions_told(uri):
            info = archive.next()
        if info is None:
            _check_end(archive, uri)
            return
        # With a size below zero the next header lies before this one, and reading would never end.
        if info.size < 0 or info.offset <= last:
            raise CorpusError(f"{uri} is damaged: the header of {info.name[:100]!r} leads backwards; get it again")
        last = info.offset
        yield info


def tar_member(info: tarfile.TarInfo) -> Member:
    """A file of a tar archive that is being read."""
    return Member(info.name, info.offset_data, info.size, info.size, 0, PLAIN_TAR)


def _check_end(archive: tarfile.TarFile, uri: str) -> None:
    """Python's reader takes whatever is no header for the end; what is behind it must not go unread in silence."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise CorpusError(f"{uri} is damaged: what lies at byte {archive.offset:,} is no header; get it again")


@contextmanager
def _contradictions_told(uri: str) -> Iterator[None]:
    """What Python's reader raises on crafted headers beside errors of its own."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise CorpusError(f"{uri} is damaged: a header cannot be read ({type(error).__name__}); get it again") from None


class _Bounded(io.BufferedReader):
    """Reads no further than the file goes: a buffer for what a header claims would be made before anything is read."""

    def __init__(self, file: pa.NativeFile, buffer_bytes: int) -> None:
        super().__init__(file, buffer_bytes)
        self._num_bytes = int(file.size())

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._num_bytes - self.tell())
        return super().read(left if size is None else min(size, left))


@contextmanager
def open_tar(uri: str) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar archive, to be read from front to back.

    Raises:
        CorpusError: the archive is cut off, compressed, or no tar archive; also while it is read.
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    # Local headers are a seek away; a remote one would cost a request each.
    buffer_bytes = io.DEFAULT_BUFFER_SIZE if storage.is_local(uri) else TAR_BUFFER_BYTES
    file = storage.with_retries(lambda: storage.open_file(uri), uri)
    with file:
        try:
            with _contradictions_told(uri):
                archive = tarfile.open(fileobj=_Bounded(file, buffer_bytes), mode="r:")  # noqa: SIM115 -- closed below
            with archive:
                yield archive
        except (tarfile.TarError, EOFError) as error:
            problem = " ".join(str(error).split()) or "it ends too early"
            raise CorpusError(f"{uri} is not a complete, uncompressed tar archive ({problem}); get it again") from None


# -- one directory an archive ------------------------------------------------------------------------------------------


class Directory:
    """Where each member of an archive is, by a 64-bit hash of its name (400,000 names: 16 MB)."""

    def __init__(self, listed: Iterable[Member]) -> None:
        rows = [(_hash(m.name), m.offset, m.stored, m.size, m.crc, m.method) for m in listed]
        entries = np.array(rows, dtype=_ENTRY)
        self._entries = entries[np.argsort(entries["key"], kind="stable")]
        self._keys = np.ascontiguousarray(self._entries["key"])

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str) -> Member | None:
        """The member of a name; of several, the last one written."""
        key = _hash(name)
        at = int(np.searchsorted(self._keys, np.uint64(key), side="right")) - 1
        if at < 0 or int(self._keys[at]) != key:
            return None
        _, offset, stored, size, crc, method = self._entries[at].tolist()
        return Member(name, offset, stored, size, crc, method)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class _Directories:
    """The directories used last, bounded by their entries, for all threads of a process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, object], Directory] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str, version: object) -> Directory:
        key = (uri, version)
        # Whoever asks meanwhile would have to read the same directory.
        with self._lock:
            if key not in self._kept:
                self._kept[key] = Directory(members(uri))
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MAX_KEPT_ENTRIES:
                self._kept.popitem(last=False)
            return self._kept[key]


_DIRECTORIES = _Directories()


def find(uri: str, version: object, address: Address) -> Member | None:
    """The member of an archive that an address means; None if the archive has none of this name.

    Raises:
        CorpusError, FileNotFoundError, StorageError: as `members`.
    """
    if address.place:
        offset, size = address.place
        return Member(address.member, offset, size, size, 0, PLAIN_TAR)
    if address.cell:
        group, row = address.cell
        return Member(address.member, group, row, 0, 0, PARQUET_CELL)
    return directory(uri, version).find(address.member)


def directory(uri: str, version: object) -> Directory:
    """The directory of an archive, read unless this process has it; `version` is what changes with the archive.

    Raises:
        CorpusError, FileNotFoundError, StorageError: as `members`.
    """
    return _DIRECTORIES.get(uri, version)


def read_member(uri: str, member: Member, version: object = None) -> bytes:
    """The bytes of a member, checked against the size and checksum that the directory names.

    Raises:
        CorpusError: the member is damaged, encrypted, or packed in a way other than deflate.
        FileNotFoundError: the archive is not there.
        StorageError: it cannot be read.
    """
    if member.method == PARQUET_CELL:
        return read_cell(uri, version, member.offset, member.stored, member.name.partition("/")[0])
    if member.method == PLAIN_TAR:
        data = storage.read_range(uri, member.offset, member.size)
        if len(data) != member.size:
            raise CorpusError(f"{uri} ends inside {member.name}; get it again")
        return data
    if member.method not in (STORED, DEFLATED):
        how = "encrypted" if member.method == _ENCRYPTED else f"packed by method {member.method}"
        raise CorpusError(f"{member.name} in {uri} is {how}: only stored and deflated members are read in place")
    packed = _packed_bytes(uri, member)
    data = packed if member.method == STORED else _inflate(packed, member.size)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise CorpusError(f"{member.name} in {uri} is damaged: its bytes are not those that the directory names")
    return data


def _packed_bytes(uri: str, member: Member) -> bytes:
    window = storage.read_range(uri, member.offset, _LOCAL.size + HEADER_SLACK + member.stored)
    if len(window) < _LOCAL.size or not window.startswith(_LOCAL_MARK):
        raise CorpusError(f"{member.name} in {uri} is damaged: it is not where the directory says")
    *_, name_length, extra_length = _LOCAL.unpack_from(window)
    start = _LOCAL.size + name_length + extra_length
    packed = window[start : start + member.stored]
    if len(packed) < member.stored:
        packed += storage.read_range(uri, member.offset + start + len(packed), member.stored - len(packed))
    return packed


def _inflate(packed: bytes, size: int) -> bytes:
    """Inflate, but never far beyond the size that the directory names: a small archive can claim anything."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return inflater.decompress(packed, size + 1)
    except zlib.error:
        return b""
