"""What a running training says: records travel from rank 0 to the driver, which prints them and logs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dermray import cluster, interrupts
from dermray.progress import EVERY_S, Say, clock, print_line
from dermray.train.stopping import POLL_INTERVAL_S

ABORT_TIMEOUT_S = 2.0
# How long a training that is done waits for a driver that may be busy, or gone.
HEARD_WITHIN_S, ASK_EVERY_S = 10.0, 0.1
SHOWN_SCORES = ("accuracy", "R_at_10", "effective_rank", "masked_cosine")


@dataclass(frozen=True)
class StepRecord:
    """Figures of one logged step, or scores of a validation; `verdict` says in a line what limits the run."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    verdict: str = ""

    @property
    def is_validation(self) -> bool:
        """Whether it tells of a validation, which may have no scores."""
        return "loss" not in self.metrics


@dataclass(frozen=True)
class News:
    """What has come to the mailbox since the driver last looked.

    Attributes:
        controller: Ray Train's, once it is there.
        loading: the workers have their places and are making the model.
        training: they have made it.
    """

    notices: list[str]
    records: list[StepRecord]
    controller: ActorHandle | None
    loading: bool
    training: bool


@ray.remote(num_cpus=0)
class ProgressChannel:
    """A mailbox between the workers and the driver, so that no rank talks to MLflow."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._num_unheard = 0
        self._notices: list[str] = []
        self._stop = False
        self._controller: ActorHandle | None = None
        self._loading = self._training = False

    def push(self, record: StepRecord) -> None:
        """Rank 0 hands in a record."""
        self._records.append(record)
        self._num_unheard += 1

    def hear(self, count: int) -> None:
        """The driver has logged so many records more."""
        self._num_unheard -= count

    def num_unheard(self) -> int:
        """Rank 0 asks how many records the driver has not logged."""
        return self._num_unheard

    def tell(self, notice: str) -> None:
        """A line for whoever watches."""
        self._notices.append(notice)

    def load(self) -> None:
        """Rank 0 has begun."""
        self._loading = True

    def ready(self, notice: str) -> None:
        """Rank 0 begins to train."""
        self._training = True
        self._notices.append(notice)

    def put_controller(self, controller: ActorHandle) -> None:
        """Ray Train's controller says where it is."""
        self._controller = controller

    def start_anew(self) -> None:
        """It starts workers, which are not ready."""
        self._loading = self._training = False

    def drain(self) -> News:
        """The driver takes what has come since it last asked."""
        notices, records = self._notices, self._records
        self._notices, self._records = [], []
        return News(notices, records, self._controller, self._loading, self._training)

    def request_stop(self) -> None:
        """The driver wants a checkpoint and the end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Rank 0 asks whether it does."""
        return self._stop


def wait_until_heard(channel: ActorHandle) -> None:
    """Return when the driver has logged all records that this process has sent; or after `HEARD_WITHIN_S`."""
    deadline = time.monotonic() + HEARD_WITHIN_S
    while ray.get(channel.num_unheard.remote()) and time.monotonic() < deadline:
        time.sleep(ASK_EVERY_S)


