"""The loop on two real gloo processes in DDP: what happens to one rank is decided alike on both."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dermray.errors import NonFiniteError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.models import texts
from dermray.train import loop
from dermray.train.objectives.contrastive.module import Contrastive
from dermray.train.optimiser import build_optimiser
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from tests.process_groups import run_ranks
from tests.unit.test_train_loop import batches, configured, make_trainer

NO_SCORES: dict[str, float] = {}
CPU = torch.device("cpu")
CLIP_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "tiled": {},
    "micro-batches": {"train": {"micro_batch_size": 3}, "loss": {"mask_duplicates": True}},
    "sigmoid": {"loss": {"name": "siglip"}},
}


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
        (replace(batch, draws=batch.draws + rank) for batch in batches(0)),
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


def global_batch(step: int) -> Batch:
    """16 samples whose texts are padded, of unequal length, and in part equal."""
    random = np.random.default_rng(step)
    tokens = np.zeros((16, 24), dtype=np.int64)
    for row, length in zip(tokens, random.integers(2, 15, 16), strict=True):
        row[:length] = [*random.integers(1, 62, length - 1), 63]
    tokens[5:12:2] = tokens[1]
    return Batch(
        step=step,
        epoch=0,
        draws=random.permutation(99)[:16],
        arrays={
            "pixels": torch.from_numpy(random.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)),
            "tokens": torch.from_numpy(tokens),
        },
    )


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    rows = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    arrays = {name: array[rows] for name, array in batch.arrays.items()}
    return replace(batch, draws=batch.draws[rows], arrays=arrays)


def clip_trainer(config: PretrainConfig, world_size: int) -> loop.Trainer:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP_CFG, init_logit_bias=-4.0 if config.loss.name == "siglip" else None).train()
    texts.accept_short(model)
    color = ColorAugmentation(config.data, config.seed)
    return loop.Trainer(
        config=config,
        objective=Contrastive((0.5,) * 3, (0.2,) * 3, CPU, color, config.loss, config.train.micro_batch_size),
        model=model,
        wrapped=DistributedDataParallel(model) if world_size > 1 else model,
        optimiser=build_optimiser(model, config.optim),
        device=CPU,
        num_steps=100,
    )


def two_steps(rank: int, world_size: int) -> dict[str, Any]:
    """The weights after two steps on the same global batches, by each of `WAYS`."""
    warnings.simplefilter("ignore")
    answer = {}
    for way, sections in WAYS.items():
        # The bias of keys has no gradient but rounding, of which AdamW would make steps with a smaller epsilon.
        optim = {"lr": 1e-3, "warmup_steps": 0, "eps": 1e-4}
        config = configured(optim=optim, data={"color_jitter": (0.3, 0.3, 0.3, 0.1)}, **sections)
        trainer = clip_trainer(config, world_size)
        for step in range(2):
            trainer.train_step(part_of(global_batch(step), rank, world_size))
        answer[way] = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        answer[f"{way}, text tokens"] = trainer.figures.take()["text_tokens"].value
    return answer


def test_workers_together_equal_one_alone(tmp_path: Path) -> None:
    answers = run_ranks(two_steps, (1, 2, 4), tmp_path)
    (alone,) = answers[1]
    # 12 distinct texts of at most 14 tokens, trimmed to 16 of 24.
    assert alone["tiled, text tokens"] == 12 * 16 / 16
    start = dict(clip_trainer(configured(), 1).model.named_parameters())
    for way in WAYS:
        assert max(float((alone[way][name] - value.detach()).abs().max()) for name, value in start.items()) > 1e-3
        for others in (answers[2], answers[4]):
            for name, value in alone[way].items():
                for one in others:
                    torch.testing.assert_close(one[way][name], value, atol=1e-5, rtol=0, msg=f"{way}: {name}")


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
