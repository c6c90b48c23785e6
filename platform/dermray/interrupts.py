"""Ctrl-C, SIGTERM and a lost Ray node, for every job in one place: asked once a job ends clean, asked twice at once.

The first signal interrupts the main thread, unless something is at work that can stop by itself (`stopping`), such as a
training that first writes a checkpoint. What does not end in time is ended with all processes it has started. Counted
are signals in a thread of their own: Python hands them to the main thread only when that comes back from foreign code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import psutil

from dermray.errors import DermRayError, StoppedError

# How long a clean end may take: of what is interrupted, and of what has stopped by itself.
END_WITHIN_S = 9.0
END_AFTER_STOP_S = 30.0
# `timeout` and some supervisors send a signal to a process and to its group: that is one request.
SAME_WITHIN_S = 0.5
LAST_WORDS_S = 1.0
NOT_BY_ITSELF = "by force, since it did not end by itself"
HANDLED = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _State:
    """Of this process, as its signals are.

    Attributes:
        asked: the first signal that came.
        heard: the main thread knows of it.
        due: the signal that comes next is our own, and interrupts the main thread.
        num_own: signals of our own that are not counted yet, so that none is taken for a second request.
        is_held: the main thread is at something that must not be cut in two (`held_back`).
        waiting: the signal that has come meanwhile.
        last_words: what is still done, within a second, when the process is ended at once.
    """

    active: bool = False
    asked: int | None = None
    asked_at: float = 0.0
    heard: bool = False
    due: bool = False
    num_own: int = 0
    is_held: bool = False
    waiting: int | None = None
    last_words: list[Callable[[], None]] = field(default_factory=list)
    loss: str | None = None
    stop: Callable[[], None] | None = None
    grace_s: float = 0.0
    grace: threading.Timer | None = None
    deadline: threading.Timer | None = None


_state = _State()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM end the job; outside the main thread, where none arrives, nothing changes."""
    global _state
    if _state.active or not _in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    _state = _State(active=True)
    listening, telling = os.pipe()
    os.set_blocking(telling, False)
    wakened = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(listening,), name="signals", daemon=True).start()
    _take_signals()
    try:
        yield
    finally:
        _state.active = False
        # A process that was asked to end goes on ending: Ray's shutdown and threads have their time limit too.
        if not was_asked():
            signal.set_wakeup_fd(wakened)
            os.close(telling)
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Around a library that takes SIGTERM for itself: the signals are ours again behind it.

    Raises:
        KeyboardInterrupt: SIGTERM came while the library had it.
    """
    if not _state.active or not _in_main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        _state.heard = True
        # The thread that counts may not have read the number yet.
        _state.asked = _state.asked or signal.SIGTERM
        _interrupt()
    finally:
        _take_signals()


@contextlib.contextmanager
def stopping(request_stop: Callable[[], None], *, grace_s: float) -> Iterator[None]:
    """Within the block the first signal calls `request_stop`; `grace_s` later the main thread is interrupted after all.

    Args:
        request_stop: safe in a signal handler.
    """
    if not _state.active or not _in_main_thread():
        yield
        return
    _state.stop, _state.grace_s = request_stop, grace_s
    try:
        yield
    finally:
        _state.stop = None
        if _state.grace is not None:
            _state.grace.cancel()
            _end_within(END_AFTER_STOP_S)


class Interruptible:
    """A block inside one of `held_back` in which the main thread may be interrupted after all."""

    # No generator: an interruption between its two halves would be undone at some later time.
    def __enter__(self) -> None:
        """Interrupt at once if a signal waits."""
        _hold(False)

    def __exit__(self, *_: object) -> None:
        """Hold back again."""
        _state.is_held = True


@contextlib.contextmanager
def held_back() -> Iterator[contextlib.AbstractContextManager[None]]:
    """A block, short but for the blocks of what it yields, in which nothing interrupts: what must be done whole.

    A signal that comes meanwhile interrupts as soon as it may. A block that takes too long is ended by force, as
    everything is that does not hear.
    """
    if not _state.active or not _in_main_thread():
        yield contextlib.nullcontext()
        return
    before, _state.is_held = _state.is_held, True
    try:
        yield Interruptible()
    finally:
        _hold(before)


def _hold(is_held: bool) -> None:
    """Hold back signals or let them through, the one that waits too."""
    _state.is_held = is_held
    if not is_held and _state.waiting is not None:
        number, _state.waiting = _state.waiting, None
        _handle(number, None)


@contextlib.contextmanager
def telling(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """An interruption of the block says what is kept and how to go on.

    Raises:
        StoppedError: the block was interrupted.
        DermRayError: it was, because the Ray node of this machine is lost.
    """
    try:
        yield
    except KeyboardInterrupt:
        if _state.loss is not None:
            raise DermRayError(f"{_state.loss}; {what_is_kept()}") from None
        raise StoppedError(f"stopped: {what_is_kept()}") from None


def lose(loss: str) -> None:
    """From any thread: what the job cannot do without is gone, so that waiting for it would be in vain.

    Args:
        loss: what was lost, for the error's message.
    """
    if _state.active and _state.loss is None and _state.deadline is None:
        _state.loss = loss
        _signal_ourselves()


@contextlib.contextmanager
def last_words(say: Callable[[], None]) -> Iterator[None]:
    """Within the block `say` is called, from another thread, if the process is ended at once."""
    words = _state.last_words
    words.append(say)
    try:
        yield
    finally:
        words.remove(say)


def interrupt() -> bool:
    """From any thread: what has been asked to stop (`stopping`) need not be waited for. False if nothing has."""
    if _state.stop is None or _state.deadline is not None:
        return False
    _signal_ourselves()
    return True


def kill_children() -> None:
    """SIGKILL everything that this process has started or adopted, and what that has started."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def loss() -> str | None:
    """What was lost, if something was."""
    return _state.loss


