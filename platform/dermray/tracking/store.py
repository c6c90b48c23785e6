"""The MLflow store in force: its address, a client for it, its experiment, and which of its errors will pass."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, ErrorCode
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dermray.config import TrackingConfig
from dermray.errors import TrackingError
from dermray.redaction import holds_credentials, without_secrets, without_userinfo

# The stage of an experiment or run that a restore can bring back.
DELETED = "deleted"
SQLITE = "sqlite:///"
DEFAULT_DATABASE = "mlflow.db"
DEFAULT_ARTIFACTS = "mlartifacts"
# The UI then opens on training runs instead of on traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# MLflow's own defaults let one call wait for minutes; what must not be lost is tried again from the spool instead.
HTTP_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# A wrong or expired password is mended by a person, and the records are still good then.
STATUS_OF_OUTAGE = (401, 403, 408, 429)
# How long a job waits at its beginning for a database file that another process has locked.
LOCK_PATIENCE_S = 60.0
LOCK_PAUSE_S = 0.5

logger = logging.getLogger(__name__)


def tracking_uri(config: TrackingConfig) -> str:
    """The tracking URI in force: the key, else `$MLFLOW_TRACKING_URI`, else SQLite in the current folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_DATABASE).absolute()}"


def client(config: TrackingConfig) -> MlflowClient:
    """A client of the configured store. The store's chatter about schema upgrades is not shown.

    Other clients of this process keep theirs: MLflow's own address, which children inherit, stays as it is.

    Raises:
        TrackingError: no address of a store, a database that cannot be opened, or a file that another process keeps
            locked.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints every error with its whole stack before it raises it; whoever catches it says it in a line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    for name, value in HTTP_PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(config)
    if holds_credentials(uri):
        # At the end of a run it prints the server's address as it was given.
        os.environ[MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name] = "true"
    try:
        if uri.startswith(SQLITE):
            return _client_of_file(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    # A database's driver is a package of its own.
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise TrackingError(
            f"tracking.uri={without_userinfo(uri)}: {first_line(error)}; give a database or server that MLflow can "
            "open, or tracking.enabled=false"
        ) from None


def _client_of_file(uri: str) -> MlflowClient:
    """A client of a database file: one process at a time creates its tables, and a locked one is waited for.

    Raises:
        SQLAlchemyError: it is no database, or stays locked.
    """
    database = Path(uri.removeprefix(SQLITE))
    deadline = time.monotonic() + LOCK_PATIENCE_S
    told = False
    with _alone(database):
        while True:
            try:
                if _is_plain_file(uri) and not database.exists():
                    _create(database)
                return MlflowClient(tracking_uri=uri, registry_uri=uri)
            except OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            if not told:
                logger.warning("another process has locked %s: waiting up to %.0f s", database, LOCK_PATIENCE_S)
                told = True
            time.sleep(LOCK_PAUSE_S)


def _is_plain_file(uri: str) -> bool:
    """Whether a URI of SQLite names a file and nothing else: no `:memory:`, and no options behind a question mark."""
    return uri.removeprefix(SQLITE) not in ("", ":memory:") and "?" not in uri


def _create(database: Path) -> None:
    """Make MLflow's tables aside: SQLite would keep half of them from a process that is ended meanwhile."""
    aside = database.with_name(f".{database.name}.new")
    # Of one that was ended; SQLite would take a journal that lies beside a new file for its own.
    for suffix in ("", "-journal", "-wal", "-shm"):
        aside.with_name(aside.name + suffix).unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"{SQLITE}{aside}", registry_uri=f"{SQLITE}{aside}")
    try:
        os.link(aside, database)
    except FileExistsError:
        # Of an MLflow server that has begun meanwhile; it knows nothing of our lock.
        pass
    except OSError:
        # A file system without links.
        aside.rename(database)
    aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Held by one process at a time; by all of them where no lock file can be made."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(database.with_name(f".{database.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def asked(config: TrackingConfig) -> Iterator[MlflowClient]:
    """A client for what a job cannot do without: see `answered`, which the block is in.

    Raises:
        TrackingError: as `client` and `answered`.
    """
    mlflow_client = client(config)
    with answered(mlflow_client):
        yield mlflow_client


@contextlib.contextmanager
def answered(mlflow_client: MlflowClient) -> Iterator[None]:
    """Within the block an answer that does not come, or that nobody expects, is one line.

    Raises:
        TrackingError: the store is out of reach, refuses, or is none of MLflow's; names its address and what to do.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            # Of a file, and no word of MLflow's.
            raise
        raise TrackingError(unanswered(str(mlflow_client.tracking_uri), error)) from None


def unanswered(uri: str, error: Exception) -> str:
    """What is wrong with the store at `uri`, by what it answered or did not, and what to do; in one line."""
    uri, said = without_userinfo(uri), first_line(error)
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status in (401, 403):
        return (
            f"MLflow at {uri} lets nobody in with these credentials ({said}): set $MLFLOW_TRACKING_USERNAME and so on"
        )
    if _is_foreign(error):
        return f"what answers at {uri} is no MLflow server ({said}): give the address of one with tracking.uri=URI"
    if isinstance(error, MlflowException) and not is_outage(error):
        return f"MLflow at {uri} refuses: {said}"
    return f"MLflow at {uri} is out of reach ({said}): start it, or give another address with tracking.uri=URI"


def _is_foreign(error: Exception) -> bool:
    """Whether an answer came that MLflow does not give: it knows its own paths, and speaks JSON."""
    if not isinstance(error, MlflowException):
        return False
    return error.error_code == ErrorCode.Name(ENDPOINT_NOT_FOUND) or "not in a valid JSON format" in str(error)


def is_missing(error: MlflowException) -> bool:
    """True if MLflow answered that it has no such thing, and not that it cannot tell."""
    return not is_outage(error) and not _is_foreign(error)


def is_outage(error: Exception) -> bool:
    """True if the same call may be taken later: no connection, an overloaded or broken server, a wrong password."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in STATUS_OF_OUTAGE
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def first_line(error: Exception) -> str:
    """What an error says, in one line and without secrets."""
    return without_secrets(str(error).strip().partition("\n")[0]) or type(error).__name__


def require_experiment(mlflow_client: MlflowClient, name: str) -> None:
    """Refuse an experiment that was deleted in MLflow's page, and an address of something else, while nothing is lost.

    Raises:
        TrackingError: the experiment was deleted and could be restored; names the two ways on. Or what answers is no
            MLflow server.
    """
    try:
        experiment = mlflow_client.get_experiment_by_name(name)
    except (MlflowException, OSError) as error:
        if _is_foreign(error):
            raise TrackingError(unanswered(str(mlflow_client.tracking_uri), error)) from None
        # Out of reach, or a store that refuses: what the run says waits, and the run itself tells.
        return
    if experiment is not None and experiment.lifecycle_stage == DELETED:
        raise TrackingError(deleted_experiment(experiment))


def deleted_experiment(experiment: Experiment) -> str:
    """What to do about an experiment that was deleted."""
    return (
        f"the experiment {experiment.name!r} was deleted in MLflow: restore it with `mlflow experiments restore "
        f"--experiment-id {experiment.experiment_id}`, or give another one with tracking.experiment=NAME"
    )


def experiment_id(mlflow_client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, created where there is none; beside a SQLite file its artifacts get a folder."""
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith(SQLITE):
        location = (Path(uri.removeprefix(SQLITE)).parent / DEFAULT_ARTIFACTS).absolute().as_uri()
    try:
        return str(mlflow_client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
    except MlflowException:
        # Another process created it in between.
        experiment = mlflow_client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
