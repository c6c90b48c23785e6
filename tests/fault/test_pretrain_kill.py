"""Pretraining under SIGKILL: of a worker, and of the whole driver. The weights come out as if nothing had happened.

A test waits for a state of the output (a checkpoint is there) and kills then; it proves that the kill struck a run
under way, or it fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient

from dermray import entry, tracking
from dermray.commands import pretrain as pretrain_job
from dermray.config import TrackingConfig
from dermray.errors import StoppedError
from dermray.train import checkpoint
from dermray.train.pretrain import pretrain
from dermray.train.progress import StepRecord
from tests import pretraining
from tests.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

# Generous: on a busy machine the start of a worker group alone takes a minute.
DEADLINE_S = 240


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def wait_for(condition: Callable[[], bool], what: str, *, interval_s: float = 0.005) -> None:
    """Poll closely, so that what is waited for is acted upon while it is true."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {DEADLINE_S} s for {what}")
        time.sleep(interval_s)


def training_workers() -> list[psutil.Process]:
    """The processes of Ray Train's workers among the descendants of this cluster's raylet."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def committed_steps(output: Path) -> list[int]:
    try:
        return [info.step for info in checkpoint.committed(str(output))]
    except FileNotFoundError:
        return []


def finished(output: Path) -> bool:
    return (output / "summary.json").exists()


class Killer(threading.Thread):
    """Kills, or stops, one of two workers as soon as the first checkpoint is committed."""

    def __init__(self, output: Path, number: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(daemon=True)
        self.output = output
        self.number = number
        self.victim: psutil.Process | None = None
        self.killed: int | None = None
        self.steps_at_kill: list[int] = []
        self.finished_at_kill = True

    def run(self) -> None:
        wait_for(lambda: len(training_workers()) == 2, "two training workers", interval_s=0.2)
        victim = max(training_workers(), key=lambda process: process.create_time())
        wait_for(lambda: bool(committed_steps(self.output)), "the first checkpoint")
        victim.send_signal(self.number)
        self.victim = victim
        self.steps_at_kill, self.finished_at_kill = committed_steps(self.output), finished(self.output)
        if self.number is signal.SIGKILL:
            victim.wait(30)
        self.killed = victim.pid


@pytest.mark.long
def test_a_killed_worker_changes_nothing(root: Path, tmp_path: Path) -> None:
    """SIGKILL of one of two workers mid-epoch: the group starts over from the checkpoint, bit for bit."""
    output = tmp_path / "output"
    wait_for(lambda: not training_workers(), "the end of earlier tests' workers", interval_s=0.2)
    killer = Killer(output)
    killer.start()
    result, records = pretraining.run(pretraining.configured(root, output, "num_workers=2"))
    killer.join(1)
    assert killer.killed is not None, "no worker was killed"
    assert not psutil.pid_exists(killer.killed)
    assert not killer.finished_at_kill
    assert 0 < killer.steps_at_kill[-1] < pretraining.NUM_STEPS

    _, undisturbed, expected = pretraining.undisturbed(root, 2)
    assert result.weights_sha256 == undisturbed.weights_sha256
    steps = [record.step for record in records]
    jumps = [(earlier, later) for earlier, later in pairwise(steps) if later != earlier + 1]
    assert all(later <= earlier for earlier, later in jumps), "a step is missing"
    assert len(jumps) <= 1
    assert set(steps) == set(range(1, pretraining.NUM_STEPS + 1))
    losses = {record.step: record.metrics["loss"] for record in expected}
    assert all(record.metrics["loss"] == losses[record.step] for record in records), "repeated steps repeat figures"


@pytest.mark.long
def test_a_stopped_worker_is_named_and_replaced(root: Path, tmp_path: Path) -> None:
    """SIGSTOP of one of two workers: it lives and answers nothing. The other one says so in time, and both go."""
    output = tmp_path / "output"
    wait_for(lambda: not training_workers(), "the end of earlier tests' workers", interval_s=0.2)
    killer = Killer(output, signal.SIGSTOP)
    killer.start()
    try:
        config = pretraining.configured(root, output, "num_workers=2", "train.collective_timeout_s=10")
        result, records = pretraining.run(config)
    finally:
        if killer.victim is not None and killer.victim.is_running():
            killer.victim.kill()
    killer.join(1)
    assert killer.killed is not None, "no worker was stopped"
    assert not killer.finished_at_kill
    _, undisturbed, _ = pretraining.undisturbed(root, 2)
    assert result.weights_sha256 == undisturbed.weights_sha256
    assert {record.step for record in records} == set(range(1, pretraining.NUM_STEPS + 1))


@pytest.mark.long
def test_a_stop_while_workers_are_started_anew_does_not_wait_for_them(root: Path, tmp_path: Path) -> None:
    """A worker is killed, and a stop is asked for as soon as the controller says so."""
    output, notices = tmp_path / "output", list[str]()
    wait_for(lambda: not training_workers(), "the end of earlier tests' workers", interval_s=0.2)
    killer = Killer(output)
    killer.start()
    with pytest.raises(StoppedError, match=r"^stopped before the workers trained; the checkpoint of step \d+ is kept"):
        pretrain(
            pretraining.configured(root, output, "num_workers=2"),
            on_record=lambda _: None,
            on_notice=notices.append,
            stop_requested=lambda: any("failed or is lost" in notice for notice in notices),
        )
    killer.join(1)
    assert killer.killed is not None, "no worker was killed"
    wait_for(lambda: not training_workers(), "the end of the workers", interval_s=0.2)
    pretraining.free_places()
    result, _ = pretraining.run(pretraining.configured(root, output, "num_workers=2"))
    assert result.resumed_step >= pretraining.CHECKPOINT_EVERY


@pytest.mark.long
def test_a_killed_driver_started_again_ends_in_the_same_weights_and_the_same_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the job's whole process group, then the same command at once, while Ray still buries the dead."""
    output = tmp_path / "output"
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command = [
        sys.executable,
        str(ROOT / "jobs" / "pretrain.py"),
        f"corpus={pretraining.corpus(root)}",
        f"output={output}",
        f"model={pretraining.model(root)}",
        f"tracking.uri={store}",
        *pretraining.OVERRIDES,
    ]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: bool(committed_steps(output)) or first.poll() is not None, "the first checkpoint")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(30) == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    assert not finished(output), "the kill came too late to prove anything"
    assert committed_steps(output)[-1] < pretraining.NUM_STEPS

    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=DEADLINE_S, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "resumed at step" in second.stdout
    _, undisturbed, expected = pretraining.undisturbed(root, 1)
    assert undisturbed.weights_sha256[:12] in second.stdout

    arguments = command[2:]
    assert pretrain_job.main(arguments) == 0
    assert f"finished {pretraining.NUM_STEPS} steps" in capsys.readouterr().out
    assert entry.run_job(lambda: pretrain_job.main([*arguments, "optim.lr=1"])) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "optim.lr was 0.001, now 1.0" in message
    assert message.count("\n") == 1
    assert_one_complete_run(store, output, undisturbed.weights_sha256, expected)


