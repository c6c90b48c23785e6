"""The one place that checks, decodes, orients, resizes and encodes images.

The size is read from the header and refused before any pixel is decoded. Plain JPEGs take a fast path (libjpeg-turbo,
scaled down in the DCT domain where the target allows it); everything else goes through Pillow. Pixels come out
upright, as sRGB, without alpha, and encoded images carry no metadata. What is in the published form already stays as
it is, byte for byte.

What a decode costs is bounded before it starts, by `dermray.image_bounds`: a thread that decodes cannot be stopped. And
whatever a codec raises costs the one image: it comes out as an `ImageError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, ParamSpec, TypeVar

import cv2
import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin

from dermray import avif_bounds, dicom, foreign, image_bounds, image_colour, webp_bounds
from dermray.errors import ImageError

DEFAULT_MAX_PIXELS = 50_000_000
# Pillow refuses more than this by itself, whatever limit is asked for.
PILLOW_MAX_PIXELS = 178_956_970
# Raster formats only: Pillow also opens formats that run interpreters (EPS) or hold no photograph.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
# Longer sides than this cannot be stored: the JPEG format and its library end here.
MAX_JPEG_SIDE = 65_500
# An image without anything brighter than this (of 255, in its grey picture of 32 x 32) is counted as dark.
DARK_LEVEL = 32
# Of which a caller may not want to know.
UNASKED = {b"GIF8": "GIF", b"BM": "BMP", b"II*\x00": "TIFF", b"MM\x00*": "TIFF"}
ORIENTATION_TAG = 0x0112
# Tags of TIFF.
NEW_SUBFILE_TYPE, MAKE = 254, 271
# Side of the grey picture whose lowest frequencies make the perceptual hash, and of the one that tells a blank image.
HASH_SIDE = 32
# Where the 64 coefficients of the hash are among all of the grey picture's, row by row: 8 x 8 but the constant one, and
# the next one of the first row.
LOWEST = np.append((HASH_SIDE * np.arange(8)[:, None] + np.arange(8)).ravel()[1:], 8)
CHROMA_420 = 2
# Standard deviation of the smoothing before a reduction, in pixels of an image to be reduced by the square root of 2.
PREFILTER = 0.4
# glibc's names of what `mallopt` sets (malloc.h), and bytes: pieces up to the first come from the heap, whose end is
# given back to the system beyond the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_PIECE, KEPT_FREE = 32 << 20, 256 << 20
# The header is checked against a limit of ours, which Pillow's warning would only repeat.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


def costs_one_image(function: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """What codecs raise on odd content has no common base: whatever it is, it becomes this image's error."""

    @functools.wraps(function)
    def guarded(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        try:
            return function(*args, **kwargs)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError("truncated", f"a codec gave it up: {_told(error)}") from error

    return guarded


class ImageHeader(NamedTuple):
    """What the first bytes of an image tell; width and height are in pixels as stored, before orientation."""

    format: str
    width: int
    height: int


class StandardImage(NamedTuple):
    """An image as DermRay publishes it: an upright sRGB JPEG without metadata, its size and its perceptual hash."""

    jpeg: bytes
    width: int
    height: int
    phash: int
    original: ImageHeader
    is_dark: bool = False


@costs_one_image
def inspect(data: bytes, *, accepted: Sequence[str] = ()) -> ImageHeader:
    """Format and size from the header alone.

    Args:
        data: the encoded image.
        accepted: formats to look for; empty: all. Readers of others are not even asked.

    Raises:
        ImageError: `zero_byte`, `not_an_image`, `unsupported_format`, `too_complex`, or `too_many_pixels` (beyond what
            Pillow opens at all).
    """
    return _header(_open(data, PILLOW_MAX_PIXELS, accepted))


@costs_one_image
def decode(
    data: bytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int = 1,
    shorter_side: int | None = None,
    enlarged_side: int | None = None,
) -> np.ndarray:
    """Bytes of any supported format → uint8 [H, W, 3] RGB, upright.

    EXIF orientation is applied, transparency composited on white, an embedded ICC profile converted to sRGB;
    CMYK, palette, 16-bit and grey images become 8-bit RGB; of an animation the first frame is taken.
    With `shorter_side` a large JPEG may come out reduced, its shorter side still at least that long. With
    `enlarged_side`, to which the caller will bring the shorter side, images too elongated for that are refused.

    It takes `image_bounds.MAX_DECODE_BYTES` of memory at most, in proportion more above the default `max_pixels`.

    Raises:
        ImageError: with reason `zero_byte`, `not_an_image`, `unsupported_format`, `truncated` (also: damaged),
            `too_many_pixels`, `too_small`, `too_elongated`, `too_complex` or `burned_in_annotation`.
    """
    image = _open(data, max_pixels)
    _check_size(_header(image), max_pixels, min_side)
    if enlarged_side is not None:
        image_bounds.check_enlarged(image.width, image.height, enlarged_side)
    return _pixels(image, data, shorter_side, max_pixels)


@costs_one_image
def standardise(
    data: bytes,
    *,
    image_size: int,
    jpeg_quality: int,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int = 1,
    min_contrast: int = 0,
) -> StandardImage:
    """Bytes of any supported format → an upright JPEG whose shorter side is at most `image_size`.

    Bytes that this function has made with the same `jpeg_quality` come back as they are: encoding again would only
    lose quality.

    Raises:
        ImageError: as `decode`; `blank`, where brightness varies by less than `min_contrast` of 255 levels; and
            `too_elongated`, where it is longer than a JPEG can be.
    """
    image = _open(data, max_pixels)
    header = _header(image)
    _check_size(header, max_pixels, min_side)
    pixels = resize_shorter(_pixels(image, data, image_size, max_pixels), image_size)
    height, width = pixels.shape[:2]
    jpeg = data if _is_published(image, data, image_size, jpeg_quality) else encode_jpeg(pixels, jpeg_quality)
    small = _small_grey(pixels)
    if int(small.max()) - int(small.min()) < min_contrast:
        raise ImageError("blank", f"its brightness varies by less than {min_contrast} of 255 levels: nothing to see")
    return StandardImage(jpeg, width, height, _hash(small), header, int(small.max()) < DARK_LEVEL)


@costs_one_image
def thumbnail(data: bytes, *, max_side: int, quality: int) -> bytes:
    """A small JPEG of an encoded image, longer side at most `max_side` pixels; never enlarged.

    Raises:
        ImageError: as `decode`.
    """
    header = inspect(data)
    shorter = max(1, round(max_side * min(header.width, header.height) / max(header.width, header.height)))
    pixels = resize_shorter(decode(data, shorter_side=shorter), shorter)
    # Of a picture much longer than wide a shorter side of one pixel is still too much.
    return encode_jpeg(pixels[:max_side, :max_side], quality)


@costs_one_image
def perceptual_hash(image: bytes) -> int:
    """64-bit perceptual hash of an image: signs of the lowest frequencies of its 32 x 32 grey picture.

    The 64 cosine coefficients next to the constant one, each above (1) or below (0) their median. Rescaling, JPEG
    compression, brightness and contrast change a few bits at most; so may do `standardise`, which takes it of the
    pixels before it compresses them.

    Raises:
        ImageError: as `decode`.
    """
    return _hash(_small_grey(decode(image)))


def _small_grey(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → its grey picture, uint8 [32, 32]."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    # Means of two by two pixels cost next to nothing; averaging over areas that are no whole pixels is slow.
    while min(grey.shape) >= 4 * HASH_SIDE:
        height, width = (side // 2 for side in grey.shape)
        grey = cv2.resize(grey[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)


def use_one_core() -> None:
    """Settle a process that works on one image after the other: OpenCV on one thread, freed memory kept for the next.

    The pixels of an image come and go in pieces of about a megabyte. Left alone, glibc gives them back to the system
    each time, which then has to clear every page again: up to a third of the time that a small image takes. Other C
    libraries stay as they are.
    """
    cv2.setNumThreads(1)
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_PIECE)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


@costs_one_image
def resize_shorter(image: np.ndarray, side: int) -> np.ndarray:
    """Shrink uint8 [H, W, 3] so that its shorter side is `side`, with antialiasing; never enlarges.

    Raises:
        ImageError: `truncated`: the library gives it up.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter <= side:
        return image
    size = (max(side, round(width * side / shorter)), max(side, round(height * side / shorter)))
    factor = shorter / side
    if factor >= 2:
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    # Averaging over areas that are no whole number of pixels is OpenCV's slowest path by far; for factors below 2 a
    # small Gaussian before bilinear sampling takes a quarter of the time and looks the same.
    sigma = PREFILTER * (factor**2 - 1) ** 0.5
    smooth = cv2.GaussianBlur(image, (5, 5), max(sigma, 1e-3), borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(smooth, size, interpolation=cv2.INTER_LINEAR)


@costs_one_image
def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] RGB → baseline JPEG with 4:2:0 chroma and no metadata.

    Raises:
        ImageError: `too_elongated`: a side is longer than a JPEG's can be.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_JPEG_SIDE:
        raise ImageError("too_elongated", f"{width} x {height}: a JPEG ends at {MAX_JPEG_SIDE:,} pixels; crop it")
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def codec_versions() -> dict[str, str]:
    """Versions of the libraries whose change may alter the bytes that `standardise` returns."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("simplejpeg", "opencv-python-headless", "pillow")}


def _hash(small: np.ndarray) -> int:
    frequencies = cv2.dct(small.astype(np.float32))
    lowest = frequencies.ravel()[LOWEST]
    middle = np.partition(lowest, len(lowest) // 2)[len(lowest) // 2]
    return int.from_bytes(np.packbits(lowest >= middle).tobytes(), "big")


def _is_published(image: Image.Image, data: bytes, image_size: int, jpeg_quality: int) -> bool:
    """True for a JPEG such as `encode_jpeg` makes at this quality: nothing to turn, to shrink or to strip."""
    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and image.format == "JPEG"
        and image.mode == "RGB"
        and min(image.size) <= image_size
        and not image.info.get("progressive")
        and [name for name, _ in image.applist] == ["APP0"]
        and data.endswith(b"\xff\xd9")
        and JpegImagePlugin.get_sampling(image) == CHROMA_420
        and image.quantization == _quantization(jpeg_quality)
    )


@cache
def _quantization(quality: int) -> dict[int, list[int]]:
    """The quantisation tables that `encode_jpeg` writes."""
    made = Image.open(io.BytesIO(encode_jpeg(np.zeros((16, 16, 3), np.uint8), quality)))
    assert isinstance(made, JpegImagePlugin.JpegImageFile)
    return made.quantization


def _open(data: bytes, max_pixels: int, accepted: Sequence[str] = ()) -> Image.Image:
    if not data:
        raise ImageError("zero_byte", "the file is empty")
    if foreign.is_dicom(data) and not accepted:
        return dicom.read(data, max_pixels)
    image_bounds.check_structure(data)
    data = data if accepted else avif_bounds.checked(data)
    _take_heif()
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(accepted) or FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except Exception as error:
        raise _unreadable(data, error, accepted) from None
    if image.format == "PNG":
        image.info["stored_bits"] = data[24]
        image.info["significant_bits"] = image_bounds.png_significant_bits(data)
    elif image.format == "TIFF":
        _refuse_raw(image, data)
        bits = max(image.tag_v2.get(image_bounds.BITS, (8,)))  # type: ignore[attr-defined]
        image.info["stored_bits"] = bits
        # 12 bits packed as such; of 16 nobody knows how many the sensor had.
        image.info["significant_bits"] = bits if 8 < bits < 16 else None
    return image


def _refuse_raw(image: Image.Image, data: bytes) -> None:
    """Refuse a camera's raw file, of which Pillow would give the small picture beside the photograph."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    is_reduced = bool(tags.get(NEW_SUBFILE_TYPE, 0) & 1)
    named = foreign.describe(data[: foreign.HEAD_BYTES])
    raw = named or foreign.camera_raw(str(tags.get(MAKE, "")).strip(), set(tags), is_reduced=is_reduced)
    if raw is not None:
        raise ImageError("unsupported_format", f"this is {raw.name}: {raw.advice}")


def _unreadable(data: bytes, error: Exception, accepted: Sequence[str]) -> ImageError:
    """What bytes are that no reader takes, and what to do about it."""
    known = foreign.describe(data[: foreign.HEAD_BYTES])
    if known is not None and known.name == "a HEIC image" and _take_heif() is None and not accepted:
        return ImageError("unsupported_format", f"this is {known.name}: install dermray[heic], or {known.advice}")
    if known is not None and not data.startswith((b"\xff\xd8", b"\x89PNG")):
        is_picture = known.name.endswith("image") or "raw file" in known.name
        reason = "unsupported_format" if is_picture else "not_an_image"
        return ImageError(reason, f"this is {known.name}: {known.advice}")
    other = next((name for mark, name in UNASKED.items() if data.startswith(mark)), None)
    if accepted and other is not None:
        return ImageError("unsupported_format", f"{other} images are not accepted; send JPEG, PNG or WebP")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError("not_an_image", f"no known image format; it begins with {data[:12]!r}")
    return ImageError("not_an_image", f"the header is unreadable: {_told(error)}")


@cache
def _take_heif() -> str | None:
    """Teach Pillow HEIC where the optional package is installed; its version, None without it."""
    try:
        import pillow_heif
    except ImportError:
        return None
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return str(pillow_heif.__version__)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _header(image: Image.Image) -> ImageHeader:
    return ImageHeader(image.format or "", image.width, image.height)


def _check_size(header: ImageHeader, max_pixels: int, min_side: int) -> None:
    size = f"{header.width} x {header.height}"
    if header.width * header.height > max_pixels:
        raise ImageError("too_many_pixels", f"{size} is more than the {max_pixels:,} pixels allowed")
    if min(header.width, header.height) < min_side:
        raise ImageError("too_small", f"{size}: the shorter side is below {min_side}")


def _pixels(image: Image.Image, data: bytes, shorter_side: int | None, max_pixels: int) -> np.ndarray:
    is_jpeg = image.format in ("JPEG", "MPO")
    _check_cost(image, data, max_pixels)
    pixels = _decode_fast(image, data, shorter_side) if is_jpeg and image.mode in ("RGB", "L") else None
    if pixels is None:
        pixels = _decode_with_pillow(image)
        pixels = image_colour.deepened(pixels, image, data, max_pixels)
    # PNG and WebP may keep EXIF behind the pixels, so it is read once they are loaded.
    orientation = _orientation(image)
    if image.format != "DICOM":
        image.close()
    return _orient(pixels, orientation)


def _check_cost(image: Image.Image, data: bytes, max_pixels: int) -> None:
    width, height, extra, kind = image.width, image.height, 0, image.format or ""
    if kind in ("JPEG", "MPO"):
        kind, extra = "JPEG", image_bounds.jpeg_bytes(data, width, height)
    elif kind == "TIFF":
        kind, extra = "PNG", image_bounds.tiff_piece_bytes(image.tag_v2, width, height)  # type: ignore[attr-defined]
    elif kind == "WEBP":
        extra = webp_bounds.code_bytes(data, width * height)
    elif kind == "AVIF":
        extra = avif_bounds.extra_bytes(data, width * height)
    elif kind == "HEIF" and (image.mode != "RGB" or image.info.get("bit_depth", 8) > 8):
        kind = "deep HEIF"
    image_bounds.check_cost(kind, width, height, max_pixels, extra)


def _decode_fast(image: Image.Image, data: bytes, shorter_side: int | None) -> np.ndarray | None:
    """libjpeg-turbo in strict mode; None for what it refuses, so that Pillow tells damage from oddity."""
    scale: dict[str, int] = {}
    if shorter_side is not None and min(image.size) >= 2 * shorter_side:
        # The library picks a scale by both sides, so each gets the bound that the shorter one sets.
        ratio = shorter_side / min(image.size)
        scale = {"min_width": int(image.width * ratio), "min_height": int(image.height * ratio), "min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, **scale)
    except Exception:
        return None
    image_colour.convert_profile(pixels, image)
    return pixels


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    try:
        image.load()
    except Exception as error:
        raise ImageError("truncated", f"the pixels cannot all be decoded: {_told(error)}") from None
    return image_colour.to_rgb(image)


def _orientation(image: Image.Image) -> int:
    try:
        raw = image.info.get("Raw profile type exif")
        exif = image.info.get("exif") or (bytes.fromhex("".join(raw.split("\n")[3:])) if raw else b"")
        return 1 if image_bounds.is_bomb(exif) else int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        # Camera and messenger software writes EXIF that breaks every assumption of the reader; the picture is fine.
        return 1


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1-8 (TIFF 6.0); unknown values leave the image as it is."""
    if orientation not in range(2, 9):
        return pixels
    turned = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
