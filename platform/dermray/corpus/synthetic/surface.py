"""What lies on a lesion or in it: scale, crust, fluid, vessels, pigment, ulceration.

Each function takes the canvas and the placed lesions and changes the canvas; `SURFACES` names them, and
`CONCEPTS` says which visual concepts each one makes visible.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from dermray.corpus.synthetic.canvas import Canvas, Colour, Field, smoothstep
from dermray.corpus.synthetic.lesions import Lesions

Surface = Callable[[Canvas, Lesions], None]
SURFACES: dict[str, Surface] = {}
CONCEPTS: dict[str, tuple[str, ...]] = {}

SILVER: Colour = (0.93, 0.92, 0.90)
HONEY: Colour = (0.86, 0.60, 0.16)
BLOOD_CRUST: Colour = (0.33, 0.10, 0.07)
PUS: Colour = (0.95, 0.91, 0.68)
PEARL: Colour = (0.97, 0.86, 0.82)
HAIR_COLOURS: tuple[Colour, ...] = ((0.07, 0.05, 0.045), (0.17, 0.10, 0.06), (0.32, 0.21, 0.12))


def _surface(name: str, *concepts: str) -> Callable[[Surface], Surface]:
    def register(function: Surface) -> Surface:
        SURFACES[name] = function
        CONCEPTS[name] = concepts
        return function

    return register


def _ring(rho: Field, low: float, high: float, soft: float = 0.12) -> Field:
    return smoothstep(low - soft, low + soft, rho) * smoothstep(high + soft, high - soft, rho)


@_surface("silvery scale", "scale")
def _silvery_scale(canvas: Canvas, lesions: Lesions) -> None:
    flakes = 0.7 * canvas.noise(0.025) + 0.8 * canvas.noise(0.12)
    alpha = smoothstep(-0.9, 0.5, flakes) * smoothstep(1.0, 0.72, lesions.rho)
    canvas.cover(alpha * np.float32(canvas.rng.uniform(0.72, 0.92)), SILVER)
    canvas.relief += 0.006 * alpha * canvas.noise(0.02)


@_surface("scaly border", "scaly", "annular")
def _scaly_border(canvas: Canvas, lesions: Lesions) -> None:
    edge = _ring(lesions.rho, 0.82, 1.02, 0.08)
    flakes = smoothstep(0.2, 0.8, canvas.noise(0.03))
    canvas.cover(edge * flakes * np.float32(0.75), (0.95, 0.88, 0.84))
    canvas.relief += 0.02 * edge


@_surface("fine scale", "scaly")
def _fine_scale(canvas: Canvas, lesions: Lesions) -> None:
    flakes = smoothstep(0.5, 1.2, canvas.noise(0.016))
    canvas.cover(lesions.mask * flakes * np.float32(0.35), (0.93, 0.89, 0.85))


@_surface("honey crust", "crust", "yellow")
def _honey_crust(canvas: Canvas, lesions: Lesions) -> None:
    clumps = canvas.noise(0.05)
    alpha = smoothstep(-0.5, 0.3, clumps) * smoothstep(0.95, 0.65, lesions.rho)
    tone = canvas.rng.uniform(0.85, 1.1)
    canvas.cover(alpha * np.float32(0.92), (HONEY[0] * tone, HONEY[1] * tone, HONEY[2]))
    canvas.cover(alpha * smoothstep(0.4, 1.4, clumps) * np.float32(0.6), (0.55, 0.30, 0.08))
    canvas.relief += alpha * (0.02 + 0.008 * canvas.noise(0.025))
    canvas.gloss += 0.35 * alpha


@_surface("haemorrhagic crust", "crust")
def _haemorrhagic_crust(canvas: Canvas, lesions: Lesions) -> None:
    alpha = smoothstep(0.3, 0.9, canvas.noise(0.05)) * smoothstep(0.85, 0.6, lesions.rho)
    canvas.cover(alpha * np.float32(0.85), BLOOD_CRUST)
    canvas.relief += 0.008 * alpha


@_surface("clear fluid", "vesicle", "translucent")
def _clear_fluid(canvas: Canvas, lesions: Lesions) -> None:
    inside = smoothstep(1.0, 0.8, lesions.rho)
    canvas.cover(inside * np.float32(0.62), (0.96, 0.87, 0.80))
    canvas.cover(_ring(lesions.rho, 0.82, 1.02, 0.1) * np.float32(0.55), (0.62, 0.22, 0.20))
    _bead(canvas, lesions, 0.9)


@_surface("tense blister", "bulla", "translucent")
def _tense_blister(canvas: Canvas, lesions: Lesions) -> None:
    fluid = smoothstep(1.0, 0.88, lesions.rho)
    amber = np.float32(canvas.rng.uniform(0.45, 0.65))
    canvas.cover(fluid * amber, (0.93, 0.77, 0.50))
    canvas.cover(_ring(lesions.rho, 0.86, 1.02, 0.07) * np.float32(0.5), (0.58, 0.30, 0.20))
    _bead(canvas, lesions, 1.0)
    _highlight(canvas, lesions)


@_surface("pus", "pustule", "yellow")
def _pus(canvas: Canvas, lesions: Lesions) -> None:
    canvas.cover(smoothstep(0.68, 0.45, lesions.rho) * np.float32(0.95), PUS)
    _bead(canvas, lesions, 0.5)


@_surface("pearly", "translucent")
def _pearly(canvas: Canvas, lesions: Lesions) -> None:
    inside = smoothstep(1.02, 0.85, lesions.rho)
    canvas.cover(inside * np.float32(0.55), PEARL)
    canvas.gloss += 0.5 * inside


@_surface("umbilication", "umbilicated", "dome-shaped")
def _umbilication(canvas: Canvas, lesions: Lesions) -> None:
    pit = smoothstep(0.34, 0.12, lesions.rho)
    canvas.relief -= 0.4 * pit * lesions.size
    canvas.cover(pit * np.float32(0.75), (0.62, 0.34, 0.28))
    canvas.blood += 0.35 * _ring(lesions.rho, 1.0, 1.2, 0.12)


@_surface("target rings", "targetoid")
def _target_rings(canvas: Canvas, lesions: Lesions) -> None:
    canvas.blood += 1.0 * _ring(lesions.rho, 0.74, 1.02, 0.09)
    canvas.cover(_ring(lesions.rho, 0.48, 0.74, 0.07) * np.float32(0.55), (0.95, 0.80, 0.76))
    centre = smoothstep(0.5, 0.38, lesions.rho)
    canvas.cover(centre * np.float32(0.8), (0.42, 0.09, 0.19))
    canvas.relief += 0.15 * centre * lesions.size


@_surface("wheal", "wheal", "raised")
def _wheal(canvas: Canvas, lesions: Lesions) -> None:
    canvas.cover(smoothstep(0.9, 0.4, lesions.rho) * np.float32(0.42), (0.99, 0.86, 0.82))
    canvas.blood += 0.75 * _ring(lesions.rho, 0.85, 1.15, 0.2)


@_surface("wickham striae", "flat topped", "purple")
def _wickham_striae(canvas: Canvas, lesions: Lesions) -> None:
    net = smoothstep(0.16, 0.0, np.abs(canvas.noise(0.04)))
    canvas.cover(net * smoothstep(1.0, 0.8, lesions.rho) * np.float32(0.42), (0.90, 0.82, 0.90))


@_surface("telangiectasia", "telangiectasia", "vascular structures")
def _telangiectasia(canvas: Canvas, lesions: Lesions) -> None:
    rng = canvas.rng
    lines = []
    for spot in lesions.spots:
        for _ in range(int(rng.integers(6, 11))):
            start = spot[:2] + rng.normal(0, 0.45, 2) * spot[2:4].mean()
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.45, 12))
            step = spot[2:4].mean() * 0.09
            lines.append(start + step * np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0))
    vessels = canvas.strokes([line.astype(np.float32) for line in lines], 0.007)
    canvas.cover(vessels * smoothstep(1.15, 0.9, lesions.rho) * np.float32(0.75), (0.72, 0.10, 0.14))


@_surface("lichenification", "lichenification")
def _lichenification(canvas: Canvas, lesions: Lesions) -> None:
    rng = canvas.rng
    turn = rng.uniform(0, np.pi)
    warp = 0.02 * canvas.noise(0.16) + 0.006 * canvas.noise(0.05)
    creases = np.zeros_like(canvas.relief)
    for angle in (turn, turn + rng.uniform(1.2, 1.7)):
        t = canvas.x * np.float32(np.cos(angle)) + canvas.y * np.float32(np.sin(angle)) + warp
        creases = np.maximum(creases, smoothstep(0.55, 1.0, np.cos(t * np.float32(2 * np.pi / 0.07))))
    creases *= lesions.mask * np.clip(0.75 + 0.4 * canvas.noise(0.12), 0, 1)
    canvas.relief -= 0.006 * creases
    canvas.melanin += 0.5 * creases
    canvas.cover(lesions.mask * smoothstep(0.6, 1.4, canvas.noise(0.03)) * np.float32(0.35), (0.90, 0.82, 0.76))


@_surface("excoriation", "excoriation")
def _excoriation(canvas: Canvas, lesions: Lesions) -> None:
    rng = canvas.rng
    heading = rng.uniform(0, np.pi)
    direction = np.array([np.cos(heading), np.sin(heading)])
    lines = []
    for index in rng.integers(0, len(lesions.spots), int(rng.integers(3, 7))):
        spot = lesions.spots[index]
        centre = spot[:2] + rng.normal(0, 0.4, 2) * spot[2:4].mean()
        half = direction * rng.uniform(0.05, 0.12) + rng.normal(0, 0.008, 2)
        lines.append(np.array([centre - half, centre + half], np.float32))
    canvas.cover(canvas.strokes(lines, 0.013) * np.float32(0.85), (0.50, 0.10, 0.08))


@_surface("warty", "warty/papillomatous", "verrucous", "rough")
def _warty(canvas: Canvas, lesions: Lesions) -> None:
    _, furrow = _cells(canvas, 0.055)
    inside = smoothstep(1.02, 0.9, lesions.rho)
    knobs = smoothstep(0.0, 0.022, furrow)
    canvas.relief += 0.024 * knobs * inside
    canvas.cover(inside * np.float32(0.6), (0.80, 0.72, 0.62))
    canvas.cover(inside * (1 - knobs) * np.float32(0.5), (0.38, 0.28, 0.22))


@_surface("black dots", "black")
def _black_dots(canvas: Canvas, lesions: Lesions) -> None:
    _dots(canvas, lesions, (9, 16), 0.013, (0.10, 0.05, 0.05))


@_surface("horn cysts", "verrucous")
def _horn_cysts(canvas: Canvas, lesions: Lesions) -> None:
    canvas.relief += 0.016 * lesions.mask * canvas.noise(0.03)
    _dots(canvas, lesions, (5, 9), 0.016, (0.13, 0.08, 0.05))
    _dots(canvas, lesions, (5, 9), 0.016, (0.90, 0.82, 0.66))


@_surface("variegated pigment", "black", "blue", "irregular", "pigmentation")
def _variegated_pigment(canvas: Canvas, lesions: Lesions) -> None:
    patches: tuple[tuple[Colour, float], ...] = (
        ((0.07, 0.05, 0.06), 0.95),
        ((0.30, 0.35, 0.44), 0.80),
        ((0.48, 0.17, 0.13), 0.55),
    )
    for colour, opacity in patches:
        alpha = smoothstep(0.15, 0.75, canvas.noise(0.2)) * smoothstep(1.0, 0.85, lesions.rho)
        canvas.cover(alpha * np.float32(opacity), colour)


@_surface("regression", "regression structures", "white(hypopigmentation)")
def _regression(canvas: Canvas, lesions: Lesions) -> None:
    alpha = smoothstep(0.55, 1.0, canvas.noise(0.18)) * smoothstep(0.95, 0.7, lesions.rho)
    canvas.cover(alpha * np.float32(0.75), (0.88, 0.82, 0.80))


@_surface("central ulcer", "ulcer", "ulcerated")
def _central_ulcer(canvas: Canvas, lesions: Lesions) -> None:
    floor = smoothstep(0.5, 0.34, lesions.rho + 0.1 * canvas.noise(0.06))
    canvas.relief -= 0.55 * floor * lesions.size
    canvas.cover(floor * np.float32(0.9), (0.40, 0.09, 0.08))


@_surface("keratin plug", "crust", "ulcerated", "rough")
def _keratin_plug(canvas: Canvas, lesions: Lesions) -> None:
    plug = smoothstep(0.62, 0.48, lesions.rho + 0.12 * canvas.noise(0.05))
    canvas.cover(plug, (0.72, 0.58, 0.34))
    canvas.cover(plug * smoothstep(0.1, 0.9, canvas.noise(0.035)) * np.float32(0.8), (0.36, 0.22, 0.12))
    canvas.relief += plug * (0.012 * canvas.noise(0.02) - 0.02)


@_surface("slough", "ulcer", "exudate", "yellow")
def _slough(canvas: Canvas, lesions: Lesions) -> None:
    floor = smoothstep(1.0, 0.9, lesions.rho)
    canvas.cover(floor, (0.62, 0.14, 0.12))
    canvas.cover(floor * smoothstep(-0.1, 0.6, canvas.noise(0.1)) * np.float32(0.9), (0.80, 0.71, 0.47))
    canvas.relief -= 0.05 * floor
    canvas.relief += 0.006 * floor * canvas.noise(0.03)
    canvas.gloss += 0.4 * floor


@_surface("lobules", "vascular structures")
def _lobules(canvas: Canvas, lesions: Lesions) -> None:
    to_middle, _ = _cells(canvas, 0.085)
    knobs = smoothstep(0.05, 0.0, to_middle)
    canvas.relief += 0.022 * knobs * lesions.mask
    canvas.cover((1 - knobs) * lesions.mask * np.float32(0.4), (0.45, 0.01, 0.10))


@_surface("fish scale", "xerosis", "scale", "fissure")
def _fish_scale(canvas: Canvas, lesions: Lesions) -> None:
    _, furrow = _cells(canvas, canvas.rng.uniform(0.10, 0.17))
    plate = smoothstep(0.004, 0.03, furrow + 0.004 * canvas.noise(0.02))
    canvas.melanin += 0.5 * plate * (1 + 0.3 * canvas.noise(0.1))
    canvas.cover(smoothstep(0.018, 0.0, furrow) * np.clip(0.65 + 0.35 * canvas.noise(0.15), 0, 1), (0.93, 0.90, 0.85))
    canvas.relief += 0.01 * plate


@_surface("strap marks", "red", "well-defined")
def _strap_marks(canvas: Canvas, lesions: Lesions) -> None:
    """Burnt skin everywhere except under one or two straps, whose edges are sharp."""
    rng = canvas.rng
    angle = rng.uniform(0, np.pi)
    across = canvas.x * np.float32(np.cos(angle)) + canvas.y * np.float32(np.sin(angle)) + 0.01 * canvas.noise(0.3)
    width = rng.uniform(0.07, 0.12)
    centres = (rng.uniform(-0.1, 0.1),) if rng.random() < 0.5 else (-rng.uniform(0.16, 0.24), rng.uniform(0.16, 0.24))
    covered = np.zeros_like(across)
    for centre in centres:
        covered = np.maximum(covered, smoothstep(width + 0.012, width - 0.012, np.abs(across - np.float32(centre))))
    canvas.blood += np.float32(rng.uniform(0.75, 1.0)) * (1 - covered)


@_surface("skin fold", "erosion")
def _skin_fold(canvas: Canvas, lesions: Lesions) -> None:
    """A crease through the middle with maceration along it."""
    _, across = canvas.along_across()
    bend = across + 0.05 * canvas.noise(0.5)
    canvas.relief -= 0.035 * np.exp(-((bend / np.float32(0.035)) ** 2))
    canvas.cover(smoothstep(0.03, 0.0, np.abs(bend)) * np.float32(0.6), (0.30, 0.08, 0.07))
    canvas.cover(_ring(np.abs(bend), 0.05, 0.09, 0.02) * lesions.mask * np.float32(0.35), (0.96, 0.84, 0.80))


@_surface("bald patch", "hair", "smooth")
def _bald_patch(canvas: Canvas, lesions: Lesions) -> None:
    """Dense hair everywhere except on the lesions."""
    rng = canvas.rng
    dark = float(canvas.tone[0, 0, 0]) > 0.35
    colour = HAIR_COLOURS[0 if dark else int(rng.integers(len(HAIR_COLOURS)))]
    num = 520
    roots = rng.uniform(-0.5, 0.5, (num, 1, 2)) * (canvas.width * canvas.pixel, canvas.height * canvas.pixel) * 1.1
    heading = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.2, (num, 1))
    length = np.linspace(0, 1, 4) * rng.uniform(0.12, 0.24, (num, 1))
    bend = heading + length * rng.normal(0.8, 1.2, (num, 1))
    lines = roots + np.stack([length * np.cos(bend), length * np.sin(bend)], -1)
    strands = canvas.strokes(list(lines.astype(np.float32)), 0.009)
    outside = smoothstep(0.9, 1.12, lesions.rho)
    canvas.cover(outside * np.float32(0.72), colour)
    canvas.cover(strands * smoothstep(0.85, 1.0, lesions.rho), colour)
    shine = smoothstep(0.3, 1.2, canvas.noise(0.03)) * strands * outside
    canvas.cover(shine * np.float32(0.3), (colour[0] + 0.26, colour[1] + 0.22, colour[2] + 0.18))


@_surface("follicle hair", "hair", "perifollicular")
def _follicle_hair(canvas: Canvas, lesions: Lesions) -> None:
    rng = canvas.rng
    heading = rng.uniform(0, 2 * np.pi)
    lines = []
    for spot in lesions.spots:
        angle = heading + rng.normal(0, 0.3)
        tip = spot[:2] + rng.uniform(0.05, 0.09) * np.array([np.cos(angle), np.sin(angle)])
        lines.append(np.array([spot[:2], tip], np.float32))
    canvas.cover(canvas.strokes(lines, 0.009) * np.float32(0.9), (0.10, 0.07, 0.06))


def _bead(canvas: Canvas, lesions: Lesions, height: float) -> None:
    """A fluid-filled dome with a wet surface."""
    inside = np.clip(1 - lesions.rho * lesions.rho, 0, 1)
    canvas.relief += np.float32(height) * 0.8 * np.sqrt(inside) * lesions.size
    canvas.gloss += 0.8 * smoothstep(0.0, 0.3, inside)


def _highlight(canvas: Canvas, lesions: Lesions) -> None:
    """The window's reflection on each blister, on the same side of all."""
    angle = canvas.rng.uniform(0, 2 * np.pi)
    glints = np.zeros((canvas.height, canvas.width), np.float32)
    for x, y, along, across, _ in lesions.spots.tolist():
        radius = (along * across) ** 0.5
        dx = canvas.x - np.float32(x + 0.42 * radius * np.cos(angle))
        dy = canvas.y - np.float32(y + 0.42 * radius * np.sin(angle))
        glints = np.maximum(glints, smoothstep(1.0, 0.5, (dx * dx + dy * dy) * np.float32(1 / (0.22 * radius) ** 2)))
    canvas.cover(glints * np.float32(0.85), (1.0, 0.99, 0.97))


