"""From the spool to MLflow, in order and once.

What MLflow has taken is known only when its answer comes. A record whose answer is lost is sent again, so that every
sending must be one that may be repeated:

- A run is found by its key (tag `dermray.run_key`), which we make, before it is created; of two that a lost answer
  made, the older one stays.
- A figure is its key, step, timestamp and value, all fixed when it was spooled. MLflow's SQL store has these as its
  primary key and takes an equal one for the same.
- A step that the run has already (a training that went back to its checkpoint) is left out: for each key only later
  steps are sent.
- Tags, parameters, data sets and artifacts replace themselves.
- A run names its parent by key. Whichever of the two comes second sets MLflow's own tag, which needs the id.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from dermray import redaction, storage
from dermray.config import TrackingConfig
from dermray.errors import StorageError, TrackingError
from dermray.tracking import store, uploads
from dermray.tracking.spool import SYNC_INTERVAL_S, Record, Spool, header, left_over, spool_folder

KEY_TAG = "dermray.run_key"
PARENT_KEY_TAG = "dermray.parent_run_key"
PARENT_TAG = "mlflow.parentRunId"
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
READ_BYTES = 1 << 20
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# How long figures are gathered for one call.
GATHER_S = 0.5

logger = logging.getLogger(__name__)


class DeletedError(OSError):
    """The experiment or the run was deleted in MLflow and can be restored: records wait as in an outage."""


def why(error: Exception) -> str:
    """Why records wait, in one line."""
    return (
        str(error)
        if isinstance(error, DeletedError | uploads.UploadError)
        else f"MLflow is out of reach ({store.first_line(error)})"
    )


class Courier:
    """Delivers the records of one run; `run_id` is known once its beginning has been delivered."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        """For runs of the store at `uri`."""
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._client = client
        self._uri = uri
        self._last_steps: dict[str, int] = {}

    def deliver(self, spool: Spool, *, revive: bool = False) -> None:
        """Send everything that is pending.

        Args:
            revive: the process that writes `spool` is at work, so that its run is RUNNING whatever it was before.

        Raises:
            MlflowException, OSError: MLflow cannot be reached; what it has not taken stays pending.
        """
        if self.run_id is None and spool.num_pending_bytes and spool.has_been_read:
            # An earlier process has delivered the beginning, and with it the run's id went.
            self._send([header(spool.path)], revive)
        while records := spool.pending(READ_BYTES):
            for batch, offset in _batches(records):
                self._send(batch, revive)
                spool.acknowledge(offset)

    def _send(self, batch: list[Record], revive: bool) -> None:
        kind = batch[0].get("kind")
        try:
            if kind == "begin":
                self._begin(batch[0], revive)
            elif self.run_id is None:
                logger.debug("left out, since its run is not in MLflow: %s", kind)
            elif kind == "metrics":
                self._metrics(batch)
            elif kind in SENDERS:
                SENDERS[kind](self._client, self.run_id, batch[0])
        except (MlflowException, OSError, StorageError) as error:
            if store.is_outage(error):
                raise
            if deleted := self._deleted(batch[0], self.run_id):
                # A restore may take the records still.
                raise DeletedError(deleted) from error
            if len(batch) > 1:
                # One figure that MLflow does not take costs none of the others.
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._send(half, revive)
                return
            logger.warning("MLflow did not take %s: %s", _described(batch), store.first_line(error))

    def _deleted(self, record: Record, run_id: str | None) -> str:
        """What was deleted in MLflow of the experiment and the run, and how to restore it; empty if nothing was."""
        run = None if run_id is None else self._client.get_run(run_id)
        if run is not None:
            experiment = self._client.get_experiment(run.info.experiment_id)
        else:
            experiment = self._client.get_experiment_by_name(record.get("experiment", ""))
        # First, since deleting an experiment deletes its runs, and restoring it restores them.
        if experiment is not None and experiment.lifecycle_stage == store.DELETED:
            return store.deleted_experiment(experiment)
        if run is not None and run.info.lifecycle_stage == store.DELETED:
            return f"the run {run_id} was deleted in MLflow: `mlflow runs restore --run-id {run_id}`"
        return ""

    def _begin(self, record: Record, revive: bool) -> None:
        """Find the run or create it."""
        found = self._find(record)
        if found is None:
            self.experiment_id = store.experiment_id(self._client, self._uri, record["experiment"])
            self._client.create_run(
                self.experiment_id,
                start_time=record["time"],
                tags={**record["tags"], KEY_TAG: record["key"]},
                run_name=record["name"],
            )
            found = self._find(record)
            if found is None:
                raise OSError("MLflow does not find the run that it has just created")
        run_id = str(found.info.run_id)
        if run_id != self.run_id:
            self._nest(found, record)
        if revive and found.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        # MLflow lets no parameter change: a resumed run keeps those it began with.
        params = [Param(key, value) for key, value in record["params"].items() if key not in found.data.params]
        for first in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])
        for path, text in record["texts"].items():
            uploads.text(self._client, run_id, text, path)
        self.run_id, self.experiment_id = run_id, str(found.info.experiment_id)
        self._last_steps = _last_steps(found)

    def _nest(self, run: Any, record: Record) -> None:
        """Set the parent of a run, and that of its children which have come before it."""
        key = record["tags"].get(PARENT_KEY_TAG)
        for parent in self._tagged(record, KEY_TAG, key) if key and PARENT_TAG not in run.data.tags else []:
            self._client.set_tag(run.info.run_id, PARENT_TAG, parent.info.run_id)
        for child in self._tagged(record, PARENT_KEY_TAG, record["key"]):
            if PARENT_TAG not in child.data.tags:
                self._client.set_tag(child.info.run_id, PARENT_TAG, run.info.run_id)

    def _tagged(self, record: Record, tag: str, value: str, view: int = ViewType.ACTIVE_ONLY) -> list[Any]:
        experiment = self._client.get_experiment_by_name(record["experiment"])
        if experiment is None:
            return []
        return list(self._client.search_runs([experiment.experiment_id], f"tags.`{tag}` = '{value}'", view))

    def _find(self, record: Record) -> Any | None:
        if record.get("run_id"):
            return self._client.get_run(record["run_id"])
        known = self._tagged(record, KEY_TAG, record["key"], ViewType.ALL)
        found = [run for run in known if run.info.lifecycle_stage != store.DELETED]
        if known and not found:
            raise DeletedError(self._deleted(record, str(known[0].info.run_id)))
        if not found:
            return None
        first, *others = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        for other in others:
            # The first creation's answer was lost, or came to a process that is gone.
            self._client.delete_run(other.info.run_id)
        return first

    def _metrics(self, batch: list[Record]) -> None:
        last = dict(self._last_steps)
        fresh = []
        for record in batch:
            step = record["step"]
            for key, value in record["values"].items():
                if step is not None and step <= last.get(key, -1):
                    continue
                fresh.append(Metric(key, float(value), record["time"], step or 0))
                if step is not None:
                    last[key] = step
        for first in range(0, len(fresh), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=fresh[first : first + METRICS_PER_CALL])
        self._last_steps = last


def _last_steps(run: Any) -> dict[str, int]:
    # Public accessors give the latest values without their steps, or every point there ever was.
    return {metric.key: metric.step for metric in run.data._metric_objs}


def _batches(records: list[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Records that one call can take, with the offset behind them: figures together, everything else alone."""
    gathered: list[Record] = []
    num_values, behind = 0, 0
    for record, offset in records:
        is_metrics = record.get("kind") == "metrics"
        if gathered and (not is_metrics or num_values + len(record["values"]) > METRICS_PER_CALL):
            yield gathered, behind
            gathered, num_values = [], 0
        if not is_metrics:
            yield [record], offset
            continue
        gathered.append(record)
        num_values += len(record["values"])
        behind = offset
    if gathered:
        yield gathered, behind


