"""Dynamic batches: a batch leaves when it is full or its oldest item has waited long enough. No Ray, no torch.

Ray's own `serve.batch` works inside a Serve replica only; this one also runs in a plain event loop, so that an engine
can be tested, and put into the HTTP process, as it is. While one batch computes, the next one fills.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Batched(Generic[ResultT]):
    """One item's result, and the ride: how many shared it, how long it waited and how long the batch took."""

    result: ResultT
    batch_size: int
    queue_s: float
    forward_s: float


@dataclass(slots=True)
class _Waiting(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[Batched[ResultT]]
    since_s: float


class Batcher(Generic[ItemT, ResultT]):
    """Items in, results out, computed together on an executor, one batch at a time."""

    def __init__(
        self,
        compute: Callable[[list[ItemT]], Iterable[ResultT]],
        executor: Executor,
        *,
        max_size: int,
        max_wait_s: float,
    ) -> None:
        """Batch calls of `compute`, which returns one result an item, in order; what it raises goes to every item."""
        self._compute = compute
        self._executor = executor
        self._max_size = max_size
        self._max_wait_s = max_wait_s
        self._waiting: deque[_Waiting[ItemT, ResultT]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self._waiting)

    async def submit(self, item: ItemT) -> Batched[ResultT]:
        """The item's result. When the caller is cancelled before its batch leaves, the item is dropped."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._arrived = asyncio.Event()
            self._task = loop.create_task(self._run())
        waiting: _Waiting[ItemT, ResultT] = _Waiting(item, loop.create_future(), time.perf_counter())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._fill()
            batch = self._take()
            if batch:
                await self._forward(batch)

    async def _fill(self) -> None:
        """Wait until a batch is full or its first item is old enough."""
        while self._waiting and len(self._waiting) < self._max_size:
            left_s = self._waiting[0].since_s + self._max_wait_s - time.perf_counter()
            if left_s <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting[ItemT, ResultT]]:
        batch: list[_Waiting[ItemT, ResultT]] = []
        while self._waiting and len(batch) < self._max_size:
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                batch.append(waiting)
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _forward(self, batch: list[_Waiting[ItemT, ResultT]]) -> None:
        left_s = time.perf_counter()
        items = [waiting.item for waiting in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, items)
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        forward_s = time.perf_counter() - left_s
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(Batched(result, len(batch), left_s - waiting.since_s, forward_s))