@pytest.mark.long
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on_from_it(root: Path, tmp_path: Path) -> None:
    """No checkpoint is due for long, so the only ones are those that SIGTERM asked for."""
    output = tmp_path / "output"
    command = [
        sys.executable,
        str(ROOT / "jobs" / "pretrain.py"),
        f"corpus={pretraining.corpus(root)}",
        f"output={output}",
        f"model={pretraining.model(root)}",
        "tracking.enabled=false",
        *pretraining.OVERRIDES,
        "num_workers=2",
        "train.epochs=2000",
        "train.checkpoint_every_steps=100000",
    ]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    stopped_at = [0]
    for attempt in range(2):
        log = tmp_path / f"{attempt}.log"
        with log.open("w") as file:
            job = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=tmp_path)
        wait_for(lambda log=log, job=job: "step " in log.read_text() or job.poll() is not None, "the first step")
        job.terminate()
        assert job.wait(DEADLINE_S) == 143, log.read_text()
        steps = [int(line.split()[1].partition("/")[0]) for line in log.read_text().splitlines() if "samples/s" in line]
        assert steps[0] == stopped_at[-1] + 1, "it goes on after the step at which it was stopped"
        stopped_at.append(committed_steps(output)[-1])
        assert f"stopped at step {stopped_at[-1]};" in log.read_text()
        assert steps[-1] == stopped_at[-1]
    assert committed_steps(output) == stopped_at[1:]


# The job with a lease of seconds, so that a test need not wait for a minute.
IMPATIENT_JOB = """
import sys
from dermray import entry, ledger
from dermray.commands import pretrain
ledger.LEASE_S, ledger.BEAT_S = 3.0, 0.3
sys.exit(entry.run_job(pretrain.main))
"""


@pytest.mark.long
def test_of_two_pretrainings_one_is_refused_and_a_frozen_one_that_wakes_commits_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The workers of a driver that stands still go on without it, until they would commit what is no longer theirs."""
    output = tmp_path / "output"
    arguments = [
        f"corpus={pretraining.corpus(root)}",
        f"output={output}",
        f"model={pretraining.model(root)}",
        "tracking.enabled=false",
        *pretraining.OVERRIDES,
        "train.epochs=2000",
        "cpus_per_worker=0.5",
    ]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    jobs: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / name
        with log.open("w") as file:
            command = [sys.executable, "-c", IMPATIENT_JOB, *arguments]
            jobs.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=tmp_path))
        wait_for(lambda: "samples/s" in log.read_text() or jobs[-1].poll() is not None, "the first step")
        assert jobs[-1].poll() is None, log.read_text()
        return jobs[-1], log

    try:
        first, first_log = start("first.log")
        wait_for(lambda: bool(committed_steps(output)), "the first checkpoint")
        assert entry.run_job(lambda: pretrain_job.main([*arguments, "optim.lr=2e-3"])) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: {output} is being written by process {first.pid} on ")
        assert message.count("\n") == 1

        first.send_signal(signal.SIGSTOP)
        second, second_log = start("second.log")
        first.send_signal(signal.SIGCONT)
        assert first.wait(DEADLINE_S) == 1, first_log.read_text()
        assert "is no longer this run's" in first_log.read_text()
        taken_over = committed_steps(output)[-1]
        wait_for(lambda: committed_steps(output)[-1] > taken_over, "a checkpoint of the second")
        second.terminate()
        assert second.wait(DEADLINE_S) == 143, second_log.read_text()
        assert f"stopped at step {committed_steps(output)[-1]};" in second_log.read_text()
        assert not (output / ".claim").exists()
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()


def assert_one_complete_run(store: str, output: Path, weights_sha256: str, expected: list[StepRecord]) -> None:
    config = TrackingConfig(uri=store)
    client: MlflowClient = tracking.client(config)
    experiment = client.get_experiment_by_name(config.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id in (output / "mlflow.json").read_text()
    assert run.info.status == "FINISHED", "neither a repeated nor a refused call marks a finished run"
    assert run.data.tags["weights_sha256"] == weights_sha256
    assert len(run.inputs.dataset_inputs) == 1
    logged = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    steps = [step for step, _ in logged]
    assert steps == sorted(set(steps)), "a step was logged twice"
    assert steps[-1] == pretraining.NUM_STEPS
    losses = {record.step: record.metrics["loss"] for record in expected}
    assert all(value == losses[step] for step, value in logged)
