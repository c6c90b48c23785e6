"""Attacks on the HTTP service for `benchmarks/robustness.py`: the application over a dummy model, without Ray.

The server, and who asks its `/healthz` all the while, are processes of their own, so that the figures are the server's.
A request is answered right if it is understood or refused with 4xx; a request that is none may be hung up on. 5xx, a
traceback and a dropped server are other exceptions; one that administers or reads without the right is told apart.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http import auto

from benchmarks.robustness import CHANGED, MEMORY, OTHER, READ, REFUSED, Outcomes
from dermray.service.fleet import proxy
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access, Audience, _digest
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import DummyBackend, data_uri, free_port, photograph
from tests.unit.test_serve_access import Changes, all_routes, spellings, status_of
from tests.unit.test_serve_hostile import (
    ADMIN_TOKEN,
    FIELDS_ALONE,
    FORMS,
    JSON_BODIES,
    TOKEN,
    answers_to,
    hostile_requests,
    raw,
    whole_app,
)

# Figures beside the outcomes, in milliseconds.
WORST_ANSWER, WORST_SILENCE = "worst answer, ms", "worst /healthz meanwhile, ms"
NUM_CONNECTIONS = 600
NUM_MIXED = 2001
PREFIXES = ("", "/derm", "/v1/admin", "/assets", "/healthz")


def guarded_app(changes: Changes, *, timeout_s: float = 2.0) -> FastAPI:
    """The application, open to two tokens; `changes` counts what administrators do."""
    access = Access((_digest(TOKEN),), (_digest(ADMIN_TOKEN),))
    limits = LimitsConfig(request_timeout_s=timeout_s)
    return create_app(Catalogue.of(DummyBackend()), limits, access=access, rollouts={"dummy": changes})


@dataclass(frozen=True, slots=True)
class Serving:
    """A server in a process of its own."""

    url: str
    pid: int
    num_changes: Any

    def peak_kib(self) -> int:
        """The most memory that it has had."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


class _SharedChanges(Changes):
    """`Changes` whose count another process reads."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    @property
    def count(self) -> int:
        return int(self._shared.value)

    @count.setter
    def count(self, count: int) -> None:
        self._shared.value = count


def closed(num_changes: Any) -> FastAPI:
    """The application open to two tokens, in a hurry."""
    return guarded_app(_SharedChanges(num_changes), timeout_s=1)


def opened(num_changes: Any) -> FastAPI:
    """The application open to everybody, with a tree and an index."""
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        return whole_app(Path(folder))


def behind_guard(num_changes: Any) -> FastAPI:
    """The same on the protocol that `dermray.service.fleet.proxy:guard` gives to Ray's proxies."""
    _allow_connections()
    auto.AutoHTTPProtocol = proxy.BoundedHeads
    return opened(num_changes)


@contextlib.contextmanager
def serving(make: Callable[[Any], FastAPI], outcomes: Outcomes) -> Iterator[Serving]:
    """A server of what `make` returns; at the end its growth and what administrators did are among the outcomes."""
    context = multiprocessing.get_context("spawn")
    num_changes, port = context.Value("i", 0), free_port()
    process = context.Process(target=_serve, args=(make, num_changes, port), daemon=True)
    process.start()
    server = Serving(f"http://127.0.0.1:{port}", process.pid or 0, num_changes)
    try:
        _wait_for(server.url)
        before_kib = server.peak_kib()
        yield server
        # Whatever it was sent, it answers the next one.
        outcomes[OTHER] += httpx.get(f"{server.url}/healthz", timeout=20).status_code != 200
        outcomes[MEMORY] = server.peak_kib() - before_kib
        outcomes[CHANGED] += num_changes.value
    finally:
        process.terminate()
        process.join()


def _serve(make: Callable[[Any], FastAPI], num_changes: Any, port: int) -> None:
    uvicorn.run(make(num_changes), port=port, log_level="critical")


def _wait_for(url: str) -> None:
    deadline_s = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz", timeout=20).status_code == 200:
                return
        if time.monotonic() > deadline_s:
            raise RuntimeError("the server did not come up")
        time.sleep(0.05)


@contextlib.contextmanager
def watching(url: str) -> Iterator[Any]:
    """Ask `/healthz` all the while from another process; yields the longest wait so far, in seconds, as `.value`."""
    context = multiprocessing.get_context("spawn")
    longest_s = context.Value("d", -1.0)
    process = context.Process(target=_watch, args=(url, longest_s), daemon=True)
    process.start()
    try:
        while longest_s.value < 0:
            time.sleep(0.01)
        yield longest_s
        if not process.is_alive():
            raise RuntimeError("/healthz gave no answer")
    finally:
        process.terminate()
        process.join()


def _watch(url: str, longest_s: Any) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        while True:
            started_s = time.perf_counter()
            assert client.get("/healthz").status_code == 200
            longest_s.value = max(longest_s.value, time.perf_counter() - started_s)
            time.sleep(0.005)


def count(said: bytes, outcomes: Outcomes) -> None:
    """What became of a request, by all that the server said."""
    status = said[9:12].decode("latin-1")
    if b"Traceback" in said or b"root:" in said or said.count(b"HTTP/1.1 200") > 1:
        outcomes[CHANGED] += 1
    elif status.startswith("2"):
        outcomes[READ] += 1
    elif status.startswith(("4", "3")) or not status or status == "504":
        outcomes[REFUSED] += 1
    else:
        outcomes[OTHER] += 1
        outcomes[f"{OTHER}: status {status}"] += 1


