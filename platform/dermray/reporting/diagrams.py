"""Diagrams as inline SVG beside the plots: a graph in layers, curves over a common axis, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dermray.reporting import svg

BOX_WIDTH, BOX_HEIGHT = 280, 46
GAP_X, GAP_Y = 24, 30
MARGIN = 8
# How far an edge swings out for each layer that it passes by.
SWING = 34
BOX_CHARACTERS = 38
PLOT_WIDTH, PLOT_HEIGHT = 760, 320
TONES = {
    **{"": "var(--soft)", "good": "var(--accent)", "warn": "var(--warm)", "bad": "var(--bad)"},
    # Nothing is known of it: drawn in dashes.
    "open": "var(--soft)",
}


@dataclass(frozen=True)
class Box:
    """A node of a graph; `tone` is empty, good, warn, bad or open."""

    id: str
    title: str
    note: str = ""
    tone: str = ""
    tooltip: str = ""


def layered_graph(layers: Sequence[Sequence[Box]], edges: Sequence[tuple[str, str]], *, title: str) -> Markup:
    """Boxes in rows from top to bottom, joined by curves; an edge that passes by a row swings out to the right.

    Args:
        layers: rows, each from left to right.
        edges: ids of the boxes that are joined, the upper one first.
        title: what a screen reader says.
    """
    widest = max((len(layer) for layer in layers), default=0)
    rows = {box.id: row for row, layer in enumerate(layers) for box in layer}
    furthest = max((rows[b] - rows[a] for a, b in edges), default=1)
    width = widest * (BOX_WIDTH + GAP_X) - GAP_X + 2 * (MARGIN + SWING * (furthest - 1))
    height = len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    places: dict[str, tuple[float, float]] = {}
    for row, layer in enumerate(layers):
        left = (width - len(layer) * (BOX_WIDTH + GAP_X) + GAP_X) / 2
        for column, box in enumerate(layer):
            places[box.id] = (left + column * (BOX_WIDTH + GAP_X), MARGIN + row * (BOX_HEIGHT + GAP_Y))
    parts = [_edge(places[a], places[b], rows[b] - rows[a]) for a, b in edges]
    parts += [_box(box, *places[box.id]) for layer in layers for box in layer]
    return svg.picture(parts, width, height, title, max_width=width)


def _edge(start: tuple[float, float], end: tuple[float, float], num_rows: int) -> str:
    if num_rows == 1:
        x1, y1 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT
        x2, y2 = end[0] + BOX_WIDTH / 2, end[1]
        path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + GAP_Y / 2:.1f} {x2:.1f} {y2 - GAP_Y / 2:.1f} {x2:.1f} {y2:.1f}"
    else:
        x1, y1 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT / 2
        x2, y2 = end[0] + BOX_WIDTH, end[1] + BOX_HEIGHT / 2
        # A cubic curve comes three quarters of the way to where its handles are.
        out = max(x1, x2) + SWING * (num_rows - 1) * 4 / 3
        path = f"M{x1:.1f} {y1:.1f}C{out:.1f} {y1:.1f} {out:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return f'<path d="{path}" style="fill:none;stroke:{TONES[""]};stroke-width:1.2;opacity:.7"/>'


def _box(box: Box, x: float, y: float) -> str:
    dashes = ";stroke-dasharray:6 4" if box.tone == "open" else ""
    return (
        f"<g><title>{escape(box.tooltip or box.title)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" '
        f'style="fill:var(--card);stroke:{TONES[box.tone]};stroke-width:{2 if box.tone else 1}{dashes}"/>'
        + svg.text(x + 10, y + 19, svg.cut(box.title, BOX_CHARACTERS))
        + svg.text(x + 10, y + 36, svg.cut(box.note, BOX_CHARACTERS), css="soft")
        + "</g>"
    )


@dataclass(frozen=True)
class Curve:
    """Points `(x, y)` in order of x; one that `stopped` ends in a cross.

    Attributes:
        marked: indices of points that carry a diamond.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = ""
    stopped: bool = False
    marked: Sequence[int] = ()


