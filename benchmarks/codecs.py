"""Which codec path makes a stored image fastest: `python benchmarks/codecs.py`.

A JPEG of 600 x 450 pixels and one of 12 megapixels become pixels whose shorter side is 256, by each library's own
decoder and antialiased reduction, on one core: simplejpeg (libjpeg-turbo, reduced while decoding where that is allowed)
with OpenCV as `dermray.images` uses them, OpenCV alone, torchvision, and Pillow with and without `draft`. Prints the
best of several rounds in milliseconds, and times our path.
"""

from __future__ import annotations

import io
import sys
import timeit
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional

from dermray import entry, images

SIDE = 256
SIZES = {"600 x 450": (600, 450, 40), "12 megapixels": (4000, 3000, 3)}
ROUNDS = 7


def main() -> int:
    """Measure each size by each path."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for name, (width, height, number) in SIZES.items():
        data = photograph(width, height)
        size = (round(width * SIDE / height), SIDE)
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)

        def ours(data: bytes = data) -> object:
            return images.resize_shorter(images.decode(data, shorter_side=SIDE), SIDE)

        def opencv(data: bytes = data, size: tuple[int, int] = size) -> object:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

        def vision(tensor: torch.Tensor = tensor) -> object:
            pixels = torchvision.io.decode_jpeg(tensor)
            return functional.resize(pixels, [SIDE], antialias=True)

        def pillow(data: bytes = data, size: tuple[int, int] = size) -> object:
            return np.asarray(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BILINEAR))

        def pillow_draft(data: bytes = data, size: tuple[int, int] = size) -> object:
            image = Image.open(io.BytesIO(data))
            image.draft("RGB", size)
            return np.asarray(image.resize(size, Image.Resampling.BILINEAR))

        paths: dict[str, Callable[[], object]] = {
            "ours": ours, "OpenCV": opencv, "torchvision": vision, "Pillow": pillow, "Pillow with draft": pillow_draft,
        }  # fmt: skip
        times = {path: min(timeit.repeat(run, number=number, repeat=ROUNDS)) / number for path, run in paths.items()}
        for path, seconds in times.items():
            print(f"{name}: {path:18} {seconds * 1e3:7.2f} ms, {seconds / times['ours']:.2f} of ours")
    return 0


def photograph(width: int, height: int) -> bytes:
    """A smooth picture with some grain as JPEG."""
    random = np.random.default_rng(0)
    coarse = random.integers(60, 220, (8, 10, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    grain = random.normal(0, 8, smooth.shape).astype(np.int16)
    return images.encode_jpeg(np.clip(smooth + grain, 0, 255).astype(np.uint8), 90)


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
