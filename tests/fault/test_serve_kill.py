"""Every process of a service dies under load, or hangs, in turn: requests are answered, if asked again; none is lost.

The next process is killed when the whole service is up again. `dermray.client` is what asks; while no proxy listens at
all, it waits.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from dermray.client import Client
from dermray.vectors.encoder import Encoder
from tests.serving import pids_of, replica_pids, running, save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]
NUM_REQUESTS, MAX_REQUESTS = 5000, 20_000
NUM_CLIENTS = 16
LOOK_EVERY_S = 0.5
VICTIMS = {
    "gateway": lambda: replica_pids("gateway"),
    "encoder": lambda: replica_pids("encoder"),
    "proxy": lambda: pids_of("ProxyActor"),
    "controller": lambda: pids_of("ServeController"),
}
# In this order, again and again. What is stopped hangs, until Serve kills it.
ATTACKS = {
    **{kind: (kind, signal.SIGKILL) for kind in VICTIMS},
    "hung encoder": ("encoder", signal.SIGSTOP),
    "hung gateway": ("gateway", signal.SIGSTOP),
}
NUM_PROCESSES = {"gateway": 2, "encoder": 2, "proxy": 1, "controller": 1}


class Counting(httpx.HTTPTransport):
    """Counts every answer, also those that the client asks again after; a broken connection is status 0."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=NUM_CLIENTS))
        self.statuses: Counter[int] = Counter()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = super().handle_request(request)
            answer.read()
        except httpx.TransportError:
            self.statuses[0] += 1
            raise
        self.statuses[answer.status_code] += 1
        return answer


class Killer(threading.Thread):
    """Attacks the oldest process of one kind after the other, whenever the service is whole, until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()
        self.killed: list[tuple[str, int]] = []
        self.whole_again_s: dict[str, list[int]] = {attack: [] for attack in ATTACKS}

    @property
    def has_killed_all(self) -> bool:
        """Every kind, and the service was whole again after the last one."""
        return all(self.whole_again_s.values())

    def run(self) -> None:
        killed_s = time.monotonic()
        while not self.stopped.wait(LOOK_EVERY_S):
            if not self._is_whole():
                continue
            if self.killed:
                self.whole_again_s[self.killed[-1][0]].append(round(time.monotonic() - killed_s))
            attack = list(ATTACKS)[len(self.killed) % len(ATTACKS)]
            kind, signum = ATTACKS[attack]
            pid, killed_s = VICTIMS[kind]()[0], time.monotonic()
            os.kill(pid, signum)
            self.killed.append((attack, pid))

    def _is_whole(self) -> bool:
        pids = {kind: find() for kind, find in VICTIMS.items()}
        # Serve's own count runs behind: what was just killed may still be in it.
        if {kind: len(found) for kind, found in pids.items()} != NUM_PROCESSES:
            return False
        if self.killed and any(self.killed[-1][1] in found for found in pids.values()):
            return False
        try:
            status = serve.status()
        except (RayError, RayServeException):
            return False
        deployments = status.applications["dermray-test"].deployments if "dermray-test" in status.applications else {}
        return set(map(str, status.proxies.values())) == {"ProxyStatus.HEALTHY"} and all(
            name in deployments and deployments[name].replica_states.get("RUNNING", 0) == 2
            for name in ("gateway", "encoder")
        )


class Asking:
    """Clients that ask for the vectors of texts until so many are answered and every process has died, or too many."""

    def __init__(self, client: Client, killer: Killer) -> None:
        self._client = client
        self._killer = killer
        self._numbers = itertools.count()
        self.asked: list[int] = []
        self.waits_s: list[float] = []
        self.vectors: list[np.ndarray] = []

    def run(self) -> None:
        for number in self._numbers:
            if number >= NUM_REQUESTS and (self._killer.has_killed_all or number >= MAX_REQUESTS):
                return
            began_s = time.monotonic()
            self.asked.append(number)
            vector = self._client.embed_texts([f"text number {number % 50}"])
            self.waits_s.append(time.monotonic() - began_s)
            self.vectors.append(np.concatenate([[[number % 50]], vector], axis=1))


def test_five_thousand_requests_survive_the_death_of_every_process(ray_cluster: None, tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "tiny"))
    expected = Encoder.load(folder, device="cpu").encode_texts([f"text number {number}" for number in range(50)])
    transport, killer = Counting(), Killer()
    with (
        running(model=folder, device="cpu", num_replicas=2, num_cpus=0.5, batch_wait_ms=2) as url,
        Client(url, transport=transport) as client,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        asking = Asking(client, killer)
        killer.start()
        try:
            list(pool.map(lambda _: asking.run(), range(NUM_CLIENTS)))
        finally:
            killer.stopped.set()
            killer.join()
    num_killed, num_asked = Counter(attack for attack, _ in killer.killed), len(asking.asked)
    print(
        f"\n{num_asked} requests, killed {dict(num_killed)}: lost {num_asked - len(asking.vectors)}, asked again "
        f"{transport.statuses.total() - num_asked} times {dict(transport.statuses)}, longest wait "
        f"{max(asking.waits_s):.1f} s; whole again after, in s: {killer.whole_again_s}"
    )
    assert set(num_killed) == set(ATTACKS), num_killed
    assert len(asking.vectors) == transport.statuses[200] == num_asked >= NUM_REQUESTS
    rows = np.concatenate(asking.vectors)
    assert (rows[:, 1:] * expected[rows[:, 0].astype(int)]).sum(axis=1).min() >= 0.9999
    assert set(transport.statuses) <= {0, 200, 429, 500, 503}, transport.statuses
