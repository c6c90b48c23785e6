"""Where lesions lie and how far each pixel is from them.

A group of lesions becomes one field `rho`: 0 at the centre of the nearest lesion, 1 on its border, larger
outside. Every mask, ring, dome and halo is a function of `rho`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from dermray.corpus.synthetic.canvas import Canvas, Colour, Field, smoothstep

Layout = Literal["single", "few", "scattered", "grouped", "band", "symmetric", "inside", "around", "track", "whole"]
Range = tuple[float, float]
# Layouts whose lesions may run into one another.
MAY_TOUCH = frozenset({"inside", "grouped", "band", "symmetric"})
FAR = 9.0
# How far beyond its border (in radii) a lesion still writes `rho`: halos need it.
REACH = 1.9


@dataclass(frozen=True, slots=True)
class LesionGroup:
    """Lesions of one kind in a condition. Ranges are drawn uniformly per image; lengths in short edges."""

    layout: Layout
    count: tuple[int, int] = (1, 1)
    radius: Range = (0.2, 0.3)
    aspect: Range = (1.0, 1.3)
    wobble: float = 0.2  # irregularity of the outline, in radii
    softness: float = 0.12  # width of the border, in radii
    square: bool = False  # straight edges and corners
    hollow: float = 0.0  # 1: a ring with normal skin inside
    aligned: bool = False  # long axes share one direction
    blood: Range = (0.0, 0.0)
    melanin: Range = (0.0, 0.0)
    pallor: Range = (0.0, 0.0)
    tint: tuple[Colour, float] | None = None  # a colour of its own and its opacity
    plateau: float = 0.0  # height of a flat top, in radii
    dome: float = 0.0  # height of a round top, in radii
    gloss: float = 0.0
    surface: tuple[str, ...] = ()  # names of `surface.SURFACES`, in order


@dataclass(slots=True)
class Lesions:
    """The lesions of one group as placed: `spots` [N, 5] are (x, y, radius along, radius across, angle)."""

    spots: npt.NDArray[np.float32]
    rho: Field
    size: Field  # radius of the nearest lesion
    mask: Field


def place(canvas: Canvas, group: LesionGroup, parent: Lesions | None) -> Lesions:
    """Chooses positions and computes the group's fields. `parent` is the group that "inside"/"around" refer to."""
    if group.layout == "track":
        return _track(canvas, group)
    spots = _spots(canvas, group, parent)
    rho, size = _nearest(canvas, group, spots)
    mask = smoothstep(1 + group.softness, 1 - group.softness, rho)
    if group.hollow:
        # The clearing in the middle keeps a fifth of the colour, as old inflammation does.
        mask = mask * (1 - group.hollow * smoothstep(0.78, 0.5, rho))
    return Lesions(spots, rho, size, mask)


def _spots(canvas: Canvas, group: LesionGroup, parent: Lesions | None) -> npt.NDArray[np.float32]:
    rng = canvas.rng
    count = int(rng.integers(group.count[0], group.count[1] + 1))
    if group.layout == "symmetric":
        points = _symmetric_points(canvas)
        count = 2
    else:
        points = _candidates(canvas, group, parent, 5 * count if count > 1 else 1)
    radius = rng.uniform(*group.radius, len(points)) * canvas.zoom
    if group.layout == "symmetric":
        radius[1] = radius[0] * rng.uniform(0.92, 1.08)
    kept = _without_overlap(points, radius, count, 0.75 if group.layout in MAY_TOUCH else 1.08)
    aspect = np.sqrt(rng.uniform(*group.aspect, len(kept)))
    if group.aligned:
        angle = rng.normal(canvas.axis_angle + rng.uniform(-0.2, 0.2), 0.12, len(kept))
    else:
        angle = rng.uniform(0, np.pi, len(kept))
    return np.stack(
        [points[kept, 0], points[kept, 1], radius[kept] * aspect, radius[kept] / aspect, angle], axis=1
    ).astype(np.float32)


def _candidates(canvas: Canvas, group: LesionGroup, parent: Lesions | None, num: int) -> npt.NDArray[np.float64]:
    """Points (x, y) [num, 2] that the layout allows."""
    rng = canvas.rng
    if parent is not None and group.layout == "inside":
        rows, columns = np.nonzero(parent.mask > 0.6)
        if len(rows):
            chosen = rng.integers(0, len(rows), num)
            return np.stack([canvas.x[rows[chosen], columns[chosen]], canvas.y[rows[chosen], columns[chosen]]], 1)
    if parent is not None and group.layout == "around":
        return _points_around(canvas, parent, num)
    reach = group.radius[1] * canvas.zoom
    along, across = canvas.half_along - 0.55 * reach, canvas.half_across - 0.55 * reach
    if group.layout == "few" and group.count[1] <= 3:
        along, across = 0.6 * along, 0.6 * across
    if group.layout == "single":
        local = rng.normal(0, 0.06, (num, 2))
    elif group.layout == "grouped":
        centre = rng.uniform(-0.08, 0.08, 2)
        local = centre + rng.normal(0, 0.17, (num, 2))
    elif group.layout == "band":
        t = rng.uniform(-1, 1, num)
        local = np.stack([t * along, rng.normal(0, 0.035, num) + rng.uniform(-0.1, 0.1) + 0.08 * np.cos(2 * t)], 1)
    else:
        local = rng.uniform(-1, 1, (num, 2)) * (along, across)
    local = np.clip(local, (-along, -across), (along, across))
    cos, sin = np.cos(canvas.axis_angle), np.sin(canvas.axis_angle)
    return np.stack([local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos], 1)


