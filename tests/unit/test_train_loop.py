"""The loop on a tiny model and batches in memory: resumed equals uninterrupted, cadences, and how it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dermray.errors import NonFiniteError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.train import checkpoint, loop
from dermray.train.checkpoint_writer import snapshot
from dermray.train.objectives.contrastive.module import MAX_LOGIT_SCALE, Contrastive
from dermray.train.optimiser import build_optimiser
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig

CPU = torch.device("cpu")
NUM_STEPS = 12
SIDE = 6
VOCABULARY = 11
NO_SCORES: dict[str, float] = {}


class TinyClip(nn.Module):
    """The interface of open_clip's models, with a dropout that makes every step draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(3 * SIDE * SIDE, 8)
        self.text = nn.EmbeddingBag(VOCABULARY, 8)
        self.drop = nn.Dropout(0.2)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = nn.functional.normalize(self.drop(self.visual(pixels.flatten(1))), dim=1)
        return image, nn.functional.normalize(self.text(tokens), dim=1), self.logit_scale.exp()


def configured(**sections: dict[str, Any]) -> PretrainConfig:
    train = {"global_batch_size": 8, "log_every_steps": 5, "checkpoint_every_steps": 4} | sections.pop("train", {})
    optim = {"lr": 0.05, "warmup_steps": 3} | sections.pop("optim", {})
    return PretrainConfig.model_validate({"corpus": "c", "output": "o", "train": train, "optim": optim, **sections})


def make_trainer(config: PretrainConfig) -> loop.Trainer:
    model = TinyClip().train()
    return loop.Trainer(
        config=config,
        objective=Contrastive((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), CPU, ColorAugmentation(config.data, config.seed)),
        model=model,
        wrapped=model,
        optimiser=build_optimiser(model, config.optim),
        device=CPU,
        num_steps=NUM_STEPS,
    )


def batches(start_step: int) -> Iterator[Batch]:
    """What a loader would yield: every batch is a function of its step."""
    for step in range(start_step, NUM_STEPS):
        random = np.random.default_rng(step)
        yield Batch(
            step=step,
            epoch=step // 4,
            draws=random.integers(0, 99, 8),
            arrays={
                "pixels": torch.from_numpy(random.integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)),
                "tokens": torch.from_numpy(random.integers(0, VOCABULARY, (8, 4))),
            },
        )


class Listener:
    """Keeps what the loop tells."""

    def __init__(self, output: Path, stop_after: int | None = None) -> None:
        self.output = str(output)
        self.stop_after = stop_after
        self.retention = checkpoint.Retention(2)
        self.records: list[StepRecord] = []
        self.checkpoints: list[int] = []

    def on_checkpoint(self, trainer: loop.Trainer, scores: dict[str, float]) -> None:
        self.checkpoints.append(trainer.step)
        checkpoint.save(
            self.output,
            trainer.step,
            trainer.state(),
            trajectory=trainer.config.trajectory(),
            corpus_digest="c",
            retention=self.retention,
            scores=scores,
        )
        if trainer.step == self.stop_after:
            raise InterruptedError

    def run(
        self,
        trainer: loop.Trainer,
        validation: Any = lambda _: NO_SCORES,
        stop_requested: Callable[[], bool] = lambda: False,
        until_step: int | None = None,
    ) -> bool:
        return loop.run(
            trainer,
            batches(trainer.step),
            on_record=self.records.append,
            on_checkpoint=self.on_checkpoint,
            on_validation=validation,
            stop_requested=stop_requested,
            until_step=until_step,
        )


def assert_equal(left: Any, right: Any) -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


COOLED = {"schedule": "cosine_cooldown", "cooldown_epochs": 0.5, "cooldown_power": 2.0, "cooldown_lr": 1e-4}


@pytest.mark.parametrize(("stop_after", "optim"), [(4, {}), (8, {}), (12, {}), (8, COOLED)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop_after: int, optim: dict[str, Any]) -> None:
    config = configured(train={"log_every_steps": 1, "grad_clip_norm": 1.0}, optim=optim)
    whole = make_trainer(config)
    whole_listener = Listener(tmp_path / "whole")
    whole_listener.run(whole)

    first = Listener(tmp_path / "parts", stop_after=stop_after)
    with pytest.raises(InterruptedError):
        first.run(make_trainer(config))
    resumed = make_trainer(config)
    torch.manual_seed(999)  # whatever another process's generator holds
    latest = checkpoint.load_latest(str(tmp_path / "parts"), trajectory=config.trajectory(), corpus_digest="c")
    assert latest is not None
    resumed.restore(latest[1])
    assert resumed.step == stop_after
    second = Listener(tmp_path / "parts")
    second.run(resumed)

    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.optimiser.state_dict(), resumed.optimiser.state_dict())
    assert [r.step for r in first.records + second.records] == list(range(1, NUM_STEPS + 1))
    losses = [record.metrics["loss"] for record in first.records + second.records]
    assert losses == [record.metrics["loss"] for record in whole_listener.records]
    assert len(set(losses)) == NUM_STEPS
    assert resumed.metrics["loss"] == losses[-1], "a run resumed at its very end still has its last figures"


