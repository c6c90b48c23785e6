"""EpochPlan: exactly once, the same for every world size, resumable at any step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.corpus.manifest import Manifest, Shard
from dermray.errors import PlanError
from dermray.ingest.plan import EpochPlan


def manifest_of(shards: list[list[int]]) -> Manifest:
    return Manifest(
        shards=tuple(
            Shard(
                path=f"data/{i}.parquet",
                split="train",
                num_samples=sum(groups),
                num_bytes=1,
                sha256="0" * 64,
                row_groups=tuple(groups),
            )
            for i, groups in enumerate(shards)
        )
    )


manifests = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=8).map(manifest_of)


@given(manifests, st.integers(0, 5), st.integers(0, 3), st.integers(1, 48))
@settings(deadline=None, max_examples=150)
def test_every_sample_at_most_once_and_only_a_partial_batch_dropped(manifest, seed, epoch, global_batch_size):
    if manifest.num_samples < global_batch_size:
        with pytest.raises(PlanError, match="fewer than one global batch"):
            EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
        return
    plan = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    assert len(plan) == manifest.num_samples // global_batch_size
    seen = np.concatenate([plan.batch(step) for step in range(len(plan))])
    assert seen.dtype == np.int64
    assert len(np.unique(seen)) == len(seen) == len(plan) * global_batch_size
    assert seen.min() >= 0
    assert seen.max() < manifest.num_samples


@given(manifests, st.integers(0, 5), st.integers(1, 48))
@settings(deadline=None, max_examples=100)
def test_ranks_of_every_admitted_world_make_up_the_global_batch(manifest, seed, global_batch_size):
    if manifest.num_samples < global_batch_size:
        return
    plan = EpochPlan(manifest, seed=seed, epoch=1, global_batch_size=global_batch_size)
    assert plan.world_sizes[0] == 1
    for world_size in plan.world_sizes:
        for step in {0, len(plan) // 2, len(plan) - 1}:
            parts = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
            np.testing.assert_array_equal(np.concatenate(parts), plan.batch(step))


@given(manifests, st.integers(1, 48), st.data())
@settings(deadline=None, max_examples=100)
def test_windows_from_any_step_yield_exactly_the_remaining_batches(manifest, global_batch_size, data):
    if manifest.num_samples < global_batch_size:
        return
    plan = EpochPlan(manifest, seed=3, epoch=2, global_batch_size=global_batch_size)
    world_size = data.draw(st.sampled_from(plan.world_sizes))
    rank = data.draw(st.integers(0, world_size - 1))
    start_step = data.draw(st.integers(0, len(plan)))
    waiting: dict[int, list[int]] = {stream: [] for stream in plan.streams_of(rank, world_size)}
    windows = iter(plan.rank_windows(rank, world_size, start_step=start_step))
    for step in range(start_step, len(plan)):
        while any(len(rows) < plan.rows_per_step for rows in waiting.values()):
            window = next(windows)
            assert window.start // plan.rows_per_step <= step, "a window arrives before it is needed, in order"
            waiting[window.stream].extend(window.rows.tolist())
        got = []
        for rows in waiting.values():
            got += rows[: plan.rows_per_step]
            del rows[: plan.rows_per_step]
        np.testing.assert_array_equal(got, plan.rank_batch(step, rank, world_size))
    assert next(windows, None) is None
    assert not any(waiting.values())


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    manifest = manifest_of([[32] * 8] * 4)

    def order(seed: int, epoch: int) -> list[int]:
        plan = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=64)
        return np.concatenate([plan.batch(step) for step in range(len(plan))]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_batches_mix_row_groups():
    manifest = manifest_of([[32] * 8] * 4)
    plan = EpochPlan(manifest, seed=0, epoch=0, global_batch_size=64)
    groups = [len(set((plan.batch(step) // 32).tolist())) for step in range(len(plan))]
    assert min(groups) >= 16


def test_refuses_a_world_that_does_not_divide_the_streams_and_says_which_do():
    plan = EpochPlan(manifest_of([[16] * 4]), seed=0, epoch=0, global_batch_size=32)
    assert plan.world_sizes == (1, 2, 4)
    with pytest.raises(PlanError, match="admit 1, 2, 4 workers"):
        plan.rank_batch(0, 0, 3)
    with pytest.raises(PlanError, match="outside a world"):
        plan.rank_batch(0, 4, 4)
    with pytest.raises(PlanError, match="outside the epoch"):
        plan.batch(2)


def test_a_larger_world_keeps_the_order_when_streams_are_kept():
    manifest = manifest_of([[10, 7, 3], [20, 1]])
    plan = EpochPlan(manifest, seed=0, epoch=0, global_batch_size=8, num_streams=4)
    with pytest.raises(PlanError, match="does not divide"):
        EpochPlan(manifest, seed=0, epoch=0, global_batch_size=8, num_streams=3)
    assert plan.world_sizes == (1, 2, 4)


def test_epochs_drop_different_samples():
    manifest = manifest_of([[10] * 3])
    dropped = []
    for epoch in range(6):
        plan = EpochPlan(manifest, seed=0, epoch=epoch, global_batch_size=4)
        seen = np.concatenate([plan.batch(step) for step in range(len(plan))])
        dropped.append(tuple(sorted(set(range(30)) - set(seen.tolist()))))
    assert len(set(dropped)) > 1
