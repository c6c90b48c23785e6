"""A patch of skin to draw on: optical densities, relief and lighting.

Skin is modelled as paper behind ink: each pixel holds the optical density that melanin and blood add to the
base tone, so that the same lesion looks bright on light skin and dusky on dark skin without a second palette.
Whatever lies on top of the skin (scale, crust, pus) is an opaque layer. A relief map is lit at the end.

Lengths are in units of the short edge of the image; (0, 0) is the centre, x to the right, y downwards.
Fields are float32 [H, W].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Field: TypeAlias = npt.NDArray[np.float32]
Colour: TypeAlias = tuple[float, float, float]

# sRGB of unlit skin, Fitzpatrick 1 (very light) to 6 (very dark).
SKIN_TONES: tuple[Colour, ...] = (
    (0.955, 0.835, 0.775),
    (0.915, 0.760, 0.675),
    (0.845, 0.655, 0.540),
    (0.735, 0.530, 0.405),
    (0.560, 0.375, 0.270),
    (0.375, 0.245, 0.185),
)
DEPIGMENTED: Colour = (0.965, 0.905, 0.870)
# Density per unit of absorber in R, G, B: melanin absorbs blue most, haemoglobin green.
MELANIN = np.array([0.62, 0.95, 1.15], np.float32)
BLOOD = np.array([0.10, 1.00, 0.80], np.float32)
DRAPES: tuple[Colour, ...] = ((0.16, 0.34, 0.36), (0.13, 0.20, 0.33), (0.10, 0.10, 0.11), (0.72, 0.74, 0.76))


def smoothstep(low: float, high: float, values: Field) -> Field:
    """Hermite ramp: 0 where `values` <= low, 1 where >= high (reversed where low > high)."""
    t = np.clip((values - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@dataclass(slots=True)
class Canvas:
    """Everything that is known about the picture before it is lit. Built by `Canvas.blank`."""

    rng: np.random.Generator
    height: int
    width: int
    x: Field
    y: Field
    tone: Field  # density of the bare skin, [H, W, 3]
    melanin: Field
    blood: Field
    pallor: Field
    relief: Field
    gloss: Field
    layers: list[tuple[Field, Colour]] = field(default_factory=list)
    # Where lesions may lie: half extents along and across an axis at `axis_angle`.
    axis_angle: float = 0.0
    half_along: float = 0.5
    half_across: float = 0.5
    zoom: float = 1.0  # how near the camera is
    severity: float = 1.0  # how strong colours are
    focus_blur: float = 0.0  # sigma in units of the short edge
    backdrop: tuple[Field, Colour] | None = None

    @classmethod
    def blank(cls, rng: np.random.Generator, skin_type: int, height: int, width: int) -> Canvas:
        """Bare skin of a Fitzpatrick type (1-6) with the slow blotches of tone that all skin has."""
        short = min(height, width)
        columns = (np.arange(width, dtype=np.float32) - (width - 1) / 2) / short
        rows = (np.arange(height, dtype=np.float32) - (height - 1) / 2) / short
        base = np.asarray(SKIN_TONES[skin_type - 1], np.float32)
        neighbour = np.asarray(SKIN_TONES[int(np.clip(skin_type - 1 + rng.choice((-1, 1)), 0, 5))], np.float32)
        base = base + (neighbour - base) * np.float32(rng.uniform(0.0, 0.35))
        blank = np.zeros((height, width), np.float32)
        canvas = cls(
            rng=rng,
            height=height,
            width=width,
            x=np.broadcast_to(columns[None, :], (height, width)),
            y=np.broadcast_to(rows[:, None], (height, width)),
            tone=np.broadcast_to(-np.log(base), (height, width, 3)),
            melanin=blank.copy(),
            blood=blank.copy(),
            pallor=blank.copy(),
            relief=blank.copy(),
            gloss=blank + np.float32(0.05),
            half_along=max(height, width) / short / 2,
        )
        canvas.axis_angle = 0.0 if width >= height else float(np.pi / 2)
        canvas.zoom = rng.uniform(0.72, 1.12)
        canvas.severity = rng.uniform(0.6, 1.12)
        canvas.focus_blur = max(0.0, rng.uniform(-0.012, 0.010))
        canvas.melanin += 0.05 * canvas.noise(0.45) + 0.022 * canvas.noise(0.08)
        canvas.blood += 0.05 * canvas.noise(0.30) + 0.03 * canvas.noise(0.05)
        canvas.relief += 0.0007 * canvas.noise(0.025) + 0.0004 * canvas.noise(0.012)
        return canvas

    @property
    def pixel(self) -> float:
        """Edge of a pixel in units of the short edge."""
        return 1.0 / min(self.height, self.width)

    def noise(self, cell: float) -> Field:
        """Smooth noise of about unit variance, whose features are about `cell` wide."""
        rows = max(2, round(self.height * self.pixel / cell) + 1)
        columns = max(2, round(self.width * self.pixel / cell) + 1)
        rows, columns = min(rows, self.height), min(columns, self.width)
        grid = self.rng.standard_normal((rows, columns), np.float32)
        return cv2.resize(grid, (self.width, self.height), interpolation=cv2.INTER_CUBIC)

    def along_across(self) -> tuple[Field, Field]:
        """Coordinates in the frame of the body part: along its axis, and across it."""
        cos, sin = np.float32(np.cos(self.axis_angle)), np.float32(np.sin(self.axis_angle))
        return self.x * cos + self.y * sin, self.y * cos - self.x * sin

    def cover(self, alpha: Field, colour: Colour) -> None:
        """Lays something opaque over the skin; later layers hide earlier ones."""
        self.layers.append((alpha, colour))

    def strokes(self, lines: list[npt.NDArray[np.float32]], thickness: float) -> Field:
        """Alpha of antialiased polylines; each is [P, 2] points (x, y), thickness in units of the short edge."""
        mask = np.zeros((self.height, self.width), np.uint8)
        thickness_px = thickness / self.pixel
        for line in lines:
            cv2.polylines(mask, [self._fixed_point(line)], False, 255, max(1, round(thickness_px)), cv2.LINE_AA, 4)
        return mask.astype(np.float32) * np.float32(min(1.0, thickness_px) / 255.0)

    def _fixed_point(self, points: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Pixel coordinates with the four fractional bits that cv2's `shift` argument expects."""
        centre = np.array([(self.width - 1) / 2, (self.height - 1) / 2])
        return np.round((points / self.pixel + centre) * 16).astype(np.int32)

    def photograph(self) -> npt.NDArray[np.uint8]:
        """The lit photograph, uint8 [H, W, 3] RGB."""
        density = self.tone + self.melanin[..., None] * MELANIN
        depigmented = -np.log(np.asarray(DEPIGMENTED, np.float32))
        density += np.clip(self.pallor, 0, 1)[..., None] * (depigmented - density)
        density += self.blood[..., None] * BLOOD
        colour = np.exp(-density)
        for alpha, layer in self.layers:
            colour += alpha[..., None] * (np.asarray(layer, np.float32) - colour)
        diffuse, specular = self._light()
        colour *= diffuse[..., None]
        colour += specular[..., None]
        if self.backdrop is not None:
            alpha, drape = self.backdrop
            colour += alpha[..., None] * (np.asarray(drape, np.float32) - colour)
        if self.focus_blur > self.pixel / 4:
            colour = cv2.GaussianBlur(colour, (0, 0), self.focus_blur / self.pixel)
        return self._expose(colour)

    def _light(self) -> tuple[Field, Field]:
        """Diffuse factor (1 on flat skin) and specular addition of one lamp beside the camera (Blinn-Phong)."""
        azimuth, elevation = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.75, 1.15)
        lamp = np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], np.float32
        )
        half = lamp + np.array([0, 0, 1], np.float32)
        half /= np.linalg.norm(half)
        scale = 1.0 / (8 * self.pixel)
        slope_x = cv2.Sobel(self.relief, cv2.CV_32F, 1, 0, scale=scale)
        slope_y = cv2.Sobel(self.relief, cv2.CV_32F, 0, 1, scale=scale)
        norm = 1.0 / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
        diffuse = (lamp[2] - slope_x * lamp[0] - slope_y * lamp[1]) * norm / lamp[2]
        shine = np.clip((half[2] - slope_x * half[0] - slope_y * half[1]) * norm, 0, 1)
        specular = self.gloss * shine**24 - self.gloss * np.float32(half[2] ** 24)
        # Light scattered inside the skin fills the shadows, so that no slope turns black.
        return np.clip(0.42 + 0.58 * diffuse, 0.5, 1.3), np.maximum(specular, 0)

    def _expose(self, colour: Field) -> npt.NDArray[np.uint8]:
        """Fall-off of the lamp, vignette, white balance, exposure and sensor noise."""
        rng = self.rng
        angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.16)
        ramp = self.x * np.float32(np.cos(angle)) + self.y * np.float32(np.sin(angle))
        vignette = np.float32(rng.uniform(0.0, 0.35)) * (self.x * self.x + self.y * self.y)
        gain = np.float32(rng.uniform(0.82, 1.1)) * (1.0 + np.float32(strength) * ramp - vignette)
        balance = rng.normal(1.0, 0.03, 3).astype(np.float32)
        colour = colour * gain[..., None] * balance
        grain = rng.standard_normal((self.height, self.width, 1), np.float32) * np.float32(rng.uniform(0.004, 0.014))
        return (np.clip(colour + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
