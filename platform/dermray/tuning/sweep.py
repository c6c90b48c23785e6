"""Ray Tune glue: a driver that starts trials, listens to their validations and keeps the record of each.

The truth is in the trials' folders: their checkpoints and `trial.json`. Tune's own record of the experiment serves
its TensorBoard files only; a sweep started again tells a fresh Tune what every trial had reached.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.tune import TuneError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from dermray import cluster, interrupts, storage
from dermray.errors import ClaimError, ConfigError, DermRayError, StoppedError
from dermray.ingest.corpora import Corpora
from dermray.ledger import Claim, claim
from dermray.progress import busy, clock
from dermray.train import checkpoint, pretrain, worker
from dermray.train.stopping import POLL_INTERVAL_S
from dermray.tuning.generations import Generations
from dermray.tuning.mailbox import Mailbox
from dermray.tuning.plan import TRIAL_CPUS, Trial, share_cluster
from dermray.tuning.publishing import SweepResult, publish
from dermray.tuning.queues import Queue
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.reports import LEG, NAME, STEP, VALIDATION
from dermray.tuning.settings import SweepConfig
from dermray.tuning.trial import TrialContext, run_trial, tracked

TUNE_FOLDER = "tune"
KEPT = "finished trials and the others' checkpoints are kept, and the same command goes on with the sweep"
ABORT_TIMEOUT_S = 30
# Of how many trials under way a line says where they are.
NUM_TOLD = 4
# The ledger says what happens, why a trial failed and which objective is missing: Tune need not. Signals are ours.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}

logger = logging.getLogger(__name__)


def checked(config: SweepConfig, trials: list[Trial]) -> list[Trial]:
    """The trials with absolute URIs, each checked as `jobs/pretrain.py` would before it starts.

    Checkpoints of a population's trial are compared when its turn comes: after an exploit its settings are not those of
    the draw.

    Raises:
        DermRayError: a bad corpus, split or model, or an output that belongs to another sweep; names the trial.
    """
    found = []
    for trial in trials:
        try:
            TrialRecord.load(trial)
            pretrain.check(trial.config, fresh=config.scheduler.kind == "pbt")
        except DermRayError as error:
            # A wrong key stays one: it has an exit code of its own.
            kind = ConfigError if error.exit_code == ConfigError.exit_code else DermRayError
            raise kind(f"{trial.name} ({trial.label()}): {error}") from None
        found.append(replace(trial, config=pretrain.located(trial.config)))
    return found


def sweep(
    config: SweepConfig, trials: list[Trial], *, parent_key: str | None, say: Callable[[str], None]
) -> SweepResult:
    """Run all trials to their end or their stop; needs a connected Ray cluster.

    Args:
        trials: from `checked`, with the tracking that their processes shall use.
        parent_key: key of the MLflow run in which theirs are nested.
        say: gets a line for each validation and each end of a trial.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        DermRayError: the trials do not fit the cluster, the objective is not reported, no trial ran to its end, or
            the sweep was interrupted.
    """
    with claim(config.output, wait_s=config.wait_for_output_s) as mine:
        return _sweep(config, trials, mine, parent_key=parent_key, say=say)


def _sweep(
    config: SweepConfig,
    trials: list[Trial],
    mine: Claim,
    *,
    parent_key: str | None,
    say: Callable[[str], None],
) -> SweepResult:
    at_once, trials = share_cluster(config, trials, num_cpus=cluster.num_cpus(), num_gpus=cluster.num_gpus())
    started = time.monotonic()
    mailbox: ActorHandle = Mailbox.remote()
    ledger = Ledger(config, mine, mailbox, say, num_trials=len(trials))
    searcher = Generations if config.scheduler.kind == "pbt" else Queue
    queue = searcher(config, trials, Corpora.load(config.corpus_uris), ledger)
    grace_s = max(trial.config.train.grace_s for trial in trials)
    with (
        interrupts.telling(lambda: KEPT),
        _passed_on(ledger, mailbox),
        interrupts.stopping(ledger.interrupt, grace_s=grace_s),
        busy(lambda: f"sweep: {ledger.standing()}", say),
    ):
        _fit(config, TrialContext(mailbox, parent_key), ledger, queue, at_once)
    if ledger.interrupted:
        raise StoppedError(f"stopped: {KEPT}")
    if any(record.status is Status.UNFINISHED for record in ledger.records.values()):
        raise DermRayError("the sweep was interrupted; the same command goes on with it")
    for name, record in ledger.records.items():
        close_run(ledger.trials[name], record, parent_key)
    return publish(config, ledger.trials, list(ledger.records.values()), seconds=time.monotonic() - started)


@contextlib.contextmanager
def _passed_on(ledger: Ledger, mailbox: ActorHandle) -> Iterator[None]:
    """Within the block the ledger hears how far trials are, and they that the sweep is to end.

    A signal handler itself cannot ask Ray for anything.
    """
    over = threading.Event()

    def listen() -> None:
        while not over.wait(POLL_INTERVAL_S):
            ledger.steps = ray.get(mailbox.steps.remote())
            if ledger.interrupted:
                ray.get(mailbox.interrupt.remote())
                return

    thread = threading.Thread(target=listen, name="sweep-interruption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


class Ledger(tune.Callback):
    """Listens to Tune in the driver, keeps every trial's record and says what happens.

    Attributes:
        trials, records: of those that were begun, by name.
        steps: how far those are that train, by name, as they say themselves.
        refusal: why it ended the sweep, if it did; Tune passes on the text of an error only.
        interrupted: the sweep is to end, with a checkpoint of each trial that trains.
    """

    def __init__(
        self, config: SweepConfig, mine: Claim, mailbox: ActorHandle, say: Callable[[str], None], *, num_trials: int
    ) -> None:
        self.trials: dict[str, Trial] = {}
        self.records: dict[str, TrialRecord] = {}
        self.steps: dict[str, int] = {}
        self.refusal: DermRayError | None = None
        self.interrupted = False
        self._config = config
        self._claim = mine
        self._mailbox = mailbox
        self._say = say
        self._num_trials = num_trials
        self._began = time.monotonic()
        # Trials, and parts of some, that earlier processes trained: they took no time of this one.
        self._num_found = 0.0
        self._failed: set[str] = set()

    def interrupt(self) -> None:
        """The sweep is to end; safe in a signal handler."""
        self.interrupted = True

    def confirm(self) -> None:
        """The last look before something is written into the sweep's output.

        Raises:
            ClaimError: another run has taken it over.
        """
        try:
            self._claim.confirm()
        except ClaimError as error:
            self.refusal = error
            raise

    def _save(self, record: TrialRecord, trial: Trial) -> None:
        self.confirm()
        record.save(trial)

    def begin(self, trial: Trial, record: TrialRecord | None = None) -> None:
        """A trial is to start, or to go on from where an earlier process, or its last generation, left it."""
        record = record or TrialRecord.load(trial)
        self._failed.discard(trial.name)
        if trial.name not in self.records:
            self._num_found += self._trained(trial, record)
        self.trials[trial.name], self.records[trial.name] = trial, record
        self._save(record, trial)
        ray.get(self._mailbox.put_trial.remote(trial.name, [ray.put((trial, record))]))

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Say what the trial tries."""
        name = trial.config[NAME]
        verb = "goes on" if self.records[name].curve else "starts"
        self._say(f"{name} of {self._num_trials} {verb}: {self.trials[name].label()}")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation: into the curve."""
        mine = self.trials[trial.config[NAME]]
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
            self._save(record, mine)
            value = metrics[self._config.objective]
            self._say(f"{mine.name}  step {step}/{mine.num_steps}  {self._config.objective} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """The end of a trial: its own, or Tune's stop, which leaves no summary."""
        mine = self.trials[trial.config[NAME]]
        controller = ray.get(self._mailbox.take_controller.remote(mine.name))
        if _ran_to_end(mine):
            self._end(mine, Status.FINISHED)
            return
        if self.interrupted:
            self._say(f"{mine.name}  stops with the sweep; {pretrain.what_is_kept(mine.uri)}")
            return
        if _pauses(mine):
            self._say(f"{mine.name}  pauses at step {mine.pause_at}")
            return
        if controller is not None:
            ray.get(self._mailbox.put_stop.remote(mine.name))
            _abort(mine, controller)
        self._end(mine, Status.STOPPED)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A failure that is not the last: the trial begins again from its checkpoint."""
        mine = self.trials[trial.config[NAME]]
        reason = ray.get(self._mailbox.take_reason.remote(mine.name)) or "its process was lost"
        record = self.records[mine.name]
        record.num_failures += 1
        record.error = reason
        self._save(record, mine)
        self._say(f"{mine.name}  failed, begins again: {reason}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A failed trial costs itself, never the sweep."""
        mine = self.trials[trial.config[NAME]]
        reason = ray.get(self._mailbox.take_reason.remote(mine.name))
        self._end(mine, Status.FAILED, reason or "its process was lost")

    def _end(self, trial: Trial, status: Status, error: str = "") -> None:
        record = self.records[trial.name]
        record.end(status, error)
        self._save(record, trial)
        if status is Status.FAILED:
            self._failed.add(trial.name)
        self._say(f"{trial.name}  {status}{': ' + error if error else ''}")
        if sum(map(self._has_ended, self.records.values())) < self._num_trials:
            self._say(self.standing())

    def standing(self) -> str:
        """How many trials have ended, where the others are, and when all will have ended; from any thread."""
        begun = [(self.trials[name], record) for name, record in list(self.records.items())]
        ended = sum(self._has_ended(record) for _, record in begun)
        under_way = [self._place(trial, record) for trial, record in begun if not self._has_ended(record)]
        more = len(under_way) - NUM_TOLD
        others = [", ".join(under_way[:NUM_TOLD]) + (f" and {more} more" if more > 0 else "")] if under_way else []
        done = sum(self._trained(trial, record) for trial, record in begun)
        made = done - self._num_found
        eta = clock((time.monotonic() - self._began) / made * (self._num_trials - done)) if made > 0 else ""
        last = [f"ETA {eta} if the others take as long"] if eta else []
        return "; ".join([f"{ended} of {self._num_trials} trials have ended", *others, *last])

    def _has_ended(self, record: TrialRecord) -> bool:
        return record.status.is_final or record.name in self._failed

    def _step(self, record: TrialRecord) -> int:
        """The last step that is known of a trial's training."""
        return max(self.steps.get(record.name, 0), record.curve[-1].step if record.curve else 0)

    def _place(self, trial: Trial, record: TrialRecord) -> str:
        step = self._step(record)
        return f"{trial.name} step {step}/{trial.num_steps}" if step else f"{trial.name} has yet to train"

    def _trained(self, trial: Trial, record: TrialRecord) -> float:
        """The share of a trial's steps that is behind it; all of one that has ended."""
        return 1.0 if self._has_ended(record) else min(self._step(record) / trial.num_steps, 1.0)


