"""Which numbers of workers an elastic run may have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig

from dermray import cluster
from dermray.config import parse
from dermray.errors import ConfigError, PlanError
from dermray.train.elastic import QuietTorchTrainer, admitted_sizes, fitting_size
from dermray.train.settings import PretrainConfig


def configured(num_workers: str) -> PretrainConfig:
    return parse(PretrainConfig, ["corpus=c", "output=o", f"num_workers={num_workers}"])


@pytest.mark.parametrize(
    ("text", "elastic", "least", "most"),
    [("3", False, 3, 3), ("[2, 8]", True, 2, 8), ("[4, 4]", True, 4, 4), ("[5]", False, 5, 5)],
)
def test_a_number_or_two_bounds(text: str, elastic: bool, least: int, most: int) -> None:
    config = configured(text)
    assert (config.elastic, config.least_workers, config.most_workers) == (elastic, least, most)
    again: Any = PretrainConfig.model_validate_json(config.model_dump_json())
    assert again == config


@pytest.mark.parametrize("text", ["0", "[]", "[4, 2]", "[1, 2, 4]", "many", "[0, 2]", "1.5", "true"])
def test_what_is_no_number_of_workers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"num_workers: needs a number from 1 on, or \[least, most\]"):
        configured(text)


def test_the_number_of_workers_is_no_part_of_what_a_resumed_run_must_agree_on() -> None:
    assert configured("[1, 4]").trajectory() == configured("2").trajectory()


def test_bounds_hold_only_what_the_plan_admits() -> None:
    assert admitted_sizes((1, 2, 4, 8, 16), least=3, most=12) == (4, 8)
    with pytest.raises(PlanError, match=r"between 5 and 7 can share .* admit 1, 2, 4, 8 workers"):
        admitted_sizes((8, 4, 2, 1), least=5, most=7)


@given(st.sets(st.sampled_from([1, 2, 4, 8, 16]), min_size=1), st.integers(0, 20), st.integers(1, 40))
def test_the_largest_that_fits_and_leaves_room_for_decoding(sizes: set[int], possible: int, num_cpus: int) -> None:
    admitted = tuple(sorted(sizes))
    chosen = fitting_size(admitted, possible, num_cpus=num_cpus, cpus_per_worker=1.5, decoding_cpus=0.25)
    fitting = [size for size in admitted if size <= possible and size * 1.5 + 0.25 <= num_cpus]
    assert chosen == (fitting[-1] if fitting else 0)


@pytest.mark.parametrize("own", [True, False])
def test_no_process_asks_a_dashboard_of_a_cluster_that_has_none(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "is_own", lambda: own)
    trainer = QuietTorchTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in names) is not own
