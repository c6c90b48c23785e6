"""Pieces of work on a cluster whose nodes come and go: one that joins is used, one that is lost costs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from dermray import cluster, pieces
from dermray.config import ClusterConfig

pytestmark = [pytest.mark.own_cluster, pytest.mark.long, pytest.mark.timeout(300)]

NUM_PIECES = 100
SECONDS_EACH = 0.3
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
# A dead node is noticed after some seconds.
HEARTBEATS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node, joined."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # These nodes are not reached from elsewhere.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {**NODE, "_system_config": HEARTBEATS, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.connect(ClusterConfig(address=made.address))
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def where(number: int) -> str:
    """The node that a piece is done on."""
    time.sleep(SECONDS_EACH)
    return str(ray.get_runtime_context().get_node_id())


def test_a_node_that_joins_is_used_and_one_that_is_lost_costs_nothing(nodes: Any) -> None:
    head, second, is_lost = str(ray.get_runtime_context().get_node_id()), None, False
    done: dict[str, str] = {}
    told: list[str] = []
    pool = pieces.Pool(noun="piece", operator="where")
    for name, node in pieces.run({str(number): number for number in range(NUM_PIECES)}, where, pool, say=told.append):
        assert name not in done
        done[name] = node
        if second is None:
            second = nodes.add_node(**NODE)
        if node != head and not is_lost:
            nodes.remove_node(second, allow_graceful=False)
            is_lost = True
    assert is_lost, "the node that joined was given nothing"
    assert len(done) == NUM_PIECES
    # Once for the worker at work there, and perhaps once more for one that was to begin there.
    assert 1 <= len(told) <= 2
    assert all("a piece's worker is lost" in line for line in told)