def _dots(canvas: Canvas, lesions: Lesions, count: tuple[int, int], radius: float, colour: Colour) -> None:
    """Small round dots inside the lesions."""
    rng = canvas.rng
    rows, columns = np.nonzero(lesions.rho < 0.75)
    if not len(rows):
        return
    chosen = rng.integers(0, len(rows), int(rng.integers(count[0], count[1] + 1)))
    away = np.ones((canvas.height, canvas.width), np.uint8)
    away[rows[chosen], columns[chosen]] = 0
    distance = cv2.distanceTransform(away, cv2.DIST_L2, 5) * np.float32(canvas.pixel / radius)
    canvas.cover(smoothstep(1.3, 0.6, distance) * np.float32(0.9), colour)


def _cells(canvas: Canvas, cell: float) -> tuple[Field, Field]:
    """Cobbles about `cell` wide: distance to the middle of the nearest one, and to the furrow around it."""
    rng = canvas.rng
    step = cell / canvas.pixel
    rows, columns = np.meshgrid(np.arange(0, canvas.height, step), np.arange(0, canvas.width, step), indexing="ij")
    rows = rows + rng.uniform(-0.33, 0.33, rows.shape) * step
    columns = columns + rng.uniform(-0.33, 0.33, rows.shape) * step
    # Every other row is shifted by half a cell, so that plates come out six-sided.
    columns[1::2] += step / 2
    away = np.ones((canvas.height, canvas.width), np.uint8)
    away[np.clip(rows, 0, canvas.height - 1).astype(int), np.clip(columns, 0, canvas.width - 1).astype(int)] = 0
    to_middle, nearest = cv2.distanceTransformWithLabels(away, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    inside = np.ones_like(away)
    inside[:, 1:][nearest[:, 1:] != nearest[:, :-1]] = 0
    inside[1:][nearest[1:] != nearest[:-1]] = 0
    pixel = np.float32(canvas.pixel)
    return to_middle * pixel, cv2.distanceTransform(inside, cv2.DIST_L2, 5) * pixel
