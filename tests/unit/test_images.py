"""Every kind of image a raw corpus holds, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from dermray import images
from dermray.errors import ImageError
from tests.raw_corpus import photograph


def gradient(width: int = 96, height: int = 64) -> np.ndarray:
    """Smooth and without symmetry, so that JPEG keeps it and every flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [40 + 160 * x / width, 220 - 150 * y / height, 90 + 60 * (x * y) / (width * height)], axis=-1
    ).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    return encoded(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0, **options)


def assert_close(left: np.ndarray, right: np.ndarray, tolerance: float = 3.0) -> None:
    assert left.shape == right.shape
    assert np.abs(left.astype(float) - right.astype(float)).mean() < tolerance


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few compressed zeros."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(data, **options)
    return caught.value.reason


def test_plain_formats_give_the_pixels() -> None:
    pixels = gradient()
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(images.decode(encoded(Image.fromarray(pixels), kind)), pixels)
    assert_close(images.decode(jpeg(pixels)), pixels)
    assert_close(images.decode(encoded(Image.fromarray(pixels), "WEBP", quality=95)), pixels)


def test_inspect_reads_the_header_only() -> None:
    assert images.inspect(png_header(12_000, 14_000)) == ("PNG", 12_000, 14_000)
    assert images.inspect(jpeg(gradient())[:700]) == ("JPEG", 96, 64)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "zero_byte"),
        (b"<!doctype html><html>404</html>", "not_an_image"),
        (b"\xff\xd8\xff\xe0garbage without a frame", "not_an_image"),
        (b"\x00" * 4096, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
        (jpeg(gradient())[:-600], "truncated"),
        (encoded(Image.fromarray(gradient()), "PNG")[:400], "truncated"),
        (png_header(9_000, 9_000), "too_many_pixels"),
        (png_header(60_000, 60_000), "too_many_pixels"),
    ],
    ids=["empty", "html", "jpeg magic", "zeros", "eps", "cut jpeg", "cut png", "big header", "huge header"],
)
def test_bad_bytes_have_their_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_every_truncation_of_a_jpeg_is_noticed() -> None:
    data = jpeg(gradient())
    for length in range(1, len(data) - 40, 97):
        assert reason(data[:length]) in ("not_an_image", "truncated")


def test_limits_are_inclusive() -> None:
    data = jpeg(gradient(96, 64))
    assert images.decode(data, max_pixels=96 * 64, min_side=64).shape == (64, 96, 3)
    assert reason(data, max_pixels=96 * 64 - 1) == "too_many_pixels"
    assert reason(data, min_side=65) == "too_small"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_dropped(orientation: int, kind: str) -> None:
    upright = gradient()
    # What a camera stores, so that the orientation turns it upright again: PIL's own table of inverses.
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = Image.fromarray(upright) if inverse is None else Image.fromarray(upright).transpose(inverse)
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(stored, kind, exif=exif, **options)
    assert_close(images.decode(data), upright, 5)
    published = images.standardise(data, image_size=32, jpeg_quality=90)
    assert (published.width, published.height) == (48, 32)
    assert len(Image.open(io.BytesIO(published.jpeg)).getexif()) == 0