def curves(lines: Sequence[Curve], *, title: str, x_title: str) -> Markup:
    """Curves over a common axis; where one ends before its time stands a cross. Names are tooltips.

    Args:
        lines: the curves; at least one point in all.
        title: heading, and what the vertical axis shows.
        x_title: what the horizontal axis shows.
    """
    left, right, top, bottom = 62, 18, 40, 44
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_end, x_ticks = svg.axis(0.0, max(xs))
    low, high = min(ys), max(ys)
    high = high if high - low > svg.SMALLEST_SPAN else low + 1.0
    y_end, y_ticks = svg.axis(low, high)
    y_low = y_ticks[0]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (PLOT_WIDTH - left - right) * x / x_end
        up = (PLOT_HEIGHT - top - bottom) * (y - y_low) / (y_end - y_low)
        return left + across, PLOT_HEIGHT - bottom - up

    parts = [svg.heading(title)]
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{PLOT_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg.text(left - 8, y + 4, svg.number(tick, ""), anchor="end", css="soft"))
    below = PLOT_HEIGHT - bottom + 18
    parts += [
        svg.text(at(tick, y_low)[0], below, svg.number(tick, ""), anchor="middle", css="soft") for tick in x_ticks
    ]
    parts.append(svg.text((left + PLOT_WIDTH - right) / 2, PLOT_HEIGHT - 6, x_title, anchor="middle", css="soft"))
    parts += [_drawn(line, [at(x, y) for x, y in line.points]) for line in lines if line.points]
    return svg.picture(parts, PLOT_WIDTH, PLOT_HEIGHT, title)


def _drawn(line: Curve, points: Sequence[tuple[float, float]]) -> str:
    colour = TONES[line.tone]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    x, y = points[-1]
    end = (
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" style="stroke:{colour};stroke-width:1.8"/>'
        if line.stopped
        else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}"/>'
    )
    weight = 2.2 if line.tone else 1.2
    marks = "".join(_diamond(*points[index], colour) for index in line.marked)
    return (
        f"<g><title>{escape(line.name)}</title>"
        f'<path d="{path}" style="fill:none;stroke:{colour};stroke-width:{weight}"/>{marks}{end}</g>'
    )


def _diamond(x: float, y: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" style="fill:var(--card);stroke:{colour};stroke-width:1.6"/>'


@dataclass(frozen=True)
class Scale:
    """A vertical axis of parallel coordinates: numbers, perhaps on a logarithmic scale, or names in order."""

    name: str
    values: Sequence[float | str]
    logarithmic: bool = False

    def places(self) -> tuple[list[float], str, str]:
        """Each value between 0 and 1, and what stands at both ends."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(self.values):
            # A trial without the parameter has a name there (a dash), and the axis is one of names then.
            scaled = [math.log(value) if self.logarithmic else float(value) for value in numbers]
            low, high = min(scaled), max(scaled)
            span = high - low if high - low > svg.SMALLEST_SPAN else 1.0
            return [(value - low) / span for value in scaled], f"{min(numbers):.4g}", f"{max(numbers):.4g}"
        names = list(dict.fromkeys(str(value) for value in self.values))
        step = 1 / max(len(names) - 1, 1)
        return [names.index(str(value)) * step for value in self.values], names[0], names[-1]


def parallel_coordinates(scales: Sequence[Scale], tones: Sequence[str], names: Sequence[str], *, title: str) -> Markup:
    """A line a trial through a vertical axis for each parameter and for the objective.

    Args:
        scales: the axes, each with N values.
        tones, names: of the N lines; those with a tone are drawn last.
        title: heading.
    """
    top, bottom, side = 52, 30, 66
    step = (PLOT_WIDTH - 2 * side) / max(len(scales) - 1, 1)
    placed = [scale.places() for scale in scales]
    parts = [svg.heading(title)]
    for number, (scale, (_, low, high)) in enumerate(zip(scales, placed, strict=True)):
        x = side + number * step
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{PLOT_HEIGHT - bottom}"/>')
        parts.append(
            svg.text(
                x, top - 20, svg.cut(scale.name.rpartition(".")[2].removeprefix("validation_"), 18), anchor="middle"
            )
        )
        parts.append(svg.text(x, top - 6, svg.cut(high, 14), anchor="middle", css="soft"))
        parts.append(svg.text(x, PLOT_HEIGHT - bottom + 16, svg.cut(low, 14), anchor="middle", css="soft"))
    for trial in sorted(range(len(names)), key=lambda index: bool(tones[index])):
        points = [
            (side + number * step, PLOT_HEIGHT - bottom - (PLOT_HEIGHT - top - bottom) * places[trial])
            for number, (places, _, _) in enumerate(placed)
        ]
        parts.append(_drawn(Curve(names[trial], points, tones[trial]), points))
    return svg.picture(parts, PLOT_WIDTH, PLOT_HEIGHT, title)


def legend(entries: Mapping[str, str]) -> Markup:
    """A line of coloured marks with their meanings: text → tone."""
    marks = [
        f'<span class="muted small"><span style="color:{TONES[tone]}">{"◌" if tone == "open" else "●"}</span> '
        f"{escape(text)}&ensp;</span>"
        for text, tone in entries.items()
    ]
    return Markup("<p>" + "".join(marks) + "</p>")
