"""How long a training stands still after a SIGKILL and what it repeats: `python benchmarks/resume.py [worker driver]`.

Real jobs on a corpus made for it: `jobs/pretrain.py` with two workers on a Ray cluster of its own. One worker is killed
some steps after a checkpoint, and Ray Train starts the group again; of another job all is killed, and the same command
given again at once, which also starts a new Ray cluster. Told are the seconds from the kill to the next step, and how
many steps were taken twice. Steps are seen when they are printed, at most half a second late.
"""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from dermray import entry

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_EVERY = 20
# Steps after the last checkpoint at which the kill comes.
STEPS_AFTER = 10
DEADLINE_S = 180
TOY = (
    "model=dermray_tiny",
    "num_workers=2",
    "tracking.enabled=false",
    "train.global_batch_size=32",
    "train.max_steps=100000",
    "train.epochs=100000",
    "train.log_every_steps=1",
    f"train.checkpoint_every_steps={CHECKPOINT_EVERY}",
)


class Job:
    """A pretraining that is watched by what it prints."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self._steps: queue.Queue[tuple[int, float]] = queue.Queue()
        self._last_step = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.match(r"step +(\d+)/", line):
                self._last_step = int(match[1])
                self._steps.put((self._last_step, time.monotonic()))

    def next_step(self) -> tuple[int, float]:
        """The number of the next printed step, and when it was printed."""
        return self._steps.get(timeout=DEADLINE_S)

    def run_to(self, step: int) -> tuple[int, float]:
        """Wait for a step."""
        while True:
            reached = self.next_step()
            if reached[0] >= step:
                return reached

    def kill(self) -> int:
        """SIGKILL to the job and whatever belongs to it; the last step it printed."""
        if self.process.poll() is None:
            for process in [psutil.Process(self.process.pid), *self.processes()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self._reader.join()
        return self._last_step

    def processes(self, named: str = "") -> list[psutil.Process]:
        """Its descendants whose command line holds a word."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if named in " ".join(child.cmdline())]


def main() -> int:
    """Make a corpus; kill what the command line names, or both."""
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as name:
        folder = Path(name)
        run_job("synthesize", f"output={folder}/raw", "num_images=300")
        run_job("prepare", "source=derm1m", f"input={folder}/raw", f"output={folder}/corpus", "row_group_size=16",
                "tracking.enabled=false")  # fmt: skip
        arguments = (f"corpus={folder}/corpus", *TOY)
        for victim in sys.argv[1:] or ("worker", "driver"):
            (kill_worker if victim == "worker" else kill_driver)((f"output={folder}/{victim}", *arguments))
    return 0


def kill_worker(arguments: tuple[str, ...]) -> None:
    """One of two workers."""
    job = Job(*arguments)
    try:
        reached, _ = job.run_to(CHECKPOINT_EVERY + STEPS_AFTER)
        job.processes("RayTrainWorker")[-1].send_signal(signal.SIGKILL)
        tell("a worker", job, reached, time.monotonic())
    finally:
        job.kill()


def kill_driver(arguments: tuple[str, ...]) -> None:
    """The job with its Ray cluster; then the same command."""
    job = Job(*arguments)
    job.run_to(CHECKPOINT_EVERY + STEPS_AFTER)
    killed_at = time.monotonic()
    reached = job.kill()
    job = Job(*arguments)
    try:
        tell("the driver and its Ray cluster", job, reached, killed_at)
    finally:
        job.kill()


def run_job(name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def tell(what: str, job: Job, reached: int, killed_at: float) -> None:
    """Follow the steps after a kill at `reached` until training is where it was."""
    last = reached
    while True:
        step, at = job.next_step()
        if step <= last:
            break
        # Steps that were on their way when the kill came.
        last = step
    resumed_s, resumed = at - killed_at, step
    _, at = job.run_to(last + 1)
    print(
        f"SIGKILL of {what} at step {last}: training again after {resumed_s:.1f} s, at step {resumed}; "
        f"{last - resumed + 1} steps taken twice (checkpoints every {CHECKPOINT_EVERY}), a new step after "
        f"{at - killed_at:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
