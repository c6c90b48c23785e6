"""Checkpoints written behind training: the state is copied to the CPU at once, and saved by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Save = Callable[[int, dict[str, Any], Mapping[str, float]], object]


class CheckpointWriter:
    """Saves one state at a time in the background.

    Costs the memory of one copy of the state on the host while it writes.
    """

    def __init__(self, save: Save) -> None:
        """`save(step, state, scores)` commits a checkpoint."""
        self._save = save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, step: int, state: dict[str, Any], scores: Mapping[str, float]) -> None:
        """Copy the state and begin to save it, once the one before is saved.

        Raises:
            BaseException: what saving the one before raised.
        """
        self.wait()
        copied = snapshot(state)
        self._thread = threading.Thread(
            target=self._run, args=(step, copied, dict(scores)), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being saved.

        Raises:
            BaseException: what saving raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, state: dict[str, Any], scores: Mapping[str, float]) -> None:
        try:
            self._save(step, state, scores)
        except BaseException as error:  # raised again where training will see it
            self._error = error


def snapshot(state: Any) -> Any:
    """A copy on the CPU that shares no memory with the state: tensors in dictionaries, lists and tuples."""
    if isinstance(state, Tensor):
        return torch.empty_like(state, device="cpu").copy_(state.detach())
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state
