"""Pieces of a plot: the picture around it, its texts, lines, axes and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

# Less than this is nothing: an axis over it would divide by next to zero.
SMALLEST_SPAN = 1e-9


def picture(parts: Sequence[str], width: float, height: float, title: str, *, max_width: float | None = None) -> Markup:
    """An `<svg>` of so many units, as wide as its column, or at most `max_width` pixels; the title is for listeners."""
    style = f' style="max-width:{max_width:.0f}px"' if max_width else ""
    return Markup(
        f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}"'
        f'{style} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def heading(title: str) -> str:
    """The title at the upper left."""
    return text(0, 14, title, css="heading")


def text(x: float, y: float, said: str, *, anchor: str = "start", css: str = "") -> str:
    """A text whose base line begins, ends or is centred (`anchor`) at a point."""
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(said)}</text>'


def base_line(left: float, right: float, y: float) -> str:
    """What bars stand on."""
    return f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'


def whisker(low: float, high: float, y: float) -> str:
    """An interval with its two ends."""
    ends = f"M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
    return f'<path class="whisker" d="{ends}M{low:.1f} {y:.1f}H{high:.1f}"/>'


def cut(name: str, characters: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= characters else name[: characters - 1].rstrip() + "…"


def axis(low: float, high: float) -> tuple[float, list[float]]:
    """The end of an axis that holds `high`, at a round figure, and the ticks up to it."""
    found = ticks(low, high if high - low > SMALLEST_SPAN else low + 1.0, cover=True)
    return found[-1], found


def ticks(low: float, high: float, *, cover: bool = False) -> list[float]:
    """Round figures (1, 2 or 5 times a power of ten apart) inside `[low, high]`, or around it if `cover`."""
    if high - low <= SMALLEST_SPAN:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.floor(low / step + 1e-9) if cover else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if cover else math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def number(value: float, unit: str) -> str:
    """A value with three figures, or all those before the point; the unit `"%"` reads it as a fraction."""
    if unit == "%":
        return f"{100 * value:.3g} %" if abs(value) < 0.1 else f"{100 * value:.1f} %".replace(".0 %", " %")
    whole = abs(value) >= 1000 or float(value).is_integer()
    digits = f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()
