"""Ray Tune glue: a driver that starts trials, listens to their validations and keeps the record of each.

The truth is in the trials' folders: their checkpoints and `trial.json`. Tune's own record of the experiment serves
its TensorBoard files only; a sweep started again tells a fresh Tune what every trial had reached.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.tune import TuneError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from dermray import cluster, storage
from dermray.errors import DermRayError
from dermray.train import pretrain, worker
from dermray.tuning import records
from dermray.tuning.plan import TRIAL_CPUS, Trial, share_cluster
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from dermray.tuning.trial import NAME, STEP, VALIDATION, Mailbox, TrialContext, run_trial, tracked

BEST_NAME = "best.yaml"
TRIALS_NAME = "trials.json"
TUNE_FOLDER = "tune"
ABORT_TIMEOUT_S = 30
# The ledger says what happens, why a trial failed and which objective is missing: Tune need not.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """What a finished sweep leaves.

    Attributes:
        records: of all trials, best first.
        leaderboard: the same as a text table.
        best_uri: YAML of the best trial's recipe.
        trials_uri: JSON of all trials.
    """

    best: Trial
    records: list[TrialRecord]
    leaderboard: str
    best_uri: str
    trials_uri: str
    value: float

    def metrics(self, trials: dict[str, Trial]) -> dict[str, float]:
        """Figures of the whole sweep."""
        counts = {f"trials_{status}": 0.0 for status in Status if status is not Status.UNFINISHED}
        for record in self.records:
            counts[f"trials_{record.status}"] += 1
        full = sum(trial.samples_at(trial.num_steps) for trial in trials.values())
        trained = sum(record.samples_trained for record in self.records)
        return {"best_objective": self.value, "samples_trained": trained, "samples_share": trained / full, **counts}


def checked(trials: list[Trial]) -> list[Trial]:
    """The trials with absolute URIs, each checked as `jobs/pretrain.py` would before it starts.

    Raises:
        DermRayError: a bad corpus, split or model, or an output that belongs to another sweep; names the trial.
    """
    found = []
    for trial in trials:
        try:
            pretrain.check(trial.config)
        except DermRayError as error:
            raise DermRayError(f"{trial.name} ({trial.label()}): {error}") from None
        found.append(replace(trial, config=pretrain.located(trial.config)))
    return found


def sweep(
    config: SweepConfig, trials: list[Trial], *, parent_id: str | None, say: Callable[[str], None]
) -> SweepResult:
    """Run all trials to their end or their stop; needs a connected Ray cluster.

    Args:
        trials: from `checked`, with the tracking that their processes shall use.
        parent_id: MLflow run in which theirs are nested.
        say: gets a line for each validation and each end of a trial.

    Raises:
        DermRayError: the trials do not fit the cluster, the objective is not reported, no trial ran to its end, or
            the sweep was interrupted.
    """
    at_once, trials = share_cluster(config, trials, num_cpus=cluster.num_cpus(), num_gpus=cluster.num_gpus())
    by_name = {trial.name: trial for trial in trials}
    found = {trial.name: TrialRecord.load(trial) for trial in trials}
    mailbox: ActorHandle = Mailbox.remote()  # type: ignore[attr-defined]
    context = TrialContext(by_name, dict(found), mailbox, parent_id)
    ledger = Ledger(config, by_name, found, mailbox, say)
    _fit(config, context, ledger, at_once)
    if any(record.status is Status.UNFINISHED for record in ledger.records.values()):
        raise DermRayError("the sweep was interrupted; the same command goes on with it")
    for name, record in ledger.records.items():
        close_run(by_name[name], record, parent_id)
    return _publish(config, by_name, list(ledger.records.values()))


class Ledger(tune.Callback):
    """Listens to Tune in the driver, keeps every trial's record and says what happens.

    Attributes:
        records: by name.
        refusal: why it ended the sweep, if it did; Tune passes on the text of an error only.
    """

    def __init__(
        self,
        config: SweepConfig,
        trials: dict[str, Trial],
        found: dict[str, TrialRecord],
        mailbox: ActorHandle,
        say: Callable[[str], None],
    ) -> None:
        self.records = found
        self.refusal: DermRayError | None = None
        self._config = config
        self._trials = trials
        self._mailbox = mailbox
        self._say = say

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Say what the trial tries."""
        name = trial.config[NAME]
        self._say(f"{name} of {len(self._trials)} starts: {self._trials[name].label()}")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation: into the curve."""
        mine = self._trials[trial.config[NAME]]
        record = self.records[mine.name]
        metrics = {key: float(value) for key, value in result.items() if key.startswith("validation_")}
        if self._config.objective not in metrics:
            self.refusal = DermRayError(
                f"objective: validation does not report {self._config.objective!r}; it reports "
                f"{', '.join(sorted(metrics)) or 'nothing: the split has neither labels nor captions'}"
            )
            raise self.refusal
        number, step = int(result[VALIDATION]), int(result[STEP])
        known = any(point.validation == number for point in record.curve)
        record.add(Point(number, step, mine.samples_at(step), metrics))
        if not known:
            record.save(mine)
            value = metrics[self._config.objective]
            self._say(f"{mine.name}  step {step}/{mine.num_steps}  {self._config.objective} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """The end of a trial: its own, or Tune's stop, which leaves no summary."""
        mine = self._trials[trial.config[NAME]]
        controller = ray.get(self._mailbox.take_controller.remote(mine.name))
        if _ran_to_end(mine):
            self._end(mine, Status.FINISHED)
            return
        if controller is not None:
            _abort(mine, controller)
        self._end(mine, Status.STOPPED)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A failed trial costs itself, never the sweep."""
        mine = self._trials[trial.config[NAME]]
        reason = ray.get(self._mailbox.take_reason.remote(mine.name))
        self._end(mine, Status.FAILED, reason or "its process was lost")

    def _end(self, trial: Trial, status: Status, error: str = "") -> None:
        record = self.records[trial.name]
        record.status, record.error = status, error
        record.save(trial)
        self._say(f"{trial.name}  {status}{': ' + error if error else ''}")


def _ran_to_end(trial: Trial) -> bool:
    return storage.exists(storage.join(trial.uri, worker.SUMMARY_NAME))


def _abort(trial: Trial, controller: ActorHandle) -> None:
    """End a trainer while its trial still lives. Tune's own stop kills the trial's process, and what its trainer had
    reserved would stay reserved: Ray frees it only with the help of a dashboard, which a local cluster lacks.
    """
    try:
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
    except RayActorError:
        # An aborted controller leaves by ending its own process.
        logger.debug("%s: its trainer has ended", trial.name)
    except GetTimeoutError:
        logger.warning("%s: its trainer did not end in %d s; its CPUs may stay taken", trial.name, ABORT_TIMEOUT_S)


def _fit(config: SweepConfig, context: TrialContext, ledger: Ledger, at_once: int) -> None:
    os.environ.update(QUIET_TUNE)
    uri = storage.join(config.output, TUNE_FOLDER)
    storage.remove(uri)
    filesystem, path = storage.filesystem(uri)
    trainable = functools.partial(run_trial, context)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        param_space=tune.grid_search([{NAME: trial.name, **trial.params} for trial in context.trials.values()]),
        tune_config=tune.TuneConfig(
            metric=config.objective,
            mode=config.mode,
            scheduler=_scheduler(config),
            max_concurrent_trials=at_once,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[ledger],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError:
        if ledger.refusal is not None:
            raise ledger.refusal from None
        raise


def _scheduler(config: SweepConfig) -> TrialScheduler:
    """Successive halving whose rungs lie before the last validation: a trial that came so far also finishes."""
    last_rung = config.num_validations - 1
    if config.scheduler.grace_period > last_rung:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=VALIDATION,
        max_t=last_rung,
        grace_period=config.scheduler.grace_period,
        reduction_factor=config.scheduler.reduction_factor,
        stop_last_trials=False,
    )


def _trial_name(trial: TuneTrial) -> str:
    return str(trial.config[NAME])


def close_run(trial: Trial, record: TrialRecord, parent_id: str | None) -> None:
    """End the MLflow run of a trial, whose own process could not if it was stopped or lost.

    A stopped trial's run ends FINISHED with a tag that says who stopped it.
    """
    tags = {"dermray.trial_status": str(record.status)}
    if record.status is Status.STOPPED:
        tags["dermray.stopped_by"] = f"ASHA after validation {len(record.curve)}"
    if record.status is Status.FAILED:
        tags["dermray.error"] = record.error
    with contextlib.suppress(_TrialFailedError), tracked(trial, parent_id) as current:
        current.set_tags(tags)
        if record.status is Status.FAILED:
            raise _TrialFailedError


class _TrialFailedError(Exception):
    """Makes a tracked block end as FAILED."""


def _publish(config: SweepConfig, trials: dict[str, Trial], found: list[TrialRecord]) -> SweepResult:
    best_record = records.best_of(found, config.objective, config.mode)
    best, value = trials[best_record.name], best_record.value(config.objective)
    assert value is not None
    ordered = records.ranked(found, config.objective, config.mode)
    result = SweepResult(
        best=best,
        records=ordered,
        leaderboard=records.leaderboard(found, config.objective, config.mode),
        best_uri=storage.join(config.output, BEST_NAME),
        trials_uri=storage.join(config.output, TRIALS_NAME),
        value=value,
    )
    header = (
        f"# {best.name}, the best of {len(found)} trials: {config.objective} {value:.4f} ({best.label()})\n"
        "#   python jobs/pretrain.py --config THIS_FILE corpus=URI output=URI\n"
    )
    storage.write_text(result.best_uri, header + best.recipe_yaml())
    document = {
        "objective": config.objective,
        "mode": config.mode,
        "best": best.name,
        **result.metrics(trials),
        "trials": [_describe(trials[record.name], record, config.objective) for record in ordered],
    }
    storage.write_json(result.trials_uri, document)
    return result


def _describe(trial: Trial, record: TrialRecord, objective: str) -> dict[str, Any]:
    return {
        "name": trial.name,
        "status": str(record.status),
        "params": trial.params,
        objective: record.value(objective),
        "samples_trained": record.samples_trained,
        "num_steps": trial.num_steps,
        "curve": [
            {"validation": p.validation, "step": p.step, "samples": p.samples, **p.metrics} for p in record.curve
        ],
        "error": record.error,
        "output": trial.uri,
        "config": trial.config.model_dump(mode="json"),
    }
