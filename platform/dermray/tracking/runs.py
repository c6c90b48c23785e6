"""A run of MLflow under way. Everything it says goes through a local spool, so that MLflow may be down at any time."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dermray import __version__, interrupts, redaction, storage
from dermray.config import TrackingConfig
from dermray.corpus import licences
from dermray.corpus.manifest import Manifest
from dermray.errors import TrackingError
from dermray.tracking import facts, store
from dermray.tracking.delivery import PARENT_KEY_TAG, DeletedError, Delivery, deliver_left_over, why
from dermray.tracking.spool import Record, Spool, spool_folder
from dermray.tracking.system import SystemSampler

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 4900
# How long the beginning and the end of a run wait for a store that is out of reach.
PATIENCE_S = 10.0
# The same in a process that was asked to end and has little time for it.
LAST_PATIENCE_S = 2.0
LINEAGE_TAG = "dermray.{direction}.{kind}.{digest}"
LINEAGE_DIGEST_CHARS = 16

Direction = Literal["input", "output"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Link:
    """What a run that leaves a trace holds on to."""

    key: str
    spool: Spool
    delivery: Delivery
    client: MlflowClient


@dataclass
class Run:
    """An MLflow run under way; with tracking switched off it takes everything and keeps nothing.

    Attributes:
        key: of our own making, stable over restarts, known even while MLflow is out of reach; or None.
        resumed: True when an earlier process began this run.
    """

    key: str | None = None
    resumed: bool = False
    _known_id: str | None = None
    _link: _Link | None = None

    @property
    def id(self) -> str | None:
        """The MLflow run id; None while MLflow has not yet heard of the run."""
        return (self._link.delivery.courier.run_id if self._link else None) or self._known_id

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Log figures; a step that this run has logged before, in this process or an earlier one, is left out."""
        self._append(
            {
                "kind": "metrics",
                "step": step,
                "time": _now_ms(),
                "values": {key: float(value) for key, value in metrics.items()},
            }
        )

    def log_corpus(self, uri: str, manifest: Manifest, *, context: str) -> None:
        """Record a prepared corpus as a dataset of the run (`context`: training, evaluation, export, output)."""
        where = redaction.without_userinfo(storage.normalise(uri))
        self._append(
            {
                "kind": "dataset",
                "name": storage.name_of(uri),
                "uri": where,
                "digest": manifest.digest,
                "profile": {"num_samples": manifest.num_samples, "splits": manifest.splits},
                "context": context,
            }
        )
        direction: Direction = "output" if context == "output" else "input"
        self.log_artifact(direction, "corpus", where, manifest.digest)

    def log_artifact(self, direction: Direction, kind: str, uri: str, digest: str) -> None:
        """Record what the run read or made, for lineage: the URI and digest of something that stays where it is.

        Args:
            kind: one of `dermray.tracking.lineage.KINDS`.
            digest: SHA-256 (hex), as `dermray.tracking.lineage` recomputes it for that kind.
        """
        tag = LINEAGE_TAG.format(direction=direction, kind=kind, digest=digest[:LINEAGE_DIGEST_CHARS])
        self.set_tags({tag: json.dumps({"uri": redaction.without_userinfo(storage.normalise(uri)), "digest": digest})})

    def log_folder(self, uri: str, artifact_path: str) -> None:
        """Upload a folder of small files. While MLflow is down its URI waits: the folder must stay."""
        self._append({"kind": "folder", "uri": storage.normalise(uri), "path": artifact_path})

    def log_text(self, text: str, artifact_file: str) -> None:
        """Upload a text file."""
        self._append({"kind": "text", "text": text, "path": artifact_file})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._append({"kind": "tags", "tags": {key: str(value)[:MAX_TAG_CHARS] for key, value in tags.items()}})

    def connected(self) -> tuple[MlflowClient, str]:
        """A client and the run's id, everything said so far being with MLflow.

        Raises:
            TrackingError: tracking is switched off, or MLflow is out of reach.
        """
        if self._link is None:
            raise TrackingError("registering needs MLflow; set tracking.enabled=true")
        uri = str(self._link.client.tracking_uri)
        if not self._link.delivery.flush(PATIENCE_S) or self.id is None:
            outage = self._link.delivery.outage or TimeoutError("the beginning of the run was not taken")
            reason = str(outage) if isinstance(outage, DeletedError) else store.unanswered(uri, outage)
            raise TrackingError(f"{reason}; what the run has said is kept")
        return self._link.client, self.id

    def _append(self, record: Record) -> None:
        if self._link is not None:
            # A folder is read from where it is, when MLflow takes it.
            self._link.spool.append(record if record["kind"] == "folder" else redaction.hidden(record))


