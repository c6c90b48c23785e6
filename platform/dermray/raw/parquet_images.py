"""Images inside Parquet files, read where they lie.

A column of image bytes, or of Hugging Face's struct {bytes, path}, is stored in pages. Where the pages are neither
compressed nor dictionary-encoded (as jobs/export.py and current versions of `datasets` write images), each value is a
run of bytes in the file: `places` finds it, and reading an image costs one range read, as with a tar archive. Any other
image can only be read with its row group's whole column: `read_cell` does, and keeps the columns used last.

Pages are those of the Parquet format, their headers in Thrift's compact protocol.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dermray import parquet_bounds, storage
from dermray.errors import CorpusError

# Of the columns that a process keeps for the images that cannot be read one by one.
MAX_KEPT_BYTES = 512 << 20
REMOTE_BUFFER_BYTES = 4 << 20
# A page's header holds statistics, which may be long.
HEADER_BYTES = (256, 64 << 10, 16 << 20)

# A page's header holds that of its kind, which holds statistics.
MAX_DEPTH = 4

DATA_PAGE, DATA_PAGE_V2 = 0, 3
PLAIN = 0


class Place(NamedTuple):
    """Where a value's bytes are in the file."""

    offset: int
    size: int


@contextmanager
def open_file(uri: str) -> Iterator[tuple[pq.ParquetFile, BinaryIO]]:
    """A Parquet file and its bytes.

    Raises:
        CorpusError: it is no Parquet file, or is damaged; also while it is read.
        OSError: it is not there, or cannot be read; for `storage.with_retries`.
    """
    # Local lengths are a seek away; remote ones would cost a request each.
    buffer_bytes = io.DEFAULT_BUFFER_SIZE if storage.is_local(uri) else REMOTE_BUFFER_BYTES
    # Arrow's readers and a buffer would get into each other's way on one handle.
    with storage.open_file(uri) as file, storage.open_file(uri) as content:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=not storage.is_local(uri), page_checksum_verification=True)
            parquet_bounds.require_bounded(parquet.metadata)
            yield parquet, io.BufferedReader(content, buffer_bytes)
        except (pa.ArrowException, _DamageError) as error:
            raise CorpusError(
                f"{uri} is no whole Parquet file ({' '.join(str(error).split())}); get it again"
            ) from None


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that hold image bytes: binary ones, and structs with a binary field `bytes`."""
    return [field.name for field in schema if _bytes_type(field.type) is not None]


def _bytes_type(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def places(file: pq.ParquetFile, content: BinaryIO, group: int, column: str) -> list[Place | None] | None:
    """Where each row's image of a row group begins and how long it is, None where it is null.

    None in all if the images of this row group cannot be read one by one.
    """
    leaf, depth = _leaf(file, column)
    chunk = file.metadata.row_group(group).column(leaf)
    plain_only = not set(chunk.encodings) & {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}
    if chunk.compression != "UNCOMPRESSED" or not plain_only or "PLAIN" not in chunk.encodings:
        return None
    found: list[Place | None] = []
    position = chunk.data_page_offset
    while len(found) < chunk.num_values:
        header, start = _page_header(content, position)
        position = start + _number(header, 3)
        if _number(header, 1) in (DATA_PAGE, DATA_PAGE_V2):
            values = _page_values(content, header, start, position, depth, chunk.num_values - len(found))
            if values is None:
                return None
            found.extend(values)
    return found


def _leaf(file: pq.ParquetFile, column: str) -> tuple[int, int]:
    """`(number of the stored column that holds the bytes, its definition level)`."""
    paths = (column, f"{column}.bytes")
    for number in range(len(file.schema)):
        stored = file.schema.column(number)
        if stored.path in paths:
            return number, stored.max_definition_level
    raise _DamageError(f"there is no column {column} of images in it")


def _page_values(
    content: BinaryIO, header: dict[int, Any], start: int, end: int, depth: int, most: int
) -> list[Place | None] | None:
    """The places of a data page's values, `most` at most; None if they are not plain."""
    v2 = header[1] == DATA_PAGE_V2
    about = header.get(8 if v2 else 5)
    count = _number(about, 1)
    if _number(about, 4 if v2 else 2) != PLAIN:
        return None
    if count > most:
        raise _DamageError("a page has more values than its row group")
    position = start
    if v2:
        position += _number(about, 6)
        levels_bytes = _number(about, 5)
    elif depth:
        levels_bytes = int.from_bytes(_read(content, position, 4), "little")
        position += 4
    else:
        levels_bytes = 0
    present = np.ones(count, dtype=bool)
    if depth:
        present = _levels(_read(content, position, levels_bytes), count, depth.bit_length()) == depth
    position += levels_bytes
    found: list[Place | None] = []
    for is_there in present.tolist():
        if not is_there:
            found.append(None)
            continue
        size = int.from_bytes(_read(content, position, 4), "little")
        position += 4 + size
        if position > end:
            raise _DamageError("a page is shorter than its values")
        found.append(Place(position - size, size))
    return found


