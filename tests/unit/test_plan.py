"""EpochPlan: exactly once, the same for every world size, resumable at any step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray import storage
from dermray.config import parse
from dermray.corpus.manifest import Manifest, Shard
from dermray.errors import CheckpointError, PlanError
from dermray.ingest.corpora import Corpora
from dermray.ingest.plan import MAX_STREAMS, EpochPlan
from dermray.train import checkpoint, epochs, pretrain
from dermray.train.settings import PretrainConfig
from tests import choosy
from tests.corpora import write_prepared_corpus


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


def order_of(plan: EpochPlan) -> np.ndarray:
    return np.concatenate([plan.batch(step) for step in range(len(plan))])


def groups_of(manifest: Manifest, samples: np.ndarray) -> set[int]:
    ends = np.cumsum(manifest.row_group_sizes())
    return set(np.searchsorted(ends, samples, side="right").tolist())


@given(manifests, st.integers(0, 5), st.integers(0, 3), st.integers(1, 48))
@settings(max_examples=150)
def test_every_sample_at_most_once_and_only_a_partial_batch_dropped(manifest, seed, epoch, global_batch_size):
    if manifest.num_samples < global_batch_size:
        with pytest.raises(PlanError, match="fewer than one global batch"):
            EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
        return
    plan = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    assert len(plan) == manifest.num_samples // global_batch_size
    seen = order_of(plan)
    assert seen.dtype == np.int64
    assert len(np.unique(seen)) == len(seen) == len(plan) * global_batch_size
    assert seen.min() >= 0
    assert seen.max() < manifest.num_samples


@given(manifests, st.integers(0, 5), st.integers(1, 96))
@settings(max_examples=100)
def test_ranks_of_every_admitted_world_make_up_the_global_batch(manifest, seed, global_batch_size):
    if manifest.num_samples < global_batch_size:
        return
    plan = EpochPlan(manifest, seed=seed, epoch=1, global_batch_size=global_batch_size)
    assert plan.world_sizes[0] == 1
    assert plan.num_streams <= MAX_STREAMS
    for world_size in plan.world_sizes:
        for step in {0, len(plan) // 2, len(plan) - 1}:
            parts = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
            assert {len(part) for part in parts} == {global_batch_size // world_size}
            np.testing.assert_array_equal(np.concatenate(parts), plan.batch(step))


@given(st.lists(st.integers(1, 400), min_size=8, max_size=80), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=30)
def test_a_batch_that_1_to_8_workers_divide_admits_them_all(groups, seed, epoch):
    manifest = manifest_of([groups])
    size = math.lcm(*range(1, 9))
    if manifest.num_samples < size:
        return
    plan = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=size)
    assert plan.world_sizes[:8] == tuple(range(1, 9))
    for world_size in range(1, 9):
        for step in {0, len(plan) - 1}:
            parts = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
            np.testing.assert_array_equal(np.concatenate(parts), plan.batch(step))


@given(manifests, st.integers(1, 48), st.data())
@settings(max_examples=100)
def test_a_rank_reads_each_row_group_once_and_not_beyond_its_steps(manifest, global_batch_size, data):
    if manifest.num_samples < global_batch_size:
        return
    plan = EpochPlan(manifest, seed=3, epoch=2, global_batch_size=global_batch_size)
    world_size = data.draw(st.sampled_from(plan.world_sizes))
    uses = [plan.rank_row_groups(rank, world_size) for rank in range(world_size)]
    for rank, of_rank in enumerate(uses):
        assert len({use.group for use in of_rank}) == len(of_rank)
        assert [use.first_step for use in of_rank] == sorted(use.first_step for use in of_rank)
        for step in range(len(plan)):
            held = {use.group for use in of_rank if use.first_step <= step <= use.last_step}
            assert groups_of(manifest, plan.rank_batch(step, rank, world_size)) <= held
    # Only the row groups at the seams between ranks are read by both.
    read = sum(len(of_rank) for of_rank in uses)
    assert read - len({use.group for of_rank in uses for use in of_rank}) <= world_size - 1


def test_few_row_groups_are_open_at_once():
    """Also those that two streams share: a row group is not held from the epoch's first step to its last."""
    manifest = manifest_of([[64] * 16] * 40)
    plan = EpochPlan(manifest, seed=0, epoch=0, global_batch_size=640)
    uses = plan.rank_row_groups(0, 1)
    assert len(uses) == 640
    for step in range(len(plan)):
        assert sum(use.first_step <= step <= use.last_step for use in uses) <= 3 * plan.num_streams


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    manifest = manifest_of([[32] * 8] * 4)

    def order(seed: int, epoch: int) -> list[int]:
        return order_of(EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=64)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@pytest.mark.parametrize("global_batch_size", [64, 62])
