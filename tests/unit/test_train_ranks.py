"""The loop on two real gloo processes in DDP: what happens to one rank is decided alike on both."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dermray.errors import NonFiniteError
from dermray.train import loop
from dermray.train.progress import StepRecord
from tests.process_groups import run_ranks
from tests.unit.test_train_loop import batches, configured, make_trainer

NO_SCORES: dict[str, float] = {}


def train_with_troubles(rank: int, world_size: int) -> dict[str, Any]:
    """Step 3 has a bad gradient on the last rank alone, after step 6 rank 0 alone is asked to stop."""
    warnings.simplefilter("ignore")
    trainer = make_trainer(configured(train={"log_every_steps": 1, "checkpoint_every_steps": 100}))
    records, checkpoints = train(trainer, rank, world_size, bad=(3,), stop_after=6)
    return {
        "weights": trainer.model.visual.weight.detach().clone(),
        "step": trainer.step,
        "checkpoints": checkpoints,
        "skipped": [record.metrics["skipped_steps"] for record in records],
        "losses": [record.metrics["loss"] for record in records],
        "communication": [record.metrics["communication_share"] for record in records],
    }


def train(
    trainer: loop.Trainer, rank: int, world_size: int, *, bad: tuple[int, ...], stop_after: int
) -> tuple[list[StepRecord], list[int]]:
    def spoil(gradient: Tensor) -> Tensor:
        is_bad = rank == world_size - 1 and trainer.step + 1 in bad
        return torch.full_like(gradient, math.nan) if is_bad else gradient

    trainer.model.visual.weight.register_hook(spoil)
    if world_size > 1:
        trainer.wrapped = DistributedDataParallel(trainer.model)
    records: list[StepRecord] = []
    checkpoints: list[int] = []
    loop.run(
        trainer,
        (replace(batch, samples=batch.samples + rank) for batch in batches(0)),
        on_record=records.append,
        on_checkpoint=lambda t, _: checkpoints.append(t.step),
        on_validation=lambda _: NO_SCORES,
        stop_requested=lambda: rank == 0 and trainer.step >= stop_after,
    )
    return records, checkpoints


def give_up(rank: int, world_size: int) -> dict[str, Any]:
    """Three steps in a row are bad on the last rank alone."""
    trainer = make_trainer(configured(train={"log_every_steps": 1, "max_skipped_steps": 2}))
    with pytest.raises(NonFiniteError) as caught:
        train(trainer, rank, world_size, bad=(4, 5, 6), stop_after=99)
    return {"message": str(caught.value)}


def test_bad_steps_and_stops_are_decided_alike(tmp_path: Path) -> None:
    answers = run_ranks(train_with_troubles, (1, 2), tmp_path)
    (alone,) = answers[1]
    assert (alone["step"], alone["checkpoints"]) == (6, [6])
    one, two = answers[2]
    assert one["step"] == two["step"] == 7, "a stop is seen one step later"
    assert one["checkpoints"] == two["checkpoints"] == [7]
    assert one["skipped"] == two["skipped"] == [0, 0, 1, 1, 1, 1, 1]
    assert one["losses"] == two["losses"]
    assert torch.equal(one["weights"], two["weights"])
    assert all(0 <= share <= 1 for share in one["communication"])
    assert alone["communication"] == [0] * 6


def test_ranks_give_up_together(tmp_path: Path) -> None:
    answers = run_ranks(give_up, (2,), tmp_path)
    messages = {answer["message"] for answer in answers[2]}
    assert len(messages) == 1
    assert "steps 4 to 6 had gradients that are not finite" in messages.pop()
