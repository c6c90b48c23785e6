"""How many pixels the codestreams of an AVIF hold, whatever its container says: the codec makes room for these."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from dermray import image_bounds
from dermray.errors import ImageError

MAX_UNITS = 1 << 16
# Bytes of all items together, which may lie on each other, to those of the file.
MAX_OVERLAP = 4
TIFF_MARKS = (b"II*\x00", b"MM\x00*")
SEQUENCE_HEADER = 1


def checked(data: bytes) -> bytes:
    """An AVIF whose structure was looked at, of which its picture is read and not the first frame; or other bytes.

    Raises:
        ImageError: `truncated`; `too_complex`: built as no encoder does; or `unsupported_format`: frames alone.
    """
    if not _is_avif(data):
        return data
    _coded_pixels(data)
    # Decoders choose by this brand.
    return data[:8] + b"avif" + data[12:]


def extra_bytes(data: bytes, num_pixels: int) -> int:
    """Bytes that the decoder of an AVIF takes beyond those for a picture of so many pixels, with its transparency.

    Raises:
        ImageError: as `checked`.
    """
    return max(0, _coded_pixels(data) - 2 * num_pixels) * image_bounds.BYTES_PER_PIXEL["AVIF"]


def _is_avif(data: bytes) -> bool:
    size = int.from_bytes(data[:4], "big")
    brands = [data[at : at + 4] for at in range(8, min(size, len(data), 256), 4)]
    return data[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


def _coded_pixels(data: bytes) -> int:
    """Most pixels that the codestreams of all items say that they have, together."""
    try:
        return _sum_of_items(data)
    except (struct.error, IndexError, KeyError):
        raise ImageError("truncated", "the boxes of the AVIF are damaged: copy or export it again") from None


def _sum_of_items(data: bytes) -> int:
    boxes = {kind: (start, end) for kind, start, end in _boxes(data, 0, len(data))}
    if b"meta" not in boxes:
        raise ImageError("unsupported_format", "this is an AVIF without a still picture: export one as JPEG or PNG")
    start, end = boxes[b"meta"]
    meta = {kind: (start, end) for kind, start, end in _boxes(data, start + 4, end)}
    kinds, total, num_units, room = dict(_items(data, *meta[b"iinf"])), 0, 0, MAX_OVERLAP * len(data)
    for item, pieces in _places(data, meta[b"iloc"][0], meta.get(b"idat", (0, 0))[0]):
        room -= sum(size for _, size in pieces)
        if room < 0 or num_units > MAX_UNITS:
            raise ImageError("too_complex", "an AVIF of more parts than any encoder writes: save it anew")
        body = b"".join(data[at : at + size] for at, size in pieces)
        if kinds.get(item) == b"Exif":
            tiff = max(0, *(body.find(mark) for mark in TIFF_MARKS))
            if image_bounds.is_bomb(body[tiff:]):
                raise ImageError("too_complex", "EXIF that holds more than any camera writes: save the AVIF anew")
        elif kinds.get(item) == b"av01":
            sizes = [_pixels(unit) if kind == SEQUENCE_HEADER else 0 for kind, unit in _units(body)]
            total, num_units = total + max(sizes, default=0), num_units + len(sizes)
    return total


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box, where what it holds begins, and where it ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 16 if size == 1 else 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
        size = size or end - start
        if size < head:
            raise IndexError
        yield kind, start + head, min(end, start + size)
        start += size


def _items(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Number and kind of each item that is listed."""
    for kind, at, _ in _boxes(data, start + (8 if data[start] else 6), end):
        if kind == b"infe" and data[at] >= 2:
            layout = ">HH4s" if data[at] == 2 else ">IH4s"
            item, _, named = struct.unpack_from(layout, data, at + 4)
            yield item, named


def _places(data: bytes, at: int, inner: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Number of each item and its pieces, with place and size; `inner` is the place of those kept beside the list."""
    version, (sizes, more) = data[at], data[at + 4 : at + 6]
    at += 6

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise IndexError
        return int.from_bytes(data[at - size : at], "big")

    for _ in range(take(4 if version == 2 else 2)):
        item, method = take(4 if version == 2 else 2), take(2) & 15 if version else 0
        take(2)
        base = take(more >> 4) + (inner if method == 1 else 0)
        pieces = []
        for _ in range(take(2)):
            take(more & 15 if version else 0)
            pieces.append((base + take(sizes >> 4), take(sizes & 15)))
        yield item, pieces


def _units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each unit (OBU) of an AV1 stream."""
    at = 0
    while at < len(stream):
        head = stream[at]
        at += 2 if head & 4 else 1
        size, shift = 0, 0
        while head & 2:
            byte = stream[at]
            size, shift, at = size | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80 or shift > 56:
                break
        size = size if head & 2 else len(stream) - at
        yield head >> 3 & 15, stream[at : at + min(size, 256)]
        at += size


def _pixels(header: bytes) -> int:
    """Most pixels that a frame under a sequence header may have."""
    value, left = int.from_bytes(header, "big"), 8 * len(header)

    def take(number: int) -> int:
        nonlocal left
        left -= number
        if left < 0:
            raise IndexError
        return value >> left & (1 << number) - 1

    take(4)
    if is_reduced := take(1):
        take(5)
    else:
        _pass_operating_points(take)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    # A frame of its own may have any size that fits into the bits.
    return (take(width_bits) + 1) * (take(height_bits) + 1) if is_reduced else 1 << width_bits + height_bits


def _pass_operating_points(take: Callable[[int], int]) -> None:
    """Go over what a sequence header says of time and of parts that may be decoded alone."""
    delay_bits = 0
    if take(1):
        take(64)
        if take(1):
            zeros = 0
            while not take(1):
                zeros += 1
            take(zeros)
        if take(1):
            delay_bits = take(5) + 1
            take(42)
    shows_delay = take(1)
    for _ in range(take(5) + 1):
        take(12)
        if take(5) > 7:
            take(1)
        if delay_bits and take(1):
            take(2 * delay_bits + 1)
        if shows_delay and take(1):
            take(4)
