"""Several evaluations side by side: what jobs/compare.py leaves behind (`comparison.json`, `comparison.html`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from dermray import documents, ledger, reporting, scales, storage
from dermray.errors import EvaluationError
from dermray.evaluate import compare
from dermray.evaluate.predictions import ClassPredictions, Origin
from dermray.evaluate.settings import CompareConfig
from dermray.reporting import plots

SCHEMA_VERSION = 1
JSON_NAME = "comparison.json"
HTML_NAME = "comparison.html"
# Facts that change scores without making the samples others; where reports differ in them, the page says so.
CIRCUMSTANCES = {
    "prompts": ("tasks", "zero_shot", "templates"),
    "preprocessing": ("model", "preprocessing_digest"),
    "precision": ("model", "precision"),
    "code": ("code", "digest"),
}


@dataclass(frozen=True)
class Comparison:
    """The JSON document and the page that shows it."""

    document: dict[str, Any]
    html: str

    def metrics(self) -> dict[str, float]:
        """Every difference under `[DATASET/]TASK/NAME_difference_K`, K counting the reports from 1, and its p-value."""
        flat: dict[str, float] = {}
        for dataset, found in self.document["comparisons"].items():
            for task, section in found["tasks"].items():
                for name, row in section["metrics"].items():
                    for number, one in enumerate(row["differences"]):
                        if one is None:
                            continue
                        key = "/".join(filter(None, (dataset, task, name.replace("@", "_at_"))))
                        flat[f"{key}_difference_{number}"] = one["difference"]["value"]
                        if one["p_value"] is not None:
                            flat[f"{key}_p_value_{number}"] = one["p_value"]
        return flat

    def headline(self) -> list[str]:
        """A few lines for a terminal: the first difference of each task."""
        lines = []
        for dataset, found in self.document["comparisons"].items():
            for task, section in found["tasks"].items():
                found_in = [pair for pair in section["metrics"].items() if any(pair[1]["differences"])]
                if not found_in:
                    lines.append(f"{dataset} {task}: no score that the predictions hold".lstrip())
                    continue
                name, row = found_in[0]
                for label, one in zip(self.document["names"], row["differences"], strict=True):
                    if one is not None:
                        where = " ".join(filter(None, (dataset, task, name)))
                        lines.append(f"{where}: {label} {_said(one)} against {self.document['names'][0]}")
        return lines

    def save(self, uri: str) -> None:
        """Write `comparison.html` and then `comparison.json` into the folder `uri`.

        Raises:
            ClaimError: another run writes into it, or has taken it over.
            StorageError: it cannot be written.
        """
        written = documents.json_text(self.document)
        with ledger.claim(uri) as claim:
            claim.write_together({storage.join(uri, HTML_NAME): self.html, storage.join(uri, JSON_NAME): written})


def run(config: CompareConfig) -> Comparison:
    """Compare saved reports; of benchmarks, those data sets that all of them scored.

    Raises:
        EvaluationError: a report is not there, they have no data set or task in common, or they are not comparable.
    """
    documents = [compare.read_report(uri) for uri in config.reports]
    names = config.names or _names(config.reports, documents)
    if len(names) != len(config.reports):
        raise EvaluationError(f"names: {len(names)} names are given for {len(config.reports)} reports")
    kinds = {"benchmarks" in document for document in documents}
    if len(kinds) > 1:
        raise EvaluationError(
            "some reports are of a suite of benchmarks and others of one data set; compare like with like"
        )
    groups: dict[str, list[str]] = {"": list(config.reports)}
    if kinds == {True}:
        common = [name for name in documents[0]["benchmarks"] if all(name in one["benchmarks"] for one in documents)]
        groups = {
            name: [
                storage.inside(uri, document["benchmarks"][name]["report"]).rpartition("/")[0]
                for uri, document in zip(config.reports, documents, strict=True)
            ]
            for name in common
        }
    if not groups:
        raise EvaluationError("the reports have no benchmark in common")
    comparisons = {name: _compared(uris, config) for name, uris in groups.items()}
    document = {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "names": list(names),
        "config": config.recorded(),
        "comparisons": comparisons,
    }
    drawn = {name: _plots(found, names) for name, found in comparisons.items()}
    return Comparison(document, reporting.render("compare.html", document=document, plots=drawn))


def _names(uris: Sequence[str], documents: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The models' names; with the folder of the report where two have the same."""
    models = [str(document["model"]["name"]) for document in documents]
    return tuple(
        name if models.count(name) == 1 else f"{name} ({storage.name_of(uri)})"
        for name, uri in zip(models, uris, strict=True)
    )


def _compared(uris: Sequence[str], config: CompareConfig) -> dict[str, Any]:
    """The key `comparisons.NAME` of the document: one data set."""
    documents = [compare.read_report(uri) for uri in uris]
    first = documents[0]
    common = [task for task in first["tasks"] if all(task in one["tasks"] for one in documents)]
    if not common:
        raise EvaluationError(f"the reports {', '.join(uris)} have no task in common")
    return {
        "corpus": first["corpus"],
        "reports": [
            {"uri": uri, "model": one["model"], "created_at": one["created_at"], "code": one["code"]}
            for uri, one in zip(uris, documents, strict=True)
        ],
        "differing": _differing(documents, common),
        "not_in_all": sorted({task for one in documents for task in one["tasks"]} - set(common)),
        "tasks": {task: _task(task, uris, documents, config) for task in common},
    }


