"""What crafted images cost: refused before they are decoded, or decoded within the stated memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermray import image_bounds, images, reporting
from dermray.errors import ImageError
from dermray.vectors.encoder import Encoder
from tests.serving import save_tiny_model

ROOT = Path(__file__).parents[2]
SIDE = 7000
MEASURE = """
import sys
from dermray import images
from dermray.errors import ImageError
data = open(sys.argv[1], "rb").read()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
images.decode(open(sys.argv[2], "rb").read())
before = peak()
try:
    print(images.decode(data).shape[0], end=" ")
except ImageError as error:
    print(error.reason, end=" ")
print((peak() - before) * 1024)
"""


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", interlaced: int = 0) -> bytes:
    """All zeros, packed as far as deflate goes, without holding them."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row, deflate = bytes(1 + (width * channels * depth + 7) // 8), zlib.compressobj(1)
    packed = b"".join(deflate.compress(row) for _ in range(height * (2 if interlaced else 1))) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def small() -> Image.Image:
    return Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(data)
    return caught.value.reason


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


@pytest.mark.parametrize(("width", "height"), [(300_000, 1), (1, 300_000), (2_000_000, 1)])
def test_images_too_elongated_to_enlarge_are_refused(encoder: Encoder, width: int, height: int) -> None:
    data = png(width, height)
    assert len(data) < 60_000
    with pytest.raises(ImageError, match="crop it") as caught:
        encoder.preprocess(data)
    assert caught.value.reason == "too_elongated"
    _, reasons = encoder.encode_readable([data, encoded(small(), "PNG")])
    assert reasons.tolist() == ["too_elongated", ""]
    assert encoder.preprocess(png(400, 10)).shape[0] == 3


def test_images_longer_than_a_jpeg_cost_one_row_and_no_report() -> None:
    for width, height in ((70_000, 64), (64, 70_000), (70_000, 1)):
        data = png(width, height)
        with pytest.raises(ImageError) as caught:
            images.standardise(data, image_size=256, jpeg_quality=90)
        assert caught.value.reason == "too_elongated"
        assert (reporting.thumbnail(data) or "").startswith("data:image/jpeg")


def many_scans(image: Image.Image, number: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encoded(image, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * number + data[-2:]


def with_segments(*segments: bytes) -> bytes:
    return (plain := encoded(small(), "JPEG"))[:2] + b"".join(segments) + plain[2:]


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def directory(num_entries: int, size: int) -> bytes:
    """A TIFF directory whose entries all claim the same bytes."""
    entries = b"".join(struct.pack("<HHII", 40_000 + n, 1, size, 8) for n in range(num_entries))
    return b"II*\x00" + struct.pack("<IH", 8, num_entries) + entries + bytes(4)


def tiff(**tags: int) -> bytes:
    names = {"width": 256, "height": 257, "tile_width": 322, "tile_length": 323, "compression": 259}
    base = {"width": 10, "height": 10, "compression": 8} | tags
    entries = [(258, 3, 8), (262, 3, 1), (277, 3, 1), (324, 4, 8), (325, 4, 100)]
    entries += [(names[name], 4, value) for name, value in base.items()]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + packed + bytes(200)


def gif_of_comments(number: int) -> bytes:
    plain = encoded(small().convert("P"), "GIF")
    start = 13 + (3 << (plain[10] & 7) + 1)
    return plain[:start] + b"!\xfe" + b"\x01a" * number + b"\x00" + plain[start:]


def rle_bmp(width: int, height: int, body: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(body), 0, 0, 54 + 1024) + info + bytes(1024) + body


BOMBS = {
    "scans": lambda: many_scans(small(), 2000),
    "scans of a large picture": lambda: many_scans(Image.new("RGB", (6000, 6000)), 60),
    "segments": lambda: with_segments(segment(0xE5, b"") * 50_000),
    "junk between segments": lambda: with_segments(segment(0xE5, b"a") + bytes(1_000_000)),
    "header bytes": lambda: with_segments(segment(0xE5, bytes(65_000)) * 300),
    "EXIF entries": lambda: with_segments(segment(0xE1, b"Exif\x00\x00" + directory(2000, 60_000))),
    "EXIF in parts": lambda: with_segments(segment(0xE1, b"Exif\x00\x00" + bytes(65_000)) * 20),
    "PNG chunks": lambda: png(10, 10, extra=chunk(b"abCd", b"") * 20_000),
    "TIFF entries": lambda: directory(3000, 30_000),
    "GIF comments": lambda: gif_of_comments(100_000),
    "BMP runs": lambda: rle_bmp(1000, 900, b"\x00\x02\x00\x00" * 2_000_000),
    "BMP delta": lambda: rle_bmp(40_000_000, 1, b"\x00\x02\xff\xff"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_built_to_be_slow_is_refused_unread(name: str) -> None:
    data = BOMBS[name]()
    assert refusal(data) == "too_complex"
    with pytest.raises(ImageError):
        images.standardise(data, image_size=64, jpeg_quality=90)


def test_tiff_tiles_beyond_the_picture_are_refused() -> None:
    assert refusal(tiff(tile_width=60_000, tile_length=30_000)) == "too_many_pixels"
    assert refusal(tiff(width=700_000, height=64, tile_width=16, tile_length=60_000)) == "too_many_pixels"


def test_ordinary_files_pass_the_bounds() -> None:
    for data in (
        many_scans(small(), 5),
        with_segments(segment(0xE2, b"ICC_PROFILE\x00" + bytes(60_000)) * 40),
        png(10, 10, extra=chunk(b"tEXt", b"Comment\x00a") * 1000),
        gif_of_comments(1000),
        rle_bmp(40, 2, b"\x28\x01\x00\x00\x28\x02\x00\x01"),
    ):
        assert images.decode(data).shape[2] == 3


@pytest.fixture(scope="module")
def at_the_limit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    flat = Image.new("RGB", (SIDE, SIDE), (90, 60, 40))
    (folder / "small").write_bytes(encoded(small(), "PNG"))
    files = {
        "PNG 16 bit grey": png(SIDE, SIDE, depth=16, colour=0),
        "PNG 16 bit RGBA": png(SIDE, SIDE, depth=16, colour=6),
        "PNG interlaced": png(SIDE, SIDE, interlaced=1),
        "GIF": encoded(flat.quantize(4), "GIF"),
        "JPEG": encoded(flat, "JPEG"),
        "JPEG progressive": encoded(flat, "JPEG", progressive=True, subsampling=0),
        "JPEG CMYK": encoded(flat.convert("CMYK"), "JPEG"),
        "TIFF": encoded(flat, "TIFF", compression="tiff_adobe_deflate"),
        "WEBP": encoded(flat.resize((5000, 6000)), "WEBP", method=0, quality=1),
        "AVIF": encoded(flat.resize((5600, 5700)), "AVIF", speed=10, quality=1),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.long
def test_memory_of_each_format_at_the_limit(at_the_limit: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
    peaks = {}
    for path in sorted(at_the_limit.iterdir()):
        command = [sys.executable, "-c", MEASURE, str(path), str(at_the_limit / "small")]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        result, peak = told.stdout.split()
        peaks[path.name] = int(peak)
        assert result.isdigit(), path.name
    print(peaks)
    assert max(peaks.values()) <= image_bounds.MAX_DECODE_BYTES, peaks