@contextlib.contextmanager
def run(
    config: TrackingConfig,
    *,
    kind: str,
    name: str,
    resolved: Any,
    state_uri: str | None = None,
    parent_key: str | None = None,
    ended_at: float | None = None,
) -> Iterator[Run]:
    """A run that ends FINISHED, FAILED or KILLED with the block.

    Args:
        kind: prepare, leakage, export, pretrain, evaluate, compare, sweep, trial, register, promote, deploy, rollout,
            embed, index, collect_garbage.
        name: for humans.
        resolved: the config whose keys become parameters and whose YAML becomes an artifact.
        state_uri: a JSON file that remembers the run, so that a restarted job goes on in the same one.
        parent_key: `Run.key` of another, in which it is nested, also when MLflow hears of that one later.
        ended_at: Unix time, in a process that only ends what another began: it says nothing of code and machine.

    Raises:
        TrackingError: the store refuses or its address is none; not while it is out of reach.
    """
    if not config.enabled:
        yield Run()
        return
    works = ended_at is None
    mlflow_client = store.client(config)
    store.require_experiment(mlflow_client, config.experiment)
    state = _usable_state(mlflow_client, state_uri)
    began_at = float(state.get("began_at") or time.time())
    record = _beginning(config, kind, name, resolved, parent_key, state.get("run_key") or uuid.uuid4().hex)
    if state:
        record |= _taken_up(record, state, works)
    # From its first record on a run gets its end, at whatever moment a signal comes.
    with interrupts.held_back() as let_interrupt:
        link = _link(config, mlflow_client, record)
        current = Run(link.key, bool(state), state.get("mlflow_run_id"), link)
        status, delivered = "FINISHED", False
        try:
            with let_interrupt, interrupts.last_words(lambda: _say_killed(link)):
                _announce(config, current, resolved.files, state_uri, began_at)
                with _measured(config if works else None, current, began_at):
                    yield current
        except BaseException as error:
            status = "KILLED" if interrupts.ended_by_request(error) else "FAILED"
            raise
        finally:
            delivered = _end(link, status, ended_at or time.time())
    if delivered:
        with contextlib.suppress(TrackingError):
            deliver_left_over(config)


def _taken_up(record: Record, state: Mapping[str, Any], works: bool) -> Record:
    """What differs in the beginning of a run that an earlier process began: it keeps what it began with.

    What this attempt runs with stands beside it.
    """
    attempt = time.strftime("attempts/%Y%m%d-%H%M%S", time.gmtime())
    texts = {f"{attempt}/{path}": text for path, text in record["texts"].items()} if works else {}
    return {"run_id": state.get("mlflow_run_id"), "texts": texts}


def _link(config: TrackingConfig, mlflow_client: MlflowClient, record: Record) -> _Link:
    """A spool that begins with `record`, and its delivery under way."""
    spool = Spool.begin(spool_folder(config.spool), record["key"])
    spool.append(redaction.hidden(record), durable=True)
    return _Link(record["key"], spool, Delivery(mlflow_client, store.tracking_uri(config), spool), mlflow_client)


