"""Plots as inline SVG that take their colours from the page, so that they follow light, dark and print.

Each function returns `Markup` ready for a template. Values are drawn as given; nothing is aggregated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

BAR_HEIGHT = 24
LABEL_CHARACTERS = 34
CHARACTER_WIDTH = 7.4
# Above this many classes the matrix shows colours and tooltips only: figures and names would not be legible.
MAX_LABELLED_CLASSES = 40
# Less than this is nothing: an axis over it would divide by next to zero.
SMALLEST_SPAN = 1e-9


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
    axis_end, ticks = _axis(0.0, 1.0 if unit == "%" and largest > 0.5 else largest)
    scale = (width - left - right) / axis_end
    height = top + BAR_HEIGHT * len(labels) + 10
    parts = [_heading(title)]
    for tick in ticks:
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 8}"/>')
        parts.append(_text(x, top - 10, _figure(tick, unit), anchor="middle", css="soft"))
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = top + row * BAR_HEIGHT
        middle = y + BAR_HEIGHT / 2
        figure = _figure(value, unit)
        parts.append(f"<g><title>{escape(label)}: {escape(figure)}</title>")
        parts.append(_text(left - 8, middle + 4, _cut(label, characters), anchor="end"))
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y + 4:.1f}" width="{max(value * scale, 0):.1f}" '
            f'height="{BAR_HEIGHT - 8}" rx="3"/>'
        )
        end = value
        if lows is not None and highs is not None:
            parts.append(_whisker(left + lows[row] * scale, left + highs[row] * scale, middle))
            end = max(value, highs[row])
        parts.append(_text(left + end * scale + 8, middle + 4, figure, css="soft"))
        parts.append("</g>")
    return _svg(parts, width, height, title)


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
    ticks = _ticks(min([0.0, *lows]), max([SMALLEST_SPAN, *highs]), cover=True)
    scale = (width - left - right) / max(ticks[-1] - ticks[0], SMALLEST_SPAN)
    height = top + BAR_HEIGHT * len(labels) + 10
    parts = [_heading(title)]
    for tick in ticks:
        x = left + (tick - ticks[0]) * scale
        css = "axis" if abs(tick) < SMALLEST_SPAN else "grid"
        parts.append(f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 8}"/>')
        parts.append(_text(x, top - 10, _figure(round(tick, 9), ""), anchor="middle", css="soft"))
    for row, (label, value, figure) in enumerate(zip(labels, values, figures, strict=True)):
        middle = top + (row + 0.5) * BAR_HEIGHT
        low, high = (left + (end - ticks[0]) * scale for end in (lows[row], highs[row]))
        parts.append(f"<g><title>{escape(label)}: {escape(figure)}</title>")
        parts.append(_text(left - 8, middle + 4, _cut(label, LABEL_CHARACTERS), anchor="end"))
        parts.append(_whisker(low, high, middle))
        parts.append(f'<circle class="bar" cx="{left + (value - ticks[0]) * scale:.1f}" cy="{middle:.1f}" r="4.5"/>')
        parts.append(_text(width - right + 12, middle + 4, figure, css="soft"))
        parts.append("</g>")
    return _svg(parts, width, height, title, max_width=width)


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
    parts = [_heading(title)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * side, bottom - tick * side
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, _figure(tick, "%"), anchor="end", css="soft"))
        parts.append(_text(x, bottom + gap + tall + 18, _figure(tick, "%"), anchor="middle", css="soft"))
    for one in bins:
        x, across = left + one["low"] * side, (one["high"] - one["low"]) * side - 1.5
        up, share = one["accuracy"] * side, one["num_samples"] / largest * tall
        said = (
            f"{_figure(one['num_samples'], '')} predictions, mean confidence {_figure(one['confidence'], '%')}, "
            f"right {_figure(one['accuracy'], '%')}"
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
    parts.append(_base_line(left, left + side, bottom))
    parts.append(_base_line(left, left + side, bottom + gap + tall))
    height = bottom + gap + tall + 42
    parts.append(_text(left + side / 2, height - 6, "confidence", anchor="middle", css="soft"))
    return _svg(parts, width, height, title, max_width=380)


def histogram(counts: Sequence[float], edges: Sequence[float], *, title: str, unit: str = "") -> Markup:
    """Vertical bars of counted bins.

    Args:
        counts: non-negative height of each bin.
        edges: `len(counts) + 1` ascending bin edges.
        title: heading of the plot.
        unit: written behind the edges; `"%"` reads edges as fractions.
    """
    width, height, left, right, top, bottom = 760, 260, 62, 18, 40, 36
    axis_end, ticks = _axis(0.0, max(counts, default=0))
    scale = (height - top - bottom) / axis_end
    span = (edges[-1] - edges[0]) or 1.0
    across = (width - left - right) / span
    parts = [_heading(title)]
    for tick in ticks:
        y = height - bottom - tick * scale
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, _figure(tick, ""), anchor="end", css="soft"))
    for index, value in enumerate(counts):
        x = left + (edges[index] - edges[0]) * across
        bar = (edges[index + 1] - edges[index]) * across
        tall = value * scale
        name = f"{_figure(edges[index], unit)} to {_figure(edges[index + 1], unit)}"
        parts.append(
            f"<g><title>{escape(name)}: {escape(_figure(value, ''))}</title>"
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{height - bottom - tall:.1f}" '
            f'width="{max(bar - 1, 0.5):.1f}" height="{tall:.1f}"/></g>'
        )
    parts.append(_base_line(left, width - right, height - bottom))
    for tick in _ticks(edges[0], edges[-1]):
        x = left + (tick - edges[0]) * across
        parts.append(_text(x, height - bottom + 18, _figure(tick, unit), anchor="middle", css="soft"))
    return _svg(parts, width, height, title)


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
        parts.append(_text(margin, 14, "predicted class →", css="soft"))
        parts.append(f'<text class="soft" transform="translate(14,{top + side:.1f}) rotate(-90)">← true class</text>')
    for number, label in enumerate(labels if named else []):
        short_name = _cut(label, LABEL_CHARACTERS - 8)
        parts.append(_text(margin - 8, top + (number + 0.5) * cell + 4, short_name, anchor="end"))
        x = margin + (number + 0.5) * cell
        parts.append(f'<text transform="translate({x:.1f},{top - 7:.1f}) rotate(-45)">{escape(short_name)}</text>')
    parts.append(
        f'<rect class="track" x="{margin:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" opacity=".45"/>'
    )
    for row, counts in enumerate(matrix):
        total = sum(counts)
        for column, value in enumerate(counts):
            if value:
                parts.append(_matrix_cell(row, column, value, value / total, labels, cell, margin, top, named))
    return _svg(parts, width, height, "confusion matrix", max_width=width)


def _matrix_cell(
    row: int,
    column: int,
    value: float,
    share: float,
    labels: Sequence[str],
    cell: float,
    left: float,
    top: float,
    named: bool,
) -> str:
    x, y = left + column * cell, top + row * cell
    css = "cell" if row == column else "cell-off"
    gap = 1.0 if cell > 12 else 0.25
    what = f"{labels[row]} taken for {labels[column]}" if row != column else f"{labels[row]} recognised"
    drawn = (
        f"<g><title>{escape(what)}: {_figure(value, '')} ({100 * share:.0f} %)</title>"
        f'<rect class="{css}" x="{x + gap:.1f}" y="{y + gap:.1f}" width="{cell - 2 * gap:.1f}" '
        f'height="{cell - 2 * gap:.1f}" rx="{min(3.0, cell / 8):.1f}" opacity="{0.1 + 0.9 * share:.2f}"/>'
    )
    if named and cell >= 17:
        css = "on-dark" if share > 0.55 else ""
        drawn += _text(x + cell / 2, y + cell / 2 + 4, _figure(value, ""), anchor="middle", css=css)
    return drawn + "</g>"


def _svg(parts: Sequence[str], width: float, height: float, title: str, *, max_width: float | None = None) -> Markup:
    style = f' style="max-width:{max_width:.0f}px"' if max_width else ""
    return Markup(
        f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}"'
        f'{style} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _heading(title: str) -> str:
    return _text(0, 14, title, css="heading")


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _base_line(left: float, right: float, y: float) -> str:
    return f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _whisker(low: float, high: float, y: float) -> str:
    ends = f"M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
    return f'<path class="whisker" d="{ends}M{low:.1f} {y:.1f}H{high:.1f}"/>'


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def _axis(low: float, high: float) -> tuple[float, list[float]]:
    """The end of an axis that holds `high`, at a round figure, and the ticks up to it."""
    ticks = _ticks(low, high if high - low > SMALLEST_SPAN else low + 1.0, cover=True)
    return ticks[-1], ticks


def _ticks(low: float, high: float, *, cover: bool = False) -> list[float]:
    """Round figures (1, 2 or 5 times a power of ten apart) inside `[low, high]`, or around it if `cover`."""
    if high - low <= SMALLEST_SPAN:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.floor(low / step + 1e-9) if cover else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if cover else math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _figure(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %" if abs(value) < 0.1 else f"{100 * value:.1f} %".replace(".0 %", " %")
    whole = abs(value) >= 1000 or float(value).is_integer()
    text = f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.3g}"
    return f"{text} {unit}".rstrip()
