"""Settings that cannot do what they say are told before the work, in every job that has such keys."""

from __future__ import annotations

import pytest

from dermray.config import parse
from dermray.evaluate.settings import EvaluateConfig
from dermray.export.settings import ExportConfig
from dermray.prepare.settings import PrepareConfig
from dermray.train.effects import without_effect
from dermray.train.settings import PretrainConfig
from dermray.tuning.settings import SweepConfig

SOUND = ("corpus=c", "output=o", "train.global_batch_size=32", "train.log_every_steps=5", "optim.warmup_steps=4")


def told(*overrides: str, num_steps: int = 40) -> str:
    return "\n".join(without_effect(parse(PretrainConfig, [*SOUND, *overrides]), num_steps))


def test_nothing_is_told_of_a_run_whose_settings_all_count() -> None:
    assert told() == ""
    assert told("validation.every_steps=20", "train.keep_best=x", "train.keep_best_mode=min") == ""


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optim.warmup_steps=1000"], "optim.warmup_steps=1000 is longer than the run of 40 steps: the learning rate "),
        (["validation.every_steps=41"], "validation.every_steps=41 is beyond the run of 40 steps: there is one"),
        (["train.checkpoint_every_steps=100"], "is beyond the run of 40 steps: there is a checkpoint every 5 minutes"),
        (["train.log_every_steps=50"], "train.log_every_steps=50 is beyond the run of 40 steps: only the last"),
        (
            ["optim.schedule=constant_cooldown", "optim.cooldown_epochs=0.95"],
            "optim.cooldown_epochs=0.95 are 38 steps, and after its warm-up the run has 36: the learning rate never",
        ),
        (["train.max_steps=60"], "train.max_steps=60 is beyond the run of 40 steps, which train.epochs=30 makes"),
        (["train.micro_batch_size=32"], "train.micro_batch_size=32 has no effect: a worker has 32 samples at once"),
        (["train.grad_checkpointing_keeps=products"], "has no effect without train.grad_checkpointing"),
        (["train.keep_best_mode=min"], "train.keep_best_mode has no effect without train.keep_best"),
        (["train.resize_every_s=5"], "train.resize_every_s has no effect with a fixed num_workers"),
        (["loss.name=siglip", "loss.method=local"], "loss.method has no effect with loss.name=siglip"),
        (
            ["objective.kind=tests.rotation:OBJECTIVE", "loss.name=siglip"],
            "loss.name: no effect with objective.kind=test",
        ),
        (["validation.max_samples=9"], "validation.max_samples: no effect without validation.every_steps"),
        (["model=hf-hub:a/b", "pretrained=openai"], "pretrained=openai has no effect: model=hf-hub:a/b brings its own"),
    ],
)
def test_a_setting_without_effect_is_told(overrides: list[str], line: str) -> None:
    assert line in told(*overrides)
    assert len(told(*overrides).splitlines()) == 1


def test_the_rate_that_a_long_warm_up_comes_to_is_told() -> None:
    assert "comes to 0.9% of optim.lr and never to its peak" in told("optim.warmup_steps=1000", num_steps=9)


def test_checkpoints_suit_the_length_of_the_run() -> None:
    train = parse(PretrainConfig, SOUND).train
    assert [train.checkpoint_cadence(steps) for steps in (1, 3, 40, 800, 100_000)] == [1, 1, 10, 200, 200]
    assert parse(PretrainConfig, [*SOUND, "train.checkpoint_every_steps=7"]).train.checkpoint_cadence(40) == 7
    assert train.checkpoint_every_minutes == 5


PREPARE = ("source=csv", "input=i", "output=o")
EVALUATE = ("model=m", "corpus=c", "output=o")
EXPORT = ("corpus=c", "output=o", "format=open_clip_csv", "titles=first")
SWEEP = ("recipe=r", "corpus=c", "output=o", "space.optim.lr={kind: choice, values: [0.1, 0.2]}", "num_trials=2")


@pytest.mark.parametrize(
    ("kind", "arguments", "line"),
    [
        (
            PrepareConfig,
            [*PREPARE, "rows_per_shard=64", "row_group_size=128"],
            "row_group_size=128 is beyond rows_per_shard=64",
        ),
        (PrepareConfig, [*PREPARE, "near_duplicates=keep", "max_distance=3"], "max_distance has no effect"),
        (PrepareConfig, [*PREPARE, "min_side=300"], "min_side=300 is above image_size=256"),
        (
            PrepareConfig,
            ["source=ham10000", "input=i", "output=o", "columns.label=dx"],
            "columns.label has no effect with source=ham10000",
        ),
        (PrepareConfig, [*PREPARE, "rewrite.model=m"], "rewrite.model has no effect with rewrite.mode=off"),
        (
            EvaluateConfig,
            ["model=m", "output=o", "data=d", "benchmark=make", "columns.label=dx"],
            "columns has no effect with benchmark",
        ),
        (ExportConfig, ["corpus=c", "output=o", "format=parquet", "titles=first"], "titles has no effect with format"),
        (EvaluateConfig, [*EVALUATE, "shots=[1]"], "shots has no effect without few_shot among tasks"),
        (
            EvaluateConfig,
            [*EVALUATE, "tasks=[retrieval]", "templates=['a {}']"],
            "templates has no effect",
        ),
        (EvaluateConfig, [*EVALUATE, "classes=[a,b]"], "classes has no effect with a prepared corpus"),
        (SweepConfig, [*SWEEP, "num_validations=2", "scheduler.grace_period=2"], "no trial is stopped early"),
        (SweepConfig, [*SWEEP, "search=grid"], "num_trials has no effect with search=grid"),
    ],
)
def test_other_jobs_tell_theirs(
    kind: type[PrepareConfig] | type[EvaluateConfig] | type[ExportConfig] | type[SweepConfig],
    arguments: list[str],
    line: str,
) -> None:
    (told,) = parse(kind, arguments).without_effect()
    assert line in told


@pytest.mark.parametrize(
    ("kind", "arguments"), [(PrepareConfig, PREPARE), (EvaluateConfig, EVALUATE), (ExportConfig, EXPORT)]
)
def test_defaults_are_silent(
    kind: type[PrepareConfig] | type[EvaluateConfig] | type[ExportConfig], arguments: tuple[str, ...]
) -> None:
    assert parse(kind, arguments).without_effect() == []
