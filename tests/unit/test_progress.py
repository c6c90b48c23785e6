"""What long work says of itself: counts, rate, time left, what it waits for; and never nothing for long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from dermray import cluster, entry, progress
from dermray.prepare.timing import Timing
from dermray.progress import Progress, busy
from dermray.train.progress import News, StepRecord, Waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock, which stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_counts_rate_time_left_and_what_is_waited_for(clock: Callable[[float], None]) -> None:
    work = Progress("prepare", 2000, "images", pieces=(4, "shards"), waits_for=lambda: "a task of 1 CPU; free now: 0")
    assert work.line(2.0) == "prepare: 0/4 shards, 0/2,000 images, waiting since 2 s for a task of 1 CPU; free now: 0"
    clock(20.0)
    work.advance(500)
    assert work.line(20.0) == "prepare: 1/4 shards, 500/2,000 images, 25 images/s, ETA 0:01:00"
    clock(24.0)
    work.advance(500)
    # Workers started in the 20 s until the first piece: they are no part of the rate.
    assert work.line(24.0) == "prepare: 2/4 shards, 1,000/2,000 images, 125 images/s, ETA 0:00:08"
    assert work.line(30.0).endswith("ETA 0:00:20, waiting since 6 s for a task of 1 CPU; free now: 0")


@pytest.mark.parametrize(("num", "rate"), [(3, "0.30 parts/s"), (30, "3.0 parts/s"), (30_000, "3,000 parts/s")])
def test_slow_rates_have_digits(clock: Callable[[float], None], num: int, rate: str) -> None:
    work = Progress("export", 2 * num, "parts")
    clock(10.0)
    work.advance(num)
    assert work.line(10.0) == f"export: {num:,}/{2 * num:,} parts, {rate}, ETA 0:00:10"


def told_within(deadline_s: float, lines: list[str], num: int) -> bool:
    end = time.monotonic() + deadline_s
    while len(lines) < num and time.monotonic() < end:
        time.sleep(0.005)
    return len(lines) >= num


@pytest.mark.parametrize("fails", [False, True])
def test_lines_come_by_themselves_and_end_with_the_work(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    lines: list[str] = []
    try:
        with Progress("index", 1, "parts", say=lines.append) as work:
            assert told_within(30, lines, 3), "nothing has been finished, and that is said"
            if fails:
                raise KeyboardInterrupt
            work.advance()
    except KeyboardInterrupt:
        assert fails
    assert ("index: 1/1 parts in 0:00:0" in lines[-1]) == (not fails), "an end only where it was reached"
    num_lines = len(lines)
    work.done()
    time.sleep(0.1)
    assert len(lines) == num_lines
    assert all(line.startswith("index: 0/1 parts, waiting since 0 s for the first parts") for line in lines[:3])


def test_what_cannot_be_counted_is_told_too_and_what_is_short_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with busy("index: measuring", lines.append), Progress("export", 1, "parts", say=lines.append) as work:
        work.advance()
    assert lines == []
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    with busy("index: measuring", lines.append):
        assert told_within(30, lines, 2)
    assert lines[0] == "index: measuring, for 0 s so far"


def test_a_preparation_tells_of_stages_that_do_not_tell_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    with Timing().stage("make shards", tells=True):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""
    said, end = "", time.monotonic() + 30
    with Timing().stage("report and commit"):
        while not said and time.monotonic() < end:
            time.sleep(0.005)
            said = capsys.readouterr().out
    assert said.startswith("prepare: report and commit, for 0 s so far")


def test_a_job_that_has_begun_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.02)
    said: list[str] = []

    def say(start: str) -> None:
        """Wait until a line begins so."""
        end = time.monotonic() + 30
        while not any(line.startswith(start) for line in said) and time.monotonic() < end:
            time.sleep(0.005)
            said.extend(capsys.readouterr().out.splitlines())
        assert any(line.startswith(start) for line in said), said

    def job() -> int:
        time.sleep(0.1)
        assert capsys.readouterr().out == "", "what has not begun may be as silent as it likes"
        entry.begin("embed", "loading torch")
        say("embed: loading torch …")
        say("embed: loading torch, for 0 s so far")
        print("joined it")
        say("embed: still at work, 0 s after what was said last")
        with busy("embed: measuring", lambda line: None):
            say("embed: measuring, for 0 s so far")
        return 0

    assert entry.run_job(job) == 0
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
    print("as before")
    assert capsys.readouterr().out == "as before\n"


def test_the_driver_of_a_training_says_what_it_waits_for_at_every_moment(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "free", lambda: "free now: 1 of 2 CPUs")
    said: list[str] = []
    waiting = Waiting("2 workers", said.append)

    def hears(at_s: float, *steps: int, notices: Sequence[str] = (), **state: bool) -> list[str]:
        clock(at_s)
        said.clear()
        records = [StepRecord(step, 100, {}) for step in steps]
        news = News(list(notices), records, None, state.get("loading", False), state.get("training", False))
        waiting.hear(news)
        return list(said)

    assert hears(3) == []
    assert hears(5) == ["waiting for 2 workers since 5 s; free now: 1 of 2 CPUs"]
    assert hears(6) == []
    assert hears(10, loading=True) == ["waiting for 2 workers to make the model since 10 s; free now: 1 of 2 CPUs"]
    assert hears(12, notices=["ready"], training=True) == []
    assert hears(17, training=True) == ["waiting for the figures of the first steps since 5 s"]
    assert hears(18, 49, 50, training=True) == []
    assert hears(21, training=True) == []
    assert hears(24, training=True) == ["waiting for figures of what follows step 50 of 100 since 6 s"]
    assert hears(25, 100, training=True) == []
    (last,) = hears(30, training=True)
    assert last == "waiting for what follows the last step: scores, a checkpoint, the model since 5 s"
