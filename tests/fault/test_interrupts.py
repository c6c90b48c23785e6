"""Ctrl-C and SIGTERM at moments of a preparation, an evaluation and a pretraining; a Ray node that is killed.

Signals go to the driver's whole process group, as a terminal's do. Each moment is tied to what the driver has said.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from dermray import interrupts
from tests import pretraining, raw_corpus
from tests.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

DEADLINE_S = 120
# What is promised where nothing trains, and what this machine may need more, which also runs other tests.
END_S, SLACK_S = 10, 5
ENDLESS = ("train.epochs=4000", "train.checkpoint_every_steps=100000", "train.checkpoint_every_minutes=1000")


class Job:
    """A command as a process that leads a group of its own; what it says is in a file."""

    def __init__(self, folder: Path, arguments: list[str], *, own_cluster: bool = False) -> None:
        self.said_file, self.store = folder / "said.txt", folder / "mlflow.db"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        if not own_cluster:
            environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        command = [sys.executable, str(ROOT / "jobs" / arguments[0]), *arguments[1:]]
        command += [f"tracking.uri=sqlite:///{self.store}", f"tracking.spool={folder / 'spool'}"]
        with self.said_file.open("wb") as sink:
            self.process = subprocess.Popen(
                command, env=environment, stdout=sink, stderr=sink, cwd=folder, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.said_file.read_text()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.said}"
            assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}: {self.said}"
            time.sleep(0.02)

    def wait_until_said(self, pattern: str) -> None:
        self.wait_for(lambda: re.search(pattern, self.said), pattern)

    def end(self, number: signal.Signals) -> float:
        """Signal the group; the seconds until the driver is gone."""
        begun = time.monotonic()
        os.killpg(self.process.pid, number)
        self.process.wait(DEADLINE_S)
        return time.monotonic() - begun

    def statuses(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.store)) as connection:
            return [status for (status,) in connection.execute("select status from runs")]

    def survivors(self) -> list[psutil.Process]:
        """Processes of its session that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@contextlib.contextmanager
def begun(folder: Path, arguments: list[str], *, own_cluster: bool = False) -> Iterator[Job]:
    job = Job(folder, arguments, own_cluster=own_cluster)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "raw"
    raw_corpus.write(folder, num_good=1000)
    return folder


def preparation(raw: Path, output: Path) -> list[str]:
    return [
        *("prepare.py", "source=csv", f"input={raw}", f"output={output}", "rows_per_shard=4", "split={val: 0.3}"),
        *("max_tasks=1", "max_dropped_fraction=1"),
    ]


def pretraining_of(root: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *("pretrain.py", f"corpus={pretraining.corpus(root)}", f"output={output}", f"model={pretraining.model(root)}"),
        *pretraining.OVERRIDES,
        *ENDLESS,
        *overrides,
    ]


def evaluation(root: Path, output: Path) -> list[str]:
    return [
        *("evaluate.py", f"corpus={pretraining.corpus(root)}", f"output={output}", f"model={pretraining.model(root)}"),
        *("split=train", f"cache={output}-cache", "tasks=[zero_shot,retrieval]", "bootstrap=20000"),
    ]


INT, TERM = signal.SIGINT, signal.SIGTERM


def interrupt(job: Job, moment: str, delay_s: float, number: signal.Signals) -> float:
    job.wait_until_said(moment)
    time.sleep(delay_s)
    assert job.process.poll() is None, f"it had ended: {job.said}"
    seconds = job.end(number)
    assert job.process.returncode == 128 + number, job.said
    assert "Traceback" not in job.said
    assert not job.survivors()
    print(f"{moment} and {delay_s:g} s, {number.name}: ended in {seconds:.1f} s")
    return seconds


@pytest.mark.parametrize(
    ("moment", "delay_s", "number"),
    [("rows of csv", 0.0, INT), (r" [1-9]\d*/\d+ shards", 0.0, TERM)],
)
def test_a_preparation_ends_and_goes_on(
    ray_cluster: None, raw: Path, tmp_path: Path, moment: str, delay_s: float, number: signal.Signals
) -> None:
    with begun(tmp_path, preparation(raw, tmp_path / "corpus")) as job:
        assert interrupt(job, moment, delay_s, number) < END_S + SLACK_S
        if job.store.exists():
            assert job.statuses() in ([], ["KILLED"])
        if "shards" in moment:
            assert job.statuses() == ["KILLED"]
            assert "stopped: finished shards are kept: run the same command again to go on" in job.said
    with begun(tmp_path, preparation(raw, tmp_path / "corpus")) as job:
        assert job.process.wait(DEADLINE_S) == 0, job.said


@pytest.mark.parametrize(("moment", "delay_s"), [("encoding", 0.0), ("scoring", 0.0)])
def test_an_evaluation_ends(ray_cluster: None, root: Path, tmp_path: Path, moment: str, delay_s: float) -> None:
    with begun(tmp_path, evaluation(root, tmp_path / "report")) as job:
        assert interrupt(job, moment, delay_s, INT) < END_S + SLACK_S
        assert job.statuses() == ["KILLED"]
        assert not (tmp_path / "report" / "report.json").exists()


