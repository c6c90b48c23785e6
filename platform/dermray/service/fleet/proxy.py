"""What Ray's own HTTP proxy is told beyond its settings, in its process.

The proxy reads a request's head before the application sees anything, for as long and as much of it as is sent, does
what some of its headers say, and answers `/-/routes` by itself; and it shares its port with whoever listens there too.
Ray's variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names a callback for its proxies; `command` and
`serve/config.yaml` set it to `dermray.service.fleet.proxy:guard` in the environment of the controller, which the
proxies inherit.
"""

from __future__ import annotations

import asyncio
import re
import socket

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dermray import ray_private, redaction
from dermray.service.refusals import Refusal, respond

HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10
ROUTES_PATH = "/-/routes"
# Headers by which a client would steer Ray: how long its proxy waits, whether it ends with its client, which replica it
# goes to. Names as Ray reads some of them, with either of hyphen and underscore.
_STEERING = re.compile(
    rb"x-request-(timeout-seconds|disconnect-disabled)|x-session-id|serve-multiplexed-model-id|x-serve-router-.*",
    re.DOTALL,
)
# Those that end up in the lines of its log, and what they may be.
_LOGGED = frozenset({b"x-request-id", b"traceparent", b"tracestate"})
_PLAIN = re.compile(rb"[A-Za-z0-9._:=,/-]{1,128}")


class BoundedHeads(HttpToolsProtocol):
    """Ends a connection whose request's head is not whole within `HEAD_TIMEOUT_S`, or exceeds `MAX_HEAD_BYTES`."""

    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Hand bytes on, unless they make a head too long."""
        waiting = self._timer is not None
        super().data_received(data)
        self._num_bytes += len(data) if waiting else 0
        if self._timer is not None and self._num_bytes > MAX_HEAD_BYTES:
            self._give_up()

    def on_message_begin(self) -> None:
        """Start to wait for the head of a later request on the same connection."""
        super().on_message_begin()
        if self._timer is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        """The head is here; bodies have limits of their own."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._num_bytes = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop_waiting()
        self.transport.close()


class WithoutRoutes:
    """ASGI middleware that keeps the proxy's list of applications to itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) == ROUTES_PATH:
            await respond(Refusal(404, "Not Found", code="not_found"))(scope, receive, send)
            return
        await self._app(scope, receive, send)


class PlainHeaders:
    """ASGI middleware that keeps from the proxy what it would do, log or fail to decode for any client's asking."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if "headers" in scope:
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _may_pass(name, value)]}
        await self._app(scope, receive, send)


def _may_pass(name: bytes, value: bytes) -> bool:
    if _STEERING.fullmatch(name.lower().replace(b"_", b"-")):
        return False
    return name.lower() not in _LOGGED or _PLAIN.fullmatch(value) is not None


def keep_port(sock: socket.socket) -> bool:
    """In the place of Ray's `set_socket_reuse_port`: connections of a server that has ended are in nobody's way, and
    somebody who listens is, whether he would share the port or not.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return True


def guard() -> list[Middleware]:
    """Called by each of Ray's HTTP servers before it listens; returns its middlewares."""
    redaction.install()
    # Uvicorn has no limits for heads, and looks its protocol up here when it starts.
    auto.AutoHTTPProtocol = BoundedHeads
    ray_private.set_port_reuse(keep_port)
    return [Middleware(WithoutRoutes), Middleware(PlainHeaders)]
