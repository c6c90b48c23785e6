"""The documented lane of `ray job submit`: a `ray start --head` with tokens, the repository as working_dir."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from dermray.corpus.manifest import Manifest
from tests import raw_corpus
from tests.conftest import ROOT

pytestmark = [pytest.mark.own_cluster, pytest.mark.timeout(240)]

BIN = Path(sys.executable).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
START_TIMEOUT_S = 90
JOB_TIMEOUT_S = 100
STOP_TIMEOUT_S = 30

PROBE = """
import ray

def where():
    import platform
    import dermray
    from dermray.corpus import schema
    assert platform.system() == "Linux" and "platform.py" in platform.__file__, platform
    return dermray.__file__

ray.init()
print("driver has", where())
print("worker has", ray.get(ray.remote(where).remote()))
"""


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    process: subprocess.Popen[bytes]
    dashboard: str
    environment: dict[str, str]
    folder: Path

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """Run the command that the docs show and wait for its end."""
        return subprocess.run(
            [
                str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir", ".",
                "--runtime-env", "infra/ray_job_env.yaml", "--metadata-json", json.dumps({"git_commit": COMMIT}),
                "--", *entrypoint,
            ],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=JOB_TIMEOUT_S,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node of our own on free ports; ended by its own process, after which nothing of it may be left."""
    # Ray puts sockets below it, whose paths have to be short.
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        started = start(folder, environment(folder, token))
        try:
            wait_for_agent(started)
            yield started
        finally:
            left = stop(started.process)
        assert not left, f"still running: {left}"


def environment(folder: Path, token: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    return {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # Nothing here needs a node to be drained before it ends.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }


def start(folder: Path, environment: dict[str, str]) -> Head:
    port, dashboard_port, client_port = free_ports(3)
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
                f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}", "--num-cpus=4",
                "--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={folder / 'ray'}",
            ],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Head(process, f"http://127.0.0.1:{dashboard_port}", environment, folder)


def wait_for_agent(head: Head) -> None:
    """Wait until a job is taken: the dashboard answers some seconds before there is an agent to run one."""
    deadline = time.monotonic() + START_TIMEOUT_S
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--no-wait", "--", "true"]
    while time.monotonic() < deadline:
        assert head.process.poll() is None, (head.folder / "head.log").read_text()
        taken = subprocess.run(
            command, env=head.environment, cwd=head.folder, capture_output=True, check=False, timeout=START_TIMEOUT_S
        )
        if taken.returncode == 0:
            return
        time.sleep(0.5)
    pytest.fail(f"no job was taken in {START_TIMEOUT_S} s: {(head.folder / 'head.log').read_text()}")


def stop(process: subprocess.Popen[bytes]) -> list[str]:
    """Terminate a head by its own process; returns what outlived it (and ends that too)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(process.pid)
        family = [head, *head.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        left = []
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(" ".join(one.cmdline())[:200])
                one.kill()
        return left
    return []


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def test_platform_and_dermray_in_driver_and_worker(head: Head) -> None:
    done = head.submit("python", "-c", PROBE)
    assert done.returncode == 0, done.stdout + done.stderr
    places = dict(re.findall(r"(driver|worker) has (\S+)", done.stdout))
    assert places.keys() == {"driver", "worker"}
    for place in places.values():
        # The shipped copy, not the checkout that is installed here.
        assert "working_dir_files" in place
        assert place.endswith("/platform/dermray/__init__.py")


@pytest.mark.long
def test_prepare_streams_its_lines_and_ends_with_zero(head: Head, tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=12)
    output = tmp_path / "corpus"
    done = head.submit(
        "python", "jobs/prepare.py", "source=csv", f"input={tmp_path / 'raw'}", f"output={output}", "rows_per_shard=8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepared 12 samples" in done.stdout
    assert "succeeded" in done.stdout
    assert Manifest.load(str(output)).num_samples == 12
    # MLFLOW_TRACKING_URI of the cluster reaches the job.
    client = MlflowClient(f"sqlite:///{head.folder}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.tags["mlflow.source.git.commit"] == COMMIT
    assert run.data.tags["dermray.code_package"].startswith("_ray_pkg_")


def test_a_failing_job_says_so_with_its_exit_code(head: Head, tmp_path: Path) -> None:
    done = head.submit(
        "python", "jobs/prepare.py", "source=csv", f"input={tmp_path}", f"output={tmp_path}/out", "lmit=3"
    )
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert "unknown key 'lmit', did you mean 'limit'" in printed
    assert "exit code 2" in printed


def test_a_job_without_the_token_is_refused(head: Head, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    stranger = Head(head.process, head.dashboard, {**head.environment, "RAY_AUTH_TOKEN_PATH": str(other)}, head.folder)
    done = stranger.submit("python", "-c", "print('inside')")
    assert done.returncode != 0
    assert "inside" not in done.stdout
