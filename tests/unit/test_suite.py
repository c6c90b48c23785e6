"""The rules of tests/conftest.py for whoever runs the tests: no unexpected skip, and an end of time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import NOT_BEGUN, ROOT

SUITE = """
import pytest

@pytest.mark.long
def test_of_minutes():
    pass

def test_without_a_program():
    pytest.skip("needs curl")

def test_that_gives_up():
    pytest.skip("it did not work today")

def test_after_it():
    pass
"""


def outcome(folder: Path, **clock: float) -> str:
    (folder / "test_toy.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder), "-p", "no:cacheprovider", str(folder)]
    # Without the clock of the run that this test itself belongs to.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DERMRAY_TESTS_")}
    environment |= {name: str(moment) for name, moment in clock.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=120).stdout


def test_a_skip_that_nobody_expects_is_a_failure_and_one_without_a_program_is_none(tmp_path: Path) -> None:
    told = outcome(tmp_path, DERMRAY_TESTS_BEGIN_UNTIL=time.time() + 600)
    assert "1 failed, 2 passed, 1 skipped" in told
    assert "test_that_gives_up was skipped, which tests/conftest.py does not expect: it did not work today" in told


def test_tests_of_minutes_are_not_begun_after_their_time_and_the_summary_says_so(tmp_path: Path) -> None:
    told = outcome(tmp_path, DERMRAY_TESTS_BEGIN_UNTIL=time.time() - 1, DERMRAY_TESTS_END=time.time() + 600)
    assert "1 failed, 1 passed, 2 skipped" in told
    assert NOT_BEGUN in told


def test_nothing_is_begun_after_the_end_and_that_is_a_failure(tmp_path: Path) -> None:
    told = outcome(tmp_path, DERMRAY_TESTS_END=time.time() - 1)
    assert "1 passed" in told
    assert "stopping after 0 failures" not in told
    assert "the time of the whole run is over" in told
