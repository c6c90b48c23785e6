"""The MLflow store in force: its address, a client for it, its experiment, and which of its errors will pass."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dermray.config import TrackingConfig

DEFAULT_DATABASE = "mlflow.db"
DEFAULT_ARTIFACTS = "mlartifacts"
# The UI then opens on training runs instead of on traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# MLflow's own defaults let one call wait for minutes; what must not be lost is tried again from the spool instead.
HTTP_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# A wrong or expired password is mended by a person, and the records are still good then.
STATUS_OF_OUTAGE = (401, 403, 408, 429)


def tracking_uri(config: TrackingConfig) -> str:
    """The tracking URI in force: the key, else `$MLFLOW_TRACKING_URI`, else SQLite in the current folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_DATABASE).absolute()}"


def without_secrets(uri: str) -> str:
    """A tracking URI less the user and password that it may hold."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def client(config: TrackingConfig) -> MlflowClient:
    """A client of the configured store. The store's chatter about schema upgrades is not shown."""
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, value in HTTP_PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(config)
    mlflow.set_tracking_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_outage(error: Exception) -> bool:
    """True if the same call may be taken later: no connection, an overloaded or broken server, a wrong password."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in STATUS_OF_OUTAGE
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def experiment_id(mlflow_client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, created where there is none; beside a SQLite file its artifacts get a folder."""
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / DEFAULT_ARTIFACTS).absolute().as_uri()
    try:
        return str(mlflow_client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
    except MlflowException:
        # Another process created it in between.
        experiment = mlflow_client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