def test_batches_mix_row_groups(global_batch_size):
    """Also where the world sizes alone would make two streams: 62 has no divisors but 1, 2, 31."""
    manifest = manifest_of([[32] * 8] * 4)
    plan = EpochPlan(manifest, seed=0, epoch=0, global_batch_size=global_batch_size)
    groups = [len(groups_of(manifest, plan.batch(step))) for step in range(len(plan))]
    assert min(groups) >= 16


def test_refuses_a_world_that_does_not_fit_and_says_which_do():
    plan = EpochPlan(manifest_of([[16] * 4]), seed=0, epoch=0, global_batch_size=32)
    assert plan.world_sizes == (1, 2, 4)
    with pytest.raises(PlanError, match="3 workers cannot share 4 streams evenly; .* admit 1, 2, 4 workers"):
        plan.rank_batch(0, 0, 3)
    with pytest.raises(PlanError, match="8 workers need at least 8 row groups, the corpus has 4; .*smaller row groups"):
        plan.rank_batch(0, 0, 8)
    with pytest.raises(PlanError, match="outside a world"):
        plan.rank_batch(0, 4, 4)
    with pytest.raises(PlanError, match="outside the epoch"):
        plan.batch(2)


@pytest.mark.parametrize(
    ("global_batch_size", "world_sizes"),
    [
        (4096, (1, 2, 4, 8, 16, 32, 64)),
        (2048, (1, 2, 4, 8, 16, 32, 64)),
        (840, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15, 20, 21)),
        (97, (1,)),
    ],
)
def test_world_sizes_of_a_large_corpus(global_batch_size, world_sizes):
    plan = EpochPlan(manifest_of([[128] * 100]), seed=0, epoch=0, global_batch_size=global_batch_size)
    assert plan.world_sizes == world_sizes
    assert plan.num_streams == 64


def test_epochs_drop_different_samples():
    manifest = manifest_of([[10] * 3])
    dropped = []
    for epoch in range(6):
        plan = EpochPlan(manifest, seed=0, epoch=epoch, global_batch_size=4)
        dropped.append(tuple(sorted(set(range(30)) - set(order_of(plan).tolist()))))
    assert len(set(dropped)) > 1


@st.composite
def counted(draw):
    """A manifest, and how often each of its samples is drawn: nothing at all of some row groups."""
    manifest = draw(manifests)
    per_group = [
        draw(st.sampled_from(([0], [1], [0, 1], [0, 1, 2, 5]))) for _ in range(len(manifest.row_group_sizes()))
    ]
    counts = [
        draw(st.sampled_from(choices))
        for size, choices in zip(manifest.row_group_sizes(), per_group, strict=True)
        for _ in range(size)
    ]
    return manifest, np.array(counts)


@given(counted(), st.integers(0, 5), st.integers(0, 3), st.integers(1, 48))
@settings(max_examples=150)
def test_samples_are_drawn_as_often_as_asked_for_and_unneeded_row_groups_are_not_read(drawn, seed, epoch, batch_size):
    manifest, counts = drawn
    if counts.sum() < batch_size:
        with pytest.raises(PlanError, match=f"an epoch draws {counts.sum()} samples, fewer than one global batch"):
            EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=batch_size, counts=counts)
        return
    plan = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=batch_size, counts=counts)
    num_samples = manifest.num_samples
    assert plan.num_draws == counts.sum()
    assert len(plan) == counts.sum() // batch_size
    order = order_of(plan)
    assert len(np.unique(order)) == len(order) == plan.num_samples_used
    samples, copies = order % num_samples, order // num_samples
    assert (copies < counts[samples]).all()
    # What is missing is less than a batch.
    assert (np.bincount(samples, minlength=num_samples) <= counts).all()
    needed = groups_of(manifest, samples)
    for world_size in plan.world_sizes:
        parts = [[plan.rank_batch(step, rank, world_size) for rank in range(world_size)] for step in range(len(plan))]
        np.testing.assert_array_equal(np.concatenate([np.concatenate(part) for part in parts]), order)
        for rank in range(world_size):
            uses = {use.group: use for use in plan.rank_row_groups(rank, world_size)}
            assert set(uses) <= needed
            for step in range(len(plan)):
                mine = groups_of(manifest, plan.rank_batch(step, rank, world_size) % num_samples)
                assert all(uses[group].first_step <= step <= uses[group].last_step for group in mine)