def _ran_to_end(trial: Trial) -> bool:
    return storage.exists(storage.join(trial.uri, worker.SUMMARY_NAME))


def _pauses(trial: Trial) -> bool:
    return any(info.step == trial.pause_at for info in checkpoint.committed(trial.uri))


def _abort(trial: Trial, controller: ActorHandle) -> None:
    """End a trainer while its trial still lives. Tune itself only ends the trial's process, or gives it to the next
    trial. What its trainer had reserved would stay reserved: Ray frees it only with the help of a dashboard, which a
    local cluster may lack.
    """
    try:
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
    except RayActorError:
        # An aborted controller leaves by ending its own process.
        logger.debug("%s: its trainer has ended", trial.name)
    except GetTimeoutError:
        logger.warning("%s: its trainer did not end in %d s; its CPUs may stay taken", trial.name, ABORT_TIMEOUT_S)


def _fit(config: SweepConfig, context: TrialContext, ledger: Ledger, queue: Queue | Generations, at_once: int) -> None:
    os.environ.update(QUIET_TUNE)
    uri = storage.join(config.output, TUNE_FOLDER)
    ledger.confirm()
    storage.remove(uri)
    filesystem, path = storage.filesystem(uri)
    trainable = functools.partial(run_trial, context)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            metric=config.objective,
            mode=config.mode,
            scheduler=scheduler(config),
            search_alg=queue,
            num_samples=queue.num_legs,
            max_concurrent_trials=at_once,
            # A trial's process takes seconds to start; the next trial goes on in it.
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[ledger],
            failure_config=tune.FailureConfig(max_failures=config.max_trial_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError:
        if ledger.refusal is not None:
            raise ledger.refusal from None
        raise


def scheduler(config: SweepConfig) -> TrialScheduler:
    """Successive halving whose rungs lie before the last validation: a trial that came so far also finishes.

    A population needs none: its trials pause by themselves.
    """
    last_rung = config.num_validations - 1
    if config.scheduler.kind != "asha" or config.scheduler.grace_period > last_rung:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=VALIDATION,
        max_t=last_rung,
        grace_period=config.scheduler.grace_period,
        reduction_factor=config.scheduler.reduction_factor,
        stop_last_trials=False,
    )


def _trial_name(trial: TuneTrial) -> str:
    name, leg = trial.config[NAME], trial.config.get(LEG)
    return name if leg is None else f"{name}-{leg}"


def close_run(trial: Trial, record: TrialRecord, parent_key: str | None) -> None:
    """End the MLflow run of a trial, whose own process could not if it was stopped or lost.

    A stopped trial's run ends FINISHED with a tag that says who stopped it.
    """
    tags = {"dermray.trial_status": str(record.status)}
    if record.status is Status.STOPPED:
        tags["dermray.stopped_by"] = f"ASHA after validation {len(record.curve)}"
    if record.status is Status.FAILED:
        tags["dermray.error"] = record.error
    with (
        contextlib.suppress(_TrialFailedError),
        tracked(trial, parent_key, ended_at=record.ended_at or time.time()) as current,
    ):
        current.set_tags(tags)
        if record.status is Status.FAILED:
            raise _TrialFailedError


class _TrialFailedError(Exception):
    """Makes a tracked block end as FAILED."""
