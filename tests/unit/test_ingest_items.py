"""Items of several samples: which samples they hold, how they are drawn, decoded, and counted."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.errors import PlanError
from dermray.ingest import decoding, items
from dermray.ingest.corpora import Corpora
from dermray.train import epochs
from dermray.train.settings import PretrainConfig
from tests import distilled
from tests.conftest import ROOT
from tests.corpora import add_side_table, write_prepared_corpus


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=12), max_size=6),
    st.integers(1, 4),
    st.integers(1, 3),
)
@settings(max_examples=300)
def test_an_item_is_of_one_group_and_one_row_group(found: list[list[str | None]], most: int, least: int) -> None:
    groups = [group for row_group in found for group in row_group]
    sizes = np.array([len(row_group) for row_group in found], dtype=np.int64)
    lengths = items.of_neighbours(groups, sizes, most=most, least=least)
    assert items.checked(lengths, sizes).tolist() == lengths.tolist()
    taken = [place for first in np.flatnonzero(lengths) for place in range(first, first + lengths[first])]
    assert len(set(taken)) == len(taken)
    for first in np.flatnonzero(lengths):
        assert len(set(groups[first : first + lengths[first]])) == 1
        assert lengths[first] == 1 or groups[first] is not None
        assert min(least, most) <= lengths[first] <= most
    covered = items.covered(np.ones(len(groups), bool), lengths)
    assert np.flatnonzero(covered).tolist() == taken
    if least == 1:
        assert covered.all()


def test_neighbours_by_an_example() -> None:
    groups = ["a", "a", "a", "b", "c", "c", None, None]
    sizes = np.array([3, 5])
    assert items.of_neighbours(groups, sizes, most=2, least=2).tolist() == [2, 0, 0, 0, 2, 0, 0, 0]
    assert items.of_neighbours(groups, sizes, most=2).tolist() == [2, 0, 1, 1, 2, 0, 1, 1]
    assert items.of_neighbours(["a"] * 4, np.array([3, 1]), most=9).tolist() == [3, 0, 0, 1]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (np.ones(3, np.int64), "items must be an array of 4 integers"),
        (np.ones(4), "items must be an array of 4 integers"),
        ([1, 1, 1, 1], "items must be an array of 4 integers"),
        (np.array([1, 2, 1, 0]), "begins with sample 1 is to have 2 samples, and from there its row group has 1"),
        (np.array([1, -1, 1, 0]), "begins with sample 1 is to have -1 samples"),
    ],
)
def test_what_are_no_items_is_refused(lengths: object, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        items.checked(lengths, np.array([2, 2]))  # type: ignore[arg-type]


def test_groups_are_one_a_sample_and_items_have_some() -> None:
    for groups, most in ((["a", "b"], 0), (["a"], 1)):
        with pytest.raises(PlanError, match=rf"items of at most {most} of 2 samples with {len(groups)} groups"):
            items.of_neighbours(groups, np.array([2]), most=most)
    assert items.of_neighbours(["a", "a"], np.array([2, 0]), most=2).tolist() == [2, 0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 samples in row groups of 8, 4 and 8; lesions of three images, so a pair and a single each."""
    folder = tmp_path_factory.mktemp("items")
    write_prepared_corpus(folder, {"train": 20}, samples_per_shard=12)
    add_side_table(folder, "lesions", "lesion", "text", lambda index: f"lesion {index // 3}")
    add_side_table(folder, "masks", "mask", "mask", lambda index: None)
    return str(folder)


def configured(corpus: str, *keys: str) -> PretrainConfig:
    batch = ("train.global_batch_size=2", "objective.kind=tests.distilled:OBJECTIVE")
    return parse(PretrainConfig, [f"corpus={corpus}", "output=o", *batch, *keys])


# Firsts of pairs: of the row groups [0..7], [8..11], [12..19]; 7 is parted from 6, and 18 from 19 of the second shard.
FIRSTS = [0, 3, 6, 9, 12, 15, 18]


def test_an_epoch_is_of_items_and_says_which_samples_are_in_none(corpus: str) -> None:
    config, corpora = configured(corpus), Corpora.load([corpus])
    plan = epochs.first(config, corpora)
    drawn = np.concatenate([plan.batch(step) for step in range(len(plan))])
    assert plan.num_draws == len(FIRSTS)
    assert set(drawn.tolist()) <= set(FIRSTS)
    assert epochs.account(config, corpora) == (
        "an epoch of the split train draws 14 of 20 samples; left out: not used by the objective 6; "
        "of its draws: 6 of 7 draws; left out: less than a global batch, others each epoch 1"
    )
    half = configured(corpus, "data.fraction=0.5")
    told = epochs.account(half, corpora)
    (used,) = re.findall(r"draws (\d+) of 20 samples", told)
    lengths = epochs.items(half, corpora.select("train"))
    counts = epochs.counts(half, corpora.select("train"))
    assert lengths is not None
    assert counts is not None
    assert int(used) == items.covered(counts(0) > 0, lengths).sum() < 14
    assert epochs.trajectory(config, corpora) != epochs.trajectory(half, corpora)


def test_the_rows_of_an_item_are_decoded_side_by_side(corpus: str) -> None:
    config, corpora = configured(corpus), Corpora.load([corpus]).select("train")
    lengths = epochs.items(config, corpora)
    assert lengths is not None
    assert np.flatnonzero(lengths).tolist() == FIRSTS
    views = distilled.Pairs()
    index = corpora.index(columns=views.columns)
    groups = [decoding.unpacked(group) for group in decoding.read(index, [0, 2], views.columns)]
    seen: list[list[str]] = []

    class Seeing(distilled.Pairs):
        def make(self, of_draws, out):
            seen.extend([row["sample_id"] for row in item.rows] for item in of_draws)
            super().make(of_draws, out)

    where = {"group_of": np.array([0, 1, 0]), "row_of": np.array([3, 0, 0])}
    arrays = decoding.Decoder(corpus, 0, Seeing())(
        0, 0, np.array([3, 12, 0]), groups, **where, lengths=lengths[[3, 12, 0]]
    )
    ids = [group["sample_id"].to_pylist() for group in groups]
    assert seen == [ids[0][3:5], ids[1][0:2], ids[0][0:2]]
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(("one", "other"), (3, 16, 16, 3))
    assert not np.array_equal(arrays["one"], arrays["other"])


def test_the_documented_function_gives_pairs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?def pairs.*?)```", page, re.DOTALL)
    found: dict[str, object] = {}
    exec(code, found)
    manifest: Manifest = write_prepared_corpus(tmp_path, {"train": 4})
    lengths = found["pairs"](SimpleNamespace(corpus=str(tmp_path)), manifest)  # type: ignore[operator]
    assert lengths.tolist() == [0, 0, 0, 0], "nobody knows their lesions"
