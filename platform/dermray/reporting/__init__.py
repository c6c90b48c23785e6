"""One look for every HTML report: templates, plots and thumbnails of self-contained pages.

This room renders what it is given and computes nothing. A page holds all it needs (style, script, plots as
inline SVG, images as data URIs), follows the reader's light or dark setting, and prints well. It runs no script
but its own, and loads nothing, whatever stands in the names that it shows: its policy names both by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dermray import __version__, images
from dermray.errors import ImageError
from dermray.scales import NO_VALUE

THUMBNAIL_QUALITY = 82


def render(template: str, **context: Any) -> str:
    """Fill one of the templates of `dermray/reporting/templates`; values are HTML-escaped.

    Templates extend `base.html` (blocks `title`, `eyebrow`, `lede`, `content`) and import `parts.html` for
    tiles, cards and tables. Filters: `percent`, `count`, `size`, `duration`, `short`, `metric`, `score` (functions
    below).

    Raises:
        jinja2.UndefinedError: the template asks for a value that `context` lacks.
    """
    return _environment().get_template(template).render(**context)


def macros(source: str, names: Iterable[str], **context: Any) -> dict[str, Markup]:
    """What the macros of a part of a page give, by name; nothing for one that the part has not.

    Args:
        source: the part, in Jinja: it may import our templates, and values are HTML-escaped. Empty: a table of scores.
        names: of macros that take no argument.
        context: what they see.

    Raises:
        jinja2.TemplateError: it is no template, or asks for a value that `context` lacks.
    """
    environment = _environment()
    template = environment.from_string(source) if source else environment.get_template("evaluate_scores.html")
    module = template.make_module(context)
    return {name: getattr(module, name)() if hasattr(module, name) else Markup() for name in names}


def thumbnail(image: bytes, *, max_side: int = 160) -> str | None:
    """A small JPEG of an encoded image as a `data:` URI, longer side at most `max_side` pixels.

    None where no picture can be made of it: a page is shown without that picture rather than not at all.
    """
    try:
        small = images.thumbnail(image, max_side=max_side, quality=THUMBNAIL_QUALITY)
    except ImageError:
        return None
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


def score(one: Mapping[str, Any], key: str = "value", digits: int = 4) -> str:
    """A score of a report, or an end of its interval: `0.8710`; `3.25 mm` where it has a unit; undefined → a dash.

    Args:
        one: `value`, `low`, `high`, and `unit` where the score is no share of 1.
        key: which of the three.
        digits: behind the point; of a score with a unit, digits that count.
    """
    value, unit = one[key], one.get("unit")
    if value is None:
        return NO_VALUE
    return f"{value:.{digits}f}" if unit is None else f"{value:.{digits}g}\u00a0{unit}".rstrip()


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
    filters = (percent, count, size, duration, short, metric, score)
    environment.filters.update((function.__name__, function) for function in filters)
    style, script = (_source(environment, name) for name in ("style.css", "sort.js"))
    environment.globals.update(dermray_version=__version__, style=style, script=script, policy=_policy(style, script))
    return environment


def _source(environment: Environment, name: str) -> Markup:
    """A file of the templates as it stands, which is what its hash is of."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _policy(style: str, script: str) -> str:
    """The `Content-Security-Policy` of a page: its own style and script, images inside it, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (style, script)]
    rules = {
        "default-src": "'none'",
        "style-src": f"'sha256-{hashes[0]}'",
        # Plots take their colours, and bars their widths, by the attribute.
        "style-src-attr": "'unsafe-inline'",
        "script-src": f"'sha256-{hashes[1]}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{rule} {sources}" for rule, sources in rules.items())