def _announce(
    config: TrackingConfig, current: Run, files: Iterable[str], state_uri: str | None, began_at: float
) -> None:
    """Let MLflow hear of the run, if it does at all, and remember it for a process that takes it up."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            current.log_artifact("input", "recipe", file, storage.sha256(file))
    assert current._link is not None
    current._link.delivery.flush(0.0)
    _remember(config, current, state_uri, began_at)


@contextlib.contextmanager
def _measured(config: TrackingConfig | None, current: Run, began_at: float) -> Iterator[None]:
    """Within the block figures of the machine go to the run, where settings ask for them."""
    if config is None or not config.system_metrics_interval_s:
        yield
        return
    sampler = SystemSampler(
        lambda figures, step: current.log_metrics(figures, step=step),
        interval_s=config.system_metrics_interval_s,
        began_at=began_at,
    )
    try:
        yield
    finally:
        sampler.close()


def _beginning(config: TrackingConfig, kind: str, name: str, resolved: Any, parent_key: str | None, key: str) -> Record:
    code_tags, texts = facts.artifacts()
    tags = {
        "dermray.kind": kind,
        "dermray.version": __version__,
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB",
        **code_tags,
    }
    if parent_key is not None:
        tags[PARENT_KEY_TAG] = parent_key
    params = {k: v[:MAX_PARAM_CHARS] for k, v in flatten(resolved.recorded()).items()}
    return {
        "kind": "begin",
        "key": key,
        "tracking_uri": redaction.without_userinfo(store.tracking_uri(config)),
        "experiment": config.experiment,
        "name": name,
        "time": _now_ms(),
        "tags": tags,
        "params": params,
        "texts": {"config.yaml": resolved.to_yaml(), **texts},
    }


def _usable_state(mlflow_client: MlflowClient, state_uri: str | None) -> dict[str, Any]:
    """What an earlier process remembered of its run; empty when there is none or MLflow has it no more."""
    if state_uri is None:
        return {}
    try:
        state = storage.read_object(state_uri)
    except FileNotFoundError:
        return {}
    run_id = state.get("mlflow_run_id")
    if run_id is None:
        return state if state.get("run_key") else {}
    try:
        if mlflow_client.get_run(run_id).info.lifecycle_stage == "deleted":
            return {}
    except (MlflowException, OSError) as error:
        if not store.is_outage(error):
            return {}
    return state


def _remember(config: TrackingConfig, current: Run, state_uri: str | None, began_at: float) -> None:
    if state_uri is not None:
        state = {
            "mlflow_run_id": current.id,
            "run_key": current.key,
            "began_at": began_at,
            "tracking_uri": redaction.without_userinfo(store.tracking_uri(config)),
        }
        storage.write_json(state_uri, state)


def _say_killed(link: _Link) -> None:
    """All that a process can still do which is ended at once; what MLflow does not take of it waits in the spool."""
    link.spool.append({"kind": "end", "status": "KILLED", "time": _now_ms()}, durable=True)
    link.delivery.flush(interrupts.LAST_WORDS_S)


def _end(link: _Link, status: str, ended_at: float) -> bool:
    """Say how the run ended; whether MLflow has taken everything."""
    link.spool.append({"kind": "end", "status": status, "time": int(ended_at * 1000)}, durable=True)
    delivered = link.delivery.close(LAST_PATIENCE_S if interrupts.was_asked() else PATIENCE_S)
    link.spool.close()
    if not delivered:
        logger.warning(
            "%s; what it has not taken of this run waits in %s: the next run delivers it, or jobs/deliver.py",
            why(link.delivery.outage) if link.delivery.outage else "MLflow is slow",
            link.spool.path,
        )
    return delivered


def provenance(current: Run, *manifests: Manifest) -> dict[str, Any]:
    """What a model folder's `dermray.json` says of the run that trains it and of its corpora."""
    return {
        "mlflow_run_id": current.id,
        "mlflow_run_key": current.key,
        "licences": list(dict.fromkeys(name for manifest in manifests for name in licences.of_corpus(manifest))),
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _now_ms() -> int:
    return int(time.time() * 1000)
