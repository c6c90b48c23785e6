"""Counts of draws: exact in every epoch, even over all epochs, and nothing read that is not needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.config import parse
from dermray.errors import PlanError
from dermray.ingest import draws
from dermray.ingest.corpora import Corpora
from dermray.train import epochs
from dermray.train.pretrain import samples_of_an_epoch
from dermray.train.settings import PretrainConfig
from tests import choosy
from tests.corpora import write_prepared_corpus


@st.composite
def weighted(draw):
    """Sizes of row groups, and a weight of each sample; not all are 0."""
    sizes = np.array(draw(st.lists(st.integers(1, 12), min_size=1, max_size=8)))
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=int(sizes.sum()), max_size=int(sizes.sum()))))
    weights[draw(st.integers(0, len(weights) - 1))] += 1
    return weights, sizes


@given(weighted(), st.integers(0, 5), st.integers(1, 100), st.integers(1, 12))
@settings(max_examples=150)
def test_an_epoch_has_the_draws_asked_for_and_all_epochs_draw_evenly(given_weights, seed, length, num_epochs):
    weights, sizes = given_weights
    total, drawn = weights.sum(), np.zeros(len(weights), dtype=np.int64)
    for epoch in range(num_epochs):
        counts = draws.stretch(weights, sizes, seed=seed, begin=epoch * length, length=length)
        assert counts.dtype == np.int64
        assert counts.sum() == length
        assert (counts[weights == 0] == 0).all()
        assert (counts >= length // total * weights).all()
        assert (counts <= -(-length // total) * weights).all()
        drawn += counts
        again = draws.stretch(weights, sizes, seed=seed, begin=epoch * length, length=length)
        np.testing.assert_array_equal(again, counts)
    rounds = num_epochs * length // total
    assert (drawn >= rounds * weights).all()
    assert (drawn <= -(-num_epochs * length // total) * weights).all()
    # Only the row groups at both ends of a stretch are drawn from in part.
    starts = np.cumsum(sizes) - sizes
    parts = counts - length // total * weights
    in_part = np.add.reduceat(parts, starts)
    cut = (in_part > 0) & (in_part < np.add.reduceat(weights, starts))
    assert cut.sum() <= 2


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 5), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=100)
def test_a_share_is_exact_leaves_row_groups_out_and_holds_every_smaller_one(sizes, seed, one, other):
    sizes = np.array(sizes)
    smaller, larger = (draws.share(sizes, seed=seed, fraction=fraction) for fraction in sorted((one, other)))
    assert smaller.sum() == max(1, round(min(one, other) * sizes.sum()))
    assert set(np.unique(larger)) <= {0, 1}
    assert (larger >= smaller).all()
    of_groups = np.add.reduceat(smaller, np.cumsum(sizes) - sizes)
    assert ((of_groups > 0) & (of_groups < sizes)).sum() <= 1


def configured(corpus: Path, *keys: str) -> PretrainConfig:
    return parse(PretrainConfig, [f"corpus={corpus}", "output=o", "train.global_batch_size=4", *keys])


def test_a_fraction_trains_on_the_same_samples_each_epoch_and_tells_the_others(tmp_path):
    corpora = Corpora.of("c", write_prepared_corpus(tmp_path / "corpus", {"train": 20}, row_group_size=4))
    config = configured(tmp_path / "corpus", "data.fraction=0.45")
    assert samples_of_an_epoch(config) == (
        f"an epoch of the split train draws 9 of 20 samples; left out: {epochs.NOT_KEPT} 11; "
        f"of its draws: 8 of 9 draws; left out: {epochs.LEFT_OVER} 1"
    )
    counts = epochs.counts(config, corpora)
    np.testing.assert_array_equal(counts(0), counts(7))
    assert len(epochs.first(config, corpora).rank_row_groups(0, 1)) == 3
    other = epochs.counts(configured(tmp_path / "corpus", "data.fraction=0.45", "seed=1"), corpora)
    assert counts(0).tolist() != other(0).tolist()
    with pytest.raises(PlanError, match="an epoch draws 2 samples, fewer than one global batch of 4"):
        epochs.first(configured(tmp_path / "corpus", "data.fraction=0.1"), corpora)


def test_an_objective_that_draws_other_samples_each_epoch_draws_as_many_of_a_fraction(tmp_path, monkeypatch):
    manifest = write_prepared_corpus(tmp_path / "corpus", {"train": 30}, row_group_size=4)
    corpora = Corpora.of("c", manifest)
    config = configured(tmp_path / "corpus", "data.fraction=0.5", "objective.kind=tests.choosy:OBJECTIVE")
    kept = draws.share(manifest.row_group_sizes(), seed=0, fraction=0.5)
    counts, wanted = epochs.counts(config, corpora), choosy.twice_and_never(config, manifest)
    np.testing.assert_array_equal(counts(0), wanted(0) * kept)
    drawn = [counts(epoch) for epoch in range(6)]
    assert len({each.sum() for each in drawn}) == 1
    assert all((each[wanted(epoch) * kept == 0] == 0).all() for epoch, each in enumerate(drawn))
    unused = int(((wanted(0) == 0) & (kept == 1)).sum())
    told = f"left out: {epochs.NOT_KEPT} 15, {epochs.NOT_DRAWN} {unused};"
    assert told in samples_of_an_epoch(config)

    def fading(config, of):
        return lambda epoch: 1 - kept if epoch else kept

    monkeypatch.setattr(choosy, "FADING", replace(choosy.OBJECTIVE, counts=fading), raising=False)
    config = configured(tmp_path / "corpus", "data.fraction=0.5", "objective.kind=tests.choosy:FADING")
    with pytest.raises(PlanError, match=r"uses none of the samples that data\.fraction keeps of c in epoch 1"):
        epochs.first(config, corpora)
