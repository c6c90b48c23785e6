"""Plots as inline SVG that take their colours from the page, so that they follow light, dark and print.

Each function returns `Markup` ready for a template. Values are drawn as given; nothing is aggregated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from dermray.reporting import svg

BAR_HEIGHT = 24
LABEL_CHARACTERS = 34
CHARACTER_WIDTH = 7.4
# Above this many classes the matrix shows colours and tooltips only: figures and names would not be legible.
MAX_LABELLED_CLASSES = 40


def bar_chart(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    lows: Sequence[float] | None = None,
    highs: Sequence[float] | None = None,
    title: str,
    unit: str = "",
    compact: bool = False,
) -> Markup:
    """Horizontal bars from zero, one a label, top to bottom.

    Args:
        labels: names; long ones are cut, the whole name is in the tooltip.
        values: non-negative lengths of the bars.
        lows, highs: ends of an interval drawn as a whisker over each bar.
        title: heading of the plot.
        unit: `"%"`: values are fractions, the axis runs to 100 %; anything else stands behind the figures.
        compact: for half the width of a page.
    """
    characters = LABEL_CHARACTERS // 2 if compact else LABEL_CHARACTERS
    left = 16 + CHARACTER_WIDTH * min(characters, max((len(label) for label in labels), default=0))
    width, right, top = 420 if compact else 760, 72 if compact else 86, 44
    largest = max([*values, *(highs or [])], default=0.0)
    axis_end, ticks = svg.axis(0.0, 1.0 if unit == "%" and largest > 0.5 else largest)
    scale = (width - left - right) / axis_end
    height = top + BAR_HEIGHT * len(labels) + 10
    parts = [svg.heading(title)]
    for tick in ticks:
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 8}"/>')
        parts.append(svg.text(x, top - 10, svg.number(tick, unit), anchor="middle", css="soft"))
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = top + row * BAR_HEIGHT
        middle = y + BAR_HEIGHT / 2
        figure = svg.number(value, unit)
        parts.append(f"<g><title>{escape(label)}: {escape(figure)}</title>")
        parts.append(svg.text(left - 8, middle + 4, svg.cut(label, characters), anchor="end"))
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y + 4:.1f}" width="{max(value * scale, 0):.1f}" '
            f'height="{BAR_HEIGHT - 8}" rx="3"/>'
        )
        end = value
        if lows is not None and highs is not None:
            parts.append(svg.whisker(left + lows[row] * scale, left + highs[row] * scale, middle))
            end = max(value, highs[row])
        parts.append(svg.text(left + end * scale + 8, middle + 4, figure, css="soft"))
        parts.append("</g>")
    return svg.picture(parts, width, height, title)


def interval_chart(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    lows: Sequence[float],
    highs: Sequence[float],
    title: str,
    figures: Sequence[str],
) -> Markup:
    """Points with their intervals beside a line at 0, one a label, top to bottom: differences of scores.

    Args:
        labels: names; long ones are cut, the whole name is in the tooltip.
        values: points.
        lows, highs: ends of the intervals.
        title: heading of the plot.
        figures: what is written at the right of each row.
    """
    left = 16 + CHARACTER_WIDTH * min(LABEL_CHARACTERS, max((len(label) for label in labels), default=0))
    right = 24 + CHARACTER_WIDTH * max((len(figure) for figure in figures), default=0)
    width, top = 760, 44
    ticks = svg.ticks(min([0.0, *lows]), max([svg.SMALLEST_SPAN, *highs]), cover=True)
    scale = (width - left - right) / max(ticks[-1] - ticks[0], svg.SMALLEST_SPAN)
    height = top + BAR_HEIGHT * len(labels) + 10
    parts = [svg.heading(title)]
    for tick in ticks:
        x = left + (tick - ticks[0]) * scale
        css = "axis" if abs(tick) < svg.SMALLEST_SPAN else "grid"
        parts.append(f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 8}"/>')
        parts.append(svg.text(x, top - 10, svg.number(round(tick, 9), ""), anchor="middle", css="soft"))
    for row, (label, value, figure) in enumerate(zip(labels, values, figures, strict=True)):
        middle = top + (row + 0.5) * BAR_HEIGHT
        low, high = (left + (end - ticks[0]) * scale for end in (lows[row], highs[row]))
        parts.append(f"<g><title>{escape(label)}: {escape(figure)}</title>")
        parts.append(svg.text(left - 8, middle + 4, svg.cut(label, LABEL_CHARACTERS), anchor="end"))
        parts.append(svg.whisker(low, high, middle))
        parts.append(f'<circle class="bar" cx="{left + (value - ticks[0]) * scale:.1f}" cy="{middle:.1f}" r="4.5"/>')
        parts.append(svg.text(width - right + 12, middle + 4, figure, css="soft"))
        parts.append("</g>")
    return svg.picture(parts, width, height, title, max_width=width)


def reliability_diagram(bins: Sequence[Mapping[str, float]], *, title: str) -> Markup:
    """How often predictions of each confidence are right, beside the diagonal, above the share of predictions.

    Args:
        bins: `low`, `high`, `num_samples`, `confidence` and `accuracy` of each that holds samples.
        title: heading of the plot.
    """
    side, left, top, tall, gap = 300.0, 46.0, 34.0, 56.0, 14.0
    width, bottom = left + side + 26, top + side
    total = sum(one["num_samples"] for one in bins) or 1.0
    largest = max((one["num_samples"] for one in bins), default=1.0)
    parts = [svg.heading(title)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * side, bottom - tick * side
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg.text(left - 8, y + 4, svg.number(tick, "%"), anchor="end", css="soft"))
        parts.append(svg.text(x, bottom + gap + tall + 18, svg.number(tick, "%"), anchor="middle", css="soft"))
    for one in bins:
        x, across = left + one["low"] * side, (one["high"] - one["low"]) * side - 1.5
        up, share = one["accuracy"] * side, one["num_samples"] / largest * tall
        said = (
            f"{svg.number(one['num_samples'], '')} predictions, mean confidence {svg.number(one['confidence'], '%')}, "
            f"right {svg.number(one['accuracy'], '%')}"
        )
        x_dot, radius = left + one["confidence"] * side, 2 + 4 * one["num_samples"] / total
        parts.append(
            f"<g><title>{escape(said)}</title>"
            f'<rect class="bar" x="{x + 0.75:.1f}" y="{bottom - up:.1f}" width="{across:.1f}" height="{up:.1f}"/>'
            f'<rect class="cell-off" x="{x + 0.75:.1f}" y="{bottom + gap + tall - share:.1f}" width="{across:.1f}" '
            f'height="{share:.1f}" opacity=".6"/>'
            f'<circle class="dot" cx="{x_dot:.1f}" cy="{bottom - up:.1f}" r="{radius:.1f}"/>'
            "</g>"
        )
    parts.append(f'<path class="diagonal" d="M{left} {bottom}L{left + side} {top}"/>')
    parts.append(svg.base_line(left, left + side, bottom))
    parts.append(svg.base_line(left, left + side, bottom + gap + tall))
    height = bottom + gap + tall + 42
    parts.append(svg.text(left + side / 2, height - 6, "confidence", anchor="middle", css="soft"))
    return svg.picture(parts, width, height, title, max_width=380)


def histogram(counts: Sequence[float], edges: Sequence[float], *, title: str, unit: str = "") -> Markup:
    """Vertical bars of counted bins.

    Args:
        counts: non-negative height of each bin.
        edges: `len(counts) + 1` ascending bin edges.
        title: heading of the plot.
        unit: written behind the edges; `"%"` reads edges as fractions.
    """
    width, height, left, right, top, bottom = 760, 260, 62, 18, 40, 36
    axis_end, ticks = svg.axis(0.0, max(counts, default=0))
    scale = (height - top - bottom) / axis_end
    span = (edges[-1] - edges[0]) or 1.0
    across = (width - left - right) / span
    parts = [svg.heading(title)]
    for tick in ticks:
        y = height - bottom - tick * scale
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg.text(left - 8, y + 4, svg.number(tick, ""), anchor="end", css="soft"))
    for index, value in enumerate(counts):
        x = left + (edges[index] - edges[0]) * across
        bar = (edges[index + 1] - edges[index]) * across
        tall = value * scale
        name = f"{svg.number(edges[index], unit)} to {svg.number(edges[index + 1], unit)}"
        parts.append(
            f"<g><title>{escape(name)}: {escape(svg.number(value, ''))}</title>"
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{height - bottom - tall:.1f}" '
            f'width="{max(bar - 1, 0.5):.1f}" height="{tall:.1f}"/></g>'
        )
    parts.append(svg.base_line(left, width - right, height - bottom))
    for tick in svg.ticks(edges[0], edges[-1]):
        x = left + (tick - edges[0]) * across
        parts.append(svg.text(x, height - bottom + 18, svg.number(tick, unit), anchor="middle", css="soft"))
    return svg.picture(parts, width, height, title)


def confusion_matrix(matrix: Sequence[Sequence[float]], labels: Sequence[str]) -> Markup:
    """A square matrix of counts: rows are true classes, columns predictions, colour the share of its row.

    Args:
        matrix: counts `[C, C]`.
        labels: `C` class names.
    """
    num_classes = len(labels)
    named = num_classes <= MAX_LABELLED_CLASSES
    cell = max(5.0, min(48.0, (760 if named else 960) / max(num_classes, 1)))
    longest = min(LABEL_CHARACTERS - 8, max((len(label) for label in labels), default=0))
    margin = 14 + CHARACTER_WIDTH * longest if named else 22.0
    side = cell * num_classes
    # Column names lean, so the last one sticks out to the right of the grid.
    lean = 0.72 * margin if named else 0.0
    top = 12 + lean if named else 22.0
    width, height = margin + side + lean + 6, top + side + 12
    parts: list[str] = []
    if not named:
        parts.append(svg.text(margin, 14, "predicted class →", css="soft"))
        parts.append(f'<text class="soft" transform="translate(14,{top + side:.1f}) rotate(-90)">← true class</text>')
    for number, label in enumerate(labels if named else []):
        short_name = svg.cut(label, LABEL_CHARACTERS - 8)
        parts.append(svg.text(margin - 8, top + (number + 0.5) * cell + 4, short_name, anchor="end"))
        x = margin + (number + 0.5) * cell
        parts.append(f'<text transform="translate({x:.1f},{top - 7:.1f}) rotate(-45)">{escape(short_name)}</text>')
    parts.append(
        f'<rect class="track" x="{margin:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" opacity=".45"/>'
    )
    for row, counts in enumerate(matrix):
        total = sum(counts)
        for column, value in enumerate(counts):
            if value:
                x, y = margin + column * cell, top + row * cell
                right = row == column
                what = f"{labels[row]} recognised" if right else f"{labels[row]} taken for {labels[column]}"
                parts.append(_matrix_cell(x, y, cell, value, value / total, what, right, named and cell >= 17))
    return svg.picture(parts, width, height, "confusion matrix", max_width=width)


def _matrix_cell(
    x: float, y: float, cell: float, value: float, share: float, what: str, is_right: bool, shows_count: bool
) -> str:
    css = "cell" if is_right else "cell-off"
    gap = 1.0 if cell > 12 else 0.25
    drawn = (
        f"<g><title>{escape(what)}: {svg.number(value, '')} ({100 * share:.0f} %)</title>"
        f'<rect class="{css}" x="{x + gap:.1f}" y="{y + gap:.1f}" width="{cell - 2 * gap:.1f}" '
        f'height="{cell - 2 * gap:.1f}" rx="{min(3.0, cell / 8):.1f}" opacity="{0.1 + 0.9 * share:.2f}"/>'
    )
    if shows_count:
        css = "on-dark" if share > 0.55 else ""
        drawn += svg.text(x + cell / 2, y + cell / 2 + 4, svg.number(value, ""), anchor="middle", css=css)
    return drawn + "</g>"
