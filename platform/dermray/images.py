"""The one place that checks, decodes, orients, resizes and encodes images.

The size is read from the header and refused before any pixel is decoded. Plain JPEGs take a fast path (libjpeg-turbo,
scaled down in the DCT domain where the target allows it); everything else goes through Pillow. Pixels come out
upright, as sRGB, without alpha, and encoded images carry no metadata. What is in the published form already stays as
it is, byte for byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from functools import cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, JpegImagePlugin

from dermray.errors import ImageError

DEFAULT_MAX_PIXELS = 50_000_000
# Pillow refuses more than this by itself, whatever limit is asked for.
PILLOW_MAX_PIXELS = 178_956_970
# Raster formats only: Pillow also opens formats that run interpreters (EPS) or hold no photograph.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION_TAG = 0x0112
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
# What Pillow's readers raise on damaged content, beyond OSError.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError)

# The header is checked against a limit of ours, which Pillow's warning would only repeat.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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


def inspect(data: bytes) -> ImageHeader:
    """Format and size from the header alone.

    Raises:
        ImageError: `zero_byte`, `not_an_image`, or `too_many_pixels` (beyond what Pillow opens at all).
    """
    return _header(_open(data))


def decode(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, min_side: int = 1, shorter_side: int | None = None
) -> np.ndarray:
    """Bytes of any supported format → uint8 [H, W, 3] RGB, upright.

    EXIF orientation is applied, transparency composited on white, an embedded ICC profile converted to sRGB;
    CMYK, palette, 16-bit and grey images become 8-bit RGB; of an animation the first frame is taken.
    With `shorter_side` a large JPEG may come out reduced, its shorter side still at least that long.

    Raises:
        ImageError: with reason `zero_byte`, `not_an_image`, `truncated` (also: damaged), `too_many_pixels` or
            `too_small`.
    """
    image = _open(data)
    _check_size(_header(image), max_pixels, min_side)
    return _pixels(image, data, shorter_side)


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
        ImageError: as `decode`; and `blank`, where brightness varies by less than `min_contrast` of 255 levels.
    """
    image = _open(data)
    header = _header(image)
    _check_size(header, max_pixels, min_side)
    pixels = resize_shorter(_pixels(image, data, image_size), image_size)
    height, width = pixels.shape[:2]
    jpeg = data if _is_published(image, data, image_size, jpeg_quality) else encode_jpeg(pixels, jpeg_quality)
    small = _small_grey(pixels)
    if int(small.max()) - int(small.min()) < min_contrast:
        raise ImageError("blank", f"its brightness varies by less than {min_contrast} of 255 levels: nothing to see")
    return StandardImage(jpeg, width, height, _hash(small), header)


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


def resize_shorter(image: np.ndarray, side: int) -> np.ndarray:
    """Shrink uint8 [H, W, 3] so that its shorter side is `side`, with antialiasing; never enlarges."""
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


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] RGB → baseline JPEG with 4:2:0 chroma and no metadata."""
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


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("zero_byte", "the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except Image.UnidentifiedImageError:
        raise ImageError("not_an_image", f"no known image format; it begins with {data[:12]!r}") from None
    except DAMAGE as error:
        raise ImageError("not_an_image", f"the header is unreadable: {error}") from None


def _header(image: Image.Image) -> ImageHeader:
    return ImageHeader(image.format or "", image.width, image.height)


def _check_size(header: ImageHeader, max_pixels: int, min_side: int) -> None:
    size = f"{header.width} x {header.height}"
    if header.width * header.height > max_pixels:
        raise ImageError("too_many_pixels", f"{size} is more than the {max_pixels:,} pixels allowed")
    if min(header.width, header.height) < min_side:
        raise ImageError("too_small", f"{size}: the shorter side is below {min_side}")


def _pixels(image: Image.Image, data: bytes, shorter_side: int | None) -> np.ndarray:
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        pixels = _decode_fast(image, data, shorter_side)
    if pixels is None:
        pixels = _decode_with_pillow(image)
    # PNG and WebP may keep EXIF behind the pixels, so it is read once they are loaded.
    return _orient(pixels, _orientation(image))


def _decode_fast(image: Image.Image, data: bytes, shorter_side: int | None) -> np.ndarray | None:
    """libjpeg-turbo in strict mode; None for what it refuses, so that Pillow tells damage from oddity."""
    scale: dict[str, int] = {}
    if shorter_side is not None and min(image.size) >= 2 * shorter_side:
        # The library picks a scale by both sides, so each gets the bound that the shorter one sets.
        ratio = shorter_side / min(image.size)
        scale = {"min_width": int(image.width * ratio), "min_height": int(image.height * ratio), "min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, **scale)
    except ValueError:
        return None
    profile = _foreign_profile(image)
    if profile is None or image.mode != "RGB":
        return pixels
    return np.asarray(_to_srgb(Image.fromarray(pixels), profile))


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    try:
        image.load()
        return np.array(_flatten(image))
    except DAMAGE as error:
        raise ImageError("truncated", f"the pixels cannot all be decoded: {error}") from None


def _flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode → 8-bit RGB on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    profile = _foreign_profile(image)
    if profile is not None and image.mode in ("RGB", "CMYK"):
        return _to_srgb(image, profile)
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Deep grey levels → uint8: 16-bit integers by their full range, floats from [0, 1] or [0, 255]."""
    peak = float(values.max(initial=0))
    if values.dtype.kind == "f":
        full = 1.0 if peak <= 1.0 else 255.0
    else:
        full = 255.0 if peak <= 255 and values.dtype.itemsize > 2 else max(65535.0, peak)
    return np.clip(np.rint(np.nan_to_num(values.astype(np.float64)) * (255.0 / full)), 0, 255).astype(np.uint8)


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded ICC profile if it fits the image's colour space and is not sRGB already."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if profile.profile.xcolor_space.strip() != image.mode:
            return None
        return None if "srgb" in (profile.profile.profile_description or "").lower() else profile
    except (OSError, ImageCms.PyCMSError, ValueError):
        return None


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    try:
        converted: Any = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
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
