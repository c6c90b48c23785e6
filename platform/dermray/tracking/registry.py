"""Models in MLflow's registry: finding one by alias or version, and adding one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from dermray import storage
from dermray.config import TrackingConfig
from dermray.corpus import licences
from dermray.errors import StorageError, TrackingError
from dermray.models import kinds, layout
from dermray.tracking import flavour, store, uploads
from dermray.tracking.runs import Run

MODELS_PREFIX = "models:/"
CHAMPION = "champion"
# Tags of a version that say which samples of the corpus its score is of, each in words.
SCORED_ON = {"evaluation_split": "split", "evaluation_samples": "number of samples"}
# `true` where less of the score that decides is better.
LOWER_TAG = "dermray.lower_is_better"
PROVENANCE_NAME = "dermray.json"
WEIGHTS_TAG = "dermray.weights_sha256"
COMMERCIAL_USE_TAG = "commercial_use"
# Absent on versions of before there were kinds, which are all `clip`.
KIND_TAG = "dermray.kind"
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
        TrackingError: no such model, version or alias, or its weights are not those of its tag
            `dermray.weights_sha256`.
        ModelError: `dermray.json` beside the weights names others.
    """
    if not uri.startswith(MODELS_PREFIX):
        return ResolvedModel(uri, storage.name_of(uri.removeprefix("local-dir:")))
    with store.asked(config or TrackingConfig()) as mlflow_client:
        version = version_of(mlflow_client, uri)
        folder = fetched(mlflow_client, str((version.tags or {}).get(FOLDER_TAG) or version.source))
    alias = uri.partition("@")[2] or None
    tags = version.tags or {}
    _require_weights(folder, tags.get(WEIGHTS_TAG), uri)
    return ResolvedModel(folder, version.name, str(version.version), alias, version.run_id, tags)


def _require_weights(folder: str, registered: str | None, uri: str) -> None:
    """Refuse a version whose files are not, or no longer, those that were registered."""
    if not registered:
        return
    try:
        found = layout.weights_digest(folder)
    except (OSError, StorageError) as error:
        raise TrackingError(f"{uri}: its model folder {folder} cannot be read: {error}") from None
    if found != registered:
        held = f"weights {found[:12]}" if found else "no weights"
        raise TrackingError(
            f"{uri} was registered with the weights {registered[:12]}, and {folder} holds {held}: register what is "
            "there as a version of its own with jobs/register.py, or put the weights back"
        )


def version_at(uri: str, config: TrackingConfig) -> str:
    """Which version `models:/NAME@ALIAS` points at; unlike `resolve_model` it fetches no files.

    Raises:
        TrackingError: no such model, version or alias.
    """
    with store.asked(config) as mlflow_client:
        return str(version_of(mlflow_client, uri).version)


def version_of(mlflow_client: MlflowClient, uri: str) -> ModelVersion:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    Raises:
        TrackingError: no such model, version or alias.
        MlflowException: no answer.
    """
    reference = uri.removeprefix(MODELS_PREFIX)
    name, at, alias = reference.partition("@")
    try:
        if at:
            return mlflow_client.get_model_version_by_alias(name, alias)
        name, _, number = reference.rpartition("/")
        return mlflow_client.get_model_version(name, number)
    except MlflowException as error:
        if not store.is_missing(error):
            raise
        raise TrackingError(
            f"the registry has no {uri}: {store.first_line(error)}; see `mlflow ui` for what there is, or "
            "register one with jobs/register.py"
        ) from None


def fetched(mlflow_client: MlflowClient, source: str) -> str:
    """Where a model folder can be read: as it was given, or a local copy of what the store holds."""
    if source.startswith(("mlflow-artifacts:", "runs:", "models:")):
        uri = mlflow_client.tracking_uri
        return str(mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=uri, registry_uri=uri))
    return storage.normalise(source) if storage.is_local(source) else source


@dataclass(frozen=True)
class Registration:
    """What `register` did.

    Attributes:
        promoted: True when the alias now points at this version.
        previous: metric of the version that held the alias before, or None.
        not_compared: why the version that held the alias before was not compared by its score; empty if it was, or if
            there was none.
    """

    name: str
    version: str
    promoted: bool
    value: float
    previous: float | None
    not_compared: str = ""


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
    alias is free, its holder was scored on another corpus, other samples of it or another metric, or its score is not
    better.

    Args:
        alias: None moves none; `jobs/promote.py` decides then.
        tags: of the version; those of `SCORED_ON` say which samples were scored, `LOWER_TAG` how the score is read.

    Raises:
        ModelError: the folder is of a kind that is not known here.
        TrackingError: tracking is switched off, MLflow does not answer or take it, or the alias is that of a model of
            another kind.
    """
    mlflow_client, run_id = current.connected()
    # MLflow's keys hold no "@".
    metric_key = metric.replace("@", "_at_")
    facts = model_facts(model_uri)
    with store.answered(mlflow_client):
        _require_registered_model(mlflow_client, name)
        holder = None if alias is None else holder_of(mlflow_client, name, alias)
        other = None if holder is None else of_other_kind(holder.tags or {}, facts)
        if other:
            raise TrackingError(f"models:/{name}@{alias} {other}: register this model under another name or alias")
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
        # Once more: what was uploaded took its time.
        holder = holder_of(mlflow_client, name, alias)
        previous, not_compared = None, "" if holder is None else _not_comparable(holder, metric_key, score_tags)
        if holder is not None and not not_compared:
            previous = float(holder.tags[metric_key])
        sign = -1.0 if score_tags.get(LOWER_TAG) == "true" else 1.0
        promoted = previous is None or sign * value >= sign * previous
        if promoted:
            mlflow_client.set_registered_model_alias(name, alias, version.version)
    return Registration(name, str(version.version), promoted, value, previous, not_compared)


