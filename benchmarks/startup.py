"""How soon a command answers: `python benchmarks/startup.py`.

Seconds to the end of `--help` and of a refusal (a key that does not exist), of every command; the median of three runs,
each in a process of its own, with the processor time beside it, which other work on the machine hardly changes. Last,
of `serve run` with a model that is not there: seconds to the first line (Ray's own), to ours, and to the refusal;
beside it Ray's `serve --help`, which none of our code runs in.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [*sorted(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")), "tune/sweep.py"]
SERVE = str(Path(sys.executable).parent / "serve")
NUM_RUNS = 3


@dataclass(frozen=True)
class Run:
    """Seconds of a command: on the clock, and of the processor."""

    seconds: float
    cpu_s: float


def main() -> int:
    print(f"{'':<26}{'--help':>9}{'cpu':>8}{'refusal':>10}{'cpu':>8}   seconds, median of {NUM_RUNS}")
    for command in COMMANDS:
        help_s, refusal_s = of(command, "--help", code=0), of(command, "no_such_key=1", code=2)
        print(
            f"{command:<26}{help_s.seconds:>9.2f}{help_s.cpu_s:>8.2f}{refusal_s.seconds:>10.2f}{refusal_s.cpu_s:>8.2f}",
            flush=True,
        )
    runs = [serving() for _ in range(NUM_RUNS)]
    first_s, ours_s, end_s = (statistics.median(times) for times in zip(*runs, strict=True))
    help_s = statistics.median(_timed([SERVE, "--help"], 0).seconds for _ in range(NUM_RUNS))
    print(f"serve run: first line {first_s:.2f}, ours {ours_s:.2f}, refusal {end_s:.2f}; serve --help {help_s:.2f}")
    return 0


def serving() -> tuple[float, float, float]:
    """Seconds of `serve run` to its first line, to ours, and to its end, which is a refusal."""
    command = [SERVE, "run", "serve.app:build", "model=no-such-model"]
    started, seen = time.monotonic(), dict[str, float]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.setdefault("ours" if line.startswith("dermray:") else "first", time.monotonic() - started)
    if not process.returncode or "ours" not in seen:
        raise SystemExit(f"serve run did not refuse a model that is not there (exit code {process.returncode})")
    return min(seen.values()), seen["ours"], time.monotonic() - started


def of(command: str, argument: str, *, code: int) -> Run:
    """A command with one argument, which must end with exit code `code`."""
    runs = [_run(command, argument, code) for _ in range(NUM_RUNS)]
    return Run(statistics.median(run.seconds for run in runs), statistics.median(run.cpu_s for run in runs))


def _run(command: str, argument: str, code: int) -> Run:
    return _timed([sys.executable, str(ROOT / command), argument], code)


def _timed(command: list[str], code: int) -> Run:
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, check=False)
    seconds, after = time.monotonic() - started, os.times()
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr.decode()}")
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, used)


if __name__ == "__main__":
    sys.exit(main())
