"""What a running training says: records travel from rank 0 to the driver, which prints them and logs them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_INTERVAL_S = 0.5
SHOWN_SCORES = ("accuracy", "R_at_10")


@dataclass(frozen=True)
class StepRecord:
    """Figures of one logged step; `verdict` says in a line what limits the run."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    verdict: str = ""


@ray.remote(num_cpus=0)
class ProgressChannel:
    """A mailbox between the workers and the driver, so that no rank talks to MLflow."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._notices: list[str] = []
        self._stop = False

    def push(self, record: StepRecord) -> None:
        """Rank 0 hands in a record."""
        self._records.append(record)

    def tell(self, notice: str) -> None:
        """Rank 0 has a line for whoever watches."""
        self._notices.append(notice)

    def drain(self) -> tuple[list[str], list[StepRecord]]:
        """The driver takes what has come since it last asked."""
        notices, records = self._notices, self._records
        self._notices, self._records = [], []
        return notices, records

    def request_stop(self) -> None:
        """The driver wants a checkpoint and the end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Rank 0 asks whether it does."""
        return self._stop


class ProgressListener:
    """Drains a channel in a thread of the driver and hands on each notice and each record, in order."""

    def __init__(self, on_record: Callable[[StepRecord], None], on_notice: Callable[[str], None]) -> None:
        # With the driver: on another node it would be lost with that node, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.channel: ActorHandle = ProgressChannel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._on_record, self._on_notice = on_record, on_notice
        self._stop = threading.Event()
        self._stop_training = threading.Event()
        self._thread = threading.Thread(target=self._run, name="training-progress", daemon=True)

    def __enter__(self) -> ProgressListener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        ray.kill(self.channel)

    def request_stop(self) -> None:
        """Have the workers write a checkpoint and end; safe in a signal handler."""
        self._stop_training.set()

    @property
    def stop_was_requested(self) -> bool:
        """Whether it was."""
        return self._stop_training.is_set()

    def _run(self) -> None:
        told = False
        while True:
            stopping = self._stop.is_set()
            if self._stop_training.is_set() and not told:
                ray.get(self.channel.request_stop.remote())
                told = True
            notices, records = ray.get(self.channel.drain.remote())
            for notice in notices:
                self._on_notice(notice)
            for record in records:
                self._on_record(record)
            if stopping:
                return
            self._stop.wait(POLL_INTERVAL_S)


class ProgressPrinter:
    """Prints one line a record: loss, speed, data wait, MFU and ETA, or held-out scores; and what is new.

    New is another verdict, or another number of workers.
    """

    def __init__(self, print_line: Callable[[str], None] | None = None) -> None:
        self._print = print_line or functools.partial(print, flush=True)
        self._begun: tuple[float, int] | None = None
        self._num_workers: float | None = None
        self.verdict = ""

    def __call__(self, record: StepRecord) -> None:
        """Print a record."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, record.step)
        metrics = record.metrics
        if "loss" in metrics:
            figures = f"{_shown(metrics)}  ETA {self._eta(record, now)}"
        else:
            shown = [key for key in metrics if key.endswith(SHOWN_SCORES)]
            figures = "  ".join(f"{key.removeprefix('validation_')} {metrics[key]:.3f}" for key in shown)
        self._print(f"step {record.step:>6}/{record.num_steps}  {figures}")
        num_workers = metrics.get("num_workers", self._num_workers)
        if num_workers != self._num_workers:
            self._print(f"{'':>5}{num_workers:.0f} worker{'s' if num_workers != 1 else ''}")
            self._num_workers = num_workers
        if record.verdict:
            if record.verdict.partition(" (")[0] != self.verdict.partition(" (")[0]:
                self._print(f"{'':>5}{record.verdict}")
            self.verdict = record.verdict

    def _eta(self, record: StepRecord, now: float) -> str:
        assert self._begun is not None
        since, first_step = self._begun
        done = record.step - first_step
        if done <= 0:
            return "-"
        seconds = round((now - since) / done * (record.num_steps - record.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _shown(metrics: dict[str, float]) -> str:
    """The figures of a training step that fit a line."""
    parts = [
        f"loss {metrics['loss']:.4f}",
        f"{metrics['samples_per_s']:,.0f} samples/s",
        f"data wait {metrics['data_wait_share']:.0%}",
    ]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.0%}")
    if metrics.get("skipped_steps"):
        parts.append(f"skipped {metrics['skipped_steps']:.0f}")
    return "  ".join(parts)
