from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.config import parse, validate
from dermray.errors import ConfigError
from dermray.tuning.settings import SweepConfig
from dermray.tuning.space import Choice, Integer, LogUniform, Uniform, dotted, grid, num_points, ordered, sample

SPACE = {
    "optim.lr": LogUniform(kind="loguniform", low=1e-4, high=1e-2),
    "train.global_batch_size": Choice(kind="choice", values=[64, 128]),
    "data.horizontal_flip": Uniform(kind="uniform", low=0.0, high=0.5),
    "optim.warmup_steps": Integer(kind="int", low=1, high=40),
}
BASE = {"recipe": "r.yaml", "corpus": "c", "output": "o"}


def sweep_config(**keys):
    return validate(
        SweepConfig, {**BASE, "space": {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1}}, **keys}
    )


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_values_stay_inside_and_a_longer_draw_begins_with_the_shorter(seed, num_trials):
    trials = sample(SPACE, num_trials=num_trials, seed=seed)
    assert trials == sample(SPACE, num_trials=num_trials + 3, seed=seed)[:num_trials]
    for trial in trials:
        assert list(trial) == list(SPACE)
        assert 1e-4 <= trial["optim.lr"] <= 1e-2
        assert trial["train.global_batch_size"] in (64, 128)
        assert 0 <= trial["data.horizontal_flip"] <= 0.5
        assert trial["optim.warmup_steps"] in range(1, 41)
        assert trial["optim.lr"] == float(f"{trial['optim.lr']:.4g}")


def test_another_seed_draws_other_trials():
    assert sample(SPACE, num_trials=3, seed=0) != sample(SPACE, num_trials=3, seed=1)


def test_loguniform_covers_orders_of_magnitude_alike():
    parameter = SPACE["optim.lr"]
    values = [parameter.sample(np.random.default_rng(seed)) for seed in range(600)]
    assert np.mean([value < 1e-3 for value in values]) == pytest.approx(0.5, abs=0.08)


def test_a_finite_space_is_drawn_without_repetition():
    space = {
        "a": Choice(kind="choice", values=[1, [2, 3], "x"]),
        "b": Integer(kind="int", low=0, high=1),
    }
    assert num_points(space) == 6
    assert math.isinf(num_points(SPACE))
    trials = sample(space, num_trials=6, seed=3)
    assert len({str(trial) for trial in trials}) == 6


def test_a_space_that_holds_too_little_ends_the_draw() -> None:
    narrow = {"optim.lr": Uniform(kind="uniform", low=1.0001, high=1.0002)}
    with pytest.raises(ConfigError, match="widen the ranges"):
        sample(narrow, num_trials=20, seed=0)
    for keys in ({"num_trials": 10**39}, {"space": {"optim.warmup_steps": {"kind": "int", "low": 1, "high": 10**39}}}):
        with pytest.raises(ConfigError):
            sweep_config(**keys)
    wide = {"optim.warmup_steps": {"kind": "int", "low": 0, "high": 2**50}}
    with pytest.raises(ConfigError, match="100,000 points"):
        sweep_config(search="grid", space=wide)


def test_an_exponent_without_a_dot_is_a_number():
    config = sweep_config(space={"optim.lr": {"kind": "choice", "values": ["1e-4", 0.1, "e-4"]}}, num_trials=3)
    assert config.space["optim.lr"].values == [1e-4, 0.1, "e-4"]


def test_nested_and_dotted_keys_are_one():
    tree = {"optim.lr": {"kind": "uniform", "low": 0, "high": 1}, "optim": {"lr": {"high": 2}, "eps": {"kind": "int"}}}
    assert dotted(tree) == {"optim.lr": {"kind": "uniform", "low": 0, "high": 2}, "optim.eps": {"kind": "int"}}


