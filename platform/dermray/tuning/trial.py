"""One trial: the real trainer inside a Ray Tune function, its own nested MLflow run, its validations told to Tune."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from dermray import cluster, storage, tracking
from dermray.errors import DermRayError, StoppedError
from dermray.ingest.corpora import Corpora
from dermray.train.progress import StepRecord
from dermray.tuning.plan import Trial
from dermray.tuning.records import TrialRecord
from dermray.tuning.reports import NAME, STEP, VALIDATION, ReportValidation

MAX_REASON_CHARS = 600
# A stopped trial ends its run before its process takes the next trial; Tune would wait 2 s for that.
THREAD_TIMEOUT_S = 60


@dataclass(frozen=True)
class TrialContext:
    """What every trial's process needs.

    Attributes:
        mailbox: a `Mailbox` actor, which knows the trials.
        parent_key: key of the sweep's MLflow run.
    """

    mailbox: ActorHandle
    parent_key: str | None


def run_trial(context: TrialContext, config: dict[str, Any]) -> None:
    """The Tune trainable. A trial of an earlier process says again what it had reached, and goes on from there."""
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(THREAD_TIMEOUT_S))
    name = config[NAME]
    trial, record = ray.get(ray.get(context.mailbox.trial.remote(name)))[0]
    for point in record.curve:
        tune.report({**point.metrics, STEP: point.step, VALIDATION: point.validation})
    if record.status.is_final:
        return
    for unheard in _unheard(trial, record):
        tune.report(unheard)
    try:
        _train_and_tell(trial, record, context)
    except StoppedError:
        # The sweep is to end; started again, the trial goes on with it.
        return
    except Exception as error:
        ray.get(context.mailbox.put_reason.remote(name, _in_one_line(error)))
        raise


def _unheard(trial: Trial, record: TrialRecord) -> list[dict[str, Any]]:
    """Validations that checkpoints know of and the record does not: the driver was killed before it heard of them.

    They are behind the trial, which goes on from the last checkpoint, and would never be told again.
    """
    from dermray.train import checkpoint

    heard = {point.validation for point in record.curve}
    told = [
        {**info.scores, STEP: info.step, VALIDATION: trial.validation_of(info.step)}
        for info in checkpoint.committed(trial.uri)
        if info.scores
    ]
    return [one for one in told if one[VALIDATION] not in heard]


def _in_one_line(error: Exception) -> str:
    kind = "" if isinstance(error, DermRayError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[-MAX_REASON_CHARS:]


def _train_and_tell(trial: Trial, record: TrialRecord, context: TrialContext) -> None:
    """Train in a thread beside this one, which is Tune's: it passes validations on, and is ended where Tune stops."""
    mailbox, name = context.mailbox, trial.name
    outcome: Future[None] = Future()

    def train() -> None:
        try:
            _train(trial, record, context)
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)
        mailbox.close.remote(name)

    ray.get(mailbox.open.remote(name))
    # A daemon: the process of a trial that Tune ends does not wait for it.
    training = threading.Thread(target=train, name="training", daemon=True)
    training.start()
    try:
        while (figures := ray.get(mailbox.take_validation.remote(name))) is not None:
            tune.report(figures)
    finally:
        training.join()
    outcome.result()


def _train(trial: Trial, record: TrialRecord, context: TrialContext) -> None:
    from dermray.train.pretrain import pretrain

    cluster.connect(trial.config.cluster)
    with tracked(trial, context.parent_key) as current:

        def on_record(record: StepRecord) -> None:
            current.log_metrics(record.metrics, step=record.step)
            context.mailbox.put_step.remote(trial.name, record.step)

        def is_interrupted() -> bool:
            return bool(ray.get(context.mailbox.is_interrupted.remote()))

        corpora = Corpora.load(trial.config.corpus_uris)
        for uri, manifest in zip(corpora.uris, corpora.manifests, strict=True):
            current.log_corpus(uri, manifest, context="training")
        provenance = tracking.provenance(current, *corpora.manifests)
        if record.exploits:
            _say_exploits(current, record)
            provenance["exploits"] = [asdict(exploit) for exploit in record.exploits]
        try:
            result = pretrain(
                trial.config,
                on_record=on_record,
                provenance=provenance,
                extra_callbacks=[ReportValidation(trial.name, trial.validates_every, context.mailbox)],
                until_step=trial.pause_at,
                stop_requested=is_interrupted,
            )
        except StoppedError:
            if trial.pause_at is None or is_interrupted():
                raise
            return
        except Exception:
            if not ray.get(context.mailbox.is_stopped.remote(trial.name)):
                raise
            return
        current.log_artifact("output", "model", result.model_uri, result.weights_sha256)
        current.set_tags({"model_uri": result.model_uri, "weights_sha256": result.weights_sha256})


def _say_exploits(current: tracking.Run, record: TrialRecord) -> None:
    """What a run was begun with MLflow keeps as parameters; what it goes on with becomes figures of that step."""
    last = record.exploits[-1]
    numbers = {f"settings/{key}": v for key, v in last.params.items() if type(v) in (int, float)}
    current.log_metrics(numbers, step=last.step)
    origin = {f"dermray.exploit.{e.generation:03d}": f"{e.donor} step {e.step} {e.sha256}" for e in record.exploits}
    current.set_tags(origin)


def tracked(
    trial: Trial, parent_key: str | None, *, ended_at: float | None = None
) -> AbstractContextManager[tracking.Run]:
    """The trial's MLflow run, nested in the sweep's: begun, or taken up where another process left it.

    Args:
        ended_at: Unix time, in the sweep's driver, which only ends it.
    """
    return tracking.run(
        trial.config.tracking,
        kind="trial",
        name=trial.name,
        resolved=trial.config,
        state_uri=storage.join(trial.uri, "mlflow.json"),
        parent_key=parent_key,
        ended_at=ended_at,
    )
