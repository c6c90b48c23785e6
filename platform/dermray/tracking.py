"""The one place that talks to MLflow. Only drivers call it; everything else hands them figures and URIs.

SQLite and a local artifact folder by default (where `mlflow ui` looks too), any tracking URI otherwise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException

from dermray import __version__, storage
from dermray.config import TrackingConfig
from dermray.corpus.manifest import Manifest
from dermray.errors import StoppedError, TrackingError

DEFAULT_DATABASE = "mlflow.db"
DEFAULT_ARTIFACTS = "mlartifacts"
MODELS_PREFIX = "models:/"
MAX_PARAM_CHARS = 6000
PARAMS_PER_CALL = 100
CHAMPION = "champion"
# The UI then opens on training runs instead of on traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

logger = logging.getLogger(__name__)


def tracking_uri(config: TrackingConfig) -> str:
    """The tracking URI in force: the key, else `$MLFLOW_TRACKING_URI`, else SQLite in the current folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_DATABASE).absolute()}"


def client(config: TrackingConfig) -> MlflowClient:
    """A client of the configured store. The store's chatter about schema upgrades is not shown."""
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    mlflow.set_tracking_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@dataclass
class Run:
    """An MLflow run under way; with tracking switched off it takes everything and keeps nothing.

    Attributes:
        id: the MLflow run id, or None.
        resumed: True when an earlier process began this run.
    """

    id: str | None = None
    resumed: bool = False
    experiment_id: str | None = None
    _client: MlflowClient | None = None
    _last_steps: dict[str, int] = field(default_factory=dict)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Log figures; a step that this run has logged before, in this process or an earlier one, is left out.

        A tracking server that fails costs the figures of this call, never the run.
        """
        if self._client is None:
            return
        now = int(time.time() * 1000)
        try:
            fresh = [
                Metric(key, float(value), now, step or 0)
                for key, value in metrics.items()
                if step is None or step > self._last_step(key)
            ]
            self._client.log_batch(self.id, metrics=fresh)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow did not take the metrics of step %s: %s", step, error)
            return
        if step is not None:
            self._last_steps.update({metric.key: step for metric in fresh})

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps and self.resumed and self._client is not None:
            history = self._client.get_metric_history(self.id, key)
            self._last_steps[key] = max((m.step for m in history), default=-1)
        return self._last_steps.get(key, -1)

    def log_corpus(self, uri: str, manifest: Manifest, *, context: str) -> None:
        """Record a prepared corpus as a dataset input of the run (`context`: training, evaluation, output)."""
        if self._client is None:
            return
        dataset = Dataset(
            name=storage.name_of(uri),
            digest=manifest.digest[:36],
            source_type="dermray_corpus",
            source=json.dumps({"uri": storage.normalise(uri), "digest": manifest.digest}),
            profile=json.dumps({"num_samples": manifest.num_samples, "splits": manifest.splits}),
        )
        self._client.log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_folder(self, uri: str, artifact_path: str) -> None:
        """Upload a folder of small files."""
        if self._client is not None:
            with storage.local_folder(uri) as path:
                self._client.log_artifacts(self.id, str(path), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Upload a text file."""
        if self._client is not None:
            self._client.log_text(self.id, text, artifact_file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        if self._client is not None:
            for key, value in tags.items():
                self._client.set_tag(self.id, key, value)


@contextlib.contextmanager
def run(
    config: TrackingConfig,
    *,
    kind: str,
    name: str,
    resolved: Any,
    state_uri: str | None = None,
    parent_id: str | None = None,
) -> Iterator[Run]:
    """A run that ends FINISHED, FAILED or KILLED with the block.

    Args:
        kind: prepare, leakage, export, pretrain, evaluate, sweep, trial, register, rollout, embed, index.
        name: for humans.
        resolved: the config whose keys become parameters and whose YAML becomes an artifact.
        state_uri: a JSON file that remembers the run id, so that a restarted job goes on in the same run.
        parent_id: makes it a nested run.
    """
    if not config.enabled:
        yield Run()
        return
    mlflow_client = client(config)
    current = _resume(mlflow_client, state_uri) or _create(mlflow_client, config, kind, name, resolved, parent_id)
    if state_uri is not None:
        storage.write_json(state_uri, {"mlflow_run_id": current.id, "tracking_uri": tracking_uri(config)})
    try:
        yield current
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | StoppedError) else "FAILED"
        with contextlib.suppress(MlflowException):
            mlflow_client.set_terminated(current.id, status)
        raise
    try:
        mlflow_client.set_terminated(current.id, "FINISHED")
    except MlflowException as error:
        logger.warning("MLflow did not take the end of run %s: %s", current.id, error)


def _resume(mlflow_client: MlflowClient, state_uri: str | None) -> Run | None:
    if state_uri is None:
        return None
    try:
        run_id = storage.read_json(state_uri)["mlflow_run_id"]
        info = mlflow_client.get_run(run_id).info
        mlflow_client.update_run(run_id, status="RUNNING")
    except (FileNotFoundError, MlflowException):
        return None
    return Run(run_id, True, info.experiment_id, mlflow_client)


