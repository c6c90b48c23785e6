"""Plots as inline SVG that take their colours from the page, so that they follow light, dark and print.

Each function returns `Markup` ready for a template. Values are drawn as given; nothing is aggregated here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
) -> Markup:
    """Horizontal bars from zero, one a label, top to bottom.

    Args:
        labels: names; long ones are cut, the whole name is in the tooltip.
        values: non-negative lengths of the bars.
        lows, highs: ends of an interval drawn as a whisker over each bar.
        title: heading of the plot.
        unit: `"%"`: values are fractions, the axis runs to 100 %; anything else stands behind the figures.
    """
    left = 16 + CHARACTER_WIDTH * min(LABEL_CHARACTERS, max((len(label) for label in labels), default=0))
    width, right, top = 760, 86, 44
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
        parts.append(_text(left - 8, middle + 4, _cut(label, LABEL_CHARACTERS), anchor="end"))
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