def _symmetric_points(canvas: Canvas) -> npt.NDArray[np.float64]:
    """One point on either cheek."""
    offset = 0.5 * canvas.width * canvas.pixel * canvas.rng.uniform(0.55, 0.64)
    y = canvas.rng.normal(0.02, 0.04)
    return np.array([[-offset, y], [offset, y + canvas.rng.normal(0, 0.02)]])


def _points_around(canvas: Canvas, parent: Lesions, num: int) -> npt.NDArray[np.float64]:
    """Points just outside the parent's border."""
    rows, columns = np.nonzero((parent.rho > 1.15) & (parent.rho < REACH))
    if not len(rows):
        return canvas.rng.uniform(-0.45, 0.45, (num, 2))
    chosen = canvas.rng.integers(0, len(rows), num)
    return np.stack([canvas.x[rows[chosen], columns[chosen]], canvas.y[rows[chosen], columns[chosen]]], 1)


def _without_overlap(
    points: npt.NDArray[np.float64], radius: npt.NDArray[np.float64], count: int, gap: float
) -> npt.NDArray[np.int64]:
    """Indices of at most `count` points, greedily, no two closer than `gap` times the sum of their radii."""
    kept = [0]
    for index in range(1, len(points)):
        if len(kept) == count:
            break
        distance = np.hypot(*(points[kept] - points[index]).T)
        if (distance > gap * (radius[kept] + radius[index])).all():
            kept.append(index)
    return np.array(kept)


def _nearest(canvas: Canvas, group: LesionGroup, spots: npt.NDArray[np.float32]) -> tuple[Field, Field]:
    """`rho` and radius of the nearest lesion at each pixel; outlines warped by one pair of noise fields."""
    rho = np.full((canvas.height, canvas.width), FAR, np.float32)
    size = np.full_like(rho, spots[:, 2].mean())
    if group.layout == "whole":
        return np.zeros_like(rho), size
    typical = float(spots[:, 2:4].mean())
    warp_x, warp_y = _warp(canvas, typical), _warp(canvas, typical)
    for x, y, along, across, angle in spots.tolist():
        reach = REACH * max(along, across)
        rows = _window(y, reach, canvas.height, canvas.pixel)
        columns = _window(x, reach, canvas.width, canvas.pixel)
        amplitude = np.float32(group.wobble * 0.38 * (along * across) ** 0.5)
        dx = canvas.x[rows, columns] - np.float32(x) + amplitude * warp_x[rows, columns]
        dy = canvas.y[rows, columns] - np.float32(y) + amplitude * warp_y[rows, columns]
        cos, sin = np.cos(angle), np.sin(angle)
        u = dx * np.float32(cos / along) + dy * np.float32(sin / along)
        v = dy * np.float32(cos / across) - dx * np.float32(sin / across)
        distance = (u**8 + v**8) ** np.float32(0.125) if group.square else np.sqrt(u * u + v * v)
        window = rho[rows, columns]
        size[rows, columns][distance < window] = (along * across) ** 0.5
        np.minimum(window, distance, out=window)
    return rho, size


def _warp(canvas: Canvas, radius: float) -> Field:
    """Displacement of outlines: lobes about as wide as a lesion, with notches on them."""
    coarse, fine = max(0.03, radius * 0.9), max(0.015, radius * 0.35)
    return canvas.noise(coarse) + np.float32(0.4) * canvas.noise(fine)


def _window(centre: float, reach: float, length: int, pixel: float) -> slice:
    middle = (length - 1) / 2
    low = int(np.floor((centre - reach) / pixel + middle))
    high = int(np.ceil((centre + reach) / pixel + middle)) + 1
    return slice(min(max(low, 0), length), min(max(high, 0), length))


def _track(canvas: Canvas, group: LesionGroup) -> Lesions:
    """One winding line: `rho` is the distance to it over half its thickness."""
    rng = canvas.rng
    t = np.linspace(-1, 1, 80)
    swing = rng.uniform(0.12, 0.2) * np.sin(rng.uniform(5, 8) * t + rng.uniform(0, 6))
    wander = 0.06 * np.sin(rng.uniform(9, 13) * t + rng.uniform(0, 6))
    along = t * rng.uniform(0.34, 0.44) + 0.6 * wander
    angle = rng.uniform(0, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    line = np.stack([along * cos - (swing + wander) * sin, along * sin + (swing + wander) * cos], 1)
    line = (line + rng.normal(0, 0.04, 2)).astype(np.float32)
    away = (canvas.strokes([line], canvas.pixel) < 0.5).astype(np.uint8)
    distance = cv2.distanceTransform(away, cv2.DIST_L2, 5) * np.float32(canvas.pixel)
    radius = float(rng.uniform(*group.radius))
    rho = distance * np.float32(1 / radius) + group.wobble * 0.3 * canvas.noise(0.06)
    spot = np.array([[line[:, 0].mean(), line[:, 1].mean(), radius, radius, angle]], np.float32)
    mask = smoothstep(1 + group.softness, 1 - group.softness, rho)
    return Lesions(spot, np.maximum(rho, 0), np.full_like(rho, radius), mask)
