"""Chunks of decoding tasks: every row of the rank's steps once, in order, small at first."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.ingest.plan import EpochPlan
from dermray.ingest.schedule import UNIT_ROWS, chunk_steps, chunks
from tests.unit.test_plan import manifest_of, manifests


@given(manifests, st.integers(1, 48), st.data())
@settings(max_examples=100)
def test_chunks_hold_the_batches_of_a_rank_from_any_step_to_any_other(manifest, global_batch_size, data):
    if manifest.num_samples < global_batch_size:
        return
    plan_of = functools.cache(
        lambda epoch: EpochPlan(manifest, seed=1, epoch=epoch, global_batch_size=global_batch_size)
    )
    per_epoch = len(plan_of(0))
    world_size = data.draw(st.sampled_from(plan_of(0).world_sizes))
    rank = data.draw(st.integers(0, world_size - 1))
    end_step = data.draw(st.integers(0, 3 * per_epoch))
    step = start_step = data.draw(st.integers(0, end_step))
    where = {"rank": rank, "world_size": world_size, "start_step": start_step, "end_step": end_step}
    for chunk in chunks(plan_of, **where):
        assert chunk.first_step == step
        for row in chunk.draws:
            epoch, within = divmod(step, per_epoch)
            assert epoch == chunk.epoch
            np.testing.assert_array_equal(row, plan_of(epoch).rank_batch(within, rank, world_size))
            step += 1
        for block in chunk.blocks:
            assert all(unit.size <= max(UNIT_ROWS, len(unit)) for unit in block)
    assert step == end_step


@pytest.mark.parametrize(
    ("rank_batch_size", "num_streams", "num_steps"),
    [(4096, 64, 1), (512, 8, 1), (256, 64, 4), (64, 64, 16), (16, 1, 8), (1, 1, 128)],
)
def test_a_chunk_takes_many_rows_of_each_stream(rank_batch_size, num_streams, num_steps):
    assert chunk_steps(rank_batch_size, num_streams) == num_steps


def test_the_first_batch_waits_for_no_other():
    plan = EpochPlan(manifest_of([[64] * 256]), seed=0, epoch=0, global_batch_size=256)
    made = list(chunks(lambda _: plan, rank=0, world_size=1, start_step=3, end_step=30))
    assert [chunk.num_steps for chunk in made] == [1, 2, 4, 4, 4, 4, 4, 4]
    assert [len(chunk.blocks[0]) for chunk in made[:2]] == [2, 4]


@pytest.mark.parametrize(
    ("global_batch_size", "units"),
    [
        (1024, [[(1, 128)] * 8]),
        (256, [[(1, 256)]] * 4),
        (96, [[(1, 96)]] * 11),
        (32, [[(4, 32)]] * 4),
    ],
)
def test_once_under_way_a_task_makes_whole_batches_unless_they_are_large(global_batch_size, units):
    plan = EpochPlan(manifest_of([[64] * 256]), seed=0, epoch=0, global_batch_size=global_batch_size)
    *_, chunk, _ = chunks(lambda _: plan, rank=0, world_size=1, start_step=0, end_step=len(plan))
    assert [[unit.shape for unit in block] for block in chunk.blocks] == units
