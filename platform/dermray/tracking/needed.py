"""What MLflow knows to be needed of everything that runs have written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient

from dermray.config import TrackingConfig
from dermray.tracking import store
from dermray.tracking.lineage import named_artifacts
from dermray.tracking.registry import FOLDER_TAG

LIVE = ("RUNNING", "SCHEDULED")
_QUOTED = re.compile(r"""(['"])(.*?)\1""")


@dataclass
class Needed:
    """URIs with the reason, and whole outputs with the reason."""

    named: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def reason(self, item_uri: str) -> str:
        """Why a folder or file is needed; empty if it is not."""
        for output, why in self.outputs.items():
            if _holds(output, item_uri):
                return why
        return next((why for uri, why in self.named.items() if _holds(item_uri, uri)), "")


def needed(config: TrackingConfig) -> Needed:
    """What runs and model versions name, and the outputs of what is at work or has an alias.

    Raises:
        TrackingError: MLflow is out of reach.
    """
    with store.asked(config) as mlflow_client:
        return _needed(mlflow_client)


def _needed(mlflow_client: MlflowClient) -> Needed:
    needs = Needed()
    outputs: dict[str, str] = {}
    experiments = [experiment.experiment_id for experiment in mlflow_client.search_experiments()]
    for run in _all_pages(lambda token: mlflow_client.search_runs(experiments, max_results=1000, page_token=token)):
        what = f"run {run.info.run_id} ({run.info.run_name})"
        output = run.data.params.get("output", "")
        outputs[run.info.run_id] = output
        if run.info.status in LIVE and output:
            needs.outputs[output] = f"{what} is {run.info.status}"
        named = [value for key, value in run.data.params.items() if "/" in value and key != "output"]
        named += [uri for _, _, uri, _ in named_artifacts(run)]
        needs.named |= {uri: f"{what} names it" for value in named for uri in _uris(value)}
    for model in _all_pages(lambda token: mlflow_client.search_registered_models(page_token=token)):
        aliased = {str(number): alias for alias, number in (model.aliases or {}).items()}
        for version in mlflow_client.search_model_versions(f"name='{model.name}'"):
            tags = version.tags or {}
            what = f"{model.name} version {version.version}"
            for uri in filter(None, [str(version.source), tags.get(FOLDER_TAG), tags.get("dermray.report_uri")]):
                needs.named[uri] = f"{what} names it"
            trained = outputs.get(tags.get("dermray.training_run_id", ""))
            if trained and str(version.version) in aliased:
                needs.outputs[trained] = f"{what} has the alias {aliased[str(version.version)]}"
    return needs


def _all_pages(call: Any) -> Iterable[Any]:
    token = None
    while True:
        page = call(token)
        yield from page
        token = page.token
        if not token:
            return


def _uris(value: str) -> set[str]:
    """The paths and URIs in a parameter, which may be a list or a mapping as text.

    A path may have blanks, commas and quotes in it, so what could be one counts whole and in parts: `['/a b/c', '/d']`
    gives `/a b/c` and `/d`, and `/a`, `b/c` and the whole besides. What is none keeps nothing from being removed.
    """
    quoted = [text for _, text in _QUOTED.findall(value)]
    unquoted = value.replace("'", " ").replace('"', " ")
    parts = [value, *quoted, *(part.strip() for part in unquoted.split(",")), *unquoted.replace(",", " ").split()]
    return {part.rstrip("/") for part in parts if "/" in part}


def _holds(folder: str, uri: str) -> bool:
    """True if `uri` is `folder` or lies in it."""
    base = folder.removeprefix("file://").rstrip("/")
    other = uri.removeprefix("local-dir:").removeprefix("file://").strip("[](){}")
    return other == base or other.startswith(f"{base}/")
