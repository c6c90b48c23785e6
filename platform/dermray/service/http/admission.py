"""What every request passes before and after its route: origin, size and time limits, headers, metrics, last resort.

A client that goes away takes its request with it: the route is cancelled, and what waits for a batch is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermray.predict import ServedModel
from dermray.printable import printable
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access
from dermray.service.http.metrics import Metrics
from dermray.service.refusals import Refusal, respond, too_large
from dermray.service.settings import LimitsConfig

logger = logging.getLogger("dermray.serve")

# The page and the reference load nothing from elsewhere; previews of a chosen file are blob: URLs.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
# Of a path, and of each end of a long traceback.
LOGGED_CHARS = 500
TRACE_CHARS = 8000
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def model_headers(model: ServedModel) -> dict[str, str]:
    """The identity of the model as response headers; a name outside ASCII is percent-encoded."""
    headers = {
        "X-DermRay-Model": quote(model.name, safe=" /@:._-+"),
        "X-DermRay-Model-Version": model.version,
        "X-DermRay-Model-Alias": model.alias and quote(model.alias, safe="._-"),
        "X-DermRay-Model-Digest": model.digest,
        "X-DermRay-Preprocessing-Digest": model.preprocessing_digest,
    }
    return {name: value for name, value in headers.items() if value is not None}


@dataclass(slots=True)
class _Held:
    """Bytes of the bodies of all requests that are being answered."""

    limit_bytes: int
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self.limit_bytes:
            message = "too much is being answered already"
            raise Refusal(429, message, code="queue_full", retry=True)
        self.num_bytes += num_bytes


@dataclass(slots=True)
class _Exchange:
    """One request on its way: how much of it has come, what has been answered, whether the client is still there."""

    limit_bytes: int
    held: _Held
    receive: Receive
    send: Send
    catalogue: Catalogue
    received_bytes: int = 0
    status: int | None = None
    client_gone: bool = False
    started_s: float = field(default_factory=time.perf_counter)
    _handler: asyncio.Task[None] | None = None
    _watcher: asyncio.Task[Message] | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application as a task that a vanished client cancels."""
        self._handler = asyncio.ensure_future(app(scope, self.receive_counted, self.send_with_headers))
        try:
            await self._handler
        except asyncio.CancelledError:
            if not self.client_gone:
                self._handler.cancel()
                raise
        finally:
            self.held.num_bytes -= self.received_bytes
            if self._watcher is not None:
                self._watcher.cancel()

    async def receive_counted(self) -> Message:
        if self._watcher is not None:
            return await asyncio.shield(self._watcher)
        message = await self.receive()
        if message["type"] == "http.request":
            num_bytes = len(message.get("body", b""))
            if self.received_bytes + num_bytes > self.limit_bytes:
                raise body_too_large(self.limit_bytes)
            self.held.add(num_bytes)
            self.received_bytes += num_bytes
            if not message.get("more_body", False):
                self._watcher = asyncio.ensure_future(self.receive())
                self._watcher.add_done_callback(self._cancel_if_gone)
        return message

    def _cancel_if_gone(self, watcher: asyncio.Task[Message]) -> None:
        if watcher.cancelled() or watcher.exception() is not None or watcher.result()["type"] != "http.disconnect":
            return
        if self._handler is not None and not self._handler.done() and self.status is None:
            self.client_gone = True
            self._handler.cancel()

    async def send_with_headers(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            extra = SECURITY_HEADERS | model_headers(self.catalogue.default.model)
            encoded = ((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in extra.items())
            added = [(name, value) for name, value in encoded if name not in present]
            message = {**message, "headers": [*message["headers"], *added]}
        await self.send(message)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s


def body_too_large(limit_bytes: int) -> Refusal:
    """The 413 of a request's body."""
    return too_large("the request body is too large", f"{limit_bytes / 2**20:.0f} MB")


def _without_long_texts(error: Exception) -> Exception:
    """The error itself, or one that shows the ends of what it says where that, or what led to it, is long."""
    trace = "".join(traceback.format_exception(error))
    if len(trace) <= 2 * TRACE_CHARS:
        return error
    shown = f"{trace[:TRACE_CHARS]}\n… {len(trace) - 2 * TRACE_CHARS:,} characters …\n{trace[-TRACE_CHARS:]}"
    return RuntimeError(shown)


class Admission:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, *, catalogue: Catalogue, limits: LimitsConfig, access: Access, metrics: Metrics
    ) -> None:
        self._app = app
        self._catalogue = catalogue
        self._limits = limits
        self._access = access
        self._metrics = metrics
        self._held = _Held(limits.pending_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self._limits.body_bytes, self._held, receive, send, self._catalogue)
        with self._metrics.in_progress.track_inprogress():
            await self._answer(scope, exchange)
        route = getattr(scope.get("route"), "path", "other")
        status = exchange.status or 499
        self._metrics.observe_request(route, status, exchange.elapsed_s)
        if status >= 400:
            code = scope.get("state", {}).get("error_code", "unmatched")
            self._metrics.observe_failure(route, code)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            headers = Headers(scope=scope)
            self._access.origins.check(scope["method"], headers)
            self._check_announced_size(headers)
            async with asyncio.timeout(self._limits.request_timeout_s):
                await exchange.run(self._app, scope)
        except Refusal as refusal:
            await self._refuse(scope, exchange, refusal)
        except TimeoutError:
            message = f"no answer within {self._limits.request_timeout_s:g} s"
            await self._refuse(scope, exchange, Refusal(504, message, code="deadline_exceeded", retry=True))
        except Exception as error:
            # What is logged passes the redaction, which takes its time for long texts: an error may hold a whole body.
            method, path = (printable(scope[key][:LOGGED_CHARS]) for key in ("method", "path"))
            logger.error("%s %s failed", method, path, exc_info=_without_long_texts(error))
            message = "the server failed on this request; its log says why"
            await self._refuse(scope, exchange, Refusal(500, message, code="internal_error"))

    def _check_announced_size(self, headers: Headers) -> None:
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limits.body_bytes:
            raise body_too_large(self._limits.body_bytes)

    async def _refuse(self, scope: Scope, exchange: _Exchange, refusal: Refusal) -> None:
        scope.setdefault("state", {})["error_code"] = refusal.code
        if exchange.status is None:
            await respond(refusal)(scope, exchange.receive, exchange.send_with_headers)