def _create(
    mlflow_client: MlflowClient, config: TrackingConfig, kind: str, name: str, resolved: Any, parent_id: str | None
) -> Run:
    tags = {
        "dermray.kind": kind,
        "dermray.version": __version__,
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB",
        **_code_tags(),
    }
    if parent_id is not None:
        tags["mlflow.parentRunId"] = parent_id
    experiment_id = _experiment_id(mlflow_client, config)
    created = mlflow_client.create_run(experiment_id, tags=tags, run_name=name)
    run_id = created.info.run_id
    params = [Param(k, v[:MAX_PARAM_CHARS]) for k, v in flatten(resolved.model_dump(mode="json")).items()]
    for first in range(0, len(params), PARAMS_PER_CALL):
        mlflow_client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])
    mlflow_client.log_text(run_id, resolved.to_yaml(), "config.yaml")
    return Run(run_id, False, experiment_id, mlflow_client)


def _experiment_id(mlflow_client: MlflowClient, config: TrackingConfig) -> str:
    experiment = mlflow_client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return experiment.experiment_id
    uri = tracking_uri(config)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / DEFAULT_ARTIFACTS).absolute().as_uri()
    try:
        return mlflow_client.create_experiment(config.experiment, artifact_location=location, tags=EXPERIMENT_TAGS)
    except MlflowException:
        # Another process created it in between.
        experiment = mlflow_client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise
        return experiment.experiment_id


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _code_tags() -> dict[str, str]:
    """Commit and dirtiness of the checkout this code runs from; empty outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--short")))}
    except (OSError, subprocess.SubprocessError):
        return {}


@dataclass(frozen=True)
class ResolvedModel:
    """A model URI as far as the registry knows it.

    Attributes:
        folder_uri: the model folder (or whatever was given, when it is no registry URI).
        name: registered name, or the folder's name.
        version: registered version, or None.
        alias: the alias it was asked by, or None.
        run_id: of the training run, or None.
    """

    folder_uri: str
    name: str
    version: str | None = None
    alias: str | None = None
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def resolve_model(uri: str, config: TrackingConfig | None = None) -> ResolvedModel:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION` → its folder; any other URI stays as it is.

    Raises:
        TrackingError: no such model, version or alias.
    """
    if not uri.startswith(MODELS_PREFIX):
        return ResolvedModel(uri, storage.name_of(uri.removeprefix("local-dir:")))
    mlflow_client = client(config or TrackingConfig())
    reference = uri.removeprefix(MODELS_PREFIX)
    name, at, alias = reference.partition("@")
    try:
        if at:
            version = mlflow_client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = reference.partition("/")
            version = mlflow_client.get_model_version(name, number)
    except MlflowException as error:
        raise TrackingError(
            f"the registry has no {uri}: {error.message.splitlines()[0]}; see `mlflow ui` for what there is, or "
            "register one with jobs/register.py"
        ) from None
    return ResolvedModel(
        _local_or_direct(version.source), name, str(version.version), alias or None, version.run_id, version.tags or {}
    )


def move_alias(uri: str, version: str, config: TrackingConfig) -> None:
    """Let the alias of `models:/NAME@ALIAS` point at a version.

    Raises:
        TrackingError: the registry does not take it.
    """
    name, _, alias = uri.removeprefix(MODELS_PREFIX).partition("@")
    try:
        client(config).set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise TrackingError(f"the registry did not move {uri} to version {version}: {error.message}") from None


def _local_or_direct(source: str) -> str:
    if source.startswith("mlflow-artifacts:") or source.startswith("runs:"):
        return str(mlflow.artifacts.download_artifacts(artifact_uri=source))
    return storage.normalise(source) if storage.is_local(source) else source


@dataclass(frozen=True)
class Registration:
    """What `register` did.

    Attributes:
        promoted: True when the alias now points at this version.
        previous: metric of the version that held the alias before, or None.
    """

    name: str
    version: str
    promoted: bool
    value: float
    previous: float | None


def register(
    current: Run,
    *,
    name: str,
    model_uri: str,
    metric: str,
    value: float,
    corpus_digest: str,
    alias: str = CHAMPION,
    tags: Mapping[str, str] | None = None,
) -> Registration:
    """Upload the model folder into `current`, register it, and move `alias` to it when it is the best so far.

    Best means: the alias is free, its holder was scored on another corpus or metric, or its score is not higher.

    Raises:
        TrackingError: tracking is switched off.
    """
    if current._client is None:
        raise TrackingError("registering needs MLflow; set tracking.enabled=true")
    mlflow_client = current._client
    current.log_folder(model_uri, "model")
    source = f"{mlflow_client.get_run(current.id).info.artifact_uri}/model"
    with contextlib.suppress(MlflowException):
        mlflow_client.create_registered_model(name)
    # MLflow's keys hold no "@".
    metric_key = metric.replace("@", "_at_")
    score_tags = {
        "metric": metric,
        metric_key: f"{value:.6f}",
        "evaluation_corpus_digest": corpus_digest,
        **(tags or {}),
    }
    version = mlflow_client.create_model_version(name, source, run_id=current.id, tags=score_tags)
    try:
        holder = mlflow_client.get_model_version_by_alias(name, alias)
    except MlflowException:
        holder = None
    previous = None
    if (
        holder is not None
        and holder.tags.get("evaluation_corpus_digest") == corpus_digest
        and metric_key in holder.tags
    ):
        previous = float(holder.tags[metric_key])
    promoted = previous is None or value >= previous
    if promoted:
        mlflow_client.set_registered_model_alias(name, alias, version.version)
    return Registration(name, str(version.version), promoted, value, previous)