@given(manifests, st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=50)
def test_once_each_is_the_order_without_counts(manifest, seed, epoch):
    plain = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=1)
    ones = np.ones(manifest.num_samples, dtype=np.int32)
    counted = EpochPlan(manifest, seed=seed, epoch=epoch, global_batch_size=1, counts=ones)
    np.testing.assert_array_equal(order_of(counted), order_of(plain))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1] * 12, "counts must be an array of 12 integers, one a sample, not a list"),
        # Both wrap around in 64 bits, the second to a small number.
        (np.full(12, 2**64 - 1, dtype=np.uint64), "counts add up to 221,360,928,884,514,619,392 draws"),
        (np.array([2**62] * 4 + [1] * 8), "counts add up to 18,446,744,073,709,551,616 draws"),
        (np.array([2**32] + [1] * 11), "at most 4,294,967,296 are planned"),
    ],
)
def test_counts_that_are_too_many_or_no_array_are_refused(counts, message):
    with pytest.raises(PlanError, match=message):
        EpochPlan(manifest_of([[6, 6]]), seed=0, epoch=0, global_batch_size=2, counts=counts)


@pytest.mark.parametrize(
    "counts", [np.ones(11, int), np.ones((12, 1), int), np.ones(12), np.arange(12) - 1, np.ones(12, bool)]
)
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(PlanError, match="counts must be 12 integers from 0 on, one a sample"):
        EpochPlan(manifest_of([[6, 6]]), seed=0, epoch=0, global_batch_size=2, counts=counts)


def test_an_objective_that_draws_another_number_each_epoch_is_refused_before_the_first(monkeypatch, tmp_path):
    manifest = write_prepared_corpus(tmp_path, {"train": 10})
    kind = replace(choosy.OBJECTIVE, counts=lambda config, of: lambda epoch: np.full(of.num_samples, 1 + epoch))
    monkeypatch.setattr(choosy, "UNEVEN", kind, raising=False)
    keys = [f"corpus={tmp_path}", "output=o", "train.global_batch_size=4", "objective.kind=tests.choosy:UNEVEN"]
    with pytest.raises(PlanError, match="draws 10 samples in epoch 0 and 20 in epoch 1"):
        epochs.first(parse(PretrainConfig, keys), Corpora.of(str(tmp_path), manifest))


def test_a_run_does_not_go_on_with_other_draws_than_it_began_with(monkeypatch, tmp_path):
    """Neither keys nor corpus have changed, but the objective's code: no other batch would be what it was."""
    manifest = write_prepared_corpus(tmp_path / "corpus", {"train": 10})
    twice = np.arange(10) % 3
    kind = replace(choosy.OBJECTIVE, counts=lambda config, of: lambda epoch: np.roll(twice, epoch))
    monkeypatch.setattr(choosy, "ROLLING", kind, raising=False)
    output = str(tmp_path / "run")
    keys = [f"corpus={tmp_path}/corpus", f"output={output}", "train.global_batch_size=4"]
    config = parse(PretrainConfig, [*keys, "objective.kind=tests.choosy:ROLLING"])

    def saved(trajectory):
        storage.remove(output)
        keep = checkpoint.Retention(1)
        checkpoint.save(output, 1, {"step": 1}, trajectory=trajectory, corpus_digest=manifest.digest, retention=keep)

    saved(epochs.trajectory(config, Corpora.of(config.corpus_uris[0], manifest)))
    pretrain.check(config)
    twice[:] = twice[::-1].copy()
    with pytest.raises(CheckpointError, match="draws of the objective was '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        pretrain.check(config)
    # An earlier version did not say what it drew; once each is something else than what is drawn by counts.
    saved(config.trajectory())
    pretrain.check(config)
    saved({**config.trajectory(), checkpoint.DRAWS: None})
    with pytest.raises(CheckpointError, match="draws of the objective was None, now"):
        pretrain.check(config)


def test_a_row_group_that_all_streams_share_is_put_in_order_once():
    counts = np.zeros(1000, int)
    counts[300:400] = 50
    plan = EpochPlan(manifest_of([[100] * 10]), seed=0, epoch=0, global_batch_size=64, counts=counts)
    assert plan.num_streams == 10
    assert sorted(np.unique(order_of(plan) % 1000)) == list(range(300, 400))
    assert plan._group_rows.cache_info().misses == 1