class ProgressListener:
    """Drains a channel in a thread of the driver and hands on each notice and each record, in order.

    Asked to stop, it has training workers write a checkpoint; where none trains, the driver is interrupted, or Ray
    Train's controller ended, at once.

    Args:
        workers: what is waited for until they train: "2 training workers of 1 CPU".
        stop_requested: asked now and then whether to stop, besides `request_stop`.

    Attributes:
        is_training: the workers have made the model and take steps.
    """

    def __init__(
        self,
        on_record: Callable[[StepRecord], None],
        on_notice: Callable[[str], None],
        *,
        workers: str = "training workers",
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        # With the driver: on another node it would be lost with that node, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.channel: ActorHandle = ProgressChannel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._on_record, self._on_notice = on_record, on_notice
        self._waiting, self._stop_requested = Waiting(workers, on_notice), stop_requested
        self._stop = threading.Event()
        self._stop_training = threading.Event()
        self._told_to_stop = False
        self.is_training = False
        self._controller: ActorHandle | None = None
        self._thread = threading.Thread(target=self._run, name="training-progress", daemon=True)

    def __enter__(self) -> ProgressListener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if interrupts.loss() is None:
            self._thread.join(timeout=30)
            ray.kill(self.channel)

    def request_stop(self) -> None:
        """Have the workers write a checkpoint and end; safe in a signal handler."""
        self._stop_training.set()

    @property
    def stop_was_requested(self) -> bool:
        """Whether it was."""
        return self._stop_training.is_set()

    def abort(self) -> None:
        """End the controller of Ray Train, and with it all workers, now."""
        if self._controller is None or interrupts.loss() is not None:
            return
        try:
            ray.get(self._controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
        except GetTimeoutError:
            # While it starts workers it hears nothing; they end with it.
            ray.kill(self._controller)
        except RayError:
            # A controller that is aborted leaves by ending its own process.
            return

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            news = ray.get(self.channel.drain.remote())
            self._controller, self.is_training = news.controller, news.training
            for notice in news.notices:
                self._on_notice(notice)
            for record in news.records:
                self._on_record(record)
            if news.records:
                self.channel.hear.remote(len(news.records))
            if stopping:
                return
            self._waiting.hear(news)
            if self._stop_requested():
                self._stop_training.set()
            if self._stop_training.is_set():
                self._pass_on_the_stop(news)
            self._stop.wait(POLL_INTERVAL_S)

    def _pass_on_the_stop(self, news: News) -> None:
        if not news.training:
            # A trial has no main thread of its own; and of a controller that has yet to start there is no handle.
            if not interrupts.interrupt():
                self.abort()
        elif not self._told_to_stop:
            ray.get(self.channel.request_stop.remote())
            self._told_to_stop = True


class Waiting:
    """Says every few seconds what the driver of a training waits for, where the workers say nothing.

    Args:
        workers: in words.
        say: prints a line.
    """

    def __init__(self, workers: str, say: Callable[[str], None]) -> None:
        self._workers, self._say = workers, say
        self._since = self._told = time.monotonic()
        self._last: StepRecord | None = None

    def hear(self, news: News) -> None:
        """What the workers have said by now, which may be nothing."""
        now = time.monotonic()
        self._last = news.records[-1] if news.records else self._last
        if news.training and (news.notices or news.records):
            self._since = self._told = now
        elif now - self._told >= EVERY_S:
            self._told = now
            free = "" if news.training else f"; {cluster.free()}"
            self._say(f"waiting for {self._what(news)} since {now - self._since:.0f} s{free}")

    def _what(self, news: News) -> str:
        if not news.training:
            return f"{self._workers} to make the model" if news.loading else self._workers
        if self._last is None:
            return "the figures of the first steps"
        if self._last.step < self._last.num_steps:
            return f"figures of what follows step {self._last.step} of {self._last.num_steps}"
        return "what follows the last step: scores, a checkpoint, the model"


class ProgressPrinter:
    """Prints one line a record: loss, speed, data wait, MFU and ETA, or held-out scores; and what is new.

    New is another verdict, or another number of workers.
    """

    def __init__(self, say: Say = print_line) -> None:
        self._print = say
        self._begun: tuple[float, int] | None = None
        self._num_workers: float | None = None
        self.verdict = ""

    def __call__(self, record: StepRecord) -> None:
        """Print a record."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, record.step)
        metrics = record.metrics
        if record.is_validation:
            shown = [key for key in metrics if key.endswith(SHOWN_SCORES)]
            figures = "  ".join(f"{key.removeprefix('validation_')} {metrics[key]:.3f}" for key in shown)
        else:
            figures = f"{_shown(metrics)}  ETA {self._eta(record, now)}"
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
        return clock((now - since) / done * (record.num_steps - record.step))


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
