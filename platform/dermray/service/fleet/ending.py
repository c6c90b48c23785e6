"""The end of a service: what has begun is finished, what comes later is refused and may be asked again."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermray.service.refusals import respond, unavailable

LOOK_EVERY_S = 0.05


class Ending:
    """How many requests a process is answering, and whether it takes more."""

    def __init__(self) -> None:
        self.num_open = 0
        self.is_closed = False

    async def finish(self, within_s: float) -> int:
        """Take no more requests, and wait for those that have begun; returns how many are left after this time."""
        self.is_closed = True
        deadline_s = time.monotonic() + within_s
        while self.num_open and time.monotonic() < deadline_s:
            await asyncio.sleep(LOOK_EVERY_S)
        return self.num_open


class Draining:
    """ASGI middleware around the whole application, which counts for `Ending` and refuses when it is closed."""

    def __init__(self, app: ASGIApp, *, ending: Ending) -> None:
        self._app = app
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer 503 and close the connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        if self._ending.is_closed:
            await respond(unavailable("the service is ending"))(scope, receive, send_and_close)
            return
        self._ending.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._ending.num_open -= 1
