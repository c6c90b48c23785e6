"""Captions by a language model: batches, cache, pace, failures, secrets, against a real server on this machine."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dermray.config import parse, validate
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.errors import ConfigError, CorpusError, EndpointError
from dermray.prepare.pipeline import read
from dermray.prepare.rewriting import asking, endpoint
from dermray.prepare.rewriting.captions import RewriteStats, rewrite_captions
from dermray.prepare.rewriting.settings import RewriteConfig
from dermray.prepare.rewriting.tasks import DECOMPOSE, REWRITE
from dermray.prepare.settings import PrepareConfig
from dermray.raw.sources.rows import RAW, RawRows, assemble, raw_captions
from tests import llm_server
from tests.llm_server import LlmServer, rewritten, sub_captions
from tests.s3 import BUCKET, faulty_s3

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-very-secret-9f8e7d"
CHINESE = "\u9762\u90e8\u7ea2\u8272\u4e18\u75b9. \u7629\u75d2\u4e24\u5468"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmServer]:
    monkeypatch.setattr(endpoint, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with llm_server.llm_server() as running:
        yield running


def settings(server: LlmServer, **changes: Any) -> RewriteConfig:
    base = {"mode": "decompose", "endpoint": server.url, "model": "test-model", "requests_per_minute": 60_000}
    return validate(RewriteConfig, {**base, **changes})


def numbered(count: int) -> list[str]:
    return [f"A red plaque number {number}. It itches" for number in range(count)]


def rows(captions: list[str | None], **more: Any) -> RawRows:
    places = pa.array(range(1, len(captions) + 1), pa.int64())
    names = pa.array([f"{place}.jpg" for place in places], pa.string())
    table = assemble(
        row=places, source="made", source_id=names, image=names, captions=raw_captions(pa.array(captions, pa.string()))
    )
    return RawRows(table, **more)


def said(raw: RawRows, aspect: str) -> list[list[str]]:
    column = raw.table["captions"].to_pylist()
    return [[caption["text"] for caption in row if caption["aspect"] == aspect] for row in column]


def run(raw: RawRows, config: RewriteConfig, output: Path) -> tuple[RawRows, RewriteStats]:
    made, stats = rewrite_captions(raw, config, output=str(output))
    return made, stats[-1]


def test_off_by_default_and_asks_nobody(server: LlmServer, tmp_path: Path) -> None:
    raw = rows(numbered(3))
    assert rewrite_captions(raw, RewriteConfig(), output=str(tmp_path)) == (raw, ())
    assert not server.requests
    assert list(tmp_path.iterdir()) == []


def test_captions_are_taken_apart_in_batches(server: LlmServer, tmp_path: Path) -> None:
    captions = [*numbered(23), None, numbered(1)[0], CHINESE]
    made, stats = run(rows(captions), settings(server, captions_per_request=5), tmp_path)
    assert said(made, "raw") == [[caption] if caption else [] for caption in captions]
    assert said(made, "sub") == [sub_captions(caption or "") for caption in captions]
    assert made.table.schema == RAW
    # 24 different captions, the repeated one asked for once.
    assert stats.num_captions == stats.num_answered == 24
    assert len(server.requests) == stats.tally.num_requests == 5
    assert set(server.asked.values()) == {1}
    assert stats.tally.prompt_tokens == 5 * 7
    assert stats.tally.completion_tokens == 5 * 5


def test_what_a_request_says(server: LlmServer, tmp_path: Path) -> None:
    raw = rows([CHINESE])
    run(raw, settings(server, max_tokens=300), tmp_path / "a")
    run(
        raw, settings(server, temperature=None, json_mode=False, max_tokens_key="max_completion_tokens"), tmp_path / "b"
    )
    first, second = (request.body for request in server.requests)
    assert first["model"] == "test-model"
    assert first["max_tokens"] == 300
    assert first["temperature"] == 0
    assert first["response_format"] == {"type": "json_object"}
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert f"1 to {MAX_SUB_CAPTIONS} sub-captions" in first["messages"][0]["content"]
    assert json.loads(first["messages"][1]["content"]) == [{"id": 1, "caption": CHINESE}]
    assert second["max_completion_tokens"] == 512
    assert not {"max_tokens", "temperature", "response_format"} & second.keys()
    assert server.requests[0].path == llm_server.PATH
    assert server.requests[0].authorization is None


def test_rewriting_replaces_the_raw_caption(server: LlmServer, tmp_path: Path) -> None:
    captions = numbered(4)
    raw = rows(captions, captions_from={"raw": "column caption"})
    made, stats = run(raw, settings(server, mode="rewrite"), tmp_path)
    assert said(made, "raw") == [[rewritten(caption)] for caption in captions]
    assert made.captions_from == {
        "raw": f"column caption, rewritten by test-model (prompt sha256 {REWRITE.prompt_sha256[:12]})"
    }
    assert stats.to_json() == {
        "task": "rewrite",
        "model": "test-model",
        "prompt_sha256": hashlib.sha256(REWRITE.prompt.encode()).hexdigest(),
        "captions": 4,
        "answered": 4,
        "failed": {},
    }


def test_both_decomposes_what_was_rewritten(server: LlmServer, tmp_path: Path) -> None:
    captions = numbered(2)
    made, stats = rewrite_captions(rows(captions), settings(server, mode="both"), output=str(tmp_path))
    assert [done.task for done in stats] == ["rewrite", "decompose"]
    assert said(made, "sub") == [sub_captions(rewritten(caption)) for caption in captions]
    assert set(made.captions_from) == {"raw", "sub"}


def test_the_cache_answers_without_the_server(server: LlmServer, tmp_path: Path) -> None:
    raw = rows(numbered(12))
    first, _ = run(raw, settings(server), tmp_path)
    num_requests = len(server.requests)
    # Neither endpoint nor pace nor the company of a caption is part of what its answer hangs on.
    elsewhere = settings(server, endpoint="http://nobody.invalid/v1", captions_per_request=3, api_key_env="NOT_SET")
    again, stats = run(raw, elsewhere, tmp_path)
    assert len(server.requests) == num_requests
    assert again.table.equals(first.table)
    assert again.captions_from == first.captions_from
    assert (stats.num_from_cache, stats.tally.num_requests) == (12, 0)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 99}, {"mode": "rewrite"}, {"json_mode": False}]
)
def test_what_decides_an_answer_is_asked_for_anew(server: LlmServer, tmp_path: Path, change: dict[str, Any]) -> None:
    captions = numbered(3)
    run(rows(captions), settings(server), tmp_path)
    run(rows(captions), settings(server, **change), tmp_path)
    assert set(server.asked.values()) == {2}


def test_only_new_captions_are_asked_for(server: LlmServer, tmp_path: Path) -> None:
    run(rows(numbered(5)), settings(server), tmp_path)
    made, stats = run(rows(numbered(8)), settings(server), tmp_path)
    assert stats.num_from_cache == 5
    assert set(server.asked.values()) == {1}
    assert said(made, "sub") == [sub_captions(caption) for caption in numbered(8)]


def test_a_cache_on_s3(server: LlmServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    with faulty_s3() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("DERMRAY_S3_CLIENT", "s3fs")
        config = settings(server, cache=f"s3://{BUCKET}/rewrites")
        first, _ = run(rows(numbered(4)), config, tmp_path)
        again, stats = run(rows(numbered(4)), config, tmp_path)
    assert stats.num_from_cache == 4
    assert again.table.equals(first.table)


def test_a_poisoned_caption_is_found_by_halves(server: LlmServer, tmp_path: Path) -> None:
    captions = numbered(16)
    server.poison = {captions[5]: llm_server.NOT_JSON, captions[11]: llm_server.REFUSAL}
    config = settings(server, captions_per_request=16, max_failed_fraction=0.2, num_concurrent=1)
    made, stats = run(rows(captions), config, tmp_path)
    assert stats.failed == {"llm_malformed": 1, "llm_refused": 1}
    assert stats.num_answered == 14
    assert said(made, "raw") == [[caption] for caption in captions]
    assert said(made, "sub") == [
        [] if place in (5, 11) else sub_captions(caption) for place, caption in enumerate(captions)
    ]
    # 16; 8 and 8; then on each side 4, 4, and of the bad four 2, 2, and of the bad two 1, 1.
    assert len(server.requests) == 1 + 2 + 2 * (2 + 2 + 2)
    # What could not be had is cached too, once the run is accepted.
    again, stats = run(rows(captions), config, tmp_path)
    assert len(server.requests) == 15
    assert again.table.equals(made.table)
    assert stats.failed == {"llm_malformed": 1, "llm_refused": 1}
    # Without that segment the two are asked for again.
    server.poison = {}
    next((tmp_path / "rewrites").glob("failed-*.jsonl")).unlink()
    mended, stats = run(rows(captions), config, tmp_path)
    assert stats.failed == {}
    assert said(mended, "sub") == [sub_captions(caption) for caption in captions]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (llm_server.NO_COMPLETION, "llm_malformed"),
        (llm_server.WRONG_COUNT, "llm_malformed"),
        (llm_server.WRONG_IDS, "llm_malformed"),
        (llm_server.BLANK, "llm_malformed"),
        (llm_server.CUT_OFF, "llm_malformed"),
        (llm_server.ENDLESS, "llm_malformed"),
        (llm_server.REFUSAL, "llm_refused"),
        (llm_server.SLOW, "llm_failed"),
        (500, "llm_failed"),
        (400, "llm_failed"),
    ],
)
def test_a_caption_without_an_answer_is_counted(
    server: LlmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str, reason: str
) -> None:
    monkeypatch.setattr(endpoint, "MAX_FAILED_ATTEMPTS", 2)
    captions = numbered(2)
    server.poison = {captions[1]: fault}
    made, stats = run(rows(captions), settings(server, max_failed_fraction=0.5, timeout_s=0.5), tmp_path)
    assert stats.failed == {reason: 1}
    assert said(made, "sub") == [sub_captions(captions[0]), []]


def test_a_fenced_answer_is_read(server: LlmServer, tmp_path: Path) -> None:
    server.inject(llm_server.FENCED)
    made, _ = run(rows([CHINESE]), settings(server), tmp_path)
    assert said(made, "sub") == [sub_captions(CHINESE)]


@pytest.mark.parametrize("fault", [500, 502, 503, 429, llm_server.NOT_JSON])
def test_a_passing_fault_leaves_no_trace(server: LlmServer, tmp_path: Path, fault: int | str) -> None:
    server.inject(fault, times=2)
    _, stats = run(rows(numbered(8)), settings(server, captions_per_request=4, num_concurrent=1), tmp_path)
    assert stats.failed == {}
    assert stats.num_answered == 8


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_holds_up_everybody(server: LlmServer, tmp_path: Path, status: int) -> None:
    server.inject(status, Retry_After="1")
    run(rows(numbered(6)), settings(server, captions_per_request=2, num_concurrent=1), tmp_path)
    assert server.requests[1].at - server.requests[0].at > 0.99
    assert len(server.requests) == 4


def test_a_wait_of_hours_stops_the_run(server: LlmServer, tmp_path: Path) -> None:
    server.inject(429, Retry_After="7200")
    with pytest.raises(EndpointError, match=r"HTTP 429: injected 429.* asks to wait 7,200 s"):
        run(rows(numbered(1)), settings(server), tmp_path)


def test_an_endpoint_that_stays_busy_stops_the_run(server: LlmServer, tmp_path: Path) -> None:
    server.inject(503, times=100)
    with pytest.raises(EndpointError, match=r"is busy: HTTP 503.* after 6 attempts"):
        run(rows(numbered(1)), settings(server), tmp_path)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept the key"), (403, "does not allow this key"), (404, "know the model")]
)
def test_what_is_wrong_with_every_request_stops_at_once(
    server: LlmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    monkeypatch.setenv("TEST_LLM_KEY", SECRET)
    server.inject(status, times=100)
    with pytest.raises(EndpointError, match=words) as caught:
        run(rows(numbered(50)), settings(server, num_concurrent=1, api_key_env="TEST_LLM_KEY"), tmp_path)
    assert len(server.requests) == 1
    assert "for Bearer ***" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_redirect_is_not_followed(server: LlmServer, tmp_path: Path) -> None:
    with llm_server.llm_server() as other:
        server.inject(307, Location=f"{other.url}/chat/completions")
        with pytest.raises(EndpointError, match="give that address as rewrite.endpoint"):
            run(rows(numbered(1)), settings(server), tmp_path)
        assert not other.requests


def test_an_endpoint_that_is_down_stops_at_once(server: LlmServer, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9/v1/chat/completions cannot be reached") as caught:
        run(rows(numbered(30)), settings(server, endpoint="http://127.0.0.1:9/v1"), tmp_path)
    assert "attempts" not in str(caught.value)


def test_too_many_failures_stop_the_run_and_keep_the_answers(server: LlmServer, tmp_path: Path) -> None:
    captions = numbered(40)
    server.poison = dict.fromkeys(captions[20:23], llm_server.NOT_JSON)
    config = settings(server, captions_per_request=2, num_concurrent=1, max_failed_fraction=0.05)
    with pytest.raises(
        EndpointError, match=r"3 of 40 captions .* llm_malformed 3 .*max_failed_fraction=0.05"
    ) as caught:
        run(rows(captions), config, tmp_path)
    assert str(tmp_path / "rewrites") in str(caught.value)
    assert not list((tmp_path / "rewrites").glob("failed-*"))
    first = server.asked
    server.poison = {}
    _, stats = run(rows(captions), config, tmp_path)
    assert stats.num_from_cache >= 20
    assert all(server.asked[caption] == first[caption] for caption in captions[:20])


def test_an_endpoint_that_only_fails_is_not_asked_for_all(server: LlmServer, tmp_path: Path) -> None:
    server.inject(400, times=10_000)
    with pytest.raises(EndpointError, match=f"to {asking.MAX_FAILED_IN_A_ROW} captions in a row.*HTTP 400"):
        run(rows(numbered(2000)), settings(server, max_failed_fraction=0.5), tmp_path)
    assert len(server.requests) < 300


def test_no_more_at_once_than_allowed(server: LlmServer, tmp_path: Path) -> None:
    server.delay_s = 0.02
    run(rows(numbered(40)), settings(server, captions_per_request=1, num_concurrent=4), tmp_path)
    assert server.most_at_once == 4


def test_the_pace_holds_against_a_real_server(server: LlmServer, tmp_path: Path) -> None:
    config = settings(server, captions_per_request=1, requests_per_minute=600, num_concurrent=20)
    started = time.monotonic()
    run(rows(numbered(20)), config, tmp_path)
    # One second's worth goes at once; the next ten take a second, counted from the start, not from the first arrival.
    assert server.requests[-1].at - started > 0.9


def test_the_key_is_sent_and_kept_nowhere(
    server: LlmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_LLM_KEY", f" {SECRET}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    server.api_key = SECRET
    made, stats = run(rows(numbered(3)), settings(server, api_key_env="TEST_LLM_KEY"), tmp_path)
    assert {request.authorization for request in server.requests} == {f"Bearer {SECRET}"}
    with pytest.raises(EndpointError) as caught:
        run(rows(["new"]), settings(server), tmp_path)
    assert server.requests[-1].authorization is None
    config = parse(PrepareConfig, prepare_arguments(server, tmp_path, api_key_env="TEST_LLM_KEY"))
    told = capfd.readouterr()
    kept = "".join(file.read_text() for file in (tmp_path / "rewrites").iterdir())
    everything = [kept, told.out, told.err, str(made.captions_from), str(stats), str(caught.value), config.to_yaml()]
    assert SECRET not in "".join([*everything, str(config.content())])
    assert "TEST_LLM_KEY" not in str(config.content())
    assert server.url not in str(config.content())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TEST_LLM_KEY", None, "TEST_LLM_KEY is not set"),
        ("TEST_LLM_KEY", "", "TEST_LLM_KEY is not set"),
        ("TEST_LLM_KEY", f"{SECRET}\r\nX-Evil: 1", "holds characters that no key has"),
    ],
)
def test_an_unusable_key_is_named_but_not_shown(
    server: LlmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, message: str
) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as caught:
        run(rows(numbered(1)), settings(server, api_key_env=variable), tmp_path)
    assert SECRET not in str(caught.value)
    assert not server.requests


def test_settings_that_are_read_kindly(server: LlmServer) -> None:
    base = ["source=csv", "input=raw", "output=out"]
    assert parse(PrepareConfig, [*base, "rewrite.mode=off"]).rewrite.mode == "off"
    assert "rewrite" not in parse(PrepareConfig, base).content()
    assert settings(server, endpoint=f"{server.url}/chat/completions/").url == f"{server.url}/chat/completions"
    with pytest.raises(ConfigError, match="choose one"):
        parse(PrepareConfig, [*prepare_arguments(server, Path("out")), "sub_captions=4"])


def test_a_source_with_sub_captions_of_its_own_is_refused(server: LlmServer, tmp_path: Path) -> None:
    raw = rows(["one"])
    captions = pa.array([[{"aspect": "sub", "text": "given"}]], RAW.field("captions").type)
    raw = RawRows(raw.table.set_column(raw.table.column_names.index("captions"), RAW.field("captions"), captions))
    with pytest.raises(ConfigError, match="brings sub-captions of its own"):
        run(raw, settings(server), tmp_path)


def damage_bytes(segment: Path) -> None:
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)


def damage_line(segment: Path, line: dict[str, Any]) -> None:
    content = (json.dumps(line) + "\n").encode()
    segment.with_name(f"answers-000000-{hashlib.sha256(content).hexdigest()[:16]}.jsonl").write_bytes(content)
    segment.unlink()


@pytest.mark.parametrize(
    "line",
    [None, {"key": "k", "texts": ["x"]}, {"key": "0" * 64}, {"texts": []}, {"texts": ["x"] * 9}, {"texts": [""]}],
)
def test_a_damaged_segment_is_named(server: LlmServer, tmp_path: Path, line: dict[str, Any] | None) -> None:
    run(rows(["one"]), settings(server), tmp_path)
    segment = next((tmp_path / "rewrites").iterdir())
    key = json.loads(segment.read_text())["key"]
    if line is None:
        damage_bytes(segment)
    else:
        damage_line(segment, {"key": key, **line})
    with pytest.raises(CorpusError, match=r"rewrites/answers-.*\.jsonl is damaged .*; remove it"):
        run(rows(["one"]), settings(server), tmp_path)
    assert len(server.requests) == 1


def test_what_a_killed_write_leaves_is_no_segment(server: LlmServer, tmp_path: Path) -> None:
    run(rows(["one"]), settings(server), tmp_path)
    (tmp_path / "rewrites" / ".answers-000001-0123456789abcdef.jsonl.abc.part").write_text('{"key":')
    _, stats = run(rows(["one"]), settings(server), tmp_path)
    assert stats.num_from_cache == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to SIGINT: a sweep that ran in this process before leaves Ray Tune's behind.

    Hypothesis times Python's garbage collection by a callback, and an exception in one is printed and lost.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_keeps_the_answers_and_says_nothing(
    server: LlmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.delay_s = 0.05

    def interrupt() -> None:
        while len(server.requests) < 20:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        run(rows(numbered(1000)), settings(server, captions_per_request=1, num_concurrent=4), tmp_path)
    pressing.join()
    gc.collect()
    # asyncio logs what nobody has asked a future for.
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    kept = sum(len(file.read_text().splitlines()) for file in (tmp_path / "rewrites").iterdir())
    assert len(server.requests) - 2 * 4 <= kept < 1000


def prepare_arguments(server: LlmServer, output: Path, **more: str) -> list[str]:
    keys = {"mode": "decompose", "endpoint": server.url, "model": "m", "captions_per_request": "2", **more}
    return ["source=csv", f"input={output}/raw", f"output={output}/out", *(f"rewrite.{k}={v}" for k, v in keys.items())]


def test_killed_and_run_again_asks_only_for_what_is_missing(server: LlmServer, tmp_path: Path) -> None:
    captions = numbered(400)
    (tmp_path / "raw").mkdir()
    table = "".join(f"{number}.jpg,{caption}\n" for number, caption in enumerate(captions))
    (tmp_path / "raw" / "metadata.csv").write_text(f"image,caption\n{table}")
    server.delay_s = 0.1
    pace = {"num_concurrent": "2", "requests_per_minute": "60000"}
    arguments = prepare_arguments(server, tmp_path, **pace)
    cache = tmp_path / "out" / "rewrites"
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as job:
        deadline = time.monotonic() + 60
        while len(list(cache.glob("answers-*.jsonl")) if cache.exists() else []) < 2:
            assert job.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline, "nothing was published in time"
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    lines = [line for file in cache.glob("*.jsonl") for line in file.read_text().splitlines()]
    kept = {json.loads(line)["key"] for line in lines}
    config = parse(PrepareConfig, arguments)
    keys = DECOMPOSE.keys(config.rewrite, captions)
    assert 0 < len(kept) < len(captions)
    assert kept <= keys.keys()
    time.sleep(2 * server.delay_s)
    before = len(server.requests)
    server.delay_s = 0
    work = read(config)
    again = [caption for request in server.requests[before:] for caption in request.captions]
    assert sorted(again) == sorted(caption for key, caption in keys.items() if key not in kept)
    assert work.rewritten[0].num_from_cache == len(kept)
    assert work.captions_from["sub"].startswith("decomposed by m (prompt sha256 ")
    found = {row["captions"][0]["text"]: row["captions"][1:] for s in work.plan.shards for row in s.rows.to_pylist()}
    assert found == {
        caption: [{"aspect": "sub", "text": part} for part in sub_captions(caption)] for caption in captions
    }