def test_a_pretraining_whose_workers_have_not_begun_ends(ray_cluster: None, root: Path, tmp_path: Path) -> None:
    with begun(tmp_path, pretraining_of(root, tmp_path / "run")) as job:
        assert interrupt(job, "starting the workers", 0.0, INT) < END_S + SLACK_S
        assert "there is no checkpoint yet, so the same command again begins at step 1" in job.said
        assert job.statuses() == ["KILLED"]


def test_a_pretraining_leaves_a_checkpoint_with_a_cluster_of_its_own(root: Path, tmp_path: Path) -> None:
    """As after SIGTERM on a cluster that was there, see test_pretrain_kill."""
    with begun(tmp_path, pretraining_of(root, tmp_path / "run"), own_cluster=True) as job:
        job.wait_until_said(r"step +3/")
        (dashboard,) = re.findall(r"; dashboard: (http://127\.0\.0\.1:\d+), which asks for ", job.said)
        assert httpx.get(dashboard, timeout=DEADLINE_S).status_code == 200
        assert httpx.get(f"{dashboard}/api/jobs/", timeout=DEADLINE_S).status_code == 401, "it asks for the token"
        job.process.send_signal(INT)
        assert job.process.wait(DEADLINE_S) == 128 + INT, job.said
        assert re.search(r"\nstopped at step \d+; the same command again goes on from there\n", job.said)
        assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
        assert job.statuses() == ["KILLED"]
        assert not job.survivors()


@pytest.mark.parametrize("name", ["preparation", "evaluation", "pretraining"])
def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_running(
    root: Path, raw: Path, tmp_path: Path, name: str
) -> None:
    """The clean end that the first one asks for waits for a Ray node that stands still."""
    command, moment = {
        "preparation": (preparation(raw, tmp_path / "corpus"), r" [1-9]\d*/\d+ shards"),
        "evaluation": (evaluation(root, tmp_path / "report"), "encoding"),
        "pretraining": (pretraining_of(root, tmp_path / "run"), r"step +3/"),
    }[name]
    with begun(tmp_path, command, own_cluster=True) as job:
        job.wait_until_said(moment)
        started = psutil.Process(job.process.pid).children(recursive=True)
        for child in started:
            with contextlib.suppress(psutil.Error):
                child.suspend()
        os.killpg(job.process.pid, INT)
        # Less than this, and both are one request.
        time.sleep(2 * interrupts.SAME_WITHIN_S)
        assert job.process.poll() is None, f"it had ended: {job.said}"
        assert job.end(INT) < END_S + SLACK_S
        assert job.process.returncode == 128 + INT, job.said
        assert "interrupted: ended at once" in job.said
        assert "Traceback" not in job.said
        # Killed, and gone as soon as the system has come to it.
        _, left = psutil.wait_procs({*started, *job.survivors()}, timeout=DEADLINE_S)
        assert not [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not job.survivors()
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert not (tmp_path / "report" / "report.json").exists()


def test_workers_that_never_fit_are_refused_at_the_door(root: Path, tmp_path: Path) -> None:
    with begun(tmp_path, pretraining_of(root, tmp_path / "run", "use_gpu=true"), own_cluster=True) as job:
        assert job.process.wait(DEADLINE_S) == 2, job.said
        assert "1 training worker of 1 CPU and 1 GPU would wait for ever: this machine's cluster has" in job.said
        assert not job.store.exists()


@pytest.mark.parametrize("arguments", ["preparation", "evaluation", "pretraining"])
def test_a_killed_node_is_named(root: Path, raw: Path, tmp_path: Path, arguments: str) -> None:
    command, moment = {
        "preparation": (preparation(raw, tmp_path / "corpus"), r" [1-9]\d*/\d+ shards"),
        "evaluation": (evaluation(root, tmp_path / "report"), "encoding"),
        "pretraining": (pretraining_of(root, tmp_path / "run"), "starting the workers"),
    }[arguments]
    with begun(tmp_path, command, own_cluster=True) as job:
        job.wait_until_said(moment)
        (raylet,) = [child for child in psutil.Process(job.process.pid).children() if child.name() == "raylet"]
        raylet.kill()
        assert job.process.wait(DEADLINE_S) == 1, job.said
        # Ray may have ended the driver at once, and the process beside it speaks after that.
        end = time.monotonic() + DEADLINE_S
        while job.survivors() and time.monotonic() < end:
            time.sleep(0.02)
        assert not job.survivors()
        # Ray prints the end of its own log around it.
        (said,) = [line for line in job.said.splitlines() if line.startswith("error: ")]
        assert said.startswith(f"error: the Ray node of this machine is lost: raylet, process {raylet.pid}"), job.said
        assert "same command again" in said
        assert job.statuses() == ["RUNNING" if "ended the job at once" in said else "FAILED"]
