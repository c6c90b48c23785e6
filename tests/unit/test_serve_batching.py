"""Dynamic batches, and a client that goes away: in a plain event loop, without Ray."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray import images
from dermray.predict import ModelSource
from dermray.service.engine import decoding
from dermray.service.engine.batching import Batcher
from dermray.service.engine.decoding import Room
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.fleet.replica import ReplicaBackend
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import DummyBackend


class Recorder:
    """A computation that doubles, remembers its batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.go.wait(20)
        self.batches.append(items)
        if -1 in items:
            raise ValueError("minus one")
        return [2 * item for item in items]


def run(body, **sizes):
    recorder = Recorder()

    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(recorder, executor, **({"max_size": 4, "max_wait_s": 30.0} | sizes))
            try:
                return await body(batcher, recorder)
            finally:
                recorder.go.set()

    return asyncio.run(main()), recorder.batches


def test_a_full_batch_leaves_at_once_and_keeps_its_order():
    async def body(batcher, recorder):
        return await asyncio.gather(*(batcher.submit(number) for number in range(8)))

    batched, batches = run(body)
    assert [one.result for one in batched] == [2 * number for number in range(8)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {one.batch_size for one in batched} == {4}


def test_a_batch_that_does_not_fill_leaves_when_it_is_old():
    async def body(batcher, recorder):
        return await asyncio.gather(batcher.submit(1), batcher.submit(2))

    batched, batches = run(body, max_wait_s=0.01)
    assert batches == [[1, 2]]
    assert batched[0].queue_s >= 0.009


def test_what_arrives_during_a_batch_shares_the_next():
    async def body(batcher, recorder):
        recorder.go.clear()
        first = asyncio.create_task(batcher.submit(0))
        while batcher.num_waiting or not batcher._task:
            await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        recorder.go.set()
        await asyncio.gather(first, *rest)

    _, batches = run(body, max_wait_s=0.0)
    assert batches == [[0], [1, 2, 3]]


def test_a_failure_reaches_its_own_batch_alone():
    async def body(batcher, recorder):
        answers = await asyncio.gather(*(batcher.submit(n) for n in (1, -1, 2, 3)), return_exceptions=True)
        after = await asyncio.gather(*(batcher.submit(n) for n in (4, 5, 6, 7)))
        return answers, after

    (answers, after), _ = run(body)
    assert all(isinstance(one, ValueError) for one in answers)
    assert [one.result for one in after] == [8, 10, 12, 14]


def test_an_item_whose_caller_is_gone_is_dropped_before_its_batch():
    async def body(batcher, recorder):
        recorder.go.clear()
        busy = asyncio.create_task(batcher.submit(0))
        while batcher.num_waiting or not batcher._task:
            await asyncio.sleep(0)
        gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        recorder.go.set()
        await asyncio.gather(busy, stays)

    _, batches = run(body, max_wait_s=0.0)
    assert batches == [[0], [2]]


def test_a_body_that_never_ends_is_504():
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(request_timeout_s=0.05))
    sent = []

    async def receive():
        await asyncio.get_running_loop().create_future()

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(post_scope(), receive, send), 20))
    assert sent[0]["status"] == 504


def test_what_a_replica_does_for_a_request_that_is_over_is_cancelled():
    class Call:
        """What a Serve handle returns: it does not cancel the replica's work by itself."""

        def __init__(self):
            self.cancelled = False

        def remote(self, *_):
            return self

        def __await__(self):
            return asyncio.sleep(30).__await__()

        def cancel(self):
            self.cancelled = True

    class Handle:
        ask = Call()

    async def main():
        backend = ReplicaBackend(Handle(), ModelSource("a", "a"), DummyBackend().model)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await backend.embed([], ["a"])

    asyncio.run(main())
    assert Handle.ask.cancelled


