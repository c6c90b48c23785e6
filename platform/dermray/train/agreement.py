"""What ranks have to agree on between steps, and what to say when one of them does not come.

Every rank leaves a note of where it is in the process group's store. When a collective fails, the error of the ranks
that waited quotes the notes, so that it names the rank that is missing.
"""

from __future__ import annotations

import datetime
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from dermray.errors import CollectiveError
from dermray.losses.gather import world

# Time for ranks that fail together to leave the same last notes.
_NOTES_SETTLE_S = 0.2
# Time for the process that holds the notes to answer.
_NOTES_TIMEOUT_S = 10.0
# Of the time-out: on a GPU the rank that waits must say so before NCCL's watchdog ends the process without our message.
_PATIENCE = 0.9
# Where collectives are called by name.
_CALLERS = ("torch/distributed/distributed_c10d.py", "dermray/losses/gather.py")


class Agreement:
    """Flags that are raised on some rank and seen by all at the same step, without waiting for each other.

    The exchange of one step runs beside the next one, over a group of its own in host memory: a flag is seen one step
    after it was raised. A rank alone sees it at once.

    Args:
        num_flags: how many.
        timeout_s: `train.collective_timeout_s`, of which waiting here takes nine tenths.
    """

    def __init__(self, num_flags: int, timeout_s: float) -> None:
        self._num_flags = num_flags
        self._group: dist.ProcessGroup | None = None
        if world()[1] > 1:
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_PATIENCE * timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._pending: tuple[Tensor, dist.Work] | None = None

    def exchange(self, *flags: bool) -> list[bool]:
        """Hand in this rank's flags of this step; returns those that any rank raised in the step before."""
        if self._group is None:
            return list(flags)
        seen = self._taken()
        raised = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (raised, work)
        return seen

    def wait(self) -> None:
        """Until every rank has handed in its flags of this step.

        Before the host waits for a GPU: a rank that does not come would block it there, where nothing can be said.
        """
        if self._pending is not None:
            self._pending[1].wait()

    def close(self) -> None:
        """Wait for the last exchange."""
        self._taken()

    def _taken(self) -> list[bool]:
        if self._pending is None:
            return [False] * self._num_flags
        raised, work = self._pending
        self._pending = None
        work.wait()
        return [bool(flag) for flag in raised.tolist()]


class Position:
    """Where this rank is, written down for the others."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._rank, self._world_size = world()
        self._store = dist.distributed_c10d._get_default_store() if self._world_size > 1 else None

    def note(self, step: int, doing: str) -> None:
        """Write down that this rank is in step `step`, counted from 1."""
        if self._store is not None:
            self._store.set(_key(self._rank), f"step {step}, {doing}")

    @contextmanager
    def at(self, step: int, doing: str) -> Iterator[None]:
        """Around a part of a step that talks to other ranks.

        Raises:
            CollectiveError: torch.distributed failed or timed out in the block.
        """
        begun = time.monotonic()
        self.note(step, doing)
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _is_of_collective(error):
                raise
            raise CollectiveError(
                f"rank {self._rank} waited {time.monotonic() - begun:.0f} s for others in "
                f"{_collective(error.__traceback__)} at step {step}, {doing} "
                f"(train.collective_timeout_s={self._timeout_s:g}); {self._others()}. "
                f"torch.distributed says: {' '.join(str(error).split())[:200]}"
            ) from error

    def _others(self) -> str:
        """The last notes of the other ranks."""
        time.sleep(_NOTES_SETTLE_S)
        told = ["rank 0 does not answer, which holds the notes of where the others are"]
        # Rank 0 holds the notes. If its process is stopped, asking for them has no end.
        asking = threading.Thread(target=lambda: told.append(self._asked()), name="notes", daemon=True)
        asking.start()
        asking.join(_NOTES_TIMEOUT_S)
        return told[-1]

    def _asked(self) -> str:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            return "; ".join(f"rank {rank} is at {self._read(rank)}" for rank in others)
        except RuntimeError:
            return "rank 0 is gone, and with it the notes of where the others are"

    def _read(self, rank: int) -> str:
        assert self._store is not None
        if not self._store.check([_key(rank)]):
            return "no step yet"
        return bytes(self._store.get(_key(rank))).decode()


def _key(rank: int) -> str:
    return f"dermray/position/{rank}"


def _collective(trace: TracebackType | None) -> str:
    """The function that met the error; what nobody called by name are gradients that DDP averages, and our flags."""
    names = [frame.name for frame in traceback.extract_tb(trace) if frame.filename.endswith(_CALLERS)]
    return names[-1] if names else "all_reduce"


def _is_of_collective(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors; they name its source files, a connection or a time-out."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        mark in text for mark in ("gloo", "nccl", "timed out", "connection closed", "connection reset")
    )
