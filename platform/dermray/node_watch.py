"""A process beside a driver, which says why it ended when Ray has ended it without a word, and ends what is left.

When the raylet of its machine dies, Ray's library in the driver ends the process at once if it happens to be asking
that raylet for an object: no handler, no `finally` and no output come after. So somebody else must say it. And Ray's
agents, and workers that were just starting, look for what has died for a minute or more. This file is run by its path
and uses the standard library alone: it is there within some 20 ms and takes 8 MB.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

# What Ray calls processes that are not workers: agents, and parts of its dashboard.
_NAMES = ("ray::", "ray-dashboard")
# Workers may be forked while others are ended; and what cannot be ended at all is not waited for.
_LOOK_AGAIN_S, _END_WITHIN_S = 0.2, 10.0


def lost(process: str) -> str:
    """What a driver says of a Ray process of its machine that it cannot do without: "raylet, process 17"."""
    return (
        f"the Ray node of this machine is lost: {process}, was killed or died (the system's log says whether memory "
        "ran out; a cluster of `ray start` must be started again)"
    )


def begin(watched: Mapping[int, str], *, session: str = "") -> subprocess.Popen[bytes]:
    """Start it for the calling process; to be killed once that has said itself what there is to say.

    Args:
        watched: by process id, what the driver cannot do without: "raylet, process 17". Of several that have ended the
            first is named.
        session: session folder of a cluster that ends with the driver, however that ends: what Ray has started for it
            is ended after it.
    """
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), session and os.path.realpath(session)]
    command += [f"{pid}={name}" for pid, name in watched.items()]
    # It holds nothing of the driver's open but its error output, which it writes to.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _main(driver: int, session: str, watched: Mapping[int, str]) -> None:
    # Ctrl-C is meant for the driver, whose end this process waits for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError):
        dead = _lost_before_the_driver(driver, watched)
        if dead is not None:
            line = f"error: {lost(dead)}; Ray ended the job at once; run the same command again"
            os.write(2, f"{line}\n".encode())
    if session:
        end_processes_of(session)


def _lost_before_the_driver(driver: int, watched: Mapping[int, str]) -> str | None:
    """Wait for the driver's end; which of what it could not do without had ended before, if any had.

    Raises:
        ProcessLookupError: one of them has ended and is forgotten.
    """
    names: dict[int, str] = {}
    poll = select.poll()
    for pid, name in watched.items():
        descriptor = os.pidfd_open(pid)
        names[descriptor] = name
        poll.register(descriptor, select.POLLIN)
    of_driver = os.pidfd_open(driver)
    poll.register(of_driver, select.POLLIN)
    ended = {descriptor for descriptor, _ in poll.poll()}
    select.select([of_driver], [], [])
    # In the order they were given in: when the driver is gone too, the others have ended with it.
    dead = [name for descriptor, name in names.items() if descriptor in ended]
    # Ray's processes end with a driver that is killed, so at the same instant as far as this one can see.
    return None if not dead or (of_driver in ended and _was_killed(driver)) else dead[0]


def end_processes_of(session: str) -> None:
    """SIGKILL what Ray has started for a session, until nothing of it is left.

    Args:
        session: path of its folder, without symbolic links.
    """
    deadline = time.monotonic() + _END_WITHIN_S
    while found := list(_processes_of(session)):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(_LOOK_AGAIN_S)


def _processes_of(session: str) -> Iterator[int]:
    """Workers and agents of Ray, known by what they write into the session's folder.

    A worker's output goes there from the beginning; an agent's goes to a pipe, but it has a name of Ray's, which
    drivers that have joined the session, and log there too, have not.
    """
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                numbers = os.listdir(f"/proc/{pid}/fd") if file.read().startswith(_NAMES) else ["1", "2"]
            if any(os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{session}/") for number in numbers):
                yield int(pid)


def _was_killed(pid: int) -> bool:
    """Whether a process that has ended, ended by a signal; False too if whoever started it has taken notice already."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The last field, as `waitpid` gives it: the signal's number in the lower seven bits.
            return bool(int(file.read().split()[-1]) & 0x7F)
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    _main(
        int(sys.argv[1]),
        sys.argv[2],
        {int(pid): name for pid, _, name in (each.partition("=") for each in sys.argv[3:])},
    )
