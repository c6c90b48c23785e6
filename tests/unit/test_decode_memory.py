"""Small files that are built to take much memory: each decodes, or is refused, within what is promised for one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import pydicom
import pytest
from PIL import Image, ImageCms
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit

from dermray import image_bounds, images, webp_bounds
from dermray.errors import ImageError
from tests.unit.test_image_bounds import chunk, encoded, png, small
from tests.unit.test_image_formats import dicom_file

ROOT = Path(__file__).parents[2]
SIDE = 7000
# Decodes one file after the other, told as a path a line; prints what became of each and the memory that it took.
MEASURE = """
import ctypes, json, sys
from dermray import images
from dermray.errors import ImageError
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
def became(data):
    try:
        return list(images.decode(data).shape[:2])
    except ImageError as error:
        return error.reason
for path in sys.stdin.read().split():
    data = open(path, "rb").read()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    result = became(data)
    print(json.dumps([path, result, (kib("VmHWM") - before) * 1024]))
"""


def profile_with_list(element: bytes, number: int) -> bytes:
    """sRGB, and a transform in floating point that names the same element again and again."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (count,) = struct.unpack_from(">I", srgb, 128)
    tags = [struct.unpack_from(">4sII", srgb, 132 + 12 * n) for n in range(count)]
    places = struct.pack(">II", 16 + 8 * number, len(element)) * number
    listed = b"mpet" + struct.pack(">IHHI", 0, 3, 3, number) + places + element
    # Without its description, by which it would be told from a foreign one.
    values = {name: srgb[at : at + size] for name, at, size in tags if name != b"desc"} | {b"D2B0": listed}
    table, body, start = b"", b"", 132 + 12 * len(values)
    for name, value in values.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    whole = srgb[4:128] + struct.pack(">I", len(values)) + table + body
    return struct.pack(">I", len(whole) + 4) + whole


def profile_of_tables() -> bytes:
    nodes = 33
    table = b"clut" + struct.pack(">IHH", 0, 3, 3) + bytes([nodes] * 3 + [0] * 13) + bytes(nodes**3 * 3 * 4)
    return profile_with_list(table, 1000)


def deep_tiff() -> bytes:
    """16-bit colours, all black: Pillow reads their upper byte, so that they are read again."""
    return cv2.imencode(".tiff", np.zeros((SIDE, SIDE, 3), np.uint16))[1].tobytes()


def bits(*values: tuple[int, int]) -> np.ndarray:
    """Values with so many bits each, lowest first."""
    return np.array([value >> n & 1 for value, number in values for n in range(number)], np.uint8)


def webp_of_many_codes(side: int, block_bits: int) -> bytes:
    """A lossless WebP that has other codes for each of its blocks; all of one symbol, which takes no bits."""
    one_symbol, order = bits((1, 4)), (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8)
    lengths = bits((0, 1), (8, 4), *[(int(length in (0, 8)), 3) for length in order], (0, 1))
    # 8 bits for each of 256 values, none for what else there is in green.
    red = np.concatenate([lengths, np.ones(256, np.uint8)])
    green = np.concatenate([red, np.zeros(24, np.uint8)])
    numbers = np.arange((side >> block_bits) ** 2)
    which = np.stack([half >> n & 1 for half in (numbers & 255, numbers >> 8) for n in range(7, -1, -1)], axis=1)
    head = bits((0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 4), (0, 2), (1, 1), (block_bits - 2, 3), (0, 1))
    parts = [head, green, red, *[one_symbol] * 3, which.ravel(), np.tile(one_symbol, 5 * len(numbers)), bits((0, 64))]
    stream = np.packbits(np.concatenate(parts).astype(np.uint8), bitorder="little").tobytes()
    stream += bytes(len(stream) % 2)
    return struct.pack("<4sI8sI", b"RIFF", 12 + len(stream), b"WEBPVP8L", len(stream)) + stream


def heic(side: int) -> bytes:
    sink = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (side, side), (90, 60, 40))).save(sink, quality=10)
    return sink.getvalue()


