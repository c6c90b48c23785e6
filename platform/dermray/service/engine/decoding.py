"""Encoded images to a model's pixels: a few threads, and a bound on decoded images that wait for their batch.

Decoding is ahead of the model by `room` images at most, whatever arrives: pixels take some ten times the space of the
bytes they come from. Who asks for more than there is room for waits his turn.

A thread cannot be stopped. What a decode costs is bounded before it starts, from the header (`dermray.image_bounds`);
should a codec take longer than `DECODE_LIMIT_S` all the same, its caller is told so, and the thread counts as taken
until the codec returns: nothing queues behind it.
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
from dermray.service.engine.answers import Rejection

# JPEG takes in MPO, that of phones which store a second picture behind the first.
ACCEPTED = ("JPEG", "PNG", "WEBP")
# Far above what the slowest image within the limits was seen to take; a codec that hangs must not keep its caller.
DECODE_LIMIT_S = 20.0


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
        await self.enter(count)
        try:
            yield
        finally:
            self.leave(count)

    async def enter(self, count: int) -> None:
        """Take `count` places, all at once, in turn; `leave` gives them back."""
        if count and (self._waiting or count > self._free):
            await self._turn(count)
        else:
            self._free -= count

    async def _turn(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled in the moment in which its turn came, it holds its places already.
            self.leave(0 if turn.cancelled() else count)
            raise

    def leave(self, count: int) -> None:
        """Give back `count` places."""
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
        self._lanes = Room(num_threads)
        self.num_stuck = 0
        self.room = Room(room)

    async def decode(self, encoded: Sequence[bytes]) -> tuple[list[np.ndarray], list[Rejection]]:
        """Pixels in order, and why images were rejected; call it with `room` held for all of them."""
        results = await asyncio.gather(*(self._in_time(data) for data in encoded), return_exceptions=True)
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

    async def _in_time(self, data: bytes) -> np.ndarray:
        """Decode on a free thread; give up after the limit, which runs from the moment in which the thread begins.

        Raises:
            ImageError: it is no acceptable image, or takes too long (`too_slow`).
        """
        await self._lanes.enter(1)
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data)
        work.add_done_callback(lambda _: self._lanes.leave(1))
        done, _ = await asyncio.wait([work], timeout=DECODE_LIMIT_S)
        if done:
            return work.result()
        self.num_stuck += 1
        work.add_done_callback(self._came_back)
        raise ImageError("too_slow", f"decoding took more than {DECODE_LIMIT_S:g} s: save it anew as a plain JPEG")

    def _came_back(self, work: asyncio.Future[np.ndarray]) -> None:
        self.num_stuck -= 1
        # Its error, if any, has nobody left to go to.
        work.cancelled() or work.exception()

    def _decode(self, data: bytes) -> np.ndarray:
        _, width, height = images.inspect(data, accepted=ACCEPTED)
        if width * height > self._max_pixels:
            raise ImageError(
                "too_many_pixels",
                f"the image has {width} x {height} pixels; the limit is {self._max_pixels / 1e6:g} million",
            )
        return self._preprocess(data)