def test_broken_exif_costs_nothing() -> None:
    data = jpeg(gradient(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert_close(images.decode(data), gradient())


def test_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8825)[1] = "N"
    data = jpeg(gradient(), exif=exif, comment=b"name of the patient")
    published = images.standardise(data, image_size=256, jpeg_quality=90).jpeg
    assert b"a camera" not in published
    assert b"name of the patient" not in published
    assert b"Exif" not in published


def cmyk() -> bytes:
    return encoded(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95, subsampling=0)


def grey_jpeg() -> bytes:
    return encoded(Image.fromarray(gradient()).convert("L"), "JPEG", quality=95)


def progressive() -> bytes:
    return jpeg(gradient(), progressive=True)


def palette() -> bytes:
    return encoded(Image.fromarray(gradient()).quantize(256), "PNG")


def bilevel() -> bytes:
    return encoded(Image.fromarray(gradient()).convert("1"), "PNG")


@pytest.mark.parametrize(
    ("make", "expected", "tolerance"),
    [
        (cmyk, gradient(), 6),
        (grey_jpeg, np.asarray(Image.fromarray(gradient()).convert("L").convert("RGB")), 3),
        (progressive, gradient(), 3),
        (palette, gradient(), 8),
        (bilevel, np.asarray(Image.fromarray(gradient()).convert("1").convert("RGB")), 0.1),
    ],
)
def test_other_colour_models(make: Callable[[], bytes], expected: np.ndarray, tolerance: float) -> None:
    assert_close(images.decode(make()), expected, tolerance)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    pixels = np.dstack([gradient(), np.full((64, 96), 255, np.uint8)])
    pixels[:, :48, 3] = 0
    pixels[:32, 48:, 3] = 128
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = images.decode(encoded(Image.fromarray(pixels), kind, **options))
    assert np.array_equal(decoded[:, :48], np.full((64, 48, 3), 255))
    assert_close(decoded[:32, 48:], (pixels[:32, 48:, :3] / 2 + 127.5), 1.5)
    assert np.array_equal(decoded[32:, 48:], pixels[32:, 48:, :3])


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 20, 40))
    decoded = images.decode(encoded(image, "PNG", transparency=0))
    assert tuple(decoded[5, 5]) == (200, 100, 50)
    assert tuple(decoded[5, 35]) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 96).astype(np.uint16)[None].repeat(64, axis=0)
    for kind in ("PNG", "TIFF"):
        decoded = images.decode(encoded(Image.fromarray(levels), kind))
        assert_close(decoded[..., 0], levels / 257, 1)
    floats = encoded(Image.fromarray((levels / 65535).astype(np.float32)), "TIFF")
    assert_close(images.decode(floats)[..., 2], levels / 257, 1)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert tuple(images.decode(data)[20, 20]) == (255, 0, 0)


