"""Checkpoints behind training: the state of that moment is written; errors surface; a kill costs the last only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dermray.train import checkpoint
from dermray.train.checkpoint_writer import CheckpointWriter, snapshot

# Saves step 4, then step 8 whose state takes long to write, and goes on meanwhile.
KILLED = """
import sys, time
import torch
from dermray.train import checkpoint
from dermray.train.checkpoint_writer import CheckpointWriter

def save(step, state, scores):
    checkpoint.save(sys.argv[1], step, state, trajectory={}, corpus_digest="c", retention=checkpoint.Retention(1))

writer = CheckpointWriter(save)
writer.submit(4, {"step": 4}, {})
writer.wait()
writer.submit(8, {"step": 8, "weights": torch.zeros(200_000_000)}, {})
print("training goes on", flush=True)
time.sleep(60)
"""


class SlowSave:
    """Saves when told to."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.saved: list[tuple[int, Any, dict[str, float]]] = []

    def __call__(self, step: int, state: dict[str, Any], scores: Mapping[str, float]) -> None:
        assert self.allowed.acquire(timeout=30)
        self.saved.append((step, state, dict(scores)))


def test_the_state_of_the_moment_is_saved_while_training_changes_it() -> None:
    save = SlowSave()
    writer = CheckpointWriter(save)
    weights = torch.ones(3)
    state = {"model": {"w": weights}, "optimiser": [{"m": weights * 2}], "step": 1}
    writer.submit(1, state, {"x": 0.5})
    assert save.saved == [], "submit does not wait"
    weights.fill_(7)
    save.allowed.release()
    writer.wait()
    ((step, saved, scores),) = save.saved
    assert (step, scores, saved["step"]) == (1, {"x": 0.5}, 1)
    assert saved["model"]["w"].tolist() == [1, 1, 1]
    assert saved["optimiser"][0]["m"].tolist() == [2, 2, 2]


def test_one_is_written_at_a_time_and_in_order() -> None:
    save = SlowSave()
    writer = CheckpointWriter(save)
    writer.submit(1, {}, {})
    second = threading.Thread(target=writer.submit, args=(2, {}, {}))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "the second waits for the first"
    save.allowed.release(2)
    second.join(30)
    writer.wait()
    assert [step for step, *_ in save.saved] == [1, 2]


def test_an_error_surfaces_at_the_next_checkpoint_and_once() -> None:
    def fail(step: int, state: dict[str, Any], scores: Mapping[str, float]) -> None:
        raise OSError(f"the disk is full at step {step}")

    writer = CheckpointWriter(fail)
    writer.submit(1, {}, {})
    with pytest.raises(OSError, match="full at step 1"):
        writer.submit(2, {}, {})
    writer.wait()
    writer.submit(3, {}, {})
    with pytest.raises(OSError, match="full at step 3"):
        writer.wait()


def test_killed_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "training goes on\n"
    folder = tmp_path / checkpoint.FOLDER / "step-00000008"
    end = time.monotonic() + 120
    while not any(folder.glob(".*.part")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert any(folder.glob(".*.part")), "the kill struck the writing"
    assert [info.step for info in checkpoint.committed(str(tmp_path))] == [4]
    latest = checkpoint.load_latest(str(tmp_path), trajectory={}, corpus_digest="c")
    assert latest is not None
    assert latest[1] == {"step": 4}


def test_a_snapshot_shares_no_memory_and_keeps_all_else() -> None:
    state = {"a": [torch.arange(3), (1, "x")], "b": {"c": None, "d": torch.tensor(2.0, requires_grad=True)}}
    copied = snapshot(state)
    state["a"][0].zero_()  # type: ignore[index, union-attr]
    assert copied["a"][0].tolist() == [0, 1, 2]
    assert copied["a"][1] == (1, "x")
    assert copied["b"]["c"] is None
    assert not copied["b"]["d"].requires_grad