def dicom_of(syntax: UID, frame: bytes, side: int) -> bytes:
    header = pydicom.dcmread(io.BytesIO(dicom_file(small(), compressed=True)))
    header.file_meta.TransferSyntaxUID = syntax
    header.PhotometricInterpretation = "YBR_RCT" if syntax == JPEG2000Lossless else "YBR_FULL"
    header.Rows = header.Columns = side
    header.PixelData = encapsulate([frame])
    header["PixelData"].VR = "OB"
    sink = io.BytesIO()
    header.save_as(sink)
    return sink.getvalue()


def jpeg2000(side: int, **options: object) -> bytearray:
    return bytearray(encoded(Image.new("RGB", (side, side), (90, 60, 40)), "JPEG2000", no_jp2=True, **options))


def jpeg2000_of_tiles(side: int) -> bytes:
    """All of its tiles but the first missing; their sides are said 18 bytes behind the picture's."""
    frame = jpeg2000(250)
    frame[24:32] = struct.pack(">II", side, side)
    return dicom_of(JPEG2000Lossless, bytes(frame), 250)


def jpeg2000_of_precincts(sides: int) -> bytes:
    """Of one size at both resolutions; sides are two exponents."""
    frame = jpeg2000(1000, precinct_size=(64, 64), codeblock_size=(32, 32), num_resolutions=2)
    place = frame.index(b"\xff\x52") + 14
    frame[place : place + 2] = bytes([sides] * 2)
    return dicom_of(JPEG2000Lossless, bytes(frame), 1000)


def dicom_of_items(number: int) -> bytes:
    """A sequence of empty items before the picture."""
    whole, item = dicom_file(small()), struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    place = whole.index(struct.pack("<HH", 0x7FE0, 0x0010))
    return whole[:place] + struct.pack("<HH2sHI", 9, 0x1000, b"SQ", 0, number * 8) + item * number + whole[place:]


def directory(*entries: tuple[int, int, int, int]) -> bytes:
    return struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)


def tiff_in_strips(number: int) -> bytes:
    """One pixel wide, a strip for each row, all at the same place."""
    end = 8 + 2 + 9 * 12 + 4
    ones = ((256, 1), (257, number), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1))
    where = ((273, 4, number, end), (279, 4, number, end + 4 * number))
    entries = sorted([*((tag, 4, 1, value) for tag, value in ones), *where])
    return (
        b"II*\x00"
        + struct.pack("<I", 8)
        + directory(*entries)
        + b"\x08\x00\x00\x00" * number
        + b"\x01\x00\x00\x00" * number
    )


def tiff_of_fractions(number: int) -> bytes:
    """A small picture, and in the directory of its EXIF as many fractions."""
    whole = encoded(small().resize((10, 10)), "TIFF")
    (first,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, first)
    entries = list(struct.iter_unpack("<HHII", whole[first + 2 : first + 2 + 12 * count]))
    at = len(whole)
    inner = at + len(directory(*entries)) + 12
    moved = directory(*entries, (34665, 4, 1, inner))
    exif = directory((37000, 5, number, inner + len(directory((0, 0, 0, 0)))))
    return whole[:4] + struct.pack("<I", at) + whole[8:] + moved + exif + bytes(8 * number)


def exif_of_fractions(number: int, tag: int = 0x112) -> bytes:
    """An orientation, or something else, of as many fractions."""
    return b"II*\x00" + struct.pack("<I", 8) + directory((tag, 5, number, 26)) + b"\x01\x00\x00\x00" * 2 * number


def deep_heic(side: int) -> bytes:
    """Of 10 bits with transparency, and no colour is at a lower resolution."""
    sink, pixels = io.BytesIO(), np.full((side, side, 4), 30_000, np.uint16)
    pillow_heif.from_bytes("RGBA;16", (side, side), pixels.tobytes()).save(sink, quality=50, chroma=444)
    return sink.getvalue()


def deep_avif(side: int) -> bytes:
    """Of 12 bits with transparency, and no colour is at a lower resolution."""
    settings = [cv2.IMWRITE_AVIF_DEPTH, 12, cv2.IMWRITE_AVIF_QUALITY, 100, cv2.IMWRITE_AVIF_SPEED, 10]
    return cv2.imencode(".avif", np.full((side, side, 4), 2000, np.uint16), settings)[1].tobytes()


