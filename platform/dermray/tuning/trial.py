"""One trial: the real trainer inside a Ray Tune function, its own nested MLflow run, its validations told to Tune."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from dermray import cluster, storage, tracking
from dermray.corpus.manifest import Manifest
from dermray.errors import DermRayError, StoppedError
from dermray.train.progress import StepRecord
from dermray.tuning.plan import Trial
from dermray.tuning.records import TrialRecord

# The keys under which Tune is given a trial's name, and which part of it a process trains.
NAME = "trial"
LEG = "leg"
VALIDATION = "validation"
STEP = "step"
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


@ray.remote(num_cpus=0)
class Mailbox:
    """Between the driver of the sweep and its trials: what they are to do, where their trainer is, why they failed."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[Trial, TrialRecord]] = {}
        self._controllers: dict[str, ActorHandle] = {}
        self._reasons: dict[str, str] = {}
        self._stopped: set[str] = set()

    def put_trial(self, trial: Trial, record: TrialRecord) -> None:
        """The driver begins a trial; the record is that of an earlier process of the same sweep, or fresh."""
        self._begun[trial.name] = (trial, record)

    def trial(self, name: str) -> tuple[Trial, TrialRecord]:
        """A trial that was begun, and its record at that time."""
        return self._begun[name]

    def put_controller(self, name: str, controller: ActorHandle) -> None:
        """The controller of a trial's trainer says where it is."""
        self._controllers[name] = controller

    def take_controller(self, name: str) -> ActorHandle | None:
        """The controller of a trial, which is forgotten here; None if it never reported."""
        return self._controllers.pop(name, None)

    def put_stop(self, name: str) -> None:
        """The driver is about to end a trial's trainer, because the trial was stopped."""
        self._stopped.add(name)

    def is_stopped(self, name: str) -> bool:
        """A trial whose trainer failed asks whether that was meant."""
        return name in self._stopped

    def put_reason(self, name: str, reason: str) -> None:
        """A trial says why it fails."""
        self._reasons[name] = reason

    def take_reason(self, name: str) -> str | None:
        """Why a trial failed; None if it could not say."""
        return self._reasons.pop(name, None)


class ReportValidation(TuneReportCallback):
    """Passes a trainer's validations on to Tune, numbered, so that a repeated one is known as such."""

    def __init__(self, trial: Trial, mailbox: ActorHandle) -> None:
        super().__init__()
        self._trial = trial
        self._mailbox = mailbox
        self._entered = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called by the trainer's controller for each report of the workers; rank 0 has the figures."""
        if not self._entered:
            here = ray.get_runtime_context().current_actor
            ray.get(self._mailbox.put_controller.remote(self._trial.name, here))
            self._entered = True
        numbered = {**metrics[0], VALIDATION: self._trial.validation_of(metrics[0][STEP])}
        super().after_report(run_context, [numbered], checkpoint)


def run_trial(context: TrialContext, config: dict[str, Any]) -> None:
    """The Tune trainable. A trial of an earlier process says again what it had reached, and goes on from there."""
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(THREAD_TIMEOUT_S))
    name = config[NAME]
    trial, record = ray.get(context.mailbox.trial.remote(name))
    for point in record.curve:
        tune.report({**point.metrics, STEP: point.step, VALIDATION: point.validation})
    if record.status.is_final:
        return
    try:
        _train(trial, record, context)
    except Exception as error:
        ray.get(context.mailbox.put_reason.remote(name, _in_one_line(error)))
        raise


def _in_one_line(error: Exception) -> str:
    kind = "" if isinstance(error, DermRayError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[-MAX_REASON_CHARS:]


def _train(trial: Trial, record: TrialRecord, context: TrialContext) -> None:
    from dermray.train.pretrain import pretrain

    cluster.connect(trial.config.cluster)
    with tracked(trial, context.parent_key) as current:

        def on_record(record: StepRecord) -> None:
            current.log_metrics(record.metrics, step=record.step)

        manifest = Manifest.load(trial.config.corpus)
        current.log_corpus(trial.config.corpus, manifest, context="training")
        provenance = tracking.provenance(current, manifest)
        if record.exploits:
            _say_exploits(current, record)
            provenance["exploits"] = [asdict(exploit) for exploit in record.exploits]
        try:
            result = pretrain(
                trial.config,
                on_record=on_record,
                provenance=provenance,
                extra_callbacks=[ReportValidation(trial, context.mailbox)],
                until_step=trial.pause_at,
            )
        except StoppedError:
            if trial.pause_at is None:
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


def tracked(trial: Trial, parent_key: str | None, *, works: bool = True) -> AbstractContextManager[tracking.Run]:
    """The trial's MLflow run, nested in the sweep's: begun, or taken up where another process left it.

    Args:
        works: False in the sweep's driver, which only ends it.
    """
    return tracking.run(
        trial.config.tracking,
        kind="trial",
        name=trial.name,
        resolved=trial.config,
        state_uri=storage.join(trial.uri, "mlflow.json"),
        parent_key=parent_key,
        works=works,
    )
