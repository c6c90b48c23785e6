"""Objectives are found by name or import path, bring their own keys, rates, figures and state, and resume exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dermray import scales
from dermray.config import parse
from dermray.errors import ConfigError, CorpusError
from dermray.ingest.loader import Batch
from dermray.train import checkpoint, loop, pretrain
from dermray.train.objectives import contract, kinds
from dermray.train.optimiser import build_optimiser
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from tests import distilled, rotation
from tests.corpora import add_side_table, write_prepared_corpus

CPU = torch.device("cpu")
KIND = "tests.rotation:OBJECTIVE"
NUM_STEPS = 6
NO_SCORES: dict[str, float] = {}


def configured(*overrides: str) -> PretrainConfig:
    train = ["train.global_batch_size=8", "train.log_every_steps=2", "optim.lr=0.01", "optim.warmup_steps=0"]
    return parse(PretrainConfig, ["corpus=c", "output=o", f"objective.kind={KIND}", *train, *overrides])


class Forgetful(kinds.ObjectiveConfig):
    forgotten: int = 1


class WithTeacher(rotation.Rotation):
    """Has an average of the weights as its own state, and meets a gradient that is not finite in the third step."""

    def __init__(self, model: nn.Module) -> None:
        self.teacher = {name: value.clone() for name, value in model.state_dict().items()}
        self.taken: list[float] = []
        model.register_full_backward_pre_hook(self._spoil)

    def _spoil(self, _: nn.Module, gradients: Any) -> Any:
        return tuple(gradient * (math.nan if len(self.taken) == 2 else 1) for gradient in gradients)

    def after_step(self, model: nn.Module, taken: Tensor) -> None:
        self.taken.append(taken.item())
        for name, value in model.state_dict().items():
            self.teacher[name].lerp_(value, 0.1 * taken)

    def state(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state["teacher"].items():
            self.teacher[name].copy_(value)


def trainer_of(config: PretrainConfig) -> loop.Trainer:
    torch.manual_seed(config.seed)
    built = contract.module_of(config.objective.kind).build(config, CPU)
    return loop.Trainer(
        config=config,
        objective=WithTeacher(built.model),
        model=built.model,
        wrapped=built.model,
        optimiser=build_optimiser(built.model, config.optim, built.groups),
        device=CPU,
        num_steps=NUM_STEPS,
        schedule=lambda step, num_steps: 0.01 * (1 - step / num_steps),
    )


def batches(start: int, side: int) -> Iterator[Batch]:
    for step in range(start, NUM_STEPS):
        random = np.random.default_rng(step)
        image = torch.from_numpy(random.integers(0, 256, (8, side, side, 3), dtype=np.uint8))
        yield Batch(step, 0, np.arange(8), {"image": image, "turns": torch.from_numpy(random.integers(0, 4, 8))})


def trained(trainer: loop.Trainer, until_step: int | None = None) -> list[StepRecord]:
    records: list[StepRecord] = []
    loop.run(
        trainer,
        batches(trainer.step, 12),
        on_record=records.append,
        on_checkpoint=lambda *_: None,
        on_validation=lambda _: NO_SCORES,
        until_step=until_step,
    )
    return records


def test_an_objective_of_ones_own_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = configured("objective.side=12", "objective.head_lr_factor=4")
    whole = trainer_of(config)
    records = trained(whole)
    first = trainer_of(config)
    trained(first, until_step=4)
    where: dict[str, Any] = {"trajectory": config.trajectory(), "corpus_digest": "c"}
    checkpoint.save(str(tmp_path), 4, first.state(), retention=checkpoint.Retention(1), **where)
    resumed = trainer_of(config)
    latest = checkpoint.load_latest(str(tmp_path), **where)
    assert latest is not None
    resumed.restore(latest[1])
    again = trained(resumed)

    one, other = whole.objective, resumed.objective
    assert isinstance(one, WithTeacher)
    assert isinstance(other, WithTeacher)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
        assert torch.equal(one.teacher[name], other.teacher[name])
        assert not torch.equal(one.teacher[name], value)
    assert one.taken == [1, 1, 0, 1, 1, 1]
    assert again[-1].metrics["loss"] == records[-1].metrics["loss"]
    assert [group["lr"] for group in whole.optimiser.param_groups] == pytest.approx([0.01 / 6, 0.04 / 6])
    assert [group["weight_decay"] for group in whole.optimiser.param_groups] == [0.1, 0.0]
    for record in records:
        assert record.metrics["num_right"] == pytest.approx(8 * record.metrics["accuracy"])
        assert "text_tokens" not in record.metrics


def test_a_frozen_teacher_stays_outside_and_what_gets_no_gradient_stays_as_it_is() -> None:
    config = configured().model_copy(update={"objective": distilled.DistilledConfig()})
    torch.manual_seed(0)
    built = distilled.build(config, CPU)
    trainer = loop.Trainer(
        config=config,
        objective=built.objective,
        model=built.model,
        wrapped=built.model,
        optimiser=build_optimiser(built.model, config.optim, built.groups),
        device=CPU,
        num_steps=NUM_STEPS,
    )
    crops = torch.randint(0, 256, (2, 8, distilled.SIDE, distilled.SIDE, 3), dtype=torch.uint8)
    for step in range(3):
        trainer.train_step(Batch(step, 0, np.arange(8), {"one": crops[0], "other": crops[1]}))
    state = trainer.state()
    assert state["objective"].keys() == {"average"}
    assert state["model"].keys() == state["objective"]["average"].keys() == dict(built.model.named_parameters()).keys()
    # It is in a group that decays.
    assert torch.equal(state["model"]["unused"], torch.ones(3))
    assert not torch.equal(state["model"]["head.weight"], state["objective"]["average"]["head.weight"])
    slow, fast = (group["lr"] for group in trainer.optimiser.param_groups)
    assert slow == pytest.approx(0.2 * fast)


def test_a_side_table_that_one_of_the_corpora_lacks_is_refused_before_workers_start(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_prepared_corpus(folder, {"train": 16})
        add_side_table(folder, "lesions", "lesion", "text", lambda index: str(index // 2))
    add_side_table(folders[0], "masks", "mask", "mask", lambda index: None)
    keys = ("objective.kind=tests.distilled:OBJECTIVE", f"output={tmp_path / 'out'}")
    pretrain.check(configured(f"corpus={folders[0]}", *keys))
    both = configured(f"corpus=[{folders[0]}, {folders[1]}]", *keys)
    wanted = f"{folders[1]} has no side table 'masks', of which sides.masks.mask is wanted; it has: lesions (lesion)"
    with pytest.raises(CorpusError, match=re.escape(wanted)):
        pretrain.check(both)
    add_side_table(folders[1], "masks", "outline", "mask", lambda index: None)
    with pytest.raises(CorpusError, match="b: the side table 'masks' has no column 'mask', .*; it has: outline"):
        pretrain.check(both)


def test_views_that_read_what_the_driver_was_not_told_are_refused() -> None:
    views = distilled.build(configured().model_copy(update={"objective": distilled.DistilledConfig()}), CPU).views
    with pytest.raises(ConfigError, match=r"its views read sides\.masks\.mask; its ObjectiveKind must say so"):
        contract.require_told(configured(), views)
    contract.require_told(configured("objective.kind=tests.distilled:OBJECTIVE"), views)


def test_its_keys_are_keys_of_the_run() -> None:
    config = configured("objective.side=12")
    ours = {key: value for key, value in config.trajectory().items() if key.startswith("objective.")}
    assert ours == {"objective.kind": KIND, "objective.side": 12, "objective.head_lr_factor": 10.0}
    assert PretrainConfig.model_validate_json(config.model_dump_json()) == config
    assert parse(PretrainConfig, ["corpus=c", "output=o"]).objective.kind == "contrastive"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kind=contrastiv"], "there is no objective 'contrastiv'; there are contrastive"),
        (["objective.kind=tests.nowhere:X"], "cannot be imported: No module named 'tests.nowhere'"),
        (["objective.kind=tests.rotation:check"], "is a function, and must be an ObjectiveKind"),
        (["objective.sides=3"], "unknown key 'objective.sides'"),
        (["objective.side=wide"], "objective.side: "),
    ],
)
def test_what_does_not_fit_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)


def test_a_kind_whose_keys_say_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Forgetful: forgotten must say DecidesWeights or LeavesWeights"):
        kinds.ObjectiveKind(Forgetful, "tests.rotation")


def test_checkpoints_of_before_there_were_kinds_are_contrastive() -> None:
    run: list[str] = ["corpus=c", "output=o"]
    now = parse(PretrainConfig, run).trajectory()
    before = {key: value for key, value in now.items() if key != "objective.kind"}
    info = checkpoint.CheckpointInfo("u", 1, "", before, "c")
    assert checkpoint.differences(info, trajectory=now, corpus_digest="c") == ""
    other = now | {"objective.kind": KIND}
    assert "objective.kind was 'contrastive', now" in checkpoint.differences(info, trajectory=other, corpus_digest="c")


def test_figures_are_means_over_steps() -> None:
    means = loop.FigureMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"a": contract.Figure(value, "sum"), "b": contract.Figure(torch.tensor(value))})
    taken = means.take()
    assert taken["a"] == contract.Figure(3.0, "sum")
    assert float(taken["b"].value) == 3.0
    assert means.take() == {}


def test_which_scores_of_a_validation_are_best_is_read_where_reports_read_it() -> None:
    said = scales.best(["validation_nll", "validation_image_to_text_mean_rank", "validation_macro_auroc"])
    assert said == dict(zip(said, ("min", "min", "max"), strict=True))
    assert {*kinds.find("contrastive").scores.values()} == {"max"}
    assert [name for name in kinds.find("contrastive").scores if "text_to_image_R_at_10" in name]
