"""What is said when a driver and its Ray node end, with plain processes in both places."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DRIVER = """
import os, signal, subprocess, sys, time
from dermray import node_watch
node = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(f"{sys.argv[1]}/worker.out", "wb") as sink:
    worker = subprocess.Popen(["sleep", "600"], stdout=sink, stderr=subprocess.DEVNULL)
    named = "open('/proc/self/comm', 'w').write('ray::Agent'); import time; print(flush=True); time.sleep(600)"
    agent = subprocess.Popen(
        [sys.executable, "-c", named], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[sink.fileno()]
    )
    joined = subprocess.Popen(
        ["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[sink.fileno()]
    )
agent.stdout.readline()
beside = node_watch.begin({node.pid: f"raylet, process {node.pid}"}, session=sys.argv[1])
# Its three streams, the node and the driver: from then on it misses nothing.
while len(os.listdir(f"/proc/{beside.pid}/fd")) < 5:
    time.sleep(0.01)
print(node.pid, beside.pid, worker.pid, agent.pid, joined.pid, flush=True)
exec(sys.stdin.readline())
"""
DEADLINE_S = 20
ENDED, KILLED = "os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"
BY_RAY, BY_ITSELF = f"node.wait(); {ENDED}", f"node.wait(); beside.kill(); {ENDED}"


@pytest.mark.parametrize(
    ("node_dies", "ending", "is_slow", "is_said"),
    [
        (True, BY_RAY, False, True),
        (True, BY_RAY, True, True),
        (True, BY_ITSELF, False, False),
        (False, ENDED, False, False),
        (False, KILLED, False, False),
        # Ray's processes die with a driver that is killed.
        (True, f"node.wait(); {KILLED}", True, False),
    ],
)
def test_a_driver_that_ray_ended_is_explained(
    tmp_path: Path, node_dies: bool, ending: str, is_slow: bool, is_said: bool
) -> None:
    """And what it leaves running is ended, unless it ended by itself, which sees to that; but no driver that joined it.

    `is_slow`: the process beside wakes only when all is over, so that it has to tell which came first.
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    assert driver.stderr is not None
    node, beside, *others = (int(pid) for pid in driver.stdout.readline().split())
    *started, joined = map(psutil.Process, others)
    try:
        if is_slow:
            os.kill(beside, signal.SIGSTOP)
            while psutil.Process(beside).status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
        if node_dies:
            os.kill(node, signal.SIGKILL)
        driver.stdin.write(ending + "\n")
        driver.stdin.flush()
        os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)
        if is_slow:
            os.kill(beside, signal.SIGCONT)
        # At its end, when nobody holds the stream any more.
        said = driver.stderr.read()
    finally:
        driver.wait()
        if not node_dies:
            os.kill(node, signal.SIGKILL)
        for process in started:
            if ending == BY_ITSELF:
                process.kill()
            process.wait(DEADLINE_S)
        assert joined.status() != psutil.STATUS_ZOMBIE
        joined.kill()
    lost = f"error: the Ray node of this machine is lost: raylet, process {node}, was killed or died"
    assert said.startswith(lost) if is_said else said == ""
