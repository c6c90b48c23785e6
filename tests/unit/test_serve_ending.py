"""A service begins on a port of its own and ends with its requests finished; counters of several gateways."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from dermray.errors import ConfigError
from dermray.service.engine.answers import Timing
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.fleet.ending import Draining, Ending
from dermray.service.fleet.ports import require_first, require_free
from dermray.service.http.metrics import Metrics, merged
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig, ServeArgumentError
from tests.serving import DummyBackend, free_port, listening


def listener(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """As Serve's proxies listen."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind((host, port))
    one.listen()
    return one


@pytest.mark.parametrize("taken", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("wanted", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_a_sharing_listener_has_is_refused(taken, wanted):
    with listener(taken) as one:
        port = one.getsockname()[1]
        # The system would give it to a second one too.
        listener(taken, port).close()
        with pytest.raises(ConfigError, match=rf"port {port} of {wanted} is taken.*port={port + 1}"):
            require_free(wanted, port)
    require_free(wanted, port)


def test_a_listener_that_takes_no_connection_is_seen_by_its_address():
    with listener() as full:
        address = full.getsockname()
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with pytest.raises(ConfigError, match="is taken"):
            require_free(*address)
        for one in waiting:
            one.close()


def test_connections_of_a_server_that_has_ended_do_not_count():
    one = listener()
    address = one.getsockname()
    client = socket.create_connection(address)
    accepted, _ = one.accept()
    # The side that closes first keeps the address for a minute.
    accepted.close()
    client.close()
    one.close()
    require_free(*address)


RAYLET = """
import subprocess, sys
proxy = "import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); "
proxy += "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print('up', flush=True); sys.stdin.read()"
subprocess.run(["ray::ProxyActor", "-c", proxy, sys.argv[1]], executable=sys.executable)
"""


def proxy_of(cluster: str, port: int) -> subprocess.Popen[str]:
    """A process called as a proxy is, below one called as its raylet is."""
    raylet = [sys.executable, "-c", RAYLET, str(port), f"--gcs-address={cluster}"]
    started = subprocess.Popen(raylet, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "up\n"
    return started


def test_of_two_clusters_on_one_port_the_later_one_is_refused(monkeypatch):
    port = free_port()
    first = proxy_of("127.0.0.1:1", port)
    time.sleep(0.05)
    second = proxy_of("127.0.0.1:2", port)
    try:
        for cluster, is_refused in (("127.0.0.1:1", False), ("127.0.0.1:2", True)):
            # A gateway's question, asked by a process of that cluster.
            question = f"from dermray.service.fleet.ports import require_first; require_first({port})"
            code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
            raylet = [sys.executable, "-c", code, question, f"--gcs-address={cluster}"]
            done = subprocess.run(raylet, capture_output=True, text=True, env=dict(os.environ), timeout=60)
            assert (done.returncode != 0) == is_refused, done.stderr
            assert (f"port {port} is taken by another service" in done.stderr) == is_refused
    finally:
        for one in (first, second):
            one.communicate("")
    require_first(port)


class Slow(DummyBackend):
    def __init__(self):
        super().__init__()
        self.began, self.go = threading.Event(), threading.Event()

    async def embed(self, images, texts):
        self.began.set()
        await asyncio.to_thread(self.go.wait, 20)
        return await super().embed(images, texts)


def test_an_end_finishes_what_has_begun_and_refuses_what_comes_later():
    backend, ending = Slow(), Ending()
    app = create_app(Catalogue.of(backend), LimitsConfig())
    app.add_middleware(Draining, ending=ending)
    answers = []
    with listening(app) as url:

        def ask():
            answers.append(httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=30).status_code)

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for one in asking:
            one.start()
        while ending.num_open < 8:
            time.sleep(0.01)
        assert asyncio.run(ending.finish(0.1)) == 8
        late = httpx.get(f"{url}/readyz")
        assert (late.status_code, late.headers["connection"], late.headers["retry-after"]) == (503, "close", "1")
        assert late.json()["error"]["code"] == "model_unavailable"
        backend.go.set()
        assert asyncio.run(ending.finish(20)) == 0
        for one in asking:
            one.join()
    assert answers == [200] * 8


def test_counters_of_several_gateways_are_one_text_and_keep_apart():
    gateways = {"a": Metrics(), "b": Metrics()}
    model = DummyBackend().model
    for number, metrics in enumerate(gateways.values(), 1):
        for _ in range(number):
            metrics.observe_request("/v1/classify", 200, 0.2)
            metrics.observe_items(model, 1, 0, Timing(batch_sizes=(2,)))
    text = merged({name: one.render([model]) for name, one in gateways.items()}).decode()
    for name, count in (("a", "1.0"), ("b", "2.0")):
        assert f'dermray_requests_total{{gateway="{name}",route="/v1/classify",status="200"}} {count}' in text
        assert f'dermray_request_duration_seconds_count{{gateway="{name}",route="/v1/classify"}} {count}' in text
    assert text.count("# TYPE dermray_requests_total counter") == 1
    assert text.count("# TYPE dermray_batch_size histogram") == 1


def test_a_port_is_for_serve_run_alone():
    from serve.app import build

    with pytest.raises(ServeArgumentError, match="http_options"):
        build({"model": "ViT-B-32", "port": "8001"})
