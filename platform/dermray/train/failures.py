"""Which failures are not worth another attempt: the same error of the same rank at the same step, twice.

Ray Train restarts a group of workers for any error. Each rank leaves a note of its own errors where every node sees
them; the group that is started after the second equal one reads it and gives up at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dermray import redaction, storage
from dermray.errors import CheckpointError, CollectiveError, DermRayError, DeviceMemoryError, StorageError

NOTE_PREFIX = "failure-"
# What another attempt may well cure.
_PASSING = (CollectiveError, StorageError)


def record(folder: str, rank: int, step: int, error: DermRayError) -> None:
    """Note that a rank failed in the step after `step`, if the error is not a passing one."""
    if isinstance(error, _PASSING):
        return
    uri = storage.join(folder, f"{NOTE_PREFIX}{rank:05d}.json")
    this = {"step": step, "message": redaction.without_secrets(str(error))}
    before = _note(uri) if storage.exists(uri) else {}
    same = {key: before.get(key) for key in this} == this
    storage.write_json(uri, {**this, "count": before["count"] + 1 if same else 1})


def repeated(folder: str) -> str | None:
    """The message of a failure that came twice, or None."""
    for uri in storage.list_files(folder):
        if storage.name_of(uri).startswith(NOTE_PREFIX):
            note = _note(uri)
            if note["count"] > 1:
                return str(note["message"])
    return None


def _note(uri: str) -> dict[str, Any]:
    note = storage.read_json(uri)
    if not isinstance(note, dict) or not isinstance(note.get("count"), int) or "message" not in note:
        raise CheckpointError(f"{uri} is no note of a failure; remove it and run again")
    return note


@contextmanager
def memory_explained(samples_at_once: int) -> Iterator[None]:
    """Say what helps where the device's memory is full.

    Args:
        samples_at_once: of a worker, through the towers.

    Raises:
        DeviceMemoryError: it was full within the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # Without torch's figures, which differ from attempt to attempt.
        raise DeviceMemoryError(
            f"the device is out of memory with {samples_at_once:,} samples at once: set train.grad_checkpointing=1 "
            "(with train.grad_checkpointing_keeps=products it costs little time, without it saves most memory), "
            f"or a train.micro_batch_size below {samples_at_once:,}"
        ) from error