def avif_that_says(side: int, *, holds: int) -> bytes:
    image = Image.new("RGB", (holds, holds))
    whole = bytearray(encoded(image, "AVIF", speed=10, quality=1, subsampling="4:4:4", range="full"))
    place = whole.index(b"ispe") + 8
    whole[place : place + 8] = struct.pack(">II", side, side)
    return bytes(whole)


# What becomes of each: height and width, or the reason of the refusal.
CRAFTED: dict[str, tuple[Callable[[], bytes], list[int] | str]] = {
    "profile of tables": (lambda: encoded(small(), "JPEG", icc_profile=profile_of_tables()), [48, 64]),
    "PNG of 16-bit RGB": (lambda: png(SIDE, SIDE, depth=16), "too_many_pixels"),
    "TIFF of 16-bit RGB": (deep_tiff, "too_many_pixels"),
    "PNG of 16-bit RGB within the limit": (lambda: png(5200, 5200, depth=16), [5200, 5200]),
    "WebP of many codes": (lambda: webp_of_many_codes(4096, 4), "too_many_pixels"),
    "WebP of as many codes as fit": (lambda: webp_of_many_codes(512, 2), [512, 512]),
    "JPEG 2000 in tiles of a pixel": (lambda: jpeg2000_of_tiles(1), "too_complex"),
    "JPEG 2000 in blocks of 4 x 4": (
        lambda: dicom_of(JPEG2000Lossless, jpeg2000(300, codeblock_size=(4, 4)), 300), "too_complex",
    ),
    "JPEG 2000 in precincts of 2 x 2": (lambda: jpeg2000_of_precincts(0x11), "too_complex"),
    "JPEG 2000 in ordinary parts": (
        lambda: dicom_of(JPEG2000Lossless, jpeg2000(600, precinct_size=(128, 128), tile_size=(256, 256)), 600),
        [600, 600],
    ),
    "TIFF in strips of a pixel": (lambda: tiff_in_strips(600_000), "too_complex"),
    "TIFF in some strips": (lambda: tiff_in_strips(20_000), [20_000, 1]),
    "TIFF of many fractions": (lambda: tiff_of_fractions(600_000), "too_complex"),
    "TIFF of some fractions": (lambda: tiff_of_fractions(1000), [10, 10]),
    "PNG turned by fractions": (lambda: png(10, 10, extra=chunk(b"eXIf", exif_of_fractions(4_000_000))), [10, 10]),
    "AVIF that says less": (lambda: avif_that_says(64, holds=12_000), "too_many_pixels"),
    "AVIF that says a little less": (lambda: avif_that_says(500, holds=600), [500, 500]),
    "AVIF of many fractions": (
        lambda: encoded(small(), "AVIF", exif=b"Exif\x00\x00" + exif_of_fractions(70_000, 37_000)), "too_complex",
    ),
    "HEIC of 10 bits beyond the limit": (lambda: deep_heic(5200), "too_many_pixels"),
    "DICOM of many items": (lambda: dicom_of_items(60_000), "too_complex"),
    "DICOM of some items": (lambda: dicom_of_items(10_000), [48, 64]),
}  # fmt: skip


def measured(folder: Path, files: dict[str, bytes]) -> tuple[dict[str, list[int] | str], dict[str, int]]:
    """What becomes of each file, and the bytes that it took at most, all decoded by one process."""
    # The first ones pay for what is imported and kept.
    known = {"PNG": encoded(small(), "PNG"), "DICOM": dicom_file(small()), "HEIC": heic(64)}
    paths = {}
    for number, (name, data) in enumerate([*known.items(), *files.items()]):
        (folder / str(number)).write_bytes(data)
        paths[str(folder / str(number))] = name
    told = subprocess.run(
        [sys.executable, "-c", MEASURE], env={**os.environ, "PYTHONPATH": str(ROOT / "platform")}, text=True,
        input="\n".join(paths), capture_output=True, timeout=300, check=True,
    ).stdout.splitlines()  # fmt: skip
    found = [json.loads(line) for line in told][len(known) :]
    return {paths[path]: result for path, result, _ in found}, {paths[path]: peak for path, _, peak in found}


