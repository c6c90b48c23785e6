"""Encoder replicas killed under load: every request is answered 200 or retriably, and the client loses nothing.

A replica is killed whenever two are running, so as often as Serve can replace them. With none at all for longer than
the deadline, requests end in 504, as documented.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from ray import serve

from dermray.client import Client
from dermray.encoder import Encoder
from tests.serving import encoder_pids, kill_encoder, running, save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]
NUM_REQUESTS = 5000
NUM_CLIENTS = 16
LOOK_EVERY_S = 2.0


class Counting(httpx.HTTPTransport):
    """Counts every answer, also those that the client asks again after; a broken connection is status 0."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=NUM_CLIENTS))
        self.statuses: Counter[int] = Counter()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = super().handle_request(request)
        except httpx.TransportError:
            self.statuses[0] += 1
            raise
        self.statuses[answer.status_code] += 1
        return answer


class Killer(threading.Thread):
    """Kills the oldest replica whenever another one is running too, until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()
        self.victims: list[int] = []

    def run(self) -> None:
        while not self.stopped.wait(LOOK_EVERY_S):
            encoder = serve.status().applications["dermray-test"].deployments["encoder"]
            # Serve's own count runs behind: a replica that was just killed may still be in it.
            if encoder.replica_states.get("RUNNING", 0) >= 2 and len(encoder_pids()) >= 2:
                self.victims.append(kill_encoder())


def test_five_thousand_requests_survive_replicas_that_are_killed(ray_cluster: None, tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "tiny"))
    texts = [f"text number {number % 50}" for number in range(NUM_REQUESTS)]
    expected = Encoder.load(folder, device="cpu").encode_texts(texts[:50])
    transport, killer = Counting(), Killer()
    with (
        running(model=folder, device="cpu", num_replicas=2, num_cpus=0.5, batch_wait_ms=2) as url,
        Client(url, patience_s=120, transport=transport) as client,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        killer.start()
        try:
            vectors = np.concatenate(list(pool.map(lambda text: client.embed_texts([text]), texts)))
        finally:
            killer.stopped.set()
            killer.join()
    assert len(killer.victims) == len(set(killer.victims)) >= 3
    assert vectors.shape == (NUM_REQUESTS, 128)
    cosines = (vectors * expected[np.arange(NUM_REQUESTS) % 50]).sum(axis=1)
    assert cosines.min() >= 0.9999
    assert transport.statuses[200] == NUM_REQUESTS
    assert set(transport.statuses) <= {200, 429, 503}, transport.statuses
    print(f"{len(killer.victims)} kills, answers {dict(transport.statuses)}")
