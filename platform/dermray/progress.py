"""The one way in which long work says how far it is: a line every few seconds with counts, rate and time left.

A job whose output is `watched` is never silent for longer: where nothing tells, it says what it is at.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Any

# Nobody waits longer for a line than EVERY_S; short work is told about a little sooner.
FIRST_S = 2.0
EVERY_S = 4.0
# Until so many lines are out, they come every FIRST_S.
NUM_FIRST = 15
# A watched job that has printed nothing for so long says what it is at; later than whatever tells by itself.
QUIET_S = 4.5

Say = Callable[[str], None]


class Progress:
    """Says from a thread of its own, within its `with` block, how much of what `advance` counts is there.

    `with Progress("export", 40, "parts") as progress: … progress.advance()` prints lines such as
    "export: 12/40 parts, 3.1 parts/s, ETA 0:00:09".

    Args:
        name: of the work, at the beginning of each line.
        total: of what is counted, in `unit`.
        unit: plural: "images".
        pieces: how many calls of `advance` there will be, and what each of them finishes: `(4, "shards")`; empty: each
            line counts units only.
        waits_for: says what is waited for, asked when nothing has been finished for `EVERY_S` seconds.
        say: takes a line; empty: print it.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        pieces: tuple[int, str] | None = None,
        waits_for: Callable[[], str] | None = None,
        say: Say | None = None,
    ) -> None:
        self._name, self._total, self._unit, self._pieces = name, total, unit, pieces
        self._waits_for = waits_for
        self._say = say or print_line
        self._num_done = self._num_pieces = 0
        self._began = self._moved = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._ticker = _Ticker(self._tell)

    def __enter__(self) -> Progress:
        self._began = self._moved = time.monotonic()
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.done()

    def advance(self, num: int = 1) -> None:
        """One more piece is finished, of `num` units."""
        self._num_done += num
        self._num_pieces += 1
        self._moved = time.monotonic()
        self._first = self._first or (self._moved, self._num_done)

    def done(self) -> None:
        """No more lines, as at the end of the block; whoever was told how far it is, is told its end too."""
        if self._ticker.stop() and self._num_done >= self._total:
            now = time.monotonic()
            self._say(f"{self._counts()} in {clock(now - self._began)}")

    def line(self, now_s: float) -> str:
        """What is said at a moment of `time.monotonic`."""
        rate = self._rate(now_s)
        parts = [self._counts()]
        if rate:
            digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
            left = clock((self._total - self._num_done) / rate)
            parts.append(f"{rate:,.{digits}f} {self._unit}/s, ETA {left}")
        still_s = now_s - self._moved
        if not rate or still_s >= EVERY_S:
            what = self._waits_for() if self._waits_for else f"the {'next' if self._num_done else 'first'} {self._unit}"
            parts.append(f"waiting since {still_s:.0f} s for {what}")
        return ", ".join(parts)

    def _counts(self) -> str:
        pieces = f"{self._num_pieces:,}/{self._pieces[0]:,} {self._pieces[1]}, " if self._pieces else ""
        return f"{self._name}: {pieces}{self._num_done:,}/{self._total:,} {self._unit}"

    def _rate(self, now_s: float) -> float:
        """Units a second. As soon as that can be told, without the time until the first piece: workers start in it."""
        if self._first is None:
            return 0.0
        first_s, first_done = self._first
        if now_s - first_s >= EVERY_S and self._num_done > first_done:
            return (self._num_done - first_done) / (now_s - first_s)
        return self._num_done / max(now_s - self._began, 1e-9)

    def _tell(self) -> None:
        self._say(self.line(time.monotonic()))


@contextlib.contextmanager
def busy(what: str | Callable[[], str], say: Say | None = None) -> Iterator[None]:
    """Within the block a line every few seconds that it still goes on, for work that cannot be counted.

    Args:
        what: goes on: "index: building the graph of 200,000 vectors"; or says it anew for each line.
        say: takes a line; empty: print it.
    """
    say = say or print_line
    began = time.monotonic()
    words = what if callable(what) else lambda: what

    def line() -> str:
        return f"{words()}, for {time.monotonic() - began:.0f} s so far"

    ticker = _Ticker(lambda: say(line()))
    ticker.start()
    _lines.append(line)
    try:
        yield
    finally:
        _lines.remove(line)
        ticker.stop()


def clock(seconds: float) -> str:
    """Seconds as `1:02:03`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


# What jobs say their lines with: at once, also into a pipe.
print_line: Say = functools.partial(print, flush=True)


# What each block of `busy` would say now, the innermost last.
_lines: list[Callable[[], str]] = []


class Watch:
    """Within its `with` block a job that has begun is never silent for long, whatever it imports or waits for.

    Once neither stdout nor stderr got anything for `QUIET_S`, a thread says what the innermost block of `busy` is at,
    or else that the job goes on. While foreign code keeps Python's lock, it has to wait.
    """

    def __init__(self) -> None:
        self._job = self._first = ""
        self._telling = False
        self._began_s = self._heard_s = self._line_s = 0.0
        self._over = threading.Event()
        self._heard: dict[str, _Heard] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)
        for name, stream in self._heard.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.stream)

    def begin(self, job: str, what: str) -> None:
        """The job has begun, and is at `what` until it says something else."""
        if self._job:
            return
        self._job, self._first = job, what
        self._began_s = self._heard_s = self._line_s = time.monotonic()
        for name in ("stdout", "stderr"):
            self._heard[name] = _Heard(getattr(sys, name), self._hear)
            setattr(sys, name, self._heard[name])
        self._thread.start()

    def _hear(self) -> None:
        self._heard_s = time.monotonic()
        if not self._telling:
            self._line_s, self._first = self._heard_s, ""

    def _run(self) -> None:
        while not self._over.wait(max(0.01, self._heard_s + QUIET_S - time.monotonic())):
            if time.monotonic() - self._heard_s >= QUIET_S:
                self._telling = True
                print_line(self._line())
                self._telling = False

    def _line(self) -> str:
        now = time.monotonic()
        with contextlib.suppress(IndexError):
            return _lines[-1]()
        if self._first:
            return f"{self._job}: {self._first}, for {now - self._began_s:.0f} s so far"
        return f"{self._job}: still at work, {now - self._line_s:.0f} s after what was said last"


class _Heard:
    """A text stream that says when something is written to it, and is otherwise the stream that it was."""

    def __init__(self, stream: IO[str], heard: Callable[[], None]) -> None:
        self.stream = stream
        self._heard = heard

    def write(self, text: str) -> int:
        self._heard()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Ticker:
    """Calls `tell` every few seconds until it is stopped."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._num_told = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """End it, if it was not ended before; whether it has told anything until now."""
        was_running = self._thread.is_alive() and not self._over.is_set()
        self._over.set()
        if was_running:
            # What it asks for may hang with what it tells of.
            self._thread.join(timeout=1.0)
        return was_running and self._num_told > 0

    def _run(self) -> None:
        while not self._over.wait(min(EVERY_S, FIRST_S if self._num_told < NUM_FIRST else EVERY_S)):
            self._tell()
            self._num_told += 1
