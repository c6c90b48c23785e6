"""`serve run` as a user types it: a taken port is refused, and a stop finishes what was accepted, without a noise."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import data_uri, free_port, photograph, save_tiny_model

pytestmark = [pytest.mark.own_cluster, pytest.mark.long, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
NUM_CLIENTS = 16
NOISE = ("Error", "failed", "Traceback", "SIGTERM received", "infinite retries")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.serve.scripts", "run", "serve.app:build", *arguments]


@contextlib.contextmanager
def serve_run(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The command in a cluster of its own; yields it when it is ready, and the file with its output."""
    output = tmp_path / "output.txt"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with output.open("w") as file:
        running = subprocess.Popen(
            command(*arguments, "num_cpus=0.5"),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield running, output
    finally:
        running.kill()
        running.wait()


def wait_until_ready(url: str, running: subprocess.Popen[str], output: Path) -> None:
    while True:
        assert running.poll() is None, output.read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.2)


def ask_until_refused(url: str, answers: list[object], stopped_s: list[float], number: int) -> None:
    """One question after the other, a new class list each time, until there is nobody to ask any more."""
    body = {"image": data_uri(photograph()), "labels": [f"condition {number} {label}" for label in range(40)]}
    for turn in range(1000):
        began_s = time.monotonic()
        try:
            answer = httpx.post(f"{url}/v1/classify", json=body | {"labels": [*body["labels"], str(turn)]}, timeout=60)
        except httpx.ConnectError:
            return
        except httpx.TransportError as error:
            # One that began when the gateways had ended may meet the end of the proxy; one that began before may not.
            answers.append("late" if began_s > stopped_s[0] else repr(error))
            return
        answers.append(answer.status_code)
        if answer.status_code == 503:
            assert answer.json()["error"]["message"] == "the service is ending"
            return


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_was_accepted_and_a_second_service_is_refused(
    tmp_path: Path, stop: signal.Signals
) -> None:
    model, port = str(save_tiny_model(tmp_path / "tiny")), free_port()
    url, answers, stopped_s = f"http://127.0.0.1:{port}", [], [float("inf")]
    arguments = (f"model={model}", f"port={port}", "device=cpu", "limits.pending_classifiers=64")
    with serve_run(tmp_path, *arguments) as (running, output):
        wait_until_ready(url, running, output)
        second = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"port {port} of 127.0.0.1 is taken by another program" in second.stderr.strip().splitlines()[-1]
        assert "Started a local Ray instance" not in second.stderr
        # Ray's proxy has its guard without a word of the user's.
        assert httpx.get(f"{url}/-/routes").json()["error"]["code"] == "not_found"
        # The proxy alone would answer 500.
        assert httpx.get(f"{url}/healthz", headers={"X-Request-ID": b"\xff"}).status_code == 200
        asking = [
            threading.Thread(target=ask_until_refused, args=(url, answers, stopped_s, number))
            for number in range(NUM_CLIENTS)
        ]
        for one in asking:
            one.start()
        while len(answers) < NUM_CLIENTS:
            time.sleep(0.01)
        stopped_s[0] = time.monotonic()
        running.send_signal(stop)
        for one in asking:
            one.join(120)
        assert running.wait(60) == 0
    # Every request got a whole answer of ours; those that came too late are told so, and none is cut off.
    counted = Counter(answers)
    assert set(counted) <= {200, 503, "late"}, counted
    assert counted[200] >= NUM_CLIENTS
    lines = [line for line in output.read_text().splitlines() if any(word in line for word in NOISE)]
    assert lines == []
    assert not any("POST /v1/classify" in line for line in output.read_text().splitlines())
