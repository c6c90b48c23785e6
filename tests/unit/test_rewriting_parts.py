"""Captions by a language model, the parts that need no server: answers, pace, keys, waiting times, proxies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from email.utils import formatdate
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.config import parse
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.errors import ConfigError
from dermray.prepare.rewriting import answers, endpoint
from dermray.prepare.rewriting.answers import AnswerError, checked, message_of, rewritten_of, sub_captions_of
from dermray.prepare.rewriting.pace import TokenBucket
from dermray.prepare.settings import PrepareConfig
from tests import llm_server

SECRET = "sk-very-secret-9f8e7d"

# Not `.filter(str.split)`: hypothesis takes that to mean no more than not empty.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40).filter(lambda text: bool(text.strip()))
WHOLE = st.lists(st.lists(TEXTS, min_size=1, max_size=MAX_SUB_CAPTIONS), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["answers", "id", "sub_captions", "caption", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(WHOLE, st.booleans(), st.randoms())
def test_sound_answers_are_read_whatever_their_order(whole: list[list[str]], fenced: bool, order: Any) -> None:
    listed = [{"id": number, "sub_captions": texts} for number, texts in enumerate(whole, start=1)]
    order.shuffle(listed)
    content = json.dumps({"answers": listed})
    found = sub_captions_of(f"```json\n{content}\n```" if fenced else content, len(whole))
    assert found == [list(dict.fromkeys(" ".join(text.split()) for text in texts)) for texts in whole]


@given(JSON.map(json.dumps) | st.text(max_size=60), st.integers(1, 4))
def test_any_answer_is_read_or_refused(content: str, num_captions: int) -> None:
    for read_answer, limit in ((sub_captions_of, MAX_SUB_CAPTIONS), (rewritten_of, 1)):
        with contextlib.suppress(AnswerError):
            found = read_answer(content, num_captions)
            assert len(found) == num_captions
            assert all(texts == checked(texts, limit) for texts in found)
            pa.array(found, pa.list_(pa.string()))


@given(st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(AnswerError):
        content, usage = message_of(body)
        assert isinstance(content, str)
        assert usage.prompt_tokens >= 0


@pytest.mark.parametrize(
    "texts", [[], [""], [" \n"], ["x"] * 9, ["x" * (answers.MAX_TEXT_CHARS + 1)], ["a\x00b"], ["\ud800"]]
)
def test_texts_out_of_bounds_are_refused(texts: list[str]) -> None:
    content = json.dumps({"answers": [{"id": 1, "sub_captions": texts}]})
    with pytest.raises(AnswerError):
        sub_captions_of(content, 1)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": -1}, "much"])
def test_odd_usage_costs_no_answer(usage: Any) -> None:
    body = {**llm_server.completion("text"), "usage": usage}
    assert message_of(json.dumps(body).encode()) == ("text", answers.Usage())


def test_very_deep_json_is_refused() -> None:
    with pytest.raises(AnswerError):
        sub_captions_of("[" * 100_000, 1)


def test_retry_after_is_read() -> None:
    at = formatdate(time.time() + 90, usegmt=True)
    assert endpoint._retry_after_s({"Retry-After": at}) == pytest.approx(90, abs=5)
    assert endpoint._retry_after_s({"Retry-After": formatdate(0, usegmt=True)}) == 0
    assert endpoint._retry_after_s({"Retry-After": " 2.5 "}) == 2.5
    for value in ({}, {"Retry-After": ""}, {"Retry-After": "soon"}, {"Retry-After": "-1"}, {"Retry-After": "inf"}):
        assert endpoint._retry_after_s(value) is None


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("per_minute", [1, 7, 60, 600, 6000])
def test_no_minute_has_more_requests_than_allowed(per_minute: int) -> None:
    async def draw() -> list[float]:
        clock = Clock()
        bucket = TokenBucket(per_minute, clock=clock, sleep=clock.sleep)
        times = []
        for _ in range(3 * per_minute):
            await bucket.take()
            times.append(clock.now)
        return times

    times = asyncio.run(draw())
    burst = max(1, per_minute // 60)
    assert all(later - first >= 60 - 1e-3 for first, later in zip(times, times[per_minute + burst :], strict=False))
    # Nor does it wait longer than it must.
    assert times[-1] - times[0] == pytest.approx((3 * per_minute - burst) / per_minute * 60, abs=1e-3)


def test_a_pause_lets_nothing_through() -> None:
    async def draw() -> float:
        clock = Clock()
        bucket = TokenBucket(600, clock=clock, sleep=clock.sleep)
        bucket.pause(30)
        bucket.pause(5)
        await bucket.take()
        return clock.now

    assert asyncio.run(draw()) == pytest.approx(1030)


def test_proxies_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,.inside.invalid")
    assert endpoint._proxy_of("http://model.invalid/v1") == "http://proxy.invalid:3128"
    assert endpoint._proxy_of("http://127.0.0.1:8000/v1") is None
    assert endpoint._proxy_of("http://model.inside.invalid:8000/v1") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=decompose", "needs an endpoint and a model"),
        ("mode=summarise", "rewrite.mode"),
        ("endpoint=ftp://host/v1", "not an http or https URL"),
        ("endpoint=file:///etc/passwd", "not an http or https URL"),
        ("endpoint=host:8000", "not an http or https URL"),
        (f"endpoint=https://me:{SECRET}@host/v1", "must hold no user"),
        (f"endpoint=https://{SECRET}@host/v1", "must hold no user"),
        (f"endpoint=https://host/v1?key={SECRET}", "must hold no user"),
        (f"api_key_env={SECRET}", "not a key"),
        ("requests_per_minute=0", "rewrite.requests_per_minute"),
    ],
)
def test_bad_keys_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(PrepareConfig, ["source=csv", "input=raw", "output=out", f"rewrite.{override}"])
    assert SECRET not in str(caught.value)
