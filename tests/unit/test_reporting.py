"""The report look: self-contained, escaped, valid SVG, whatever it is given."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dermray import reporting
from dermray.reporting import plots
from tests.corpora import jpeg

NASTY = '<script>alert("1")</script> & co'
finite = st.floats(0, 1e9, allow_nan=False)


def svg(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def figures(element: ET.Element) -> str:
    return " ".join(element.itertext())


def numbers_are_finite(markup: str) -> bool:
    return not re.search(r"\b(nan|inf)\b", re.sub(r">[^<]*<", "><", markup))


def test_base_page_is_self_contained():
    page = reporting.render("base.html")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "@import" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_values_are_escaped_and_missing_ones_are_errors():
    environment = reporting._environment()
    assert "<script>" not in environment.from_string("{{ value }}").render(value=NASTY)
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ value }}").render()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=50), finite), max_size=12), st.sampled_from(["", "%", "s"]))
def test_bar_chart_is_valid_for_any_values(bars, unit):
    labels = [re.sub(r"[^\x20-\x7e]", "?", label) for label, _ in bars]
    values = [value for _, value in bars]
    chart = plots.bar_chart(labels, values, lows=values, highs=values, title=NASTY, unit=unit)
    assert numbers_are_finite(chart)
    assert len(svg(chart).findall(".//{*}rect")) == len(bars)


def test_bars_are_to_scale():
    chart = svg(plots.bar_chart(["a", "b"], [0.2, 0.8], title="t", unit="%"))
    short, long = (float(rect.get("width")) for rect in chart.findall(".//{*}rect"))
    assert long / short == pytest.approx(4.0, rel=1e-2)
    assert "80 %" in figures(chart)
    assert "20 %" in figures(chart)


@settings(deadline=None, max_examples=50)
@given(st.lists(finite, min_size=1, max_size=30), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_histogram_is_valid_for_any_counts(counts, start, width):
    edges = start + width * np.arange(len(counts) + 1)
    chart = plots.histogram(counts, edges.tolist(), title="sizes", unit="px")
    assert numbers_are_finite(chart)
    assert len(svg(chart).findall(".//{*}rect")) == len(counts)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), max_size=9))
def test_interval_chart_is_valid_for_any_differences(rows):
    values, lows, highs = ([value + sign * half for value, half in rows] for sign in (0, -1, 1))
    names = [f"metric {NASTY} {number}" for number in range(len(rows))]
    chart = plots.interval_chart(names, values, lows=lows, highs=highs, title=NASTY, figures=names)
    assert numbers_are_finite(chart)
    assert len(svg(chart).findall(".//{*}circle")) == len(rows)


def test_reliability_diagram_draws_accuracy_over_confidence():
    bins = [
        {"low": 0.4, "high": 0.6, "num_samples": 30, "confidence": 0.5, "accuracy": 0.25},
        {"low": 0.8, "high": 1.0, "num_samples": 10, "confidence": 0.9, "accuracy": 0.75},
    ]
    chart = svg(plots.reliability_diagram(bins, title=NASTY))
    low, high = (float(rect.get("height")) for rect in chart.findall(".//{*}rect[@class='bar']"))
    assert high / low == pytest.approx(3.0, rel=1e-2)
    many, few = (float(rect.get("height")) for rect in chart.findall(".//{*}rect[@class='cell-off']"))
    assert many / few == pytest.approx(3.0, rel=2e-2)
    assert numbers_are_finite(plots.reliability_diagram([], title="none"))


@pytest.mark.parametrize("num_classes", [1, 4, 113])
def test_confusion_matrix_draws_what_is_there(num_classes):
    matrix = np.random.default_rng(0).integers(0, 3, (num_classes, num_classes))
    matrix[0] = 0
    chart = svg(plots.confusion_matrix(matrix.tolist(), [f"class {NASTY} {n}" for n in range(num_classes)]))
    assert len(chart.findall(".//{*}g")) == np.count_nonzero(matrix)
    assert len(chart.findall(".//{*}rect[@class='cell']")) == np.count_nonzero(np.diag(matrix))


def test_thumbnail_is_a_small_upright_jpeg():
    uri = reporting.thumbnail(jpeg((200, 100, 50), width=640, height=320), max_side=160)
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert image.size == (160, 80)
    assert reporting.thumbnail(b"nothing") is None


@pytest.mark.parametrize(
    ("filtered", "expected"),
    [
        (reporting.percent(0.8034), "80.3\u00a0%"),
        (reporting.percent(None), "\u2013"),
        (reporting.count(1234567), "1\u202f234\u202f567"),
        (reporting.size(999), "999 B"),
        (reporting.size(2_500_000), "2.5 MB"),
        (reporting.duration(0.42), "0.4 s"),
        (reporting.duration(59.7), "1 min 00 s"),
        (reporting.duration(7500), "2 h 05 min"),
        (reporting.short("abcdef" * 10), "abcdefabcdef"),
        (reporting.metric("10pct_macro_auroc_ovo"), "10 % of labels: macro AUROC ovo"),
        (reporting.metric("image_to_text_R@1"), "image → text R@1"),
    ],
)
def test_figures_for_people(filtered, expected):
    assert filtered == expected