def test_memory_of_crafted_files_stays_within_the_promise(tmp_path: Path) -> None:
    results, peaks = measured(tmp_path, {name: make() for name, (make, _) in CRAFTED.items()})
    assert results == {name: result for name, (_, result) in CRAFTED.items()}
    assert max(peaks.values()) <= image_bounds.MAX_DECODE_BYTES, peaks


@pytest.mark.long
def test_memory_of_formats_of_extras_at_the_limit(tmp_path: Path) -> None:
    flat, header = Image.new("RGB", (SIDE, SIDE), (90, 60, 40)), pydicom.dcmread(io.BytesIO(dicom_file(small())))
    header.Rows, header.Columns, header.PixelData = SIDE, SIDE, flat.tobytes()
    sink = io.BytesIO()
    header.save_as(sink)
    files = {
        "DICOM": sink.getvalue(),
        "DICOM of JPEG": dicom_of(JPEGBaseline8Bit, encoded(flat, "JPEG", progressive=True, subsampling=0), SIDE),
        "DICOM of JPEG 2000": dicom_of(JPEG2000Lossless, bytes(jpeg2000(4590)), 4590),
        "HEIC": heic(6400),
        "HEIC of 10 bits": deep_heic(5110),
        "AVIF of 12 bits": deep_avif(5680),
    }
    results, peaks = measured(tmp_path, files)
    print(peaks)
    assert results == dict(
        zip(files, ([SIDE] * 2, [SIDE] * 2, [4590] * 2, [6400] * 2, [5110] * 2, [5680] * 2), strict=True)
    )
    assert max(peaks.values()) <= image_bounds.MAX_DECODE_BYTES, peaks


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_profile_counts_without_its_transforms_in_floating_point(kind: str) -> None:
    zeros = b"matf" + struct.pack(">IHH12f", 0, 3, 3, *[0.0] * 12)
    image, options = Image.new("RGB", (32, 32), (90, 150, 40)), {"quality": 95} if kind == "JPEG" else {}
    plain = images.decode(encoded(image, kind, **options)).astype(int)
    listed = images.decode(encoded(image, kind, icc_profile=profile_with_list(zeros, 1), **options)).astype(int)
    assert np.abs(plain - listed).max() <= 2


@pytest.mark.parametrize("options", [{}, {"method": 5, "quality": 60}, {"lossless": False}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_ordinary_lossless_webp_is_looked_through(
    mode: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webp_bounds, "UNSEEN_BYTES", 0)
    noise = np.random.default_rng(1).integers(0, 9, (240, 320, 4), dtype=np.uint8)
    noise += np.arange(240, dtype=np.uint8)[:, None, None] // 2
    image = Image.fromarray(noise).convert("RGB" if mode == "P" else mode)
    data = encoded(image.quantize(100).convert("RGB") if mode == "P" else image, "WEBP", **{"lossless": True} | options)
    assert webp_bounds.code_bytes(data, 320 * 240) < 40_000_000
    assert images.decode(data).shape == (240, 320, 3)
    is_lossless = options.get("lossless", True)
    assert (webp_bounds.code_bytes(data, 320 * 240) > 0) == (is_lossless or mode == "RGBA")
    for end in range(40, len(data), len(data) // 20):
        with contextlib.suppress(ImageError):
            webp_bounds.code_bytes(data[:end], 320 * 240)


def test_the_picture_of_an_animated_avif_is_read_and_frames_alone_are_refused() -> None:
    frames = [Image.new("RGB", (64, 48), (level, 60, 40)) for level in (200, 100, 0)]
    moving = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=90)
    assert moving[8:12] == b"avis"
    assert np.abs(images.decode(moving).mean(axis=(0, 1)) - (200, 60, 40)).max() < 4
    with pytest.raises(ImageError, match="without a still picture"):
        images.decode(moving.replace(b"meta", b"free", 1))


def test_avif_in_which_anything_is_cut_or_changed_is_pixels_or_one_error() -> None:
    whole, random = encoded(small(), "AVIF", quality=50), np.random.default_rng(5)
    assert images.decode(whole).shape == (48, 64, 3)
    for _ in range(200):
        changed = bytearray(whole)
        changed[int(random.integers(4, 300))] ^= int(random.integers(1, 256))
        with contextlib.suppress(ImageError):
            images.decode(bytes(changed[: int(random.integers(200, len(whole) + 200))]))
