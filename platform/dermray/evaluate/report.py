"""What an evaluation leaves behind: `report.json` (schema in docs/evaluation.md) and one self-contained page."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

import dermray
from dermray import __version__, documents, extensions, ledger, reporting, scales, storage
from dermray.corpus.accounts import require_balance, told_in_words
from dermray.errors import EvaluationError
from dermray.evaluate import predictions, report_plots
from dermray.evaluate.benchmarks import Benchmark, Suite
from dermray.evaluate.cases import Skipped
from dermray.evaluate.leakage import Leakage
from dermray.evaluate.predictions import OwnPredictions, Predictions
from dermray.evaluate.predictors import kinds as predictors
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.tasks import kinds
from dermray.evaluate.tasks.contract import Context, TaskResult, scorer
from dermray.scales import Scale

SCHEMA_VERSION = 1
JSON_NAME = "report.json"
HTML_NAME = "report.html"
SOURCE_SUFFIXES = (".py", ".yaml", ".json")
# Macros of a task's part of the page: at its top, its own, and at its end.
PARTS = ("tiles", "block", "computed")
VERSIONED_PACKAGES = ("torch", "open_clip_torch", "pillow", "numpy")


@dataclass(frozen=True)
class Report:
    """A finished evaluation: the JSON document and the page that shows it."""

    document: dict[str, Any]
    html: str
    predictions: dict[str, Predictions] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Every score under `TASK/NAME`, its interval under `TASK/NAME_low` and `TASK/NAME_high`.

        Also the calibration error, and under `TASK/NAME_gap_DIMENSION` how far the groups lie apart. `@` is written
        `_at_`, so that every tracking store takes the names.
        """
        flat: dict[str, float] = {}
        for task, section in self.document["tasks"].items():
            for name, metric in section["metrics"].items():
                if metric["value"] is None:
                    continue
                key = f"{task}/{name.replace('@', '_at_')}"
                flat[key] = metric["value"]
                if metric["low"] is not None:
                    flat |= {f"{key}_low": metric["low"], f"{key}_high": metric["high"]}
            if "calibration" in section:
                name = "expected_calibration_error"
                flat[f"{task}/{name}"] = section["calibration"][name]
            for dimension, found in section.get("groups", {}).get("dimensions", {}).items():
                for name, gap in found["gaps"].items():
                    flat[f"{task}/{name.replace('@', '_at_')}_gap_{dimension}"] = gap["value"]
        return flat

    @property
    def scored(self) -> list[dict[str, Any]]:
        """What was scored: `uri` and `digest` of the corpus, or of the table's file."""
        return [self.document["corpus"]]

    def headline(self) -> list[str]:
        """A few lines for a terminal."""
        lines = []
        for task, section in self.document["tasks"].items():
            shown = ", ".join(f"{name} {_said(name, section['metrics'][name])}" for name in section["headline"])
            used, excluded = section["num_samples"], section["excluded"]
            lines.append(f"{task} ({used:,} samples): {shown}")
            figures = require_balance(task, used + sum(excluded.values()), used, excluded)
            if figures["told"]:
                lines.append(f"{task}: {told_in_words(figures)}")
        return lines

    def save(self, uri: str) -> None:
        """Write `predictions/TASK.parquet`, `report.html` and then `report.json` into the folder `uri`.

        Raises:
            ClaimError: another run writes into it, or has taken it over.
            StorageError: it cannot be written.
        """
        with ledger.claim(uri) as claim:
            claim.write_together(self.files(uri))

    def files(self, uri: str) -> dict[str, str | Callable[[Path], object]]:
        """What `save` writes, as `ledger.Claim.write_together` takes it."""
        model, corpus = self.document["model"], self.document["corpus"]
        files: dict[str, str | Callable[[Path], object]] = {}
        for task, found in self.predictions.items():
            origin = predictions.Origin(
                task, corpus["split"], corpus["digest"], model["model_digest"], model["preprocessing_digest"]
            )
            write = partial(predictions.write_file, predictions=found, origin=origin)
            files[storage.join(uri, predictions.path_of(task))] = write
        written = documents.json_text(self.document)
        return files | {storage.join(uri, HTML_NAME): self.html, storage.join(uri, JSON_NAME): written}


