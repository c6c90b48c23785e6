"""Encoded images to a model's pixels: a few threads, and a bound on decoded images that wait for their batch.

Decoding is ahead of the model by `room` images at most, whatever arrives: pixels take some ten times the space of the
bytes they come from. Who asks for more than there is room for waits his turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dermray import images
from dermray.errors import ImageError
from serve.backend import Rejection

# MPO is the JPEG of phones that store a second picture behind the first.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")


class Room:
    """So many places for items. Groups enter whole and in the order in which they came."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_held(self) -> int:
        """Places that are taken."""
        return self._places - self._free

    @contextlib.asynccontextmanager
    async def hold(self, count: int) -> AsyncIterator[None]:
        """Places for `count` items within the block; a group that is larger than the room has it to itself."""
        count = min(count, self._places)
        if count and (self._waiting or count > self._free):
            await self._turn(count)
        else:
            self._free -= count
        try:
            yield
        finally:
            self._leave(count)

    async def _turn(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled in the moment in which its turn came, it holds its places already.
            self._leave(0 if turn.cancelled() else count)
            raise

    def _leave(self, count: int) -> None:
        self._free += count
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._free):
            entering, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= entering
                turn.set_result(None)


class DecodePool:
    """Threads that check and decode images."""

    def __init__(
        self, preprocess: Callable[[bytes], np.ndarray], *, num_threads: int, max_pixels: int, room: int
    ) -> None:
        """Decode by `preprocess`, the model's own way from bytes to pixels, float32 `[3, S, S]`."""
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.room = Room(room)

    async def decode(self, encoded: Sequence[bytes]) -> tuple[list[np.ndarray], list[Rejection]]:
        """Pixels in order, and why images were rejected; call it with `room` held for all of them."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._threads, self._decode, data) for data in encoded]
        results = await asyncio.gather(*futures, return_exceptions=True)
        pixels: list[np.ndarray] = []
        rejections: list[Rejection] = []
        for index, result in enumerate(results):
            if isinstance(result, ImageError):
                rejections.append(Rejection(index, result.reason, str(result)))
            elif isinstance(result, BaseException):
                raise result
            else:
                pixels.append(result)
        return pixels, rejections

    def _decode(self, data: bytes) -> np.ndarray:
        kind, width, height = images.inspect(data)
        if kind not in IMAGE_FORMATS:
            raise ImageError("unsupported_format", f"{kind} images are not accepted; send JPEG, PNG or WebP")
        if width * height > self._max_pixels:
            raise ImageError(
                "too_many_pixels",
                f"the image has {width} x {height} pixels; the limit is {self._max_pixels / 1e6:g} million",
            )
        return self._preprocess(data)
