"""How often an endpoint is asked: a token bucket that all requests of a run draw from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

# Waits below this are the rounding of clocks.
_EPSILON_S = 1e-9


class TokenBucket:
    """Lets `per_minute` requests through a minute, evenly; at most one second's worth of them at once."""

    def __init__(
        self,
        per_minute: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate)
        self._tokens = self._capacity
        self._clock = clock
        self._sleep = sleep
        self._filled_at = clock()
        self._open_at = self._filled_at
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Wait until one more request may go; first come, first served."""
        async with self._turn:
            while (wait_s := self._wait_s()) > _EPSILON_S:
                await self._sleep(wait_s)
            self._tokens -= 1

    def pause(self, seconds: float) -> None:
        """Let nothing through for so long: the endpoint has said that it is busy."""
        self._open_at = max(self._open_at, self._clock() + seconds)

    def _wait_s(self) -> float:
        now = self._clock()
        self._tokens = min(self._capacity, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return max(self._open_at - now, (1 - self._tokens) / self._rate)