@dataclass(frozen=True)
class SuiteReport:
    """A finished benchmark: one report a data set, and what sets them beside the published scores."""

    document: dict[str, Any]
    html: str
    reports: dict[str, Report]

    def metrics(self) -> dict[str, float]:
        """Every score under `DATASET/TASK/NAME`."""
        return {
            f"{_short(name)}/{key}": value
            for name, report in self.reports.items()
            for key, value in report.metrics().items()
        }

    @property
    def scored(self) -> list[dict[str, Any]]:
        """What was scored, for each data set as `Report.scored`."""
        return [one for report in self.reports.values() for one in report.scored]

    def headline(self) -> list[str]:
        """A few lines for a terminal: each data set that was scored, and each that was not."""
        lines = [f"{_short(name)}: {line}" for name, report in self.reports.items() for line in report.headline()]
        return lines + [f"skipped {one['line']}" for one in self.document["skipped"]]

    def save(self, uri: str) -> None:
        """Write each data set's report into its own folder below `uri`, then the summary into `uri`; as a report's."""
        files: dict[str, str | Callable[[Path], object]] = {}
        for name, report in self.reports.items():
            files |= report.files(storage.join(uri, _short(name)))
        written = documents.json_text(self.document)
        files |= {storage.join(uri, HTML_NAME): self.html, storage.join(uri, JSON_NAME): written}
        with ledger.claim(uri) as claim:
            claim.write_together(files)


def summarise(
    suite: Suite,
    reports: Mapping[str, Report],
    skipped: Sequence[Skipped],
    *,
    config: EvaluateConfig,
    duration_s: float,
) -> SuiteReport:
    """Set the reports of a benchmark's data sets side by side.

    Args:
        suite: the benchmark.
        reports: name of a data set's benchmark → its report.
        skipped: those that were not scored.
        config: of the run.
        duration_s: of the whole evaluation.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite": suite.model_dump(mode="json", exclude={"benchmarks"}),
        "model": next((report.document["model"] for report in reports.values()), None),
        "duration_s": round(duration_s, 3),
        "config": config.recorded(),
        "benchmarks": {
            name: {
                "report": storage.join(_short(name), JSON_NAME),
                "corpus": report.document["corpus"],
                "benchmark": report.document["benchmark"],
                "num_samples": {task: section["num_samples"] for task, section in report.document["tasks"].items()},
                "excluded": {task: section["excluded"] for task, section in report.document["tasks"].items()},
            }
            for name, report in reports.items()
        },
        "skipped": [
            {
                "name": one.benchmark.name,
                "title": one.benchmark.title,
                "reason": one.reason,
                "offered": one.benchmark.dataset.offered,
                "bundle": one.benchmark.bundle or suite.bundle,
                "line": str(one),
            }
            for one in skipped
        ],
    }
    html = reporting.render(
        "benchmark.html", document=document, pages={name: f"{_short(name)}/{HTML_NAME}" for name in reports}
    )
    return SuiteReport(document, html, dict(reports))


def build(
    context: Context,
    results: Mapping[str, TaskResult],
    *,
    model_uri: str,
    duration_s: float,
    benchmark: Benchmark | None = None,
    leakage: Leakage | None = None,
) -> Report:
    """Assemble the document and render the page.

    Args:
        context: what the tasks worked on.
        results: name of a task, as `tasks` names it → result.
        model_uri: where the model was loaded from.
        duration_s: of the whole evaluation.
        benchmark: what was computed, where it is a published one.
        leakage: what was found of the samples in a training corpus, where that was looked for.
    """
    document = _document(context, results, model_uri, duration_s)
    document["benchmark"] = _compared(benchmark, document) if benchmark else None
    document["leakage"] = leakage.describe(context.samples) if leakage else None
    shown = frozenset().union(*(result.pictures for result in results.values()))
    sources = {kinds.short(name): scorer(name).page for name in results}
    pages = _pages(document["tasks"], sources, _thumbnails(context.samples, shown))
    html = reporting.render("evaluate.html", document=document, pages=pages)
    kept = {
        kinds.short(name): replace(one.predictions, scored_by=name)
        if isinstance(one.predictions, OwnPredictions)
        else one.predictions
        for name, one in results.items()
        if one.predictions is not None
    }
    return Report(document, html, kept)


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _compared(benchmark: Benchmark, document: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's facts, and a table of our scores and the published ones, in the publication's metrics."""
    ours = {
        f"{task}/{name}": metric
        for task, section in document["tasks"].items()
        for name, metric in section["metrics"].items()
    }
    reported = [*benchmark.metrics, *(metric for one in benchmark.published for metric in one.scores)]
    metrics = [metric for metric in dict.fromkeys(reported) if metric in ours]
    own = {"model": document["model"]["name"], "scores": {name: ours[name] for name in metrics}, "reference": None}
    published = [
        {
            "model": one.model,
            "scores": {name: asdict(Metric(one.scores[name])) for name in metrics if name in one.scores},
            "reference": one.reference,
        }
        for one in benchmark.published
    ]
    facts = benchmark.model_dump(mode="json", include={"name", "title", "dataset", "bundle"})
    return {**facts, "metrics": metrics, "rows": [own, *(row for row in published if row["scores"])]}