def test_the_command_line_reaches_into_a_space_of_the_file(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("space:\n  optim.lr: {kind: loguniform, low: 1.0e-4, high: 1.0e-2}\n")
    arguments = ["--config", str(file), *[f"{key}={value}" for key, value in BASE.items()]]
    config = parse(SweepConfig, [*arguments, "space.optim.lr.high=0.5", "scheduler.grace_period=2"])
    assert config.space["optim.lr"].high == 0.5
    assert config.scheduler.grace_period == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"space": {"optim.lr": {"kind": "uniform", "low": 2, "high": 1}}}, "low must be below high"),
        ({"space": {"optim.lr": {"kind": "loguniform", "low": 0, "high": 1}}}, "greater than 0"),
        ({"space": {"optim.lr": {"kind": "normal", "low": 0, "high": 1}}}, "normal"),
        ({"space": {"optim.lr": {"kind": "uniform", "low": 0}}}, "high is required"),
        ({"space": {"a": {"kind": "choice", "values": [1, 1]}}}, "values must differ"),
        ({"space": {"a": {"kind": "choice", "values": [1, 2]}}, "num_trials": 3}, "holds 2 different trials, not 3"),
        ({"space": {}}, "space"),
        ({"overrides": {"validation": {"every_steps": 3}}}, "validation.every_steps: the sweep sets this itself"),
        ({"overrides": {"tracking": {"enabled": False}}}, "tracking: the sweep sets this itself"),
        ({"space": {"output": {"kind": "choice", "values": ["a", "b"]}}, "num_trials": 2}, "output: the sweep sets"),
        ({"scheduler": {"reduction_factor": 1}}, "scheduler.reduction_factor"),
        ({"mode": "best"}, "mode"),
        ({"recipe": None}, "recipe: a sweep of pretrainings needs one"),
        ({"job": "evaluate"}, "objective: validation_zero_shot_accuracy is no score of an evaluation"),
        ({"job": "evaluate", "objective": "a/b", "overrides": {"benchmark": "make"}}, "benchmark: the sweep sets this"),
        ({"job": "evaluate", "objective": "a/b", "scheduler": {"kind": "pbt"}}, "evaluations train nothing"),
    ],
)
def test_bad_settings_are_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        sweep_config(**keys)


CONDITIONAL = {
    "loss.weight": Uniform(kind="uniform", low=0.0, high=1.0, steps=3, when={"loss.name": ["b"]}),
    "loss.name": Choice(kind="choice", values=["a", "b"]),
    "optim.lr": LogUniform(kind="loguniform", low=1e-4, high=1e-2, steps=3),
}


def test_a_key_varies_only_where_its_condition_holds():
    space = ordered(CONDITIONAL)
    assert list(space) == ["loss.name", "loss.weight", "optim.lr"]
    trials = sample(space, num_trials=40, seed=0)
    assert {trial["loss.name"] for trial in trials} == {"a", "b"}
    assert all(("loss.weight" in trial) == (trial["loss.name"] == "b") for trial in trials)


def test_a_grid_is_every_point_once():
    points = grid(ordered(CONDITIONAL))
    assert len(points) == 3 + 3 * 3
    assert [point["optim.lr"] for point in points[:3]] == [1e-4, 1e-3, 1e-2]
    assert {point["loss.weight"] for point in points if point["loss.name"] == "b"} == {0.0, 0.5, 1.0}
    assert len({str(point) for point in points}) == len(points)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"search": "grid"}, "optim.lr: a grid needs steps"),
        ({"space": {"a": {"kind": "int", "low": 1, "high": 2, "when": {"b": [1]}}}}, "a.when: b is no parameter"),
        (
            {
                "space": {
                    "a": {"kind": "int", "low": 1, "high": 2, "when": {"b": [1]}},
                    "b": {"kind": "int", "low": 1, "high": 2, "when": {"a": [1]}},
                }
            },
            "conditions go round in a circle",
        ),
        ({"search": "tpe", "space": {"num_workers": {"kind": "int", "low": 1, "high": 9}}}, "space.num_workers: tpe"),
    ],
)
def test_a_space_that_cannot_be_searched_so_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        sweep_config(**keys)
