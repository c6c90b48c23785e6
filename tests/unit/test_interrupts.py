"""Signals at real processes: what a job does at the first one, at the second, and where it cannot hear any."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

BEGIN = """
import ctypes, hashlib, os, signal, subprocess, sys, threading, time
from dermray import entry, interrupts
from dermray.errors import StoppedError
interrupts.END_WITHIN_S = 0.6
def begun():
    print("begun", flush=True)
"""
END = "\nsys.exit(entry.run_job(main))\n"
SLEEP = """
def main():
    begun()
    time.sleep(60)
"""
TELLING = """
def main():
    with interrupts.telling(lambda: "two shards are kept"):
        begun()
        time.sleep(60)
"""
# Python's handler waits until C comes back, which is in an hour.
DEAF = """
def main():
    begun()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
SWALLOWING = """
def main():
    begun()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""
WITH_CHILD = """
def main():
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, "
                              "{signal.SIGINT, signal.SIGTERM}); time.sleep(60)"])
    print(child.pid, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
STOPPING = """
def main():
    asked = threading.Event()
    with interrupts.stopping(asked.set, grace_s=30):
        begun()
        asked.wait()
    raise StoppedError("stopped at step 7")
"""
NEVER_STOPPING = """
def main():
    with interrupts.telling(lambda: "step 3 is kept"), interrupts.stopping(lambda: None, grace_s=0.5):
        begun()
        time.sleep(60)
"""
LOSING = """
def main():
    threading.Timer(0.1, interrupts.lose, ["the node is lost"]).start()
    with interrupts.telling(lambda: "two shards are kept"):
        begun()
        time.sleep(60)
"""
# As Ray does while it starts, and as it leaves things.
TAKING_SIGTERM = """
def main():
    with interrupts.kept():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    begun()
    time.sleep(60)
"""
TAKING_SIGTERM_STILL = """
def main():
    with interrupts.kept():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        begun()
        time.sleep(60)
"""
HELD_BACK = """
def main():
    with interrupts.held_back() as let_interrupt:
        begun()
        while not interrupts.was_asked():
            time.sleep(0.01)
        print("done whole", file=sys.stderr)
        with let_interrupt:
            print("not interrupted", file=sys.stderr)
"""
LAST_WORDS = """
def main():
    with interrupts.last_words(lambda: print("the run is killed", flush=True)):
        begun()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
INT, TERM = signal.SIGINT, signal.SIGTERM


def job(main: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", BEGIN + main + END], start_new_session=True, **pipes)
    assert process.stdout is not None
    process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
    # What follows the line, a call of C or a wait, is to have begun.
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(
    ("main", "signals", "code", "said"),
    [
        (SLEEP, [INT], 130, "interrupted\n"),
        (SLEEP, [TERM], 143, "interrupted\n"),
        # One request: `timeout` tells the process and its group. A busy machine may deal the two out slowly.
        (
            f"interrupts.SAME_WITHIN_S = 10{STOPPING}",
            [INT, INT],
            130,
            "Ctrl-C: stopping within 30 s; once more ends it at once\nstopped at step 7\n",
        ),
        (STOPPING, [TERM], 143, "SIGTERM: stopping within 30 s; once more ends it at once\nstopped at step 7\n"),
        (TELLING, [TERM], 143, "stopped: two shards are kept\n"),
        (NEVER_STOPPING, [INT], 130, "once more ends it at once\nstopped: step 3 is kept\n"),
        (DEAF, [INT], 130, "interrupted: ended by force, since it did not end by itself\n"),
        (SWALLOWING, [TERM], 143, "interrupted: ended by force, since it did not end by itself\n"),
        (TAKING_SIGTERM, [TERM], 143, "interrupted\n"),
        (TAKING_SIGTERM_STILL, [TERM], 143, "interrupted\n"),
        (HELD_BACK, [TERM], 143, "done whole\ninterrupted\n"),
        (LOSING, [], 1, "error: the node is lost; two shards are kept\n"),
    ],
)
def test_the_first_signal_ends_a_job(main: str, signals: list[signal.Signals], code: int, said: str) -> None:
    process = job(main)
    for number in signals:
        process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert told.endswith(said)
    assert "Traceback" not in told
    assert process.returncode == code


@pytest.mark.parametrize("main", [f"interrupts.END_WITHIN_S = 60{DEAF}", NEVER_STOPPING.replace("=0.5", "=60")])
def test_the_second_signal_ends_it_at_once(main: str) -> None:
    process = job(main)
    process.send_signal(INT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(INT)
    _, told = process.communicate(timeout=30)
    assert told.endswith("interrupted: ended at once\n")
    assert process.returncode == 130


def test_nothing_it_has_started_outlives_it() -> None:
    process = job(WITH_CHILD)
    child = psutil.Process(int(process.first_line))  # type: ignore[attr-defined]
    os.killpg(process.pid, INT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_is_ended_by_force_has_a_last_word() -> None:
    process = job(LAST_WORDS)
    process.send_signal(TERM)
    out, _ = process.communicate(timeout=30)
    assert out == "the run is killed\n"
