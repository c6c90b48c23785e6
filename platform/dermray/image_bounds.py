"""What decoding an image would cost, told from its header and structure before any of it is done.

A thread that decodes cannot be stopped, so work is bounded by arithmetic: pixels, times the bytes that the format's
codec takes for each; and the parts that a codec goes through one by one: chunks of a PNG, segments and scans of a JPEG,
blocks of a GIF, entries of a TIFF directory. All of it is linear in the bytes, and cheap beside decoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from dermray.errors import ImageError

# Memory for one decode at the default limit of pixels, beside the encoded bytes: 11 bytes for each of 50 million.
DECODE_BYTES_PER_PIXEL = 11
MAX_DECODE_BYTES = 50_000_000 * DECODE_BYTES_PER_PIXEL
# Peak bytes a pixel of codec and result together, measured by tests/unit/test_image_bounds.py.
BYTES_PER_PIXEL = {
    "PNG": 8, "BMP": 8, "GIF": 8, "JPEG": 5, "WEBP": 17, "AVIF": 17, "HEIF": 12, "deep HEIF": 21,
    "DICOM": 11, "JPEG2000": 26, "16-bit RGB": 20, "16-bit RGBA": 24,
}  # fmt: skip
# libjpeg keeps the coefficients of an image that comes in several scans: two bytes for each component.
COEFFICIENT_BYTES = 2
# Most pixels that an image may have once its shorter side is the model's: what is cut off is computed, too.
MAX_ENLARGED_PIXELS = 1 << 24

MAX_SCANS = 100
MAX_SCANNED_PIXELS = 1_000_000_000
MAX_SEGMENTS = 1024
MAX_JPEG_HEADER_BYTES = 16 << 20
MAX_JUNK_BYTES = 4096
# PNG encoders write pieces of 8 kB; one of 1 kB still passes.
FREE_CHUNKS, BYTES_PER_CHUNK = 4096, 1024
MAX_GIF_BLOCKS = 8192
# Pillow unpacks run-length coded BMPs in Python.
MAX_RLE_PIXELS = 1_000_000
EXIF_MARKS = (b"Exif\x00\x00", b"MPF\x00")
STANDALONE = (0x01, *range(0xD0, 0xD8))
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
ONE_PASS = (0xC0, 0xC1)
SIZES_OF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TILE_WIDTH, TILE_LENGTH, ROWS_PER_STRIP, SAMPLES, BITS, COMPRESSION, PLANAR = 322, 323, 278, 277, 258, 259, 284
STRIPS, TILES = 273, 324
JPEG_IN_TIFF = (6, 7)
# Of a TIFF: values beside its picture, those of inner directories that are read with it included; and what the reader
# keeps of each piece of the picture.
MAX_VALUES, MAX_EXIF_VALUES, BYTES_PER_PIECE = 1 << 19, 1 << 16, 400
BYTE_TYPES, INNER_DIRECTORIES = (1, 2, 6, 7), (34665, 34853, 40965)
# Of JPEG 2000: tiles, of each of which the decoder keeps some 12 kB; blocks of 16 x 16 samples and
# precincts of 32 x 32 pixels at the smallest, as their exponents: it keeps up to a kilobyte of each.
MAX_TILES, BLOCK_EXPONENTS, PRECINCT_EXPONENT = 4096, 8, 5


def check_structure(data: bytes) -> None:
    """Refuse what is built to be slow to look through, before a codec does.

    Raises:
        ImageError: `too_complex`.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    elif data[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        _check_directory(data)


def check_cost(kind: str, width: int, height: int, max_pixels: int, extra_bytes: int = 0) -> None:
    """Refuse an image whose decoding would take more memory than is allowed for one.

    Args:
        kind: key of `BYTES_PER_PIXEL`.
        width, height: in pixels.
        max_pixels: the caller's limit; above the default one it raises that of memory in proportion.
        extra_bytes: what this file takes beyond its format's own.

    Raises:
        ImageError: `too_many_pixels`.
    """
    allowed = max(MAX_DECODE_BYTES, max_pixels * DECODE_BYTES_PER_PIXEL)
    needed = width * height * BYTES_PER_PIXEL[kind] + extra_bytes
    if needed > allowed:
        raise ImageError(
            "too_many_pixels",
            f"{width} x {height} pixels in {kind} take {needed / 1e6:,.0f} MB to decode; {allowed / 1e6:,.0f} are "
            "allowed: store it smaller, or as a plain JPEG",
        )


def check_enlarged(width: int, height: int, side: int) -> None:
    """Refuse an image that is too elongated to bring its shorter side to `side` pixels.

    Raises:
        ImageError: `too_elongated`.
    """
    longer = side * max(width, height) / max(1, min(width, height))
    if side * longer > MAX_ENLARGED_PIXELS:
        raise ImageError(
            "too_elongated",
            f"{width} x {height}: with a shorter side of {side} it would have {side * longer / 1e6:,.0f} million "
            f"pixels; {MAX_ENLARGED_PIXELS / 1e6:,.0f} are allowed: crop it",
        )


def jpeg_bytes(data: bytes, width: int, height: int) -> int:
    """Bytes that a JPEG's decoder keeps beside the picture: the coefficients of all components, if it needs them.

    Raises:
        ImageError: `too_complex`: it has more scans than any camera or editor writes.
    """
    components, in_first_scan, one_pass = 0, 0, False
    for marker, start, end in _segments(data):
        if marker in FRAMES:
            one_pass, components = marker in ONE_PASS, data[start + 5] if end > start + 5 else 0
        elif marker == 0xDA:
            in_first_scan = data[start] if end > start else 0
    if one_pass and in_first_scan == components:
        return 0
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS or scans * width * height > MAX_SCANNED_PIXELS:
        raise ImageError("too_complex", f"{scans} scans of {width} x {height} pixels: save it as a plain JPEG")
    return width * height * components * COEFFICIENT_BYTES


def check_jpeg2000(stream: bytes) -> int:
    """Refuse a JPEG 2000 codestream of more parts than encoders make; its number of components.

    Raises:
        ImageError: `too_complex`, or `truncated`.
    """
    if not stream.startswith(b"\xff\x4f\xff\x51"):
        raise ImageError("truncated", "no JPEG 2000 codestream: export it again")
    try:
        width, height, _, _, tile_width, tile_height, left, top, components = struct.unpack_from(">8IH", stream, 8)
        across, down = (width - left) // max(1, tile_width) + 1, (height - top) // max(1, tile_height) + 1
        if across * down > MAX_TILES:
            raise _too_complex(f"a JPEG 2000 picture in {across * down:,} tiles")
        place = _check_coding(stream, 2)
        # In what is coded this pair of bytes does not occur: it begins a part of a tile.
        while (part := stream.find(b"\xff\x90", place)) >= 0:
            place = _check_coding(stream, part)
    except (struct.error, IndexError):
        raise ImageError("truncated", "the header of the JPEG 2000 picture is cut off: export it again") from None
    return int(components)


def _check_coding(stream: bytes, place: int) -> int:
    """Look at how samples are coded, by the markers of a header of JPEG 2000; where it ends."""
    while place + 4 <= len(stream) and stream[place] == 0xFF and stream[place + 1] not in (0x93, 0xD9):
        marker, end = stream[place + 1], place + 2 + struct.unpack_from(">H", stream, place + 2)[0]
        # One for all components begins with five bytes, one for a component with two.
        at = place + 4 + {0x52: 5, 0x53: 2}.get(marker, 0)
        if marker in (0x52, 0x53):
            block_exponents = stream[at + 1] + stream[at + 2] + 4
            # From the smallest resolution on, each of which has half the side of the next.
            precincts = [
                min(sides & 15, sides >> 4) + stream[at] - level for level, sides in enumerate(stream[at + 5 : end])
            ]
            if block_exponents < BLOCK_EXPONENTS or min(precincts, default=PRECINCT_EXPONENT) < PRECINCT_EXPONENT:
                raise _too_complex("a JPEG 2000 picture in tiny blocks")
        place = max(end, place + 2)
    return place + 1


def png_significant_bits(data: bytes) -> int | None:
    """Most bits that a PNG says (in sBIT) its samples had before they were stored; None where it does not say."""
    for kind, start, length in _chunks(data):
        if kind == b"sBIT":
            return max(data[start : start + min(length, 4)], default=None)
        if kind in (b"IDAT", b"PLTE"):
            return None
    return None


def tiff_piece_bytes(tags: Mapping[int, object], width: int, height: int) -> int:
    """Bytes that the decoder of a TIFF takes beside the picture, by its directory.

    Args:
        tags: values by number.
        width, height: in pixels.
    """

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        value = max(value, default=default) if isinstance(value, tuple) else value
        return int(value) if isinstance(value, int | float) else default

    samples = 1 if number(PLANAR, 1) == 2 else number(SAMPLES, 1)
    pixel = samples * max(1, number(BITS, 8) // 8)
    if TILE_WIDTH in tags:
        tile = max(1, number(TILE_WIDTH, 1)) * max(1, number(TILE_LENGTH, 1))
        across, down = -(-width // max(1, number(TILE_WIDTH, 1))), -(-height // max(1, number(TILE_LENGTH, 1)))
        # Tiles are decoded whole, so what they hold beyond the picture costs time.
        piece = max(tile, across * down * tile // 4)
    else:
        piece = width * min(height, max(1, number(ROWS_PER_STRIP, height)))
    places = max((places for tag in (STRIPS, TILES) if isinstance(places := tags.get(tag), tuple)), key=len, default=())
    return piece * pixel * (3 if number(COMPRESSION, 1) in JPEG_IN_TIFF else 1) + len(places) * BYTES_PER_PIECE


def is_bomb(exif: bytes) -> bool:
    """True for EXIF that claims many times the bytes that there are, or holds more values than a camera writes."""
    body = exif.removeprefix(b"Exif\x00\x00")
    return _claimed(body) > 4 * len(exif) + (1 << 16) or _num_values(body) > MAX_EXIF_VALUES


def _too_complex(what: str) -> ImageError:
    return ImageError("too_complex", f"{what}, as no camera or editor writes: save it anew")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Markers of a JPEG with begin and end of what they hold, up to its first scan."""
    place, junk, end = 2, 0, len(data)
    while place + 4 <= end:
        if data[place] != 0xFF or data[place + 1] in (0x00, 0xFF):
            place, junk = place + 1, junk + 1
            if junk > MAX_JUNK_BYTES:
                raise _too_complex(f"{junk:,} bytes between the segments of a JPEG")
            continue
        marker = data[place + 1]
        if marker in STANDALONE:
            place += 2
            continue
        start, place = place + 4, place + 2 + max(2, (data[place + 2] << 8) + data[place + 3])
        yield marker, start, place
        if marker == 0xDA:
            return


def _check_jpeg(data: bytes) -> None:
    exif_bytes = 0
    for num_segments, (marker, start, end) in enumerate(_segments(data), 1):
        if num_segments > MAX_SEGMENTS or end > MAX_JPEG_HEADER_BYTES:
            raise _too_complex(f"a JPEG with {num_segments:,} segments in {end:,} bytes before its picture")
        if marker in (0xE1, 0xE2):
            body = data[start:end]
            for mark in EXIF_MARKS:
                if body.startswith(mark):
                    exif_bytes += len(body)
                    # Readers put several such segments together, so a second one is not looked at alone.
                    if exif_bytes > 4 * 0xFFFF or is_bomb(body.removeprefix(mark)):
                        raise _too_complex("EXIF that claims more than it holds")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and length of each chunk of a PNG."""
    place = 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, place + 8, length
        place += 12 + length


def _check_png(data: bytes) -> None:
    allowed = FREE_CHUNKS + len(data) // BYTES_PER_CHUNK
    for number, _ in enumerate(_chunks(data), 1):
        if number > allowed:
            raise _too_complex(f"a PNG of {len(data):,} bytes in more than {allowed:,} chunks")


def _check_gif(data: bytes) -> None:
    """Blocks before the first frame; what comes behind it is not read."""
    place, number = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0), 0
    while place < len(data) and data[place] != ord(","):
        if data[place] != ord("!"):
            number, place = number + 1, place + 1
        else:
            place += 2
            while place < len(data) and data[place]:
                number, place = number + 1, place + 1 + data[place]
            place += 1
        if number > MAX_GIF_BLOCKS:
            raise _too_complex(f"a GIF with {number:,} blocks before its first frame")


def _check_bmp(data: bytes) -> None:
    if len(data) < 34:
        return
    width, height, compression = *struct.unpack_from("<ii", data, 18), struct.unpack_from("<I", data, 30)[0]
    if struct.unpack_from("<I", data, 14)[0] >= 40 and compression in (1, 2):
        num_pixels = abs(width * height)
        if num_pixels > MAX_RLE_PIXELS or len(data) > 4 * num_pixels + (1 << 16):
            raise _too_complex(f"a run-length coded BMP of {len(data):,} bytes for {num_pixels:,} pixels")


def _check_directory(data: bytes) -> None:
    if _claimed(data) > 2 * len(data) + (1 << 16):
        raise _too_complex("a TIFF directory that claims more than the file holds")
    if (number := _num_values(data, with_inner=True)) > MAX_VALUES:
        raise _too_complex(f"a TIFF of {number:,} values beside its picture")


def _claimed(tiff: bytes) -> int:
    """Bytes that the first directory of a TIFF, or of EXIF, says that its entries have."""
    # Readers cut off what goes beyond the end, so an entry costs at most the whole.
    return sum(min(len(tiff), SIZES_OF_TYPES.get(kind, 1) * number) for _, kind, number, _ in _entries(tiff))


def _num_values(tiff: bytes, *, with_inner: bool = False) -> int:
    """Numbers that a reader makes of the first directory, of which each becomes an object; of the inner ones, too."""
    total = 0
    for tag, kind, number, value in _entries(tiff):
        if kind not in BYTE_TYPES:
            total += min(number, len(tiff) // SIZES_OF_TYPES.get(kind, 1))
        if with_inner and tag in INNER_DIRECTORIES:
            inner = ((kind, number) for _, kind, number, _ in _entries(tiff, value))
            total += sum(min(n, len(tiff) // SIZES_OF_TYPES.get(k, 1)) for k, n in inner if k not in BYTE_TYPES)
    return total


def _entries(tiff: bytes, place: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, number of values and value of each entry of a directory; of the first one without its place."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    big = tiff[2:4] in (b"+\x00", b"\x00+")
    try:
        first = struct.unpack_from(order + ("Q" if big else "I"), tiff, 8 if big else 4)[0] if place is None else place
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), tiff, first)
    except (struct.error, OverflowError):
        return
    body = tiff[first + (8 if big else 2) :]
    width, layout = (20, "HHQQ") if big else (12, "HHII")
    yield from struct.iter_unpack(order + layout, body[: min(count, len(body) // width) * width])