def _described(batch: list[Record]) -> str:
    kind = batch[0].get("kind")
    if kind == "metrics":
        return f"the metrics of step {batch[0]['step']}" + (f" to {batch[-1]['step']}" if len(batch) > 1 else "")
    return f"the {kind} of a run"


def _tags(client: MlflowClient, run_id: str, record: Record) -> None:
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in record["tags"].items()])


def _text(client: MlflowClient, run_id: str, record: Record) -> None:
    uploads.text(client, run_id, record["text"], record["path"])


def _folder(client: MlflowClient, run_id: str, record: Record) -> None:
    with storage.local_folder(record["uri"]) as path:
        uploads.folder(client, run_id, path, record["path"])


def _dataset(client: MlflowClient, run_id: str, record: Record) -> None:
    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:36],
        source_type="dermray_corpus",
        source=json.dumps({"uri": record["uri"], "digest": record["digest"]}),
        profile=json.dumps(record["profile"]),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])


def _end(client: MlflowClient, run_id: str, record: Record) -> None:
    client.set_terminated(run_id, record["status"], record["time"])


SENDERS: dict[str | None, Callable[[MlflowClient, str, Record], None]] = {
    "tags": _tags,
    "text": _text,
    "folder": _folder,
    "dataset": _dataset,
    "end": _end,
}


