"""One chat completion over HTTP: pacing, retries, bounds, and which failure means what.

Speaks `POST {endpoint}/chat/completions` of the OpenAI API, which vLLM, llama.cpp, Ollama and the hosted models share.
Nothing is taken from the environment but the key that the configuration names and the usual proxy variables, and
redirects are not followed: captions and key go where the configuration says and nowhere else.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from dermray.documents import parse_json
from dermray.errors import DocumentError, EndpointError
from dermray.prepare.rewriting.answers import FAILED, MALFORMED, AnswerError
from dermray.prepare.rewriting.pace import TokenBucket

FIRST_BACKOFF_S = 0.5
CONNECT_TIMEOUT_S = 10.0
# Of a busy endpoint, and of one that fails at this request.
MAX_BUSY_ATTEMPTS = 6
MAX_FAILED_ATTEMPTS = 3
MAX_RETRY_AFTER_S = 600.0
MAX_BODY_BYTES = 8 << 20
MAX_SAID_CHARS = 200
_SECONDS = re.compile(r"\d{1,9}(\.\d*)?", re.ASCII)
BUSY = frozenset({429, 502, 503, 504})
# What is wrong with the key, the URL or the model, and so with every request.
FATAL = {
    401: "does not accept the key: check the variable that rewrite.api_key_env names",
    403: "does not allow this key to use the model: check rewrite.api_key_env and rewrite.model",
    404: "is not there, or does not know the model: check rewrite.endpoint (it often ends in /v1) and rewrite.model",
    405: "takes no chat completions: check rewrite.endpoint",
}


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Endpoint:
    """Asks one endpoint. `num_requests` counts every attempt."""

    def __init__(
        self, url: str, *, key: str | None, bucket: TokenBucket, timeout_s: float, session: aiohttp.ClientSession
    ) -> None:
        self.url = url
        self.num_requests = 0
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._bucket = bucket
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self._proxy = _proxy_of(url)
        self._session = session
        self._has_answered = False

    async def complete(self, request: dict[str, Any]) -> bytes:
        """The body of the answer to a request, once the endpoint gives one.

        Raises:
            AnswerError: the endpoint fails at this very request; a smaller one may go through.
            EndpointError: no request would go through: refused key, unknown model, out of reach, busy for good.
        """
        num_busy = num_failed = 0
        while True:
            await self._bucket.take()
            self.num_requests += 1
            try:
                reply = await self._post(request)
            except aiohttp.ConnectionTimeoutError as error:
                num_busy = await self._after_busy(num_busy, f"cannot be reached: {error}", None)
                continue
            except TimeoutError:
                num_failed = await self._after_failure(num_failed, f"no answer within {self._timeout.total:g} s")
                continue
            except aiohttp.ClientError as error:
                said = " ".join(str(error).split()) or type(error).__name__
                num_busy = await self._after_busy(num_busy, f"cannot be reached: {said}", None)
                continue
            self._has_answered = True
            if reply.status == 200:
                return reply.body
            said = f"HTTP {reply.status}: {self._said(reply.body)}"
            if reply.status in BUSY:
                num_busy = await self._after_busy(num_busy, f"is busy: {said}", _retry_after_s(reply.headers))
            elif reply.status >= 500 or reply.status == 408:
                num_failed = await self._after_failure(num_failed, said)
            else:
                self._refuse(reply, said)

    async def _post(self, request: dict[str, Any]) -> _Reply:
        async with self._session.post(
            self.url,
            json=request,
            headers=self._headers,
            timeout=self._timeout,
            proxy=self._proxy,
            allow_redirects=False,
        ) as response:
            body = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise AnswerError(MALFORMED, f"the answer has more than {MAX_BODY_BYTES:,} bytes")
            return _Reply(response.status, response.headers, bytes(body))

    async def _after_busy(self, num_before: int, why: str, retry_after_s: float | None) -> int:
        """All requests wait: what holds up one holds up the others."""
        if not self._has_answered or num_before + 1 == MAX_BUSY_ATTEMPTS or (retry_after_s or 0) > MAX_RETRY_AFTER_S:
            tries = f" after {num_before + 1} attempts" if num_before else ""
            wait = f" and asks to wait {retry_after_s:,.0f} s" if retry_after_s else ""
            raise EndpointError(f"{self.url} {why}{wait}{tries}; answers so far are kept: run the same command again")
        self._bucket.pause(_backoff_s(num_before) if retry_after_s is None else retry_after_s)
        return num_before + 1

    async def _after_failure(self, num_before: int, why: str) -> int:
        if num_before + 1 == MAX_FAILED_ATTEMPTS:
            raise AnswerError(FAILED, why)
        await asyncio.sleep(_backoff_s(num_before))
        return num_before + 1

    def _refuse(self, reply: _Reply, said: str) -> None:
        if 300 <= reply.status < 400:
            where = reply.headers.get("Location", "elsewhere")[:MAX_SAID_CHARS]
            raise EndpointError(f"{self.url} redirects to {where}: give that address as rewrite.endpoint")
        if reply.status in FATAL:
            raise EndpointError(f"{self.url} {FATAL[reply.status]} ({said})")
        raise AnswerError(FAILED, said)

    def _said(self, body: bytes) -> str:
        """The endpoint's own words, in one line; some repeat the key."""
        try:
            document = parse_json(body, "the answer")
            said = document["error"]["message"]
        except (DocumentError, LookupError, TypeError):
            said = body.decode("utf-8", "replace")
        line = " ".join(str(said).split())
        if self._key:
            line = line.replace(self._key, "***")
        return line[:MAX_SAID_CHARS] or "no message"


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment prescribes for a URL; aiohttp's own way would look for credentials as well."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _backoff_s(num_before: int) -> float:
    return FIRST_BACKOFF_S * 2**num_before * random.uniform(0.5, 1.5)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, given as such or as a date; None without one."""
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
