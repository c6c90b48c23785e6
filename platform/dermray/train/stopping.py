"""From SIGTERM in the driver to a checkpoint in the workers: an operator or a scheduler wants the machine back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray.actor import ActorHandle

POLL_INTERVAL_S = 0.5


@contextmanager
def on_sigterm(request_stop: Callable[[], None], *, grace_s: float) -> Iterator[None]:
    """Within the block SIGTERM calls `request_stop`, and interrupts the process as Ctrl-C does `grace_s` later.

    Signals reach the main thread only; in any other the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def stop(_: int, __: FrameType | None) -> None:
        if timers:
            return
        timers.append(threading.Timer(grace_s, os.kill, (os.getpid(), signal.SIGINT)))
        timers[0].daemon = True
        timers[0].start()
        request_stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for timer in timers:
            timer.cancel()


class StopPoll:
    """Asks the driver's mailbox now and then whether to stop, without waiting for the answer."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._answer: ray.ObjectRef | None = None
        self._asked_s = 0.0
        self._stop = False

    def __call__(self) -> bool:
        """Whether the last answer was yes."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = bool(ray.get(self._answer))
            self._answer = None
        if self._answer is None and time.monotonic() - self._asked_s >= POLL_INTERVAL_S:
            self._answer, self._asked_s = self._channel.stop_requested.remote(), time.monotonic()
        return self._stop
