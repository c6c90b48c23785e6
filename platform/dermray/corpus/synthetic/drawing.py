"""Draws one photograph of a condition from attributes, deterministically in the generator it is given."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from dermray.corpus.synthetic.canvas import DRAPES, Canvas, smoothstep
from dermray.corpus.synthetic.condition import Condition
from dermray.corpus.synthetic.lesions import LesionGroup, Lesions, place
from dermray.corpus.synthetic.surface import CONCEPTS, SURFACES

LIMB_SITES = frozenset({"arm", "forearm", "leg", "thigh", "wrist", "ankle", "finger"})
HAIRY_SITES = frozenset({"arm", "forearm", "leg", "thigh", "chest", "abdomen"})
# Relative frequency of Fitzpatrick types 1-6.
SKIN_TYPE_WEIGHTS = np.array([0.13, 0.20, 0.22, 0.19, 0.14, 0.12])


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is to be seen in one photograph. `concepts` holds only what was drawn."""

    condition: Condition
    skin_type: int
    site: str
    num_lesions: int
    concepts: tuple[str, ...]


def draw(
    condition: Condition,
    rng: np.random.Generator,
    *,
    size: tuple[int, int] = (120, 160),
    skin_type: int | None = None,
) -> tuple[npt.NDArray[np.uint8], Attributes]:
    """One photograph, uint8 [H, W, 3] RGB for `size` (H, W), and what it shows.

    `skin_type` fixes the Fitzpatrick type (1-6); otherwise it is drawn from those the condition allows.
    """
    if skin_type is None:
        weights = SKIN_TYPE_WEIGHTS[np.array(condition.skin_types) - 1]
        skin_type = int(rng.choice(condition.skin_types, p=weights / weights.sum()))
    site = condition.sites[int(rng.integers(len(condition.sites)))]
    canvas = Canvas.blank(rng, skin_type, *size)
    _shape_body(canvas, condition, site)
    concepts = list(condition.concepts)
    placed: list[Lesions] = []
    for group in condition.groups:
        lesions = place(canvas, group, placed[-1] if placed else None)
        _colour(canvas, group, lesions)
        optional = [name for name, share in condition.sometimes if rng.random() < share] if not placed else []
        for name in (*group.surface, *optional):
            SURFACES[name](canvas, lesions)
            concepts.extend(CONCEPTS[name])
        placed.append(lesions)
    if site in HAIRY_SITES and rng.random() < 0.35:
        _body_hair(canvas)
    if skin_type <= 4 and rng.random() < 0.3:
        _freckles(canvas)
    attributes = Attributes(condition, skin_type, site, len(placed[0].spots), tuple(dict.fromkeys(concepts)))
    return canvas.photograph(), attributes


def _shape_body(canvas: Canvas, condition: Condition, site: str) -> None:
    """Relief and backdrop of the body part: a limb on a drape, two cheeks beside a nose, or gently curved skin."""
    rng = canvas.rng
    canvas.axis_angle += rng.normal(0, 0.12)
    if condition.groups[0].layout == "symmetric":
        canvas.axis_angle = 0.0
        ridge = canvas.x + np.float32(rng.normal(0, 0.02))
        width = np.float32(rng.uniform(0.10, 0.13)) * (1 + 0.7 * np.clip(canvas.y, -0.6, 0.6))
        canvas.relief += 0.075 * np.exp(-((ridge / width) ** 2))
        canvas.blood += 0.1 * np.exp(-((ridge / width) ** 2))
        return
    if site not in LIMB_SITES or rng.random() < 0.3:
        canvas.relief -= np.float32(rng.uniform(0.0, 0.25)) * (canvas.x * canvas.x + canvas.y * canvas.y)
        return
    _, across = canvas.along_across()
    half_width = rng.uniform(0.43, 0.49)
    canvas.half_across = half_width * 0.9
    across = across + 0.012 * canvas.noise(0.6)
    profile = np.clip(1 - (across / np.float32(half_width)) ** 2, 0.0, 1.0)
    canvas.relief += np.float32(rng.uniform(0.2, 0.34)) * profile**0.75
    drape = DRAPES[int(rng.integers(len(DRAPES)))]
    edge = canvas.pixel
    canvas.backdrop = (smoothstep(half_width - edge, half_width + edge, np.abs(across)), drape)


def _colour(canvas: Canvas, group: LesionGroup, lesions: Lesions) -> None:
    """Pigment, blood, elevation and shine of a group; uneven from place to place as on real skin."""
    rng, mask = canvas.rng, lesions.mask
    patchy = 1 + 0.16 * canvas.noise(0.09)
    for target, extent in ((canvas.blood, group.blood), (canvas.melanin, group.melanin), (canvas.pallor, group.pallor)):
        if extent[1] > 0:
            target += np.float32(rng.uniform(*extent) * canvas.severity) * mask * patchy
    if group.tint is not None:
        colour, opacity = group.tint
        brightness = rng.uniform(0.85, 1.15)
        tinted = (colour[0] * brightness, colour[1] * brightness, colour[2] * brightness)
        canvas.cover(np.clip(mask * patchy * np.float32(opacity), 0, 0.96), tinted)
    if group.plateau:
        canvas.relief += np.float32(group.plateau) * mask * lesions.size
    if group.dome:
        inside = np.clip(1 - lesions.rho * lesions.rho, 0, 1)
        # A swelling without a border rises gently; a papule or nodule stands up at once.
        profile = inside * inside if group.softness > 0.3 else np.sqrt(inside)
        canvas.relief += np.float32(group.dome) * profile * lesions.size
    if group.gloss:
        canvas.gloss += np.float32(group.gloss) * mask


def _body_hair(canvas: Canvas) -> None:
    """A few fine hairs that lie roughly one way."""
    rng = canvas.rng
    num = int(rng.integers(8, 26))
    roots = rng.uniform(-0.5, 0.5, (num, 1, 2)) * (canvas.width * canvas.pixel, canvas.height * canvas.pixel)
    heading = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.3, (num, 1))
    length = np.linspace(0, 1, 5) * rng.uniform(0.06, 0.14, (num, 1))
    bend = heading + length * rng.normal(0, 4.0, (num, 1))
    lines = (roots + np.stack([length * np.cos(bend), length * np.sin(bend)], -1)).astype(np.float32)
    canvas.cover(canvas.strokes(list(lines), 0.005) * np.float32(0.55), (0.14, 0.09, 0.07))


def _freckles(canvas: Canvas) -> None:
    """Small brown spots that have nothing to do with the condition, as most skin has some."""
    rng = canvas.rng
    away = np.ones((canvas.height, canvas.width), np.uint8)
    num = int(rng.integers(4, 22))
    away[rng.integers(0, canvas.height, num), rng.integers(0, canvas.width, num)] = 0
    distance = cv2.distanceTransform(away, cv2.DIST_L2, 5) * np.float32(canvas.pixel)
    radius = rng.uniform(0.006, 0.014)
    canvas.melanin += np.float32(rng.uniform(0.25, 0.6)) * smoothstep(1.4 * radius, 0.5 * radius, distance)
