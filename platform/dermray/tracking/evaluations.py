"""What the run of an evaluation has read and made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dermray import storage
from dermray.corpus.manifest import Manifest, is_corpus
from dermray.tracking.runs import Run


def log_evaluation(
    current: Run, scored: Iterable[Mapping[str, Any]], model: Mapping[str, Any] | None, output: str, report_name: str
) -> None:
    """Record the corpora and tables that were scored, the model, and the report, each by its digest.

    Args:
        scored: `uri` and `digest` of each.
        model: `uri` and `model_digest`; None where nothing could be scored.
        output: folder of the report, whose file is `report_name`.
    """
    for one in scored:
        if is_corpus(one["uri"]):
            current.log_corpus(one["uri"], Manifest.load(one["uri"]), context="evaluation")
        else:
            current.log_artifact("input", "table", one["uri"], one["digest"])
    if model is not None:
        current.log_artifact("input", "model", model["uri"], model["model_digest"])
    current.log_artifact("output", "report", output, storage.sha256(storage.join(output, report_name)))