def test_seed_decides_what_a_model_draws(tmp_path: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        trainer = make_trainer(configured(seed=seed))
        Listener(tmp_path / f"{len(weights)}").run(trainer)
        weights.append(trainer.model.visual.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_records_and_checkpoints_come_at_their_cadence_and_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(configured())
    listener = Listener(tmp_path)
    listener.run(trainer)
    assert [record.step for record in listener.records] == [5, 10, 12]
    assert listener.checkpoints == [4, 8, 12]
    for record in listener.records:
        assert record.num_steps == NUM_STEPS
        assert set(record.metrics) >= {"loss", "lr", "logit_scale", "samples_per_s", "step_time_s", "data_wait_share"}
        assert record.metrics.keys() >= {
            "grad_norm",
            "step_time_p50_s",
            "step_time_p99_s",
            "host_memory_gb",
            "pause_share",
        }
        assert record.metrics["step_time_p50_s"] <= record.metrics["step_time_p99_s"]
        assert record.verdict.startswith("limited by ")
        assert all(math.isfinite(value) for value in record.metrics.values())
        assert 0 <= record.metrics["data_wait_share"] <= 1
    assert listener.records[0].metrics["lr"] == pytest.approx(
        0.05 * 0.5 * (1 + math.cos(math.pi * (4 - 3) / (NUM_STEPS - 3)))
    )


def test_validation_has_its_own_cadence_and_its_scores_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer(configured(validation={"every_steps": 6}))
    listener = Listener(tmp_path)
    listener.run(trainer, validation=lambda t: {"validation_x": float(t.step)})
    assert [r.step for r in listener.records if "validation_x" in r.metrics] == [6, 12]
    assert trainer.metrics["validation_x"] == 12
    assert "loss" in trainer.metrics


def test_gradients_are_clipped_and_their_norm_is_told(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"grad_clip_norm": 1e-9, "log_every_steps": 1}))
    seen: list[float] = []
    step = trainer.optimiser.step

    def watched(*args: Any) -> Any:
        seen.append(float(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()))
        return step(*args)

    trainer.optimiser.step = watched  # type: ignore[method-assign]
    listener = Listener(tmp_path)
    listener.run(trainer)
    assert max(seen) <= 1.01e-9
    assert min(record.metrics["grad_norm"] for record in listener.records) > 1e-3


def poison(trainer: loop.Trainer, at_step: int) -> None:
    """The weights are not numbers from a step on, as after an overflow."""
    original = trainer.objective.after_step

    def after_step(model: nn.Module, taken: Tensor) -> None:
        original(model, taken)
        if trainer.step == at_step:
            with torch.no_grad():
                model.visual.weight[0, 0] = math.nan

    trainer.objective.after_step = after_step  # type: ignore[method-assign]


def test_weights_that_are_no_numbers_stop_the_run_and_are_never_checkpointed(tmp_path: Path) -> None:
    """It happens between two logged steps, and a checkpoint is due before the next one."""
    trainer = make_trainer(configured(train={"log_every_steps": 10, "max_skipped_steps": 9}))
    poison(trainer, at_step=5)
    listener = Listener(tmp_path)
    with pytest.raises(NonFiniteError, match=r"the weights hold values that are not finite at step 8"):
        listener.run(trainer)
    assert listener.checkpoints == [4]


def spoil(trainer: loop.Trainer, steps: set[int]) -> None:
    """The gradients of some steps (from 1) hold an infinity."""

    def hook(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, math.inf) if trainer.step + 1 in steps else gradient

    trainer.model.visual.weight.register_hook(hook)


