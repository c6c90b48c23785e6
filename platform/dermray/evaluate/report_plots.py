"""The plots of an evaluation's page, from the sections of its document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from dermray import reporting
from dermray.reporting import plots

# Groups in a plot: more would be a wall of bars. The table holds all.
MAX_BARS = 24


def of_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Plots of one task's section: `confusion`, `reliability` (before and after the temperature), `groups`."""
    drawn: dict[str, Any] = {"groups": _groups(section["groups"])} if "groups" in section else {}
    if "confusion" in section:
        names = [one["name"] for one in section["classes"]]
        drawn["confusion"] = plots.confusion_matrix(section["confusion"], names)
    if "calibration" in section:
        drawn["reliability"] = _reliability(section["calibration"])
    return drawn


def _reliability(calibration: Mapping[str, Any]) -> list[Markup]:
    drawn = [plots.reliability_diagram(calibration["bins"], title="right, by confidence")]
    if calibration["temperature"]:
        title = f"at temperature {calibration['temperature']['value']:.3g}"
        drawn.append(plots.reliability_diagram(calibration["temperature"]["bins"], title=title))
    return drawn


def _groups(groups: Mapping[str, Any]) -> dict[str, Markup]:
    """Bars of the first score of each dimension in which two groups have one."""
    drawn = {}
    for dimension, found in groups["dimensions"].items():
        scored = [group for group in found["groups"] if group["metrics"]]
        if len(scored) < 2:
            continue
        name = next(iter(scored[0]["metrics"]))
        shown = sorted(scored, key=lambda group: -group["num_samples"])[:MAX_BARS]
        metrics = [group["metrics"][name] for group in scored if group in shown]
        drawn[dimension] = plots.bar_chart(
            [group["name"] for group in scored if group in shown],
            [metric["value"] for metric in metrics],
            lows=[metric["low"] for metric in metrics] if metrics[0]["low"] is not None else None,
            highs=[metric["high"] for metric in metrics] if metrics[0]["high"] is not None else None,
            title=reporting.metric(name),
            unit="" if "auroc" in name else "%",
            compact=True,
        )
    return drawn
