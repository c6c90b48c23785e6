"""Which failures end a run: the same error of the same rank at the same step, twice in a row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dermray import ledger, storage
from dermray.errors import CollectiveError, CorpusError, DeviceMemoryError, StorageError
from dermray.train import failures, worker
from dermray.train.settings import PretrainConfig, TrainConfig
from tests.corpora import write_prepared_corpus


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


def test_a_worker_out_of_memory_explains_it_and_is_not_tried_a_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray around it and without a card: what a full one raises."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    write_prepared_corpus(tmp_path / "corpus", {"train": 16})
    monkeypatch.setattr(worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "_build", full)
    settings = TrainConfig(global_batch_size=16, micro_batch_size=4)
    config = PretrainConfig(corpus=str(tmp_path / "corpus"), output=str(tmp_path / "out"), train=settings)
    channel = SimpleNamespace(load=SimpleNamespace(remote=lambda: None))
    with ledger.claim(config.output) as claim:
        for _ in range(2):
            with pytest.raises(DeviceMemoryError, match="4 samples at once"):
                worker.train_worker(config, {}, claim, channel)  # type: ignore[arg-type]
        told = worker.train_worker(config, {}, claim, channel)  # type: ignore[arg-type]
        assert "4 samples at once" in told[worker.FAILED]
        # Another run has taken the output over: no rank begins, and none writes into the other's notes.
        storage.remove(str(tmp_path / "out" / ledger.FOLDER))
        told = worker.train_worker(config, {}, claim, channel)  # type: ignore[arg-type]
        assert "is no longer this run's" in told[worker.FAILED]
