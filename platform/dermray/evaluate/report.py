"""What an evaluation leaves behind: `report.json` (schema in docs/evaluation.md) and one self-contained page."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from dermray import __version__, reporting, storage
from dermray.errors import ImageError
from dermray.evaluate.samples import Samples
from dermray.evaluate.tasks import Context, TaskResult
from dermray.reporting import plots

SCHEMA_VERSION = 1
JSON_NAME = "report.json"
HTML_NAME = "report.html"
VERSIONED_PACKAGES = ("torch", "open_clip_torch", "pillow", "numpy")


@dataclass(frozen=True)
class Report:
    """A finished evaluation: the JSON document and the page that shows it."""

    document: dict[str, Any]
    html: str

    def metrics(self) -> dict[str, float]:
        """Every score under `TASK/NAME`, its interval under `TASK/NAME_low` and `TASK/NAME_high`.

        `@` is written `_at_`, so that every tracking store takes the names.
        """
        flat: dict[str, float] = {}
        for task, section in self.document["tasks"].items():
            for name, metric in section["metrics"].items():
                key = f"{task}/{name.replace('@', '_at_')}"
                flat[key] = metric["value"]
                if metric["low"] is not None:
                    flat |= {f"{key}_low": metric["low"], f"{key}_high": metric["high"]}
        return flat

    def headline(self) -> list[str]:
        """A few lines for a terminal."""
        lines = []
        for task, section in self.document["tasks"].items():
            names = HEADLINE_METRICS[task]
            shown = ", ".join(f"{name} {_with_interval(section['metrics'][name])}" for name in names)
            lines.append(f"{task} ({section['num_samples']:,} samples): {shown}")
        return lines

    def save(self, uri: str) -> None:
        """Write `report.html` and then `report.json` into the folder `uri`."""
        storage.write_text(storage.join(uri, HTML_NAME), self.html)
        storage.write_json(storage.join(uri, JSON_NAME), self.document)


HEADLINE_METRICS = {
    "zero_shot": ("accuracy", "top5_accuracy", "macro_auroc"),
    "retrieval": ("image_to_text_R@1", "image_to_text_R@5", "image_to_text_R@10"),
}


def build(context: Context, results: Mapping[str, TaskResult], *, model_uri: str, duration_s: float) -> Report:
    """Assemble the document and render the page.

    Args:
        context: what the tasks worked on.
        results: task name → result.
        model_uri: where the model was loaded from.
        duration_s: of the whole evaluation.
    """
    document = _document(context, results, model_uri, duration_s)
    thumbnails = _thumbnails(context.samples, _shown_indices(document["tasks"]))
    html = reporting.render(
        "evaluate.html",
        document=document,
        thumbnail=thumbnails.get,
        zero_shot=_zero_shot_plots(document["tasks"].get("zero_shot")),
    )
    return Report(document, html)


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
        },
        "code": {
            "dermray": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES},
        },
        "engine": {
            "duration_s": round(duration_s, 3),
            "encoding_s": round(features.duration_s, 3),
            "num_actors": features.num_actors,
            "images_per_s": round(len(samples) / max(features.duration_s, 1e-9), 1),
            "failed_images": features.failures,
        },
        "config": context.config.model_dump(mode="json"),
        "tasks": {
            name: {
                "num_samples": result.num_samples,
                "excluded": result.excluded,
                "metrics": {key: asdict(metric) for key, metric in result.metrics.items()},
                **result.details,
            }
            for name, result in results.items()
        },
    }


def _shown_indices(tasks: Mapping[str, Any]) -> set[int]:
    """Samples whose pictures the page shows."""
    found: set[int] = set()
    for kind in ("right", "wrong"):
        found.update(one["index"] for one in tasks.get("zero_shot", {}).get("examples", {}).get(kind, []))
    for query in tasks.get("retrieval", {}).get("examples", []):
        found.add(query["index"])
        found.update(one["index"] for one in query["images"])
    return found


def _thumbnails(samples: Samples, indices: Iterable[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for index, image in samples.read_images(sorted(indices)).items():
        try:
            found[index] = reporting.thumbnail(image, max_side=200)
        except ImageError:
            # An unreadable image has no vector and so appears nowhere, unless the file changed since: no picture then.
            continue
    return found


def _zero_shot_plots(section: Mapping[str, Any] | None) -> dict[str, Markup] | None:
    if section is None:
        return None
    labels = [one["name"] for one in section["classes"]]
    return {"confusion": plots.confusion_matrix(section["confusion"], labels)}


def _with_interval(metric: Mapping[str, float | None]) -> str:
    value, low, high = metric["value"], metric["low"], metric["high"]
    if value is None or math.isnan(value):
        return reporting.NO_VALUE
    interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
    return f"{100 * value:.1f} %{interval}"
