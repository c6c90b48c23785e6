"""Heads of requests that never end or grow without end, and Ray's own routes, before the application sees anything."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import time

import httpx
import pytest
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from uvicorn.protocols.http import auto

from dermray.service.fleet import proxy
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import DummyBackend, free_port, listening

NUM_CONNECTIONS = 300


def unguarded(monkeypatch):
    """What `guard` sets is put back after the test."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setattr(http_util, "set_socket_reuse_port", http_util.set_socket_reuse_port)


@pytest.fixture
def url(monkeypatch):
    """The application behind the proxy's middlewares, on the protocol that Ray's servers get."""
    unguarded(monkeypatch)
    monkeypatch.setattr(proxy, "HEAD_TIMEOUT_S", 1.0)
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig())
    for middleware in proxy.guard():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    with listening(app) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setblocking(False)
    return connection


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_trickled_heads_are_given_up_and_others_are_served(url):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(connect(url))) for _ in range(NUM_CONNECTIONS)]
        closed, deadline_s = set(), time.monotonic() + 60
        head = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"a" * 10_000
        sent = 0
        while len(closed) < NUM_CONNECTIONS:
            assert time.monotonic() < deadline_s, f"{NUM_CONNECTIONS - len(closed)} connections are still open"
            for number, connection in enumerate(connections):
                # Every third one says nothing at all.
                if number not in closed and number % 3:
                    with contextlib.suppress(ConnectionError, BlockingIOError):
                        connection.send(head[sent : sent + 1])
                if number not in closed and is_closed(connection):
                    closed.add(number)
            sent += 1
            assert httpx.get(f"{url}/healthz", timeout=20).status_code == 200
            time.sleep(0.05)


@pytest.mark.parametrize("beginning", [b"GET /healthz HTTP/1.1\r\n", b"GET /"])
def test_a_head_without_end_is_given_up_early(url, beginning):
    connection = connect(url)
    connection.setblocking(True)
    unit = b"X-Long: " + b"a" * 8000 + b"\r\n" if beginning.endswith(b"\n") else b"a" * 8192
    with contextlib.closing(connection), pytest.raises(ConnectionError):
        connection.sendall(beginning + 2000 * unit)


def test_a_slow_body_and_a_kept_connection_are_no_heads(url):
    connection = connect(url)
    connection.setblocking(True)
    body = b'{"input": "acne"}'
    with contextlib.closing(connection):
        for _ in range(2):
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
            # Longer than a head may take.
            time.sleep(1.3)
            connection.sendall(body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert answer.read().startswith(b'{"object"')


def test_the_list_of_applications_is_not_told(url):
    assert httpx.get(f"{url}/-/routes").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{url}/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Ray's proxy decodes these as UTF-8, and answers 500 where they are none.
        *((name, b"\xff") for name in ("X-Request-ID", "x-session-id", "serve_multiplexed_model_id", "traceparent")),
        # An escape code of a terminal, in eight bits; and lines of a log made long.
        ("X-Request-ID", b"\x9b2J"),
        ("X-Request-ID", b"1 -- POST /v1/admin/models/dermray/rollback 200"),
        ("x-request-id", b"a" * 60_000),
        # A client asks the proxy to wait for ever, or to go on without it; to choose a replica.
        ("X-Request-Timeout-Seconds", b"0"),
        ("X-Request-Timeout-Seconds", b"\xff"),
        ("X_Request-Disconnect-Disabled", b"?1"),
        ("serve-multiplexed-model-id", b"other"),
        ("X-Serve-Router-Anything", b"other"),
    ],
)
def test_headers_that_would_steer_the_proxy_do_not_reach_it(monkeypatch, name, value):
    unguarded(monkeypatch)
    seen = []

    async def ray(scope, receive, send):
        seen.extend(scope["headers"])

    app = ray
    for middleware in proxy.guard():
        app = middleware.cls(app)
    harmless = [(b"x-request-id", b"7f3c-01.a"), (b"accept", b"a/b")]
    # As uvicorn hands them on.
    sent = [(name.lower().encode(), value), *harmless]
    asyncio.run(app({"type": "http", "path": "/", "headers": sent}, None, None))
    assert seen == harmless


def bind(port):
    """Listen as Ray's proxies do, and end."""

    async def main():
        app = create_app(Catalogue.of(DummyBackend()), LimitsConfig())
        options = http_util.configure_http_options_with_defaults(HTTPOptions(host="127.0.0.1", port=port))
        proxy.guard()
        loop = asyncio.get_running_loop()
        serving, server = await http_util.start_asgi_http_server(
            app, options, event_loop=loop, enable_so_reuseport=True
        )
        server.should_exit = True
        await serving

    asyncio.run(main())


def test_a_port_that_somebody_shares_is_not_shared(monkeypatch):
    unguarded(monkeypatch)
    port = free_port()
    with socket.socket() as other:
        # As Ray's proxies listen.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(RuntimeError, match=f"Failed to bind to address '127.0.0.1:{port}'"):
            bind(port)
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = other.accept()
        # The connections of one that has ended, which the system keeps for a minute, are in nobody's way.
        accepted.close()
        client.close()
    bind(port)
