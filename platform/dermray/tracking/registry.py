"""Models in MLflow's registry: finding one by alias or version, and adding one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dermray import storage
from dermray.config import TrackingConfig
from dermray.corpus import licences
from dermray.errors import TrackingError
from dermray.tracking import flavour
from dermray.tracking.runs import Run
from dermray.tracking.store import client

MODELS_PREFIX = "models:/"
CHAMPION = "champion"
PROVENANCE_NAME = "dermray.json"
COMMERCIAL_USE_TAG = "commercial_use"
LOGGED_MODEL_TAG = "dermray.logged_model_id"
# Of a version whose files stay where they are.
FOLDER_TAG = "dermray.model_uri"


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
    version = _version(uri, config or TrackingConfig())
    alias = uri.partition("@")[2] or None
    return ResolvedModel(
        _folder(version), version.name, str(version.version), alias, version.run_id, version.tags or {}
    )


def version_at(uri: str, config: TrackingConfig) -> str:
    """Which version `models:/NAME@ALIAS` points at; unlike `resolve_model` it fetches no files.

    Raises:
        TrackingError: no such model, version or alias.
    """
    return str(_version(uri, config).version)


def _version(uri: str, config: TrackingConfig) -> ModelVersion:
    mlflow_client = client(config)
    reference = uri.removeprefix(MODELS_PREFIX)
    name, at, alias = reference.partition("@")
    try:
        if at:
            return mlflow_client.get_model_version_by_alias(name, alias)
        name, _, number = reference.partition("/")
        return mlflow_client.get_model_version(name, number)
    except MlflowException as error:
        raise TrackingError(
            f"the registry has no {uri}: {error.message.splitlines()[0]}; see `mlflow ui` for what there is, or "
            "register one with jobs/register.py"
        ) from None


def _folder(version: ModelVersion) -> str:
    """Where a version's model folder is: in object storage as it was given, or a copy of what the store holds."""
    stays = (version.tags or {}).get(FOLDER_TAG)
    if stays:
        return str(stays)
    source = str(version.source)
    if source.startswith(("mlflow-artifacts:", "runs:", "models:")):
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
    alias: str | None = CHAMPION,
    tags: Mapping[str, str] | None = None,
) -> Registration:
    """Make the model folder one of MLflow's models, register it, and move `alias` to it when it is the best so far.

    A local folder is uploaded; one in object storage stays there, and MLflow gets its URI and digest. Best means: the
    alias is free, its holder was scored on another corpus or metric, or its score is not higher.

    Args:
        alias: None moves none; `jobs/promote.py` decides then.

    Raises:
        TrackingError: tracking is switched off.
    """
    mlflow_client, run_id = current.connected()
    with contextlib.suppress(MlflowException):
        mlflow_client.create_registered_model(name)
    # MLflow's keys hold no "@".
    metric_key = metric.replace("@", "_at_")
    facts = model_facts(model_uri)
    logged = _logged_model(mlflow_client, run_id, name, model_uri, facts)
    score_tags = {
        LOGGED_MODEL_TAG: logged.model_id,
        "metric": metric,
        metric_key: f"{value:.6f}",
        "evaluation_corpus_digest": corpus_digest,
        **facts,
        **(tags or {}),
    }
    version = mlflow_client.create_model_version(
        name, logged.artifact_location, run_id=run_id, tags=score_tags, model_id=logged.model_id
    )
    if alias is None:
        return Registration(name, str(version.version), False, value, None)
    holder = holder_of(mlflow_client, name, alias)
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


def holder_of(mlflow_client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points at, or None."""
    try:
        return mlflow_client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


def model_facts(model_uri: str) -> dict[str, str]:
    """Tags of a model folder, from its `dermray.json`: digest of the weights, training run and corpus, licences."""
    try:
        provenance = storage.read_json(storage.join(model_uri, PROVENANCE_NAME))
    except FileNotFoundError:
        provenance = {}
    names = licences.of_model(provenance)
    found = {
        "dermray.weights_sha256": provenance.get("weights_sha256"),
        "dermray.training_run_id": provenance.get("mlflow_run_id"),
        "dermray.training_run_key": provenance.get("mlflow_run_key"),
        "dermray.corpus_digest": provenance.get("corpus_digest"),
        "licence": ", ".join(name or "not stated" for name in names),
        COMMERCIAL_USE_TAG: str(licences.commercial_use(names)),
    }
    return {key: str(value) for key, value in found.items() if value}


def _logged_model(
    mlflow_client: MlflowClient, run_id: str, name: str, model_uri: str, facts: dict[str, str]
) -> LoggedModel:
    """The model folder as an MLflow model with signature, input example and `python_function` flavour."""
    stays = None if storage.is_local(model_uri) else model_uri
    experiment = mlflow_client.get_run(run_id).info.experiment_id
    if stays is not None:
        facts[FOLDER_TAG] = stays
    logged = mlflow_client.create_logged_model(
        experiment, name=name.replace("/", "-"), source_run_id=run_id, tags=facts, model_type="clip"
    )
    with flavour.files(stays, facts) as path:
        mlflow_client.log_model_artifacts(logged.model_id, str(path))
    if stays is None:
        mlflow_client.log_model_artifacts(logged.model_id, str(storage.local_path(model_uri)))
    mlflow_client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return mlflow_client.finalize_logged_model(logged.model_id, "READY")
