"""The page of a sweep: leaderboard, parallel coordinates, importance, learning curves, and what stopping has saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from dermray import reporting
from dermray.reporting import diagrams, plots
from dermray.reporting.diagrams import Curve, Scale
from dermray.scales import NO_VALUE

TONES = {"stopped": "warn", "failed": "bad", "finished": ""}


def render(document: Mapping[str, Any], parameters: Mapping[str, bool], recipe: str) -> str:
    """The page.

    Args:
        document: what `trials.json` holds; trials are best first.
        parameters: of the space; whether each is drawn on a logarithmic scale.
        recipe: name of what was varied.
    """
    trials = document["trials"]
    full = sum(trial["samples_in_full"] for trial in trials)
    return reporting.render(
        "sweep.html",
        document=document,
        recipe=recipe,
        parameters=list(parameters),
        trains=full > 0,
        saved=full - document.get("samples_trained", 0),
        coordinates=_coordinates(document, parameters),
        curves=_curves(document) if full else None,
        importance=_importance(document["importance"]),
        exploits=_exploits(document),
        schedules=_schedules(document, list(parameters)),
        legend=diagrams.legend({"best": "good", "stopped early": "warn", "failed": "bad", "others": ""}),
    )


def _tone(document: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    return "good" if trial["name"] == document["best"] else TONES[trial["status"]]


def _coordinates(document: Mapping[str, Any], parameters: Mapping[str, bool]) -> Markup | None:
    trials = [trial for trial in document["trials"] if trial[document["objective"]] is not None]
    scales = [
        Scale(key, [_value(trial["params"].get(key)) for trial in trials], logarithmic)
        for key, logarithmic in parameters.items()
    ]
    scales.append(Scale(document["objective"], [trial[document["objective"]] for trial in trials]))
    tones, names = [_tone(document, trial) for trial in trials], [trial["name"] for trial in trials]
    return diagrams.parallel_coordinates(scales, tones, names, title="settings and last figure of each trial")


def _value(value: Any) -> float | str:
    if value is None:
        return NO_VALUE
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _curves(document: Mapping[str, Any]) -> Markup:
    objective = document["objective"]
    lines = [
        Curve(
            f"{trial['name']}: {trial['status']}",
            [(point["samples"], point[objective]) for point in trial["curve"]],
            _tone(document, trial),
            trial["status"] != "finished",
            [
                index
                for index, point in enumerate(trial["curve"])
                if any(exploit["step"] == point["step"] for exploit in trial["exploits"])
            ],
        )
        for trial in document["trials"]
    ]
    return diagrams.curves(lines, title=objective, x_title="training samples seen")


def _exploits(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every exploit of a population in its order, with what the trial trained with before."""
    found = []
    for trial in document["trials"]:
        before = trial["drawn"]
        for exploit in trial["exploits"]:
            changes = [f"{key}: {before.get(key, NO_VALUE)} → {value}" for key, value in exploit["params"].items()]
            found.append({**exploit, "changes": "; ".join(changes)})
            before = exploit["params"]
    return sorted(found, key=lambda exploit: (exploit["generation"], exploit["name"]))


def _schedules(document: Mapping[str, Any], parameters: list[str]) -> list[Markup]:
    """For each numeric parameter that a population changed: its value in each trial over the samples seen."""
    if not any(trial["exploits"] for trial in document["trials"]):
        return []
    found = []
    for key in parameters:
        lines = [_schedule(document, trial, key) for trial in document["trials"]]
        if all(isinstance(value, int | float) for line in lines for _, value in line.points):
            found.append(diagrams.curves(lines, title=key, x_title="training samples seen"))
    return found


def _schedule(document: Mapping[str, Any], trial: Mapping[str, Any], key: str) -> Curve:
    per_step = trial["samples_in_full"] / trial["num_steps"]
    points, value = [(0.0, trial["drawn"].get(key))], trial["drawn"].get(key)
    for exploit in trial["exploits"]:
        at = exploit["step"] * per_step
        points += [(at, value), (at, value := exploit["params"].get(key))]
    points.append((float(trial["samples_trained"]), value))
    return Curve(trial["name"], points, _tone(document, trial))


def _importance(found: Mapping[str, Any] | None) -> Markup | None:
    if found is None:
        return None
    shares = found["shares"]
    return plots.bar_chart(list(shares), list(shares.values()), title="share of the variance explained", unit="%")