def _document(context: Context, results: Mapping[str, TaskResult], model_uri: str, duration_s: float) -> dict[str, Any]:
    samples, features = context.samples, context.features
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"uri": model_uri, "precision": context.config.precision, **asdict(features.info)},
        "corpus": {
            "uri": samples.uri,
            "digest": samples.corpus_digest,
            "split": samples.split,
            "num_samples": len(samples),
            "rows": samples.rows,
            "told": samples.told,
            "train_split": context.training[0].split if context.training else None,
            "num_train_samples": len(context.training[0]) if context.training else None,
        },
        "code": {
            "dermray": __version__,
            "digest": _code_digest(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES},
        },
        "engine": {
            "duration_s": round(duration_s, 3),
            "encoding_s": round(features.duration_s, 3),
            "num_actors": features.num_actors,
            "num_images_encoded": features.num_encoded,
            "images_per_s": round(features.num_encoded / max(features.duration_s, 1e-9), 1),
            "failed_images": features.failures,
            "failed_train_images": context.training[1].failures if context.training else {},
        },
        "config": context.config.recorded(),
        "tasks": {
            kinds.short(name): {
                "title": kinds.find(name).title,
                "num_samples": result.num_samples,
                "headline": list(result.headline),
                "excluded": result.excluded,
                "metrics": {key: _score(metric, result.scales.get(key)) for key, metric in result.metrics.items()},
                "predictions": predictions.path_of(kinds.short(name)) if result.predictions is not None else None,
                **result.details,
            }
            | _predicted_by(context.config, name)
            | {"options": _options(context.config, name, result.details)}
            for name, result in results.items()
        },
    }


def _predicted_by(config: EvaluateConfig, task: str) -> dict[str, str]:
    """Who predicted for a task, where it asks somebody."""
    name = config.predictor_of(task)
    return {"predictor": name} if name else {}


def _options(config: EvaluateConfig, task: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the run that decide a task's scores, and its own; prompts may stand in its details already."""
    recorded, predictor = config.recorded(), config.predictor_of(task)
    keys = kinds.deciding(kinds.find(task), predictors.find(predictor) if predictor else None)
    own = recorded.get("task", {}).get(kinds.short(task), {})
    return {
        **{key: recorded[key] for key in keys if key != "templates" or key not in details},
        **{f"task.{kinds.short(task)}.{key}": value for key, value in own.items()},
    }


@cache
def _code_digest() -> str:
    """SHA-256 over the source and data files of the library, whether it is committed or not."""
    folder = Path(dermray.__file__).parent
    files = sorted(file for file in folder.rglob("*") if file.suffix in SOURCE_SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _pages(
    sections: Mapping[str, Any], sources: Mapping[str, str], thumbnails: Mapping[int, str]
) -> dict[str, dict[str, Markup]]:
    """Each task's part of the page: `tiles`, `block` and `computed`.

    Raises:
        EvaluationError: a task's part cannot be made.
    """
    pages: dict[str, dict[str, Markup]] = {}
    for name, section in sections.items():
        try:
            context = {
                "name": name,
                "title": section["title"],
                "section": section,
                "plots": report_plots.of_section(section),
                "thumbnail": thumbnails.get,
                "first": not any(page["tiles"] for page in pages.values()),
            }
            pages[name] = reporting.macros(sources[name], PARTS, **context)
        except Exception as error:  # a template of somebody else's may do anything
            reason = extensions.reason(error)
            raise EvaluationError(f"{name}: its part of the page cannot be made: {reason}") from error
    return pages


def _thumbnails(samples: Samples, indices: Iterable[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for index, image in samples.read_images(sorted(indices)).items():
        picture = reporting.thumbnail(image, max_side=200)
        if picture is not None:
            found[index] = picture
    return found


def _said(name: str, metric: Mapping[str, Any]) -> str:
    return scales.of(name, metric).said(metric["value"], metric["low"], metric["high"])


def _score(metric: Metric, scale: Scale | None) -> dict[str, Any]:
    """A score as the document has it; one that is undefined (NaN) has the value null."""
    found = asdict(metric) | ({} if scale is None else scale.to_json())
    return found | ({"value": None} if math.isnan(metric.value) else {})
