"""Colour augmentation of a batch on the training device: jitter, then greyscale, as torchvision does to a PIL image.

Every operation follows Pillow's 8-bit arithmetic, so a result differs from the published pipeline's by nothing but the
random numbers. Those are a pure function of (seed, epoch, sample): neither batch nor worker matters. On a CPU
`color_host` does the same to bytes.

Pixels are float32 `[n, 3, S, S]` of whole levels 0…255, channels in the order RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dermray.ingest import color_host
from dermray.ingest.settings import DataConfig

# Bounds what an operation needs beside the batch: some ten planes of so many images.
CHUNK_IMAGES = 256
# ITU-R 601 luma in Pillow's 16-bit fixed point.
LUMA = (19595, 38470, 7471)
# Keeps these random numbers apart from those of crops and captions, which have the same (seed, epoch, sample).
STREAM = 0xC010_0001
NUM_DRAWS = 10
GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)


@dataclass(frozen=True)
class Draws:
    """What happens to each of n images.

    Attributes:
        jitter: bool `[n]`, whether colours are jittered.
        factors: float64 `[n, 4]`: brightness, contrast, saturation (1 changes nothing), hue shift in turns.
        order: int64 `[n, 4]`, a permutation of the four operations.
        greyscale: bool `[n]`.
    """

    jitter: npt.NDArray[np.bool_]
    factors: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    greyscale: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ColorAugmentation:
    """The keys `data.color_jitter`, `data.color_jitter_prob` and `data.grayscale_prob` of a run, and its seed."""

    settings: DataConfig
    seed: int

    def __call__(self, pixels: Tensor, *, epoch: int, samples: npt.NDArray[np.int64]) -> Tensor:
        """Augment a batch where it lies.

        Args:
            pixels: uint8 `[n, 3, S, S]`.
            epoch: of the batch.
            samples: indices of its samples, int64 `[n]`.

        Returns:
            float32 `[n, 3, S, S]`, levels 0…255.
        """
        if self.settings.color_jitter is None and not self.settings.grayscale_prob:
            return pixels.float()
        chosen = self.draw(epoch, samples)
        if pixels.device.type == "cpu":
            done = color_host.apply(
                pixels.numpy(),
                jitter=chosen.jitter,
                factors=chosen.factors,
                order=chosen.order,
                grey=chosen.greyscale,
            )
            return torch.from_numpy(done).float()
        return on_device(pixels.float(), chosen)

    def draw(self, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
        """The random choices for samples of an epoch."""
        uniform = uniforms(self.seed, epoch, samples)
        widths = np.array(self.settings.color_jitter or (0.0, 0.0, 0.0, 0.0))
        centres = np.array([1.0, 1.0, 1.0, 0.0])
        low = np.maximum(centres - widths, [0.0, 0.0, 0.0, -0.5])
        jitters = self.settings.color_jitter is not None
        return Draws(
            jitter=(uniform[:, 0] < self.settings.color_jitter_prob) & jitters,
            factors=low + uniform[:, 1:5] * (centres + widths - low),
            order=np.argsort(uniform[:, 5:9], axis=1),
            greyscale=uniform[:, 9] < self.settings.grayscale_prob,
        )


def on_device(levels: Tensor, draws: Draws) -> Tensor:
    """Do what was drawn to float32 `[n, 3, S, S]`, in place, by one operation on many images at a time."""
    for position in range(4):
        for operation, apply in enumerate(OPERATIONS):
            rows = np.flatnonzero(draws.jitter & (draws.order[:, position] == operation))
            _replace(levels, rows, draws.factors[:, operation], apply)
    _replace(levels, np.flatnonzero(draws.greyscale), draws.factors[:, 0], lambda part, _: greyscale(part))
    return levels


def uniforms(seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), float64 `[n, NUM_DRAWS]`: SplitMix64 (Steele et al., 2014) keyed by seed, epoch and sample."""
    key = np.zeros(1, dtype=np.uint64)
    for word in (STREAM, seed, epoch):
        key = _mix((key + GOLDEN) ^ np.uint64(word))
    state = _mix((key + GOLDEN) ^ samples.astype(np.uint64))
    draws = _mix(state[:, None] + GOLDEN * np.arange(1, NUM_DRAWS + 1, dtype=np.uint64))
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def brightness(levels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black; `factor` is float32 `[n, 1, 1, 1]`, here and below."""
    return _blend(torch.zeros_like(levels), levels, factor)


def contrast(levels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the image's luma."""
    mean = _luma(levels).double().mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor().float(), levels, factor)