def attack_requests(seconds: float, folder: Path) -> Outcomes:
    """Hostile requests over real connections: 18 smuggling forms, odd paths, methods, headers, fields and forms."""
    outcomes: Outcomes = Counter()
    requests = hostile_requests()
    with serving(closed, outcomes) as server:
        end = time.monotonic() + seconds
        for number, request in enumerate(cycle(requests)):
            if number >= len(requests) and time.monotonic() > end:
                break
            count(answers_to(server.url, request), outcomes)
    return outcomes


def attack_spellings(seconds: float, folder: Path) -> Outcomes:
    """Every route's path in other spellings, under every prefix, without and with a user's token."""
    outcomes: Outcomes = Counter()
    changes = Changes()
    app = guarded_app(changes)
    end = time.monotonic() + seconds
    for prefix, (method, template, audience), token in product(PREFIXES, all_routes(app), (None, TOKEN)):
        for path in spellings(template.replace("{name}", "dummy")):
            if time.monotonic() > end:
                break
            status = status_of(app, method, path, token, prefix)
            may = audience is Audience.EVERYBODY or (audience is Audience.USERS and token is not None)
            allowed = READ if may else CHANGED
            outcomes[OTHER if status >= 500 else allowed if 200 <= status < 300 else REFUSED] += 1
    outcomes[CHANGED] += changes.count
    return outcomes


def attack_bodies(seconds: float, folder: Path) -> Outcomes:
    """Bodies of up to 20 MB made to take long, while somebody asks `/healthz` all the time."""
    paths = ("/v1/embeddings", "/v1/classify")
    kinds = [(make, path, "application/json") for path in paths for make in JSON_BODIES.values()]
    kinds += [(make, path, "application/json") for path, make in FIELDS_ALONE.values()]
    kinds += [(make, "/v1/classify", "multipart/form-data; boundary=b") for make in FORMS.values()]
    outcomes: Outcomes = Counter()
    with (
        serving(opened, outcomes) as server,
        watching(server.url) as longest_s,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        end = time.monotonic() + seconds
        for number, (make, path, media_type) in enumerate(cycle(kinds)):
            if number >= len(kinds) and time.monotonic() > end:
                break
            body = make()
            longest_s.value, started_s = 0.0, time.perf_counter()
            answer = client.post(path, content=body, headers={"Content-Type": media_type})
            took_ms = round(1000 * (time.perf_counter() - started_s))
            outcomes[WORST_ANSWER] = max(outcomes[WORST_ANSWER], took_ms)
            outcomes[WORST_SILENCE] = max(outcomes[WORST_SILENCE], round(1000 * longest_s.value))
            count(f"HTTP/1.1 {answer.status_code}".encode(), outcomes)
    return outcomes


def attack_connections(seconds: float, folder: Path) -> Outcomes:
    """600 connections whose heads trickle in a byte at a time, behind the guard of Ray's proxies: each is given up."""
    _allow_connections()
    outcomes: Outcomes = Counter()
    with (
        serving(behind_guard, outcomes) as server,
        watching(server.url) as longest_s,
        contextlib.ExitStack() as stack,
    ):
        end = time.monotonic() + max(seconds, 2 * proxy.HEAD_TIMEOUT_S)
        waiting = [stack.enter_context(contextlib.closing(_connected(server.url))) for _ in range(NUM_CONNECTIONS)]
        while waiting and time.monotonic() < end:
            time.sleep(0.2)
            waiting = [connection for connection in waiting if not _is_closed(connection)]
        outcomes[WORST_SILENCE] = round(1000 * longest_s.value)
    outcomes[REFUSED] += NUM_CONNECTIONS - len(waiting)
    outcomes[OTHER] += len(waiting)
    return outcomes


def _allow_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))


def _connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setblocking(False)
    connection.send(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
    return connection


def _is_closed(connection: socket.socket) -> bool:
    """Send one more byte, and look whether somebody still listens."""
    try:
        connection.send(b"a")
        return connection.recv(4096) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def attack_mixed(seconds: float, folder: Path) -> Outcomes:
    """Questions that make sense among hostile ones, eight at a time."""
    outcomes: Outcomes = Counter()
    bearer = [f"Authorization: Bearer {TOKEN}", "Content-Type: application/json"]
    good = [
        raw("POST", "/v1/embeddings", bearer, b'{"input": ["a patch", "a plaque"]}'),
        raw("POST", "/v1/classify", bearer, b'{"image": "%s", "labels": ["a", "b"]}' % data_uri(photograph()).encode()),
        raw("GET", "/healthz", [], b""),
    ]
    hostile = hostile_requests()
    with serving(closed, outcomes) as server, ThreadPoolExecutor(8) as pool:
        end = time.monotonic() + seconds

        def ask(number: int) -> bytes | None:
            # Two in three are good.
            request = hostile[number // 3 % len(hostile)] if number % 3 == 0 else good[number // 2 % len(good)]
            return None if time.monotonic() > end else answers_to(server.url, request)

        for said in pool.map(ask, range(NUM_MIXED)):
            if said is not None:
                count(said, outcomes)
    return outcomes


ATTACKS: dict[str, Callable[[float, Path], Outcomes]] = {
    "requests": attack_requests,
    "spellings": attack_spellings,
    "bodies": attack_bodies,
    "connections": attack_connections,
    "mixed": attack_mixed,
}
