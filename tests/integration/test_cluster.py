"""Logical CPUs of an own cluster stand for fewer cores."""

from __future__ import annotations

import os

import pytest

from dermray import cluster


@pytest.mark.ray
def test_work_that_fills_a_core_reserves_all_its_cpus(ray_cluster: None) -> None:
    cores = min(os.cpu_count() or 1, 4)
    assert cluster.cpus_of_cores(1.0) == 4 / cores
    assert cluster.cpus_of_cores(0.5) == 2 / cores
    assert cluster.cpus_of_cores(1000.0) == 4, "a task that asks for more than there is would wait forever"
