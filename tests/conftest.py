"""Fixtures that every folder of tests shares: one Ray cluster for the whole session."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("dermray", deadline=None)
settings.load_profile("dermray")

ROOT = Path(__file__).resolve().parent.parent
# What an installed package of somebody's own would bring: entry points, which lead into `tests`.
INSTALLED = ROOT / "tests" / "installed"
sys.path.append(str(INSTALLED))
# Subprocesses and Ray workers import the source tree the tests belong to.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "platform"), str(ROOT), str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Vectors that tests compute, and records that they have not delivered, do not stay with whoever runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="dermray-tests-")
os.environ["DERMRAY_CACHE"] = os.path.join(_CACHE.name, "cache")
os.environ["DERMRAY_SPOOL"] = os.path.join(_CACHE.name, "spool")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a cluster of their own come first: two clusters on one host confuse Ray's job submission."""
    items.sort(key=lambda item: item.get_closest_marker("own_cluster") is None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The session's local Ray cluster; tests declare what they use, all share it."""
    from dermray import cluster
    from dermray.config import ClusterConfig

    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect(ClusterConfig(num_cpus=4, dashboard=False))
    yield
    import ray

    ray.shutdown()
