"""JSON bodies, bounded before they are taken apart and parsed beside the event loop.

What a body of 20 MB may hold is a few long texts (images). Millions of numbers, lists or fields would take seconds and
gigabytes to parse and to complain about, so they are counted first, which takes milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from pydantic_core import from_json

from dermray.service.http.auth import UserRoute
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig

MAX_FIELDS = 32
# Commas and brackets, those inside texts among them; the largest lists allowed take a few thousand.
MAX_MARKS = 100_000


class BoundedRequest(Request):
    """A request whose `json()` refuses what no question of ours looks like."""

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            Refusal: as `parse`.
        """
        if not hasattr(self, "_json"):
            limits: LimitsConfig = self.app.state.service.limits
            self._json = await asyncio.to_thread(parse, await self.body(), limits)
        return self._json


class QuestionRoute(UserRoute):
    """A route with a JSON body, read as `BoundedRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's own handler over such a request."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded


def parse(body: bytes, limits: LimitsConfig) -> dict[str, Any]:
    """A JSON object of at most `MAX_FIELDS` fields.

    Raises:
        Refusal: 413 for more values than any question has, 422 for what is no such object.
    """
    value = parse_value(body, limits)
    if not isinstance(value, dict):
        raise Refusal(422, "send a JSON object with Content-Type: application/json", code="invalid_body")
    check_fields(len(value))
    return value


def parse_value(text: bytes, limits: LimitsConfig) -> Any:
    """Any JSON value of not too many parts.

    Raises:
        Refusal: 413 or 422.
    """
    most = max(MAX_MARKS, 10 * (limits.labels + limits.templates + limits.items))
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > most:
        raise Refusal(413, f"the JSON holds more than {most:,} commas and brackets", code="too_large")
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        # Numbers of thousands of digits, lists a thousand deep and halves of surrogate pairs are among these.
        raise Refusal(422, "the request body is not valid JSON", code="invalid_json") from None


def check_fields(count: int) -> None:
    """Refuse more fields than any question has, before each is complained about.

    Raises:
        Refusal: 422.
    """
    if count > MAX_FIELDS:
        raise Refusal(422, f"{count:,} fields; no request has more than {MAX_FIELDS}", code="invalid_body")
