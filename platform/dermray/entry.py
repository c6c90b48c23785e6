"""What every entry point does around its work: exit codes, one-line errors, a clean end on Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from dermray import cluster, interrupts, progress, redaction
from dermray.errors import DermRayError, StoppedError
from dermray.printable import printable

_watch: progress.Watch | None = None
# Exit codes of jobs whose Ray logs nobody needs: done, refused, and stopped by Ctrl-C or SIGTERM.
_NOTHING_TO_LOOK_INTO = (0, 2, 130, 143)


def run_job(main: Callable[[], int]) -> int:
    """Run an entry point's `main`; a `DermRayError` becomes one line on stderr and its exit code.

    A job that was asked to end has exit code 130 after Ctrl-C and 143 after SIGTERM. What is logged or printed, and the
    traceback of an error that nobody expected, show no secrets.
    """
    redaction.install()
    with interrupts.handled(), _watched():
        code = 1
        try:
            code = _code_of(main)
        finally:
            if code not in _NOTHING_TO_LOOK_INTO:
                cluster.keep_logs()
        return code


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    global _watch
    with progress.Watch() as _watch:
        try:
            yield
        finally:
            _watch = None


def _code_of(main: Callable[[], int]) -> int:
    try:
        return main()
    except StoppedError as error:
        print(_shown(error), file=sys.stderr)
        return interrupts.exit_code(error.exit_code)
    except DermRayError as error:
        print(f"error: {_shown(error)}", file=sys.stderr)
        return interrupts.exit_code(error.exit_code)
    except KeyboardInterrupt:
        lost = interrupts.loss()
        print("interrupted" if lost is None else f"error: {lost}; run the same command again", file=sys.stderr)
        return interrupts.exit_code(130 if lost is None else 1)
    except Exception as error:
        lost = _lost_in_ray(error)
        if lost is None:
            raise
        print(f"error: {_shown(lost)}", file=sys.stderr)
        return 1


def begin(job: str, what: str) -> None:
    """The first line of a job, before it imports what takes seconds: "pretrain: loading torch and Ray …".

    From now on `run_job` sees to it that the job is never silent for long.
    """
    print(f"{job}: {what} …", flush=True)
    if _watch is not None:
        _watch.begin(job, what)


def _shown(said: object) -> str:
    """What may be printed: one line's characters, no secrets."""
    return printable(redaction.without_secrets(str(said)))


def warn(lines: Iterable[str]) -> None:
    """Say before the work what a user may want to change first."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _lost_in_ray(error: Exception) -> str | None:
    """What Ray lost for good, in one line; None for any other error."""
    exceptions = sys.modules.get("ray.exceptions")
    if exceptions is None:
        return None
    reason = " ".join(str(error).split())[:300]
    for kinds, what in (
        (("OutOfMemoryError",), "a worker was killed for want of memory"),
        (("WorkerCrashedError", "RayActorError"), "a worker process died"),
        (("NodeDiedError", "LocalRayletDiedError"), "a node of the Ray cluster died"),
        (("ObjectLostError",), "data that a lost process or node held is gone"),
    ):
        if isinstance(error, tuple(getattr(exceptions, kind) for kind in kinds)):
            return f"{what} ({type(error).__name__}: {reason}); what is finished is kept: run the same command again"
    return None