def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"log_every_steps": 1, "ema_decay": 0.5, "grad_clip_norm": 1.0}))
    spoil(trainer, {3, 4, 9})
    whole = Listener(tmp_path / "whole")
    whole.run(trainer)
    assert [record.metrics["skipped_steps"] for record in whole.records] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())

    stopped = make_trainer(configured(train={"log_every_steps": 1, "ema_decay": 0.5, "grad_clip_norm": 1.0}))
    spoil(stopped, {3})
    stream = batches(0)
    for _ in range(2):
        stopped.train_step(next(stream))
    before = snapshot(stopped.state())
    stopped.train_step(next(stream))
    after = stopped.state()
    for key in ("model", "optimiser", "ema"):
        if key == "optimiser":
            assert_equal(before[key]["state"], after[key]["state"])
        else:
            assert_equal(before[key], after[key])
    stopped.train_step(next(stream))
    assert not torch.equal(before["model"]["visual.weight"], stopped.model.visual.weight)


def test_too_many_bad_gradients_in_a_row_stop_the_run_by_name(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"log_every_steps": 1, "max_skipped_steps": 2}))
    spoil(trainer, {2, 3, 5, 6, 7})
    with pytest.raises(NonFiniteError, match=r"steps 5 to 7 had gradients .* train.max_skipped_steps=2 in a row"):
        Listener(tmp_path).run(trainer)


