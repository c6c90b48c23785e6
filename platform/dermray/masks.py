"""Masks: grey pictures of numbers, one of each pixel of an image, kept without loss.

a mask's file ─ decode_mask ─▶ uint8 [H, W] ─ fitted ─▶ uint8 [h, w] of the stored image ─ encode_mask ─▶ PNG
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from dermray import images
from dermray.errors import ImageError

FORMATS = ("PNG", "BMP", "GIF", "JPEG")
_PNG = b"\x89PNG"
# Of a PNG: bits of a value, and the kind of its pixels: grey, and two with transparency.
_BITS, _KIND, _GREY, _WITH_ALPHA = 24, 25, 0, (4, 6)
_WANTED = "save it as 8-bit grey PNG without transparency"


def decode_mask(data: bytes, *, max_pixels: int = images.DEFAULT_MAX_PIXELS) -> np.ndarray:
    """A mask's file (PNG, BMP, GIF, JPEG) → its numbers, uint8 [H, W]. Masks of two colours are 0 and 255.

    Raises:
        ImageError: as `images.decode`; `unsupported_format`: another format, colours, transparency, or a grey of 2, 4
            or 16 bits, whose numbers decoding changes.
    """
    try:
        images.inspect(data, accepted=FORMATS)
    except ImageError as error:
        if error.reason not in ("unsupported_format", "not_an_image"):
            raise
        raise ImageError(error.reason, f"no mask of one of {', '.join(FORMATS)}; {_WANTED}") from None
    if data.startswith(_PNG) and (
        data[_BITS] == 16 or data[_KIND] in _WITH_ALPHA or (data[_KIND] == _GREY and data[_BITS] in (2, 4))
    ):
        raise ImageError("unsupported_format", f"a mask of 2, 4 or 16 bits or with transparency; {_WANTED}")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if "transparency" in opened.info:
            raise ImageError("unsupported_format", f"a mask of which a number is transparent; {_WANTED}")
    pixels = images.decode(data, max_pixels=max_pixels)
    grey = pixels[:, :, 0]
    if not (np.array_equal(grey, pixels[:, :, 1]) and np.array_equal(grey, pixels[:, :, 2])):
        raise ImageError("unsupported_format", "a mask in colours; save the numbers of its classes as 8-bit grey PNG")
    return np.ascontiguousarray(grey)


def fitted(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask of an image before it was shrunk, or of the stored image, as numbers of the stored image's pixels.

    Each pixel takes the number of the nearest one: 4 x 2 pixels `[[1, 1, 2, 2], [1, 1, 2, 2]]` fit 2 x 1: `[[1, 2]]`.

    Args:
        mask: uint8 [H, W].
        width, height: of the stored image, in pixels.

    Returns:
        uint8 [height, width].

    Raises:
        ImageError: `mask_size`: it has other proportions (a rounded pixel aside), or fewer pixels.
    """
    own_height, own_width = mask.shape
    side = min(width, height)
    scale = side / min(own_width, own_height)
    off = max(abs(own_width * scale - width), abs(own_height * scale - height))
    # A large JPEG is decoded at a fraction of its size, which rounds its sides up: a pixel of the shorter side.
    if scale > 1 or off > 1.5 + max(width, height) / side:
        raise ImageError(
            "mask_size",
            f"the mask has {own_width} x {own_height} pixels, which are not those of its image, stored as "
            f"{width} x {height}",
        )
    if (own_width, own_height) == (width, height):
        return mask
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def encode_mask(mask: np.ndarray) -> bytes:
    """uint8 [H, W] → PNG, which `decode_mask` gives back as it is."""
    _, encoded = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    return encoded.tobytes()
