"""One trial: the real trainer inside a Ray Tune function, its own nested MLflow run, its validations told to Tune."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from dermray import cluster, storage, tracking
from dermray.corpus.manifest import Manifest
from dermray.errors import DermRayError
from dermray.train.progress import StepRecord
from dermray.tuning.plan import Trial
from dermray.tuning.records import TrialRecord

# The key under which Tune is given a trial's name.
NAME = "trial"
VALIDATION = "validation"
STEP = "step"
MAX_REASON_CHARS = 600


@dataclass(frozen=True)
class TrialContext:
    """What every trial's process needs.

    Attributes:
        mailbox: a `Mailbox` actor, which knows the trials.
        parent_id: the sweep's MLflow run.
    """

    mailbox: ActorHandle
    parent_id: str | None


@ray.remote(num_cpus=0)
class Mailbox:
    """Between the driver of the sweep and its trials: what they are to do, where their trainer is, why they failed."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[Trial, TrialRecord]] = {}
        self._controllers: dict[str, ActorHandle] = {}
        self._reasons: dict[str, str] = {}

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
    name = config[NAME]
    trial, record = ray.get(context.mailbox.trial.remote(name))
    for point in record.curve:
        tune.report({**point.metrics, STEP: point.step, VALIDATION: point.validation})
    if record.status.is_final:
        return
    try:
        _train(trial, context)
    except Exception as error:
        ray.get(context.mailbox.put_reason.remote(name, _in_one_line(error)))
        raise


def _in_one_line(error: Exception) -> str:
    kind = "" if isinstance(error, DermRayError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[-MAX_REASON_CHARS:]


def _train(trial: Trial, context: TrialContext) -> None:
    from dermray.train.pretrain import pretrain

    cluster.connect(trial.config.cluster)
    with tracked(trial, context.parent_id) as current:

        def on_record(record: StepRecord) -> None:
            current.log_metrics(record.metrics, step=record.step)

        manifest = Manifest.load(trial.config.corpus)
        current.log_corpus(trial.config.corpus, manifest, context="training")
        result = pretrain(
            trial.config,
            on_record=on_record,
            provenance=tracking.provenance(current, manifest),
            extra_callbacks=[ReportValidation(trial, context.mailbox)],
        )
        current.log_artifact("output", "model", result.model_uri, result.weights_sha256)
        current.set_tags({"model_uri": result.model_uri, "weights_sha256": result.weights_sha256})


def tracked(trial: Trial, parent_id: str | None, *, works: bool = True) -> AbstractContextManager[tracking.Run]:
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
        parent_id=parent_id,
        works=works,
    )
