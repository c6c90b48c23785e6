"""An elastic pretraining on two nodes (two raylets on this machine): one is lost, comes back, and the run finishes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dermray.train import checkpoint
from tests import pretraining
from tests.conftest import ROOT

pytestmark = [pytest.mark.own_cluster, pytest.mark.long, pytest.mark.timeout(500)]

DEADLINE_S = 150
LONG = "train.epochs=20000"
CHECKPOINT_EVERY = 8
# Of a node's 4 CPUs one worker takes these; the rest decodes. So each node holds one worker.
CPUS_PER_WORKER = 2.5
NODE = {"num_cpus": 4, "object_store_memory": 200 << 20}
SETTINGS = {
    # A dead node is noticed after some seconds, and nobody waits a minute for workers on it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
HEARTBEATS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node and, as `second`, another one."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # These nodes are not reached from elsewhere.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(
        initialize_head=True, head_node_args={**NODE, "_system_config": HEARTBEATS, "include_dashboard": False}
    )
    try:
        made.second = made.add_node(**NODE)
        yield made
    finally:
        made.shutdown()


class Job:
    """`jobs/pretrain.py` as an operator starts it."""

    def __init__(self, address: str, root: Path, output: Path, *overrides: str) -> None:
        self.log_file = output.with_suffix(".log")
        command = [
            sys.executable,
            str(ROOT / "jobs" / "pretrain.py"),
            f"corpus={pretraining.corpus(root)}",
            f"output={output}",
            f"model={pretraining.model(root)}",
            "tracking.enabled=false",
            *pretraining.OVERRIDES,
            f"train.checkpoint_every_steps={CHECKPOINT_EVERY}",
            f"cpus_per_worker={CPUS_PER_WORKER}",
            "num_workers=[1, 2]",
            "train.resize_every_s=1",
            *overrides,
        ]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **SETTINGS, "RAY_ADDRESS": address}, stdout=log, stderr=log, cwd=root
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def losses(self) -> list[tuple[int, int, float]]:
        """`(workers, step, loss)` of all printed steps; a number of workers is printed after its first step."""
        found, waiting, num_workers = [], [], 0
        for line in self.log.splitlines():
            if match := re.match(r"step +(\d+)/\d+ +loss ([\d.]+)", line):
                waiting.append((int(match[1]), float(match[2])))
                if len(waiting) > 1:
                    found.append((num_workers, *waiting.pop(0)))
            elif match := re.match(r" +(\d+) workers?$", line):
                num_workers = int(match[1])
        return found + [(num_workers, *last) for last in waiting]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.log}"
            assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}: {self.log}"
            time.sleep(0.02)

    def wait_for_workers(self, num_workers: int, *, after: int = 0) -> int:
        """Wait until so many workers print a step, beyond `after` printed steps; returns how many are printed."""
        self.wait_for(
            lambda: any(count == num_workers for count, *_ in self.losses()[after:]), f"{num_workers} workers"
        )
        return len(self.losses())


def test_a_node_is_lost_and_comes_back(cluster: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = Job(cluster.address, tmp_path, output, LONG)
    try:
        job.wait_for_workers(2)
        # Steps after the last checkpoint, which one worker will have to repeat.
        job.wait_for(lambda: len(job.losses()) >= CHECKPOINT_EVERY + 3, "steps after a checkpoint")
        assert {count for count, *_ in job.losses()} == {2}
        cluster.remove_node(cluster.second, allow_graceful=False)
        printed = job.wait_for_workers(1)
        lost_at = [count for count, *_ in job.losses()].index(1)
        cluster.second = cluster.add_node(**NODE)
        job.wait_for_workers(2, after=printed)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(DEADLINE_S) == 143, job.log
    finally:
        job.process.kill()

    steps_of_two, steps_of_one = job.losses()[:lost_at], job.losses()[lost_at:]
    resumed_at = steps_of_one[0][1]
    assert resumed_at % CHECKPOINT_EVERY == 1, "it went on from a checkpoint"
    assert resumed_at > CHECKPOINT_EVERY, "not from the beginning"
    before = {step: loss for _, step, loss in steps_of_two}
    repeated = [(before[step], loss) for count, step, loss in steps_of_one if count == 1 and step in before]
    assert repeated
    for two, one in repeated:
        # The same samples, crops and captions; additions come in another order. Losses are printed to four places.
        assert one == pytest.approx(two, rel=1e-3)

    (stopped,) = {info.step for info in checkpoint.committed(str(output))[-1:]}
    shorter = (LONG, f"train.max_steps={stopped + 3}", "resume=force")
    finishing = Job(cluster.address, tmp_path, output, *shorter)
    assert finishing.process.wait(DEADLINE_S) == 0, finishing.log
    assert f"resumed at step {stopped}" in finishing.log
    assert f"finished {stopped + 3} steps" in finishing.log
    assert {count for count, *_ in finishing.losses()} == {2}
    assert (output / "summary.json").exists()