def lose(trainer: loop.Trainer, from_step: int) -> None:
    """The loss is no number from a step (from 1) to the end of the run."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * math.nan if trainer.step + 1 >= from_step else output

    trainer.model.get_submodule("visual").register_forward_hook(hook)


@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_stays_no_number_ends_the_run_with_a_sound_checkpoint(tmp_path: Path, every: int) -> None:
    trainer = make_trainer(configured(train={"log_every_steps": every}))
    lose(trainer, from_step=5)
    listener = Listener(tmp_path)
    last = 8
    with pytest.raises(
        NonFiniteError, match=rf"steps 5 to {last} had .* the loss of step {last} is nan \(not finite on"
    ):
        listener.run(trainer)
    assert trainer.left_out.tolist() == [4, 4]
    assert listener.checkpoints == [4]
    latest = checkpoint.load_latest(str(tmp_path), trajectory=trainer.config.trajectory(), corpus_digest="c")
    assert latest is not None
    assert all(torch.isfinite(value).all() for value in latest[1]["model"].values())


def test_a_run_that_may_leave_out_all_its_steps_keeps_the_weights_it_had(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"log_every_steps": 1, "max_skipped_steps": NUM_STEPS}))
    lose(trainer, from_step=5)
    listener = Listener(tmp_path)
    listener.run(trainer)
    assert [record.metrics["skipped_steps"] for record in listener.records] == [0] * 4 + list(range(1, 9))
    assert listener.checkpoints == [4, 8, 12]
    kept = [torch.load(tmp_path / f"checkpoints/step-{step:08d}/state.pt", weights_only=True) for step in (8, 12)]
    assert_equal(kept[0]["model"], kept[1]["model"])
    assert all(torch.isfinite(value).all() for value in kept[1]["model"].values())


def test_counts_of_steps_left_out_survive_a_checkpoint(tmp_path: Path) -> None:
    config = configured(train={"log_every_steps": 1})
    first = make_trainer(config)
    spoil(first, {2, 4})
    with pytest.raises(InterruptedError):
        Listener(tmp_path, stop_after=4).run(first)
    resumed = make_trainer(config)
    latest = checkpoint.load_latest(str(tmp_path), trajectory=config.trajectory(), corpus_digest="c")
    assert latest is not None
    resumed.restore(latest[1])
    assert resumed.left_out.tolist() == [1, 2]


def test_a_stopped_run_writes_a_checkpoint_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    config = configured(train={"checkpoint_every_steps": 100}, validation={"every_steps": 7})
    whole = make_trainer(config)
    assert Listener(tmp_path / "whole").run(whole) is False
    first, listener = make_trainer(config), Listener(tmp_path / "parts")
    assert listener.run(first, stop_requested=lambda: first.step == 7) is True
    assert (first.step, listener.checkpoints) == (7, [7])
    assert not [record for record in listener.records if record.step == 7 and "loss" not in record.metrics]
    resumed = make_trainer(config)
    latest = checkpoint.load_latest(str(tmp_path / "parts"), trajectory=config.trajectory(), corpus_digest="c")
    assert latest is not None
    resumed.restore(latest[1])
    assert Listener(tmp_path / "parts").run(resumed) is False
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_a_pause_validates_and_goes_on_with_other_settings_of_the_optimiser(tmp_path: Path) -> None:
    config = configured(train={"checkpoint_every_steps": 100}, validation={"every_steps": 6})
    first, listener = make_trainer(config), Listener(tmp_path)
    assert listener.run(first, lambda _: {"validation_x": 1.0}, until_step=6) is True
    assert (first.step, listener.checkpoints) == (6, [6])
    (info,) = checkpoint.committed(str(tmp_path))
    assert info.scores == {"validation_x": 1.0}
    changed = configured(optim={"weight_decay": 0.7, "beta1": 0.5})
    second = make_trainer(changed)
    latest = checkpoint.load_latest(str(tmp_path), trajectory=changed.trajectory(), corpus_digest="c", force=True)
    assert latest is not None
    second.restore(latest[1])
    assert Listener(tmp_path).run(second, until_step=6) is True, "it pauses there already"
    assert [group["weight_decay"] for group in second.optimiser.param_groups] == [0.0, 0.7]
    assert {group["betas"] for group in second.optimiser.param_groups} == {(0.5, 0.98)}
    moments = second.optimiser.state_dict()["state"]
    assert_equal(moments, first.optimiser.state_dict()["state"])


def test_checkpoints_by_minutes_come_between_those_by_steps(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"checkpoint_every_steps": 100, "checkpoint_every_minutes": 1e-9}))
    listener = Listener(tmp_path)
    listener.run(trainer)
    assert listener.checkpoints == list(range(1, NUM_STEPS + 1))


def test_the_best_by_a_score_stays_beside_the_last(tmp_path: Path) -> None:
    config = configured(train={"checkpoint_every_steps": 4, "keep_best": "validation_x"}, validation={"every_steps": 3})
    listener = Listener(tmp_path)
    listener.retention = checkpoint.Retention(1, "validation_x", "min")
    listener.run(make_trainer(config), validation=lambda t: {"validation_x": abs(t.step - 6.5)})
    assert listener.checkpoints == [3, 4, 6, 8, 9, 12]
    assert [info.step for info in checkpoint.committed(str(tmp_path))] == [6, 12]


def test_the_average_follows_its_definition_and_is_what_validation_sees(tmp_path: Path) -> None:
    config = configured(train={"ema_decay": 0.9, "checkpoint_every_steps": 5}, validation={"every_steps": 12})
    trainer = make_trainer(config)
    expected = trainer.model.visual.weight.detach().double().clone()
    original = trainer.objective.after_step

    def after_step(model: nn.Module, taken: Tensor) -> None:
        original(model, taken)
        expected.mul_(0.9).add_(model.visual.weight.detach().double(), alpha=0.1)

    trainer.objective.after_step = after_step  # type: ignore[method-assign]
    seen: list[Tensor] = []

    def validate(t: loop.Trainer) -> dict[str, float]:
        seen.append(t.model.visual.weight.detach().clone())
        return NO_SCORES

    Listener(tmp_path).run(trainer, validation=validate)
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(trainer.model.visual.weight, seen[0])
    with trainer.averaged():
        assert torch.equal(trainer.model.visual.weight, seen[0])
    resumed = make_trainer(config)
    latest = checkpoint.load_latest(str(tmp_path), trajectory=config.trajectory(), corpus_digest="c")
    assert latest is not None
    resumed.restore(latest[1])
    assert_equal(resumed.state()["ema"], trainer.state()["ema"])


@pytest.mark.parametrize(("start", "push"), [(math.log(99.9), -1), (0.001, 1)])
def test_logit_scale_stays_between_1_and_100(tmp_path: Path, start: float, push: int) -> None:
    trainer = make_trainer(configured(optim={"lr": 0.05, "warmup_steps": 0}))
    with torch.no_grad():
        trainer.model.logit_scale.fill_(start)
    trainer.model.logit_scale.register_hook(lambda gradient: torch.full_like(gradient, push))
    Listener(tmp_path).run(trainer)
    expected = MAX_LOGIT_SCALE if push < 0 else 0.0
    assert trainer.model.logit_scale.item() == pytest.approx(expected, abs=1e-6)
    assert trainer.objective.report(trainer.model)["logit_scale"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_pixels_are_normalised_as_the_tower_expects(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    trainer = make_trainer(configured())
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = next(batches(0))
    trainer.train_step(batch)
    expected = (batch["pixels"].permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.2
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=0)


def test_bf16_is_used_when_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(configured(train={"precision": "bf16"}))
    seen: list[torch.dtype] = []
    trainer.model.visual.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    Listener(tmp_path).run(trainer)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