def linear_profile() -> bytes:
    """An RGB profile whose tone curve is not that of sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    text = "sRGB".encode("utf-16-be")
    while (at := bytes(profile).find(text)) >= 0:
        profile[at : at + len(text)] = "wide".encode("utf-16-be")
    # Swap the red and the green primary: a change that cannot go unnoticed.
    count = struct.unpack(">I", profile[128:132])[0]
    tags = {bytes(profile[132 + 12 * n : 136 + 12 * n]): 136 + 12 * n for n in range(count)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_icc_profile_becomes_srgb(kind: str) -> None:
    image = Image.new("RGB", (64, 64), (200, 60, 40))
    options = {"quality": 95} if kind == "JPEG" else {}
    plain = images.decode(encoded(image, kind, **options))[32, 32].astype(int)
    foreign = images.decode(encoded(image, kind, icc_profile=linear_profile(), **options))[32, 32].astype(int)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    srgb = images.decode(encoded(image, kind, icc_profile=own, **options))[32, 32].astype(int)
    assert np.array_equal(srgb, plain)
    assert foreign[1] > foreign[0]
    garbage = images.decode(encoded(image, kind, icc_profile=b"no profile at all", **options))[32, 32].astype(int)
    assert np.array_equal(garbage, plain)


def test_large_jpeg_is_reduced_while_decoding() -> None:
    pixels = gradient(1200, 800)
    reduced = images.decode(jpeg(pixels), shorter_side=100)
    assert min(reduced.shape[:2]) >= 100
    assert max(reduced.shape[:2]) <= 320
    whole = images.resize_shorter(images.decode(jpeg(pixels)), 100)
    assert_close(images.resize_shorter(reduced, 100), whole, 2)


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (801, 1207), (333, 77), (64, 64), (3000, 40)])
def test_resize_sets_the_shorter_side_and_never_enlarges(width: int, height: int) -> None:
    small = images.resize_shorter(gradient(width, height), 64)
    expected = min(64, width, height)
    assert min(small.shape[:2]) == expected
    assert small.shape[1] / small.shape[0] == pytest.approx(width / height, rel=0.02)


def test_resize_averages_instead_of_aliasing() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(images.resize_shorter(stripes, 64).astype(int) - 127).max() <= 2


def test_standardise_is_deterministic_and_small() -> None:
    data = jpeg(gradient(900, 600))
    first = images.standardise(data, image_size=256, jpeg_quality=90)
    assert first == images.standardise(data, image_size=256, jpeg_quality=90)
    assert (first.width, first.height) == (384, 256)
    assert first.original == ("JPEG", 900, 600)
    assert len(images.standardise(data, image_size=256, jpeg_quality=30).jpeg) < len(first.jpeg)
    assert_close(images.decode(first.jpeg), images.resize_shorter(gradient(900, 600), 256), 3)


def test_standardise_keeps_nothing_of_the_image_before() -> None:
    """Memory is used again; sizes go up and down, beyond what is kept, in several threads."""
    random = np.random.default_rng(0)
    sizes = [(300, 200), (90, 70), (640, 480), (2500, 2400), (64, 64), (301, 199), (4000, 300), (90, 70)]
    pictures = [jpeg(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]

    def plainly(data: bytes) -> bytes:
        return images.encode_jpeg(images.resize_shorter(images.decode(data, shorter_side=96), 96), 90)

    expected = [plainly(data) for data in pictures]

    def made(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
        return all(
            images.standardise(pictures[place], image_size=96, jpeg_quality=90).jpeg == expected[place]
            for place in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(made, range(12)))


def test_multi_picture_jpeg_gives_its_first_picture() -> None:
    second = Image.fromarray(255 - gradient())
    data = encoded(Image.fromarray(gradient()), "MPO", save_all=True, append_images=[second], quality=95)
    assert images.inspect(data).format == "MPO"
    assert_close(images.decode(data), gradient(), 5)


def test_compressed_tiff() -> None:
    data = encoded(Image.fromarray(gradient()), "TIFF", compression="tiff_deflate")
    assert np.array_equal(images.decode(data), gradient())


def test_published_form_stays_byte_for_byte() -> None:
    once = images.standardise(photograph(1, 900, 700), image_size=256, jpeg_quality=90)
    again = images.standardise(once.jpeg, image_size=256, jpeg_quality=90)
    assert again.jpeg == once.jpeg
    assert images.standardise(once.jpeg, image_size=256, jpeg_quality=80).jpeg != once.jpeg
    assert images.standardise(once.jpeg, image_size=128, jpeg_quality=90).height == 128


@pytest.mark.parametrize("extra", [b"\xff\xfe\x00\x08secret", b"\xff\xe1\x00\x0aExif\x00\x00ab"])
def test_published_form_with_metadata_is_encoded_anew(extra: bytes) -> None:
    plain = images.standardise(photograph(1), image_size=256, jpeg_quality=90).jpeg
    tagged = plain[:2] + extra + plain[2:]
    assert extra not in images.standardise(tagged, image_size=256, jpeg_quality=90).jpeg
    appended = images.standardise(plain + b"hidden", image_size=256, jpeg_quality=90).jpeg
    assert b"hidden" not in appended


def test_perceptual_hash_survives_what_copies_suffer_and_parts_what_differs() -> None:
    original = photograph(3, 640, 480)
    picture, first = images.decode(original), images.perceptual_hash(original)
    smaller = images.resize_shorter(picture, 200)
    brighter = np.clip(picture.astype(np.int16) + 12, 0, 255).astype(np.uint8)
    for copy in (
        images.encode_jpeg(smaller, 90),
        images.encode_jpeg(picture, 40),
        encoded(Image.fromarray(brighter), "PNG"),
    ):
        assert (images.perceptual_hash(copy) ^ first).bit_count() <= 6
    for other in range(4, 12):
        assert (images.perceptual_hash(photograph(other, 640, 480)) ^ first).bit_count() > 12
    stored = images.standardise(original, image_size=240, jpeg_quality=95)
    assert (images.perceptual_hash(stored.jpeg) ^ stored.phash).bit_count() <= 4
    with pytest.raises(ImageError):
        images.perceptual_hash(original[:500])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (180, 120, 90)])
def test_blank_images_are_refused_where_contrast_is_asked_for(colour: tuple[int, int, int]) -> None:
    blank = images.encode_jpeg(np.full((80, 90, 3), colour, np.uint8), 90)
    assert images.standardise(blank, image_size=64, jpeg_quality=90).width == 72
    with pytest.raises(ImageError) as caught:
        images.standardise(blank, image_size=64, jpeg_quality=90, min_contrast=4)
    assert caught.value.reason == "blank"
