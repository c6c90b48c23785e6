"""Any colour model and depth → 8-bit sRGB on white, in strips, so that the steps in between take little memory."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms

from dermray import image_bounds

# Depths that sensors have; the smallest that holds an image's levels is taken, where the file does not tell.
SENSOR_BITS = (8, 10, 12, 14, 16)
STRIP_PIXELS = 1 << 20
MAX_PROFILE_BYTES = 4 << 20
# Of a colour profile: its number of tags, and what a tag takes in their table.
TAGS_AT, TAG_BYTES = 128, 12
# Where the upper byte of 16 bits is below this everywhere, the picture may have fewer bits than its file.
SHALLOW = 64


def to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded image of any Pillow mode → uint8 [H, W, 3], its own orientation kept."""
    flatten = _flattener(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = np.asarray(flatten(strip))
    return pixels


def convert_profile(pixels: np.ndarray, image: Image.Image) -> None:
    """Bring uint8 [H, W, 3] RGB to sRGB in place, if `image`, from which they are, has another profile."""
    profile = _foreign_profile(image)
    if profile is None or image.mode != "RGB":
        return
    convert = _to_srgb(profile, "RGB")
    rows = max(1, STRIP_PIXELS // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        pixels[top : top + rows] = np.asarray(convert(Image.fromarray(pixels[top : top + rows])))


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The rows of an image by strips of about `STRIP_PIXELS`, each with its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _flattener(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Makes strips of an image, of any Pillow mode, 8-bit RGB on white."""
    if image.mode.startswith("I") or image.mode == "F":
        full = _full_scale(image)
        return lambda strip: Image.fromarray(_to_8_bit(np.asarray(strip), full)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white
    profile = _foreign_profile(image)
    if profile is not None and image.mode in ("RGB", "CMYK"):
        return _to_srgb(profile, image.mode)
    return lambda strip: strip if strip.mode == "RGB" else strip.convert("RGB")


def _over_white(strip: Image.Image) -> Image.Image:
    layer = strip.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _full_scale(image: Image.Image) -> float:
    """The level that is white: by what the file says of its depth or by the brightest one; of floats 1 or 255."""
    peak = max(float(np.asarray(strip).max(initial=0)) for _, strip in _strips(image))
    if image.mode == "F":
        return 1.0 if peak <= 1.0 else 255.0
    return _white_level(peak, image.info.get("significant_bits"))


def _white_level(peak: float, significant_bits: int | None) -> float:
    """White of deep levels up to `peak`: 12 bits in a file of 16 would otherwise come out nearly black."""
    bits = (significant_bits,) if significant_bits else ()
    return next((2.0**n - 1 for n in (*bits, *SENSOR_BITS) if peak <= 2.0**n - 1), max(65535.0, peak))


def _to_8_bit(values: np.ndarray, full: float) -> np.ndarray:
    """Deep grey levels, or channels, → uint8, `full` being white."""
    if values.dtype == np.uint16:
        levels = np.rint(np.arange(1 << 16) * (255.0 / full))
        return np.clip(levels, 0, 255).astype(np.uint8)[values]
    return np.clip(np.rint(np.nan_to_num(values.astype(np.float64)) * (255.0 / full)), 0, 255).astype(np.uint8)


def deepened(pixels: np.ndarray, image: Image.Image, data: bytes, max_pixels: int) -> np.ndarray:
    """A nearly black colour image again, by its own depth: Pillow takes the upper byte of 16 bits alone.

    Raises:
        ImageError: `too_many_pixels`: decoding it a second time would take more memory than is allowed.
    """
    if image.info.get("stored_bits") != 16 or image.mode not in ("RGB", "RGBA") or pixels.max(initial=0) >= SHALLOW:
        return pixels
    image_bounds.check_cost("16-bit " + image.mode, image.width, image.height, max_pixels)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3 or values.shape[:2] != pixels.shape[:2]:
        return pixels
    full = _white_level(float(values[..., :3].max(initial=0)), image.info.get("significant_bits"))
    rows = max(1, STRIP_PIXELS // values.shape[1])
    for top in range(0, len(values), rows):
        colour = _to_8_bit(values[top : top + rows, :, 2::-1], full)
        if values.shape[2] == 4:
            share = values[top : top + rows, :, 3:] / 65535.0
            colour = np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)
        pixels[top : top + rows] = colour
    return pixels


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded ICC profile if it fits the image's colour space and is not sRGB already."""
    data = image.info.get("icc_profile")
    if not data or len(data) > MAX_PROFILE_BYTES:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(_of_bounded_cost(data)))
        if profile.profile.xcolor_space.strip() != image.mode:
            return None
        return None if "srgb" in (profile.profile.profile_description or "").lower() else profile
    except Exception:
        # A profile that the library does not take: the picture is fine.
        return None


def _of_bounded_cost(profile: bytes) -> bytes:
    """An ICC profile without its transforms in floating point, beside which it has others of lower precision.

    They are lists of elements, any number of which may be the same bytes: one of 4 MB would take 500 GB, or hours.
    """
    table, (count,) = TAGS_AT + 4, struct.unpack_from(">I", profile, TAGS_AT)
    cheap = bytearray(profile)
    for at in range(table, min(table + count * TAG_BYTES, len(profile)), TAG_BYTES):
        if profile.startswith(b"D2B", at):
            # The name of no tag: readers pass over those that they do not know.
            cheap[at : at + 4] = b"\x00\x00\x00\x00"
    return bytes(cheap)


def _to_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> Callable[[Image.Image], Image.Image]:
    try:
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:
        return lambda strip: strip.convert("RGB")

    def converted(strip: Image.Image) -> Image.Image:
        done: Any = ImageCms.applyTransform(strip, transform)
        return done

    return converted