def _levels(data: bytes, count: int, width: int) -> np.ndarray:
    """Levels in the hybrid of runs and bit-packed groups, uint8 [count]."""
    levels = np.empty(0, dtype=np.uint8)
    position = 0
    try:
        while len(levels) < count:
            header, position = _varint(data, position)
            if header & 1:
                num_bytes = (header >> 1) * width
                packed = np.frombuffer(data, np.uint8, num_bytes, position)
                bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
                part = (bits << np.arange(width, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
                position += num_bytes
            else:
                # No more than `count` of a run are of use, whatever it claims.
                part = np.full(min(header >> 1, count), data[position], dtype=np.uint8)
                position += 1
            levels = np.concatenate([levels, part])
    except (IndexError, ValueError):
        raise _DamageError("a page's levels end too early") from None
    return levels[:count]


def _read(content: BinaryIO, offset: int, num_bytes: int) -> bytes:
    content.seek(offset)
    data = content.read(num_bytes)
    if len(data) != num_bytes:
        raise _DamageError("it ends too early")
    return data


# -- page headers ------------------------------------------------------------------------------------------------------


class _DamageError(Exception):
    """What is wrong with a page."""


def _number(fields: Any, number: int) -> int:
    """A size, a count or a kind that must be there."""
    value = fields.get(number) if isinstance(fields, dict) else None
    # Damage also makes truth values of numbers, and those are of type int to Python.
    if type(value) is not int or value < 0:
        raise _DamageError("a page's header is not one")
    return value


def _page_header(content: BinaryIO, offset: int) -> tuple[dict[int, Any], int]:
    """A page's header by field number, and where the page's content begins."""
    for num_bytes in HEADER_BYTES:
        content.seek(offset)
        data = content.read(num_bytes)
        try:
            fields, used = _struct(data, 0)
        except IndexError:
            # It goes on behind what was read, or there is no more.
            if len(data) < num_bytes:
                break
            continue
        return fields, offset + used
    raise _DamageError("a page has no header")


def _struct(data: bytes, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    if depth > MAX_DEPTH:
        raise _DamageError("a page's header is not one")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return fields, position
        delta, kind = head >> 4, head & 15
        if delta:
            number += delta
        else:
            number, position = _zigzag(data, position)
        if kind in (1, 2):
            fields[number] = kind == 1
        else:
            fields[number], position = _value(data, position, kind, depth)


def _value(data: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    """One value of Thrift's compact protocol, as far as page headers use it; strings are passed over."""
    if kind == 3:
        return data[position], position + 1
    if kind in (4, 5, 6):
        return _zigzag(data, position)
    if kind == 7:
        return None, position + 8
    if kind == 8:
        length, position = _varint(data, position)
        return None, position + length
    if kind == 12:
        return _struct(data, position, depth + 1)
    raise _DamageError("a page's header is not one")


def _zigzag(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise _DamageError("a page's header is not one")


# -- whole columns -----------------------------------------------------------------------------------------------------


class _Columns:
    """The image columns of the row groups used last, bounded by their bytes, for all threads of a process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str, version: object, group: int, column: str) -> pa.ChunkedArray:
        key = (uri, version, group, column)
        # Whoever asks meanwhile would most likely read the same row group.
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _column(uri, group, column)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[key]


_COLUMNS = _Columns()


def read_cell(uri: str, version: object, group: int, row: int, column: str) -> bytes:
    """The image in a row of a row group; `version` is what changes with the file.

    Raises:
        CorpusError: the file is damaged, or has no image there.
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    values = _COLUMNS.get(uri, version, group, column)
    value = values[row].as_py() if row < len(values) else None
    if value is None:
        raise CorpusError(f"{uri} has no image in row {row} of row group {group}, column {column}")
    return value


def _column(uri: str, group: int, column: str) -> pa.ChunkedArray:
    def read() -> pa.ChunkedArray:
        with open_file(uri) as (file, _):
            leaf, _ = _leaf(file, column)
            if group >= file.num_row_groups:
                raise CorpusError(f"{uri} has no row group {group}")
            values = file.read_row_group(group, columns=[file.schema.column(leaf).path], use_threads=False)[column]
        if pa.types.is_struct(values.type):
            values = pa.chunked_array([pc.struct_field(chunk, "bytes") for chunk in values.chunks])
        return values

    return storage.with_retries(read, uri)