def was_asked() -> bool:
    """Whether a signal has come."""
    return _state.asked is not None


def exit_code(default: int) -> int:
    """As shells have it: 130 after Ctrl-C, 143 after SIGTERM; `default` if no signal came."""
    return default if _state.asked is None else 128 + _state.asked


def ended_by_request(error: BaseException) -> bool:
    """Whether an error is the end that somebody asked for, and no failure."""
    return was_asked() or (isinstance(error, KeyboardInterrupt | StoppedError) and _state.loss is None)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _take_signals() -> None:
    for number in HANDLED:
        signal.signal(number, _handle)


def _count(listening: int) -> None:
    """Read the number of each signal that arrives, until the other end is closed."""
    state = _state
    with os.fdopen(listening, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            number, now = byte[0], time.monotonic()
            if number not in HANDLED:
                continue
            if state.num_own and number == signal.SIGINT:
                state.num_own -= 1
                continue
            if not state.asked_at:
                state.asked, state.asked_at = number, now
                _later(END_WITHIN_S, lambda: None if state.heard else _end_now(NOT_BY_ITSELF))
            elif now - state.asked_at >= SAME_WITHIN_S:
                _end_now("at once")


def _handle(number: int, _: FrameType | None) -> None:
    """In the main thread, which a first signal interrupts or has stop, and a later one does not concern."""
    if _state.is_held:
        _state.waiting = number
        return
    if _state.due:
        _state.due = False
        _interrupt()
    if _state.heard:
        return
    _state.heard, _state.asked = True, number
    if _state.stop is None:
        _interrupt()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    _tell(f"{name}: stopping within {_state.grace_s:g} s; once more ends it at once")
    _state.grace = _later(_state.grace_s, _signal_ourselves)
    _state.stop()


def _interrupt() -> NoReturn:
    _end_within(END_WITHIN_S)
    raise KeyboardInterrupt


def _signal_ourselves() -> None:
    """Interrupt the main thread from another one."""
    _end_within(END_WITHIN_S)
    _state.due = True
    _state.num_own += 1
    os.kill(os.getpid(), signal.SIGINT)


def _end_within(seconds: float) -> None:
    if _state.deadline is None:
        _state.deadline = _later(seconds, lambda: _end_now(NOT_BY_ITSELF))


def _later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def _end_now(why: str) -> None:
    """End this process and all it has started, whatever they are at: outputs bear a kill at any instant."""
    _tell(f"error: {_state.loss}" if _state.loss is not None else f"interrupted: ended {why}")
    for say in _state.last_words:
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        thread.join(LAST_WORDS_S)
    kill_children()
    os._exit(exit_code(1))


def _tell(line: str) -> None:
    """Past Python's buffers, which a signal handler may find in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
