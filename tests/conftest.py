"""Fixtures that every folder of tests shares: one Ray cluster for the whole session."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("dermray", deadline=None)
settings.load_profile("dermray")

ROOT = Path(__file__).resolve().parent.parent
# What an installed package of somebody's own would bring: entry points, which lead into `tests`.
INSTALLED = ROOT / "tests" / "installed"
sys.path.append(str(INSTALLED))
# Subprocesses and Ray workers import the source tree the tests belong to.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "platform"), str(ROOT), str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Vectors that tests compute, and records that they have not delivered, do not stay with whoever runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="dermray-tests-")
os.environ["DERMRAY_CACHE"] = os.path.join(_CACHE.name, "cache")
os.environ["DERMRAY_SPOOL"] = os.path.join(_CACHE.name, "spool")


# Why a test may be skipped: what it needs is not on this machine, as the test itself has looked. `.ci/run` has a clock.
NOT_BEGUN = "not begun: the time for tests of minutes was over"
EXPECTED_SKIPS = (
    NOT_BEGUN,
    "needs a CUDA device",
    "with a CUDA device torch's own allocator keeps the memory",
    "the dense loss at 32k needs 24 GiB of free memory",
    "needs a browser",
    "needs curl",
    "PostgreSQL is not installed",
    "PostgreSQL refuses root, and there is no other user",
    "there is no mount command",
    "a disk of its own may not be mounted here",
    "root may write everywhere, and there is no setpriv",
)


# Tests may put another clock in its place.
_now = time.time


def _clock(name: str) -> float:
    """A moment in seconds since 1970, which `.ci/run` sets; without it the time never ends."""
    return float(os.environ.get(name, "inf"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a cluster of their own come first: two clusters on one host confuse Ray's job submission.

    Where the time may end before the tests of minutes do, another file of them begins each day, so that none is always
    the one left out.
    """
    if _clock("DERMRAY_TESTS_BEGIN_UNTIL") < float("inf"):
        files = sorted({item.path for item in items if item.get_closest_marker("long")})
        first = int(_now() // 86_400) % max(1, len(files))
        turn = {path: (place - first) % len(files) for place, path in enumerate(files)}
        items.sort(key=lambda item: turn[item.path] if item.get_closest_marker("long") else -1)
    items.sort(key=lambda item: item.get_closest_marker("own_cluster") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of minutes is not begun when `.ci/run` has no time for it; the summary names it."""
    if item.get_closest_marker("long") is not None and _now() > _clock("DERMRAY_TESTS_BEGIN_UNTIL"):
        pytest.skip(NOT_BEGUN)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """pytest ends by itself, with a summary, before it is ended from outside."""
    if _now() > _clock("DERMRAY_TESTS_END"):
        item.session.shouldfail = "the time of the whole run is over"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip that nobody expects is a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(EXPECTED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, which tests/conftest.py does not expect: {reason}"
    return report


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The session's local Ray cluster; tests declare what they use, all share it."""
    from dermray import cluster
    from dermray.config import ClusterConfig

    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect(ClusterConfig(num_cpus=4, dashboard=False))
    yield
    import ray

    ray.shutdown()
