"""Asks a model for what the cache lacks: batches in parallel, halved where they fail, published every few seconds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from dermray.errors import EndpointError
from dermray.prepare.rewriting.answers import REASONS, AnswerError, Reason, Usage, message_of
from dermray.prepare.rewriting.cache import Cache
from dermray.prepare.rewriting.endpoint import Endpoint
from dermray.prepare.rewriting.pace import TokenBucket
from dermray.prepare.rewriting.settings import RewriteConfig
from dermray.prepare.rewriting.tasks import Task
from dermray.progress import Progress, print_line

# A kill loses what was not published yet: a thirtieth of the time that the run took, between these bounds.
FIRST_PUBLISH_S = 0.5
LAST_PUBLISH_S = 5.0
PUBLISH_SHARE = 30
PUBLISH_ANSWERS = 1000
TICK_S = 0.1
# So many captions without an answer, one after the other, are the endpoint's fault and not the captions'.
MAX_FAILED_IN_A_ROW = 50

# Cache key and caption.
Batch = Sequence[tuple[str, str]]


@dataclass
class Tally:
    """What asking has taken so far."""

    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, usage: Usage) -> None:
        """Count the tokens of one answer."""
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


class Asking:
    """One run over the captions of `pending` (caption by cache key); `num_captions` counts the cached ones too."""

    def __init__(self, task: Task, config: RewriteConfig, cache: Cache, pending: Mapping[str, str], num_captions: int):
        self._task = task
        self._config = config
        self._cache = cache
        self._num_captions = num_captions
        self._batches = deque(_batches(list(pending.items()), config.captions_per_request))
        self._tally = Tally()
        self._answers: dict[str, list[str]] = {}
        self._failed: dict[str, Reason] = {}
        self._num_failed_in_a_row = 0
        self._progress = Progress(task.name, len(pending), "captions", say=self._say)
        self._started = self._published_at = time.monotonic()

    async def run(self) -> Tally:
        """Ask for everything; afterwards the cache holds an answer or a reason for each caption.

        Raises:
            EndpointError: the endpoint cannot be used, or leaves too many captions without an answer.
            StorageError: the cache cannot be written.
        """
        key = self._config.api_key()
        bucket = TokenBucket(self._config.requests_per_minute)
        connector = aiohttp.TCPConnector(limit=self._config.num_concurrent)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            endpoint = Endpoint(
                self._config.url, key=key, bucket=bucket, timeout_s=self._config.timeout_s, session=session
            )
            with self._progress:
                await self._ask(endpoint)
        self._cache.add_failed(self._failed)
        self._tally.num_requests = endpoint.num_requests
        return self._tally

    async def _ask(self, endpoint: Endpoint) -> None:
        ticking = asyncio.create_task(self._tick())
        working = [asyncio.create_task(self._work(endpoint)) for _ in range(self._config.num_concurrent)]
        # The work ends by itself; ticking ends first only by an error.
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*working), ticking]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            next(end for end in ends if end.done()).result()
        finally:
            for task in (ticking, *working):
                task.cancel()
            await asyncio.gather(*ends, *working, return_exceptions=True)
            self._publish()

    async def _work(self, endpoint: Endpoint) -> None:
        while self._batches:
            await self._settle(self._batches.popleft(), endpoint)

    async def _settle(self, batch: Batch, endpoint: Endpoint) -> None:
        """Get an answer or a reason for each caption of a batch, by halves where the whole gives none."""
        try:
            body = await endpoint.complete(self._task.request(self._config, [caption for _, caption in batch]))
            content, usage = message_of(body)
            self._tally.add(usage)
            texts = self._task.read(content, len(batch))
        except AnswerError as error:
            if len(batch) == 1:
                self._give_up(batch[0][0], error)
                return
            middle = len(batch) // 2
            await self._settle(batch[:middle], endpoint)
            await self._settle(batch[middle:], endpoint)
            return
        self._answers.update(zip((key for key, _ in batch), texts, strict=True))
        self._progress.advance(len(batch))
        self._num_failed_in_a_row = 0
        if len(self._answers) >= PUBLISH_ANSWERS:
            self._publish()

    def _give_up(self, key: str, error: AnswerError) -> None:
        self._failed[key] = error.reason
        self._progress.advance()
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row == MAX_FAILED_IN_A_ROW:
            raise EndpointError(
                f"stopped: {self._config.url} gives no usable answer to {MAX_FAILED_IN_A_ROW} captions in a row; the "
                f"last time: {error}; answers so far are kept in {self._cache.uri}"
            )
        check_ceiling(self._config, self._cache, [*self._failed.values()], self._num_captions, str(error))

    def _publish(self) -> None:
        self._cache.add(self._answers)
        self._answers = {}
        self._published_at = time.monotonic()

    async def _tick(self) -> None:
        """Publish, less often the longer it takes."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            share_s = (now - self._started) / PUBLISH_SHARE
            if now - self._published_at >= min(LAST_PUBLISH_S, max(FIRST_PUBLISH_S, share_s)):
                self._publish()

    def _say(self, line: str) -> None:
        print_line(f"{line}; {len(self._failed):,} without an answer" if self._failed else line)


def check_ceiling(
    config: RewriteConfig, cache: Cache, reasons: Sequence[Reason], num_captions: int, last: str = ""
) -> None:
    """Stop when more captions are without an answer than the configuration allows; `reasons` are this run's.

    Raises:
        EndpointError: they are.
    """
    counted = Counter([*cache.failed.values(), *reasons])
    if counted.total() <= config.max_failed_fraction * num_captions:
        return
    why = ", ".join(f"{reason} {count:,} ({REASONS[reason]})" for reason, count in counted.most_common())
    last = f"; the last time: {last}" if last else ""
    raise EndpointError(
        f"stopped: {counted.total():,} of {num_captions:,} captions have no usable answer: {why}; more than "
        f"rewrite.max_failed_fraction={config.max_failed_fraction:g} allows{last}; "
        f"answers so far are kept in {cache.uri}"
    )


def _batches(items: list[tuple[str, str]], size: int) -> list[Batch]:
    return [items[first : first + size] for first in range(0, len(items), size)]