def _differing(documents: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """In what some reports differ beside the model, of the tasks that all of them have."""
    # Reports of earlier versions lack keys that are empty in later ones.
    found = {name: [_at(one, keys) or None for one in documents] for name, keys in CIRCUMSTANCES.items()}
    found["predictors"] = [[compare.predicted_by(one, task) for task in tasks] for one in documents]
    options = [
        {key: value for task in tasks for key, value in compare.options_of(one, task).items()} for one in documents
    ]
    told = {key: [one[key] for one in options] for key in options[0] if all(key in one for one in options)}
    found |= {f"{key} ({', '.join(map(str, values))})": values for key, values in told.items()}
    return [name for name, values in found.items() if any(value != values[0] for value in values)]


def _task(
    task: str, uris: Sequence[str], documents: Sequence[Mapping[str, Any]], config: CompareConfig
) -> dict[str, Any]:
    """Scores of all reports by metric, as reported, and the paired difference of each from the first."""
    sections = [document["tasks"][task] for document in documents]
    if not all(section.get("predictions") for section in sections):
        origins = [_origin(task, document) for document in documents]
        for uri, other in zip(uris[1:], origins[1:], strict=True):
            compare.check_origins(uris[0], origins[0], uri, other)
        return _side_by_side(task, sections, [{} for _ in uris])
    saved = [compare.load(uri, document, task) for uri, document in zip(uris, documents, strict=True)]
    baseline, origin = saved[0]
    prefix = baseline.prefix if isinstance(baseline, ClassPredictions) else ""
    found: list[Mapping[str, compare.Difference]] = [{}]
    for uri, (candidate, other) in zip(uris[1:], saved[1:], strict=True):
        compare.check_origins(uris[0], origin, uri, other)
        found.append(compare.compare(baseline, candidate, bootstrap=config.bootstrap, seed=config.seed))
    setting = baseline.setting if isinstance(baseline, ClassPredictions) else ""
    return _side_by_side(task, sections, found, prefix=prefix, setting=setting)


def _origin(task: str, document: Mapping[str, Any]) -> Origin:
    """Whose scores on what, of a report without predictions of the task."""
    model, corpus = document["model"], document["corpus"]
    return Origin(task, corpus["split"], corpus["digest"], model["model_digest"], model["preprocessing_digest"])


def _side_by_side(
    task: str,
    sections: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, compare.Difference]],
    *,
    prefix: str = "",
    setting: str = "",
) -> dict[str, Any]:
    """A task's scores in all reports, with the differences found of each: none where predictions are not kept."""
    return {
        "title": sections[0].get("title", task),
        "num_samples": sections[0]["num_samples"],
        "headline": sections[0]["headline"],
        "setting": setting,
        "metrics": {
            name: {
                "scores": [section["metrics"][name] for section in sections],
                "differences": [
                    _difference(differences.get(name.removeprefix(prefix)), name, sections[0]["metrics"][name])
                    for differences in found
                ],
            }
            for name in sections[0]["metrics"]
            if all(name in section["metrics"] for section in sections)
        },
        "calibration_errors": [
            section["calibration"]["expected_calibration_error"] if "calibration" in section else None
            for section in sections
        ],
        "groups": _groups(sections),
    }


def _difference(found: compare.Difference | None, name: str, score: Mapping[str, Any]) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**asdict(found), "better": found.is_better(name, score), "worse": found.is_worse(name, score)}


def _groups(sections: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The first score of each group that has one in all reports, by dimension."""
    every = [section.get("groups", {}).get("dimensions", {}) for section in sections]
    found = {}
    for dimension, members in every[0].items():
        rows = []
        for group in members["groups"]:
            others = [
                next((one for one in each.get(dimension, {}).get("groups", []) if one["name"] == group["name"]), None)
                for each in every
            ]
            name = next(iter(group["metrics"]), None)
            if name is not None and all(one is not None and name in one["metrics"] for one in others):
                scores = [one["metrics"][name] for one in others if one is not None]
                rows.append(
                    {"name": group["name"], "num_samples": group["num_samples"], "metric": name, "scores": scores}
                )
        if rows:
            found[dimension] = rows
    return found


def _plots(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Markup]]:
    """A plot of each task's differences for each report but the first; ranks, which have another scale, left out."""
    drawn: dict[str, list[Markup]] = {}
    for task, section in found["tasks"].items():
        drawn[task] = []
        for number in range(1, len(names)):
            rows = [
                (name, row["differences"][number])
                for name, row in section["metrics"].items()
                if row["differences"][number] and scales.of(name, row["scores"][0]).is_share
            ]
            rows = [(name, one) for name, one in rows if one["difference"]["low"] is not None]
            if rows:
                drawn[task].append(
                    plots.interval_chart(
                        [reporting.metric(name) for name, _ in rows],
                        [one["difference"]["value"] for _, one in rows],
                        lows=[one["difference"]["low"] for _, one in rows],
                        highs=[one["difference"]["high"] for _, one in rows],
                        title=f"{names[number]} minus {names[0]}",
                        figures=[f"{one['difference']['value']:+.4f}, p = {one['p_value']:.3f}" for _, one in rows],
                    )
                )
    return drawn


def _said(one: Mapping[str, Any]) -> str:
    difference = one["difference"]
    interval = f" [{difference['low']:+.4f}, {difference['high']:+.4f}]" if difference["low"] is not None else ""
    p_value = f", p = {one['p_value']:.3f}" if one["p_value"] is not None else ""
    return f"{difference['value']:+.4f}{interval}{p_value}"


def _at(document: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
