"""The clock on the wall may be set while a job runs: nothing is timed by it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from itertools import count

import pytest

from dermray.tracking.system import SystemSampler
from dermray.train import loop
from dermray.train.progress import ProgressPrinter, StepRecord
from tests.conftest import ROOT

# What says when something happened, or compares with dates of files and servers; none of it measures a time.
DATES = {
    "platform/dermray/prepare/rewriting/endpoint.py",
    "platform/dermray/release/garbage.py",
    "platform/dermray/tracking/runs.py",
    "platform/dermray/tracking/system.py",
    "platform/dermray/tuning/records.py",
    "platform/dermray/tuning/sweep.py",
}


def test_nothing_else_looks_at_the_clock_on_the_wall() -> None:
    sources = [file for folder in ("platform", "jobs", "tune", "serve") for file in (ROOT / folder).rglob("*.py")]
    users = {str(file.relative_to(ROOT)) for file in sources if re.search(r"\btime\.time\(", file.read_text())}
    assert users <= DATES


def jumping(step_s: float) -> Callable[[], float]:
    """A clock that is set again before every look at it."""
    begun, looks = time.time(), count(1)
    return lambda: begun + step_s * next(looks)


@pytest.mark.parametrize("step_s", [-86_400.0, 86_400.0])
def test_system_metrics_keep_their_steps(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    steps: list[int] = []

    def log(figures: Mapping[str, float], step: int) -> None:
        steps.append(step)

    began_at = time.time() - 100
    sampler = SystemSampler(log, interval_s=0.05, began_at=began_at)
    monkeypatch.setattr(time, "time", jumping(step_s))
    end = time.monotonic() + 30
    while len(steps) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    sampler.close()
    assert len(steps) >= 4
    assert steps == sorted(steps)
    assert 100 <= steps[0] <= steps[-1] <= 140


@pytest.mark.parametrize("step_s", [-86_400.0, 86_400.0])
def test_checkpoints_and_the_time_that_is_left_do_not_jump(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    monkeypatch.setattr(time, "time", jumping(step_s))
    clock = loop._Clock(minutes=60)
    lines: list[str] = []
    printer = ProgressPrinter(lines.append)
    for step in (1, 2):
        figures = {"loss": 1.0, "samples_per_s": 1.0, "data_wait_share": 0.0}
        printer(StepRecord(step, 3, figures))
        time.sleep(0.02)
        assert not clock.due()
    assert lines[-1].endswith("ETA 0:00:00")