def test_bodies_beyond_what_is_held_at_one_time_are_429_until_there_is_room_again():
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(body_bytes=2048, pending_bytes=3000))
    body = b'{"input": "' + b"x" * 2000 + b'"}'

    async def post(receive):
        sent = []

        async def send(message):
            sent.append(message)

        await app(post_scope(), receive, send)
        return sent[0]["status"] if sent else None

    async def main():
        leaves, began = asyncio.Event(), asyncio.Event()

        async def slow():
            if not began.is_set():
                began.set()
                return {"type": "http.request", "body": body[:1500], "more_body": True}
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def whole():
            return {"type": "http.request", "body": body, "more_body": False}

        holds = asyncio.create_task(post(slow))
        await began.wait()
        refused = await post(whole)
        leaves.set()
        await holds
        return refused, await post(whole)

    assert asyncio.run(asyncio.wait_for(main(), 20)) == (429, 200)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_groups_enter_whole_and_in_turn_and_leave_no_place_behind(groups):
    """Some are cancelled, while they wait or while they are inside; none takes more than the room has."""

    async def main():
        room, entered, open_door = Room(5), [], asyncio.Event()

        async def group(number, count):
            async with room.hold(count):
                entered.append(number)
                assert room.num_held <= 5
                await open_door.wait()

        tasks = [asyncio.create_task(group(number, count)) for number, (count, _) in enumerate(groups)]
        await asyncio.sleep(0)
        for task, (_, leaves) in zip(tasks, groups, strict=True):
            if leaves:
                task.cancel()
        await asyncio.sleep(0)
        open_door.set()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert room.num_held == 0
        stayed = [number for number, (count, leaves) in enumerate(groups) if count and not leaves]
        assert [number for number in entered if number in stayed] == stayed
        assert all(task.cancelled() == leaves for task, (_, leaves) in zip(tasks, groups, strict=True))

    asyncio.run(main())


def post_scope():
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers, "query_string": b""}
    return scope | {"http_version": "1.1", "scheme": "http", "root_path": "", "raw_path": b"/v1/embeddings"}


@pytest.mark.parametrize("leaves", ["during the body", "during the forward pass"])
def test_a_client_that_leaves_takes_its_request_along(leaves):
    """The request's own work is cancelled, nothing is sent, and it is counted as 499."""
    started, cancelled = asyncio.Event(), []

    class Slow(DummyBackend):
        async def embed(self, images, texts):
            started.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

    app = create_app(Catalogue.of(Slow()), LimitsConfig())
    sent = []

    async def main():
        messages = [{"type": "http.request", "body": b'{"input": "a"}', "more_body": leaves == "during the body"}]

        async def receive():
            if messages:
                return messages.pop()
            if leaves == "during the forward pass":
                await started.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(app(post_scope(), receive, send), 20)

    asyncio.run(main())
    assert cancelled == ([True] if leaves == "during the forward pass" else [])
    assert [one for one in sent if one.get("status") == 200] == []
    text = app.state.service.metrics.render([]).decode()
    assert 'status="200"' not in text
    if leaves == "during the forward pass":
        assert sent == []
        assert 'dermray_requests_total{route="/v1/embeddings",status="499"} 1.0' in text


def test_a_stuck_decode_frees_its_caller_and_counts_against_the_pool(monkeypatch):
    """What a codec does after the limit is not waited for, and nothing queues behind it; the other thread goes on."""
    monkeypatch.setattr(decoding, "DECODE_LIMIT_S", 0.1)
    stuck, released = small_jpeg(64), threading.Event()

    def preprocess(data):
        if data == stuck:
            released.wait(30)
        return np.zeros((3, 4, 4), np.float32)

    async def main():
        pool = decoding.DecodePool(preprocess, num_threads=2, max_pixels=10_000, room=8)
        _, rejections = await pool.decode([stuck])
        during = pool.num_stuck
        fine = [await pool.decode([small_jpeg(32)] * 3) for _ in range(2)]
        released.set()
        for _ in range(200):
            if pool.num_stuck == 0:
                break
            await asyncio.sleep(0.02)
        return rejections, during, fine, pool.num_stuck

    rejections, during, fine, after = asyncio.run(main())
    assert [one.reason for one in rejections] == ["too_slow"]
    assert [(len(pixels), refused) for pixels, refused in fine] == [(3, [])] * 2
    assert (during, after) == (1, 0)


def small_jpeg(side):
    return images.encode_jpeg(np.full((side, side, 3), 90, np.uint8), 90)
