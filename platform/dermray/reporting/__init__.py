"""One look for every HTML report: templates, plots and thumbnails of self-contained pages.

This room renders what it is given and computes nothing. A page holds all it needs (style, script, plots as
inline SVG, images as data URIs), follows the reader's light or dark setting, and prints well.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dermray import __version__, images

THUMBNAIL_QUALITY = 82
NO_VALUE = "\u2013"


def render(template: str, **context: Any) -> str:
    """Fill one of the templates of `dermray/reporting/templates`; values are HTML-escaped.

    Templates extend `base.html` (blocks `title`, `eyebrow`, `lede`, `content`) and import `parts.html` for
    tiles, cards and tables. Filters: `percent`, `count`, `size`, `duration`, `short`, `metric` (functions below).

    Raises:
        jinja2.UndefinedError: the template asks for a value that `context` lacks.
    """
    return _environment().get_template(template).render(**context)


def thumbnail(image: bytes, *, max_side: int = 160) -> str:
    """A small JPEG of an encoded image as a `data:` URI, longer side at most `max_side` pixels.

    Raises:
        ImageError: the bytes are not an acceptable image.
    """
    pixels = images.decode(image)
    height, width = pixels.shape[:2]
    shorter = max(1, round(max_side * min(height, width) / max(height, width)))
    small = images.encode_jpeg(images.resize_shorter(pixels, shorter), THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.8034 → `80.3 %` (the space does not break); nothing to show → a dash."""
    return NO_VALUE if value is None else f"{100 * value:.{digits}f}\u00a0%"


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while num_bytes >= 1000 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.0f} {units[power]}" if power == 0 else f"{num_bytes:.1f} {units[power]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metric(name: str) -> str:
    """A score in words: `macro_auroc` → `macro AUROC`, `image_to_text_R@1` → `image → text R@1`."""
    said = name.replace("image_to_text", "image → text").replace("text_to_image", "text → image").replace("_", " ")
    return (
        said.replace("auroc", "AUROC").replace("f1", "F1").replace("pct ", " % of labels: ").replace(" shot", "-shot")
    )


def short(digest: str, length: int = 12) -> str:
    """The first characters of a digest."""
    return digest[:length]


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dermray.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count, size=size, duration=duration, short=short, metric=metric)
    environment.globals["dermray_version"] = __version__
    return environment