def saturation(levels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return _blend(_luma(levels), levels, factor)


def hue(levels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by a share of the colour circle, in steps of 1/256 as Pillow's HSV has them."""
    angle, chroma, value = _to_hsv(levels)
    # torchvision truncates shift * 255 and lets the byte wrap at 256.
    return _to_rgb((angle + (shift.squeeze(1) * 255).trunc()) % 256, chroma, value)


def greyscale(levels: Tensor) -> Tensor:
    """ITU-R 601 luma in all three channels."""
    return _luma(levels).expand_as(levels)


# In the order in which torchvision numbers them.
OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)


def _replace(
    levels: Tensor,
    rows: npt.NDArray[np.int64],
    factors: npt.NDArray[np.float64],
    apply: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Apply an operation to some images of the batch in place."""
    for start in range(0, len(rows), CHUNK_IMAGES):
        part = rows[start : start + CHUNK_IMAGES]
        index = torch.from_numpy(part).to(levels.device, non_blocking=True)
        factor = torch.from_numpy(factors[part].astype(np.float32)).to(levels.device, non_blocking=True)
        levels[index] = apply(levels[index], factor.view(-1, 1, 1, 1))


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))


def _luma(levels: Tensor) -> Tensor:
    """`[n, 1, S, S]`, rounded to whole levels."""
    red, green, blue = levels.int().unbind(1)
    mixed = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000
    return (mixed >> 16).float().unsqueeze(1)


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """`start + factor * (end - start)`, cut to whole levels as Pillow's blend does."""
    return (start + factor * (end - start)).clamp_(0, 255).trunc_()


def _to_hsv(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value as whole levels, `[n, S, S]` each."""
    red, green, blue = levels.unbind(1)
    value, least = levels.amax(1), levels.amin(1)
    spread = value - least
    grey = spread == 0
    divisor = torch.where(grey, 1.0, spread)
    # Pillow keeps its variables in single precision and computes between them in double.
    to_red, to_green, to_blue = (((value - channel) / divisor).double() for channel in (red, green, blue))
    sixths = torch.where(
        red == value,
        to_blue - to_green,
        torch.where(green == value, 2.0 + to_red - to_blue, 4.0 + to_green - to_red),
    )
    turns = ((sixths.float().double() / 6.0 + 1.0) % 1.0).float()
    share = spread / torch.where(grey, 1.0, value)
    angle = torch.where(grey, 0.0, (turns.double() * 255.0).trunc().float())
    chroma = torch.where(grey, 0.0, (share.double() * 255.0).trunc().float())
    return angle, chroma, value


def _to_rgb(angle: Tensor, chroma: Tensor, value: Tensor) -> Tensor:
    sixths = angle * 6.0 / 255.0
    sector = sixths.floor()
    part = sixths - sector
    share = chroma / 255.0
    low = _half_up(value * (1.0 - share))
    falling = _half_up(value * (1.0 - share * part))
    rising = _half_up(value * (1.0 - share * (1.0 - part)))
    choice = (sector.long() % 6).unsqueeze(1)
    channels = [
        torch.stack(shades, 1).gather(1, choice).squeeze(1)
        for shades in (
            (value, falling, low, low, rising, value),
            (rising, value, value, falling, low, low),
            (low, low, rising, value, value, falling),
        )
    ]
    return torch.stack(channels, 1)


def _half_up(levels: Tensor) -> Tensor:
    """Rounded half away from zero, as C does; torch rounds half to even."""
    return (levels + 0.5).floor_()