class Delivery:
    """A thread that carries a spool to MLflow while its run goes on, and keeps trying while MLflow is down."""

    def __init__(self, client: MlflowClient, uri: str, spool: Spool) -> None:
        """Carry `spool` to the store at `uri`, after what earlier processes of the same run have left."""
        self.courier = Courier(client, uri)
        self.outage: Exception | None = None
        self._spool = spool
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._round = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mlflow-delivery", daemon=True)
        self._thread.start()
        # Of its own, so that the disk does not wait for MLflow.
        self._syncing = threading.Thread(target=self._sync, name="spool-sync", daemon=True)
        self._syncing.start()

    def flush(self, patience_s: float) -> bool:
        """Deliver now; True when nothing is pending. While MLflow is down, False after `patience_s` seconds."""
        deadline = math.inf
        with self._round:
            while self._pending and self._thread.is_alive():
                if self.outage is not None:
                    deadline = min(deadline, time.monotonic() + patience_s)
                if time.monotonic() > deadline:
                    break
                self._wake.set()
                self._round.wait(timeout=GATHER_S)
        return not self._pending

    def close(self, patience_s: float) -> bool:
        """`flush`, and end the thread."""
        done = self.flush(patience_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=patience_s)
        self._syncing.join(timeout=patience_s)
        return done

    @property
    def _pending(self) -> bool:
        return self._spool.num_pending_bytes > 0

    def _sync(self) -> None:
        while not self._stop.wait(SYNC_INTERVAL_S):
            self._spool.sync()

    def _run(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._round_trip()
                self.outage, backoff = None, FIRST_BACKOFF_S
            except Exception as error:
                # Nothing that happens here may end the training.
                if self.outage is None:
                    logger.warning("%s; records are kept in %s and delivered later", why(error), self._spool.path)
                self.outage = error
            with self._round:
                self._round.notify_all()
            self._wake.wait(GATHER_S if self.outage is None else backoff)
            if self.outage is not None:
                self._stop.wait(FIRST_BACKOFF_S)
                backoff = min(2 * backoff, MAX_BACKOFF_S)

    def _round_trip(self) -> None:
        for path in left_over(self._spool.path.parent, self._spool.key):
            if path >= self._spool.path:
                continue
            earlier = Spool.left_over(path)
            if earlier is None and path.exists():
                raise OSError(f"an earlier process of this run still holds {path}")
            if earlier is not None:
                try:
                    self.courier.deliver(earlier)
                finally:
                    earlier.close()
        self.courier.deliver(self._spool, revive=True)


@dataclass(frozen=True)
class Delivered:
    """What `deliver_left_over` did.

    Attributes:
        folder: where the spools are.
        num_delivered: files that MLflow has taken whole.
        num_kept: files of other stores, held by a process that is alive, or of what was deleted and may be restored.
    """

    folder: Path
    num_delivered: int
    num_kept: int


def deliver_left_over(config: TrackingConfig) -> Delivered:
    """Deliver to the configured store what processes that are gone have left in the spool folder.

    Raises:
        TrackingError: MLflow is out of reach; nothing is lost.
    """
    folder = spool_folder(config.spool)
    uri = store.tracking_uri(config)
    couriers: dict[str, Courier] = {}
    held: set[str] = set()
    delivered = kept = 0
    for path in left_over(folder):
        key = path.name.rpartition("-")[0]
        spool = None if key in held else Spool.left_over(path)
        if spool is None:
            # What came later of the same run waits for it.
            held.add(key)
            kept += path.exists()
            continue
        try:
            if header(path).get("tracking_uri", redaction.without_userinfo(uri)) != redaction.without_userinfo(uri):
                kept += 1
                continue
            if key not in couriers:
                couriers[key] = Courier(store.client(config), uri)
            couriers[key].deliver(spool)
            delivered += 1
        except DeletedError as error:
            logger.warning("%s; %s waits for it", error, path)
            held.add(key)
            kept += 1
        except uploads.UploadError as error:
            raise TrackingError(f"{error}; {path} waits") from None
        except (MlflowException, OSError) as error:
            raise TrackingError(f"{store.unanswered(uri, error)}; {path} waits") from None
        finally:
            spool.close()
    return Delivered(folder, delivered, kept)
