"""Which failures end a run: the same error of the same rank at the same step, twice in a row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dermray.errors import CollectiveError, CorpusError, DeviceMemoryError, StorageError
from dermray.train import failures


def test_the_same_failure_twice_is_repeated(tmp_path: Path) -> None:
    folder = str(tmp_path / "scratch")
    assert failures.repeated(folder) is None
    failures.record(folder, 0, 7, CorpusError("image 3 is damaged"))
    assert failures.repeated(folder) is None
    failures.record(folder, 0, 7, CorpusError("image 3 is damaged"))
    assert failures.repeated(folder) == "image 3 is damaged"


def test_another_step_rank_or_message_is_another_failure(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for rank, step, message in ((0, 7, "a"), (1, 7, "a"), (0, 8, "a"), (0, 8, "b"), (0, 8, "a")):
        failures.record(folder, rank, step, CorpusError(message))
    assert failures.repeated(folder) is None


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    for _ in range(3):
        failures.record(str(tmp_path), 0, 7, CollectiveError("rank 1 did not come"))
        failures.record(str(tmp_path), 0, 7, StorageError("the store is away"))
    assert failures.repeated(str(tmp_path)) is None


def test_a_full_memory_twice_ends_the_run_with_advice(tmp_path: Path) -> None:
    folder = str(tmp_path / "scratch")
    for asked in ("2.00 GiB", "1.98 GiB"):
        with pytest.raises(DeviceMemoryError) as caught, failures.memory_explained(512):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked}")
        failures.record(folder, 0, 0, caught.value)
    message = failures.repeated(folder)
    assert message is not None
    assert "train.micro_batch_size below 512" in message