def _require_registered_model(mlflow_client: MlflowClient, name: str) -> None:
    """Have a model of that name to add versions to."""
    try:
        mlflow_client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def of_other_kind(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why a model cannot take the place of another for those who ask that one, by the tags of both; empty if it can."""
    held, given = (tags.get(KIND_TAG, layout.CLIP) for tags in (before, after))
    return "" if held == given else f"is a model of the kind {held}, and this one is of the kind {given}"


def _not_comparable(holder: ModelVersion, metric_key: str, tags: Mapping[str, str]) -> str:
    """Why a version's score says nothing about that of these tags; empty if it does."""
    before, now = (each.get("evaluation_corpus_digest", "") for each in (holder.tags, tags))
    if before != now:
        return f"version {holder.version} was scored on another corpus ({before[:12]}, now {now[:12]})"
    for tag, what in SCORED_ON.items():
        # Versions of earlier builds do not say it.
        before, now = (each.get(tag, "") for each in (holder.tags, tags))
        if before and now and before != now:
            return f"version {holder.version} was scored on another {what} ({before}, now {now})"
    return "" if metric_key in holder.tags else f"version {holder.version} has no {metric_key}"


def move_alias(uri: str, version: str, config: TrackingConfig) -> None:
    """Let the alias of `models:/NAME@ALIAS` point at a version.

    Raises:
        TrackingError: the registry does not take it.
    """
    name, _, alias = uri.removeprefix(MODELS_PREFIX).partition("@")
    with store.asked(config) as mlflow_client:
        try:
            mlflow_client.set_registered_model_alias(name, alias, version)
        except MlflowException as error:
            if not store.is_missing(error):
                raise
            raise TrackingError(
                f"the registry did not move {uri} to version {version}: {store.first_line(error)}"
            ) from None


def require_version(registry: MlflowClient, name: str, which: str) -> ModelVersion:
    """A version of a model by its number or by an alias of it.

    Raises:
        TrackingError: there is none.
    """
    try:
        if which.isdigit():
            return registry.get_model_version(name, which)
        return registry.get_model_version_by_alias(name, which)
    except MlflowException as error:
        if not store.is_missing(error):
            raise
        raise TrackingError(f"the registry has no version {which} of {name}: {store.first_line(error)}") from None


def holder_of(mlflow_client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points at, or None.

    Raises:
        MlflowException: no answer, so that nobody knows.
    """
    try:
        return mlflow_client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if not store.is_missing(error):
            raise
        return None


def model_facts(model_uri: str) -> dict[str, str]:
    """Tags of a model folder: its kind, digest of the weights, training run and corpus, licences."""
    try:
        provenance = storage.read_object(storage.join(model_uri, PROVENANCE_NAME))
    except FileNotFoundError:
        provenance = {}
    names = licences.of_model(provenance)
    found = {
        KIND_TAG: layout.kind_of(model_uri),
        WEIGHTS_TAG: provenance.get("weights_sha256"),
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
        experiment, name=name.replace("/", "-"), source_run_id=run_id, tags=facts, model_type=facts[KIND_TAG]
    )
    try:
        with flavour.files(stays, facts, kinds.of(model_uri).answers) as path:
            uploads.model(mlflow_client, logged.model_id, path)
        if stays is None:
            uploads.model(mlflow_client, logged.model_id, storage.local_path(model_uri))
    except uploads.UploadError as error:
        raise TrackingError(f"{model_uri} is not registered: {error}; run the same command again") from error
    mlflow_client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return mlflow_client.finalize_logged_model(logged.model_id, "READY")
