"""The banded search finds what looking at all pairs finds, whatever the hashes, and nothing twice."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.audit import duplicates
from dermray.audit.duplicates import (
    NO_PAIRS,
    Search,
    distances,
    matches,
    near_groups,
    resembling,
)

# Small enough that hypothesis finds hashes that lie near each other, equal ones, and full buckets.
SEEDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)


@st.composite
def hashes(draw: st.DrawFn, max_size: int = 40) -> np.ndarray:
    """Hashes around a few centres, each with some bits flipped; equal ones are frequent."""
    centres = draw(SEEDS)
    flips = st.lists(st.integers(0, 63), max_size=10)
    drawn = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=max_size))
    return np.array([centre ^ sum({1 << bit for bit in bits}) for centre, bits in drawn], dtype=np.uint64)


def brute_force(left: np.ndarray, right: np.ndarray, max_distance: int) -> np.ndarray:
    return np.argwhere(np.bitwise_count(left[:, None] ^ right[None, :]) <= max_distance)


def brute_force_groups(phashes: np.ndarray, max_distance: int) -> list[int]:
    """Components by flooding, numbered as they come."""
    near = np.bitwise_count(phashes[:, None] ^ phashes[None, :]) <= max_distance
    groups = [-1] * len(phashes)
    for start in range(len(phashes)):
        if groups[start] >= 0:
            continue
        waiting, number = [start], max(groups) + 1
        while waiting:
            place = waiting.pop()
            if groups[place] < 0:
                groups[place] = number
                waiting.extend(np.flatnonzero(near[place]).tolist())
    return groups


def searched(distinct: np.ndarray, max_distance: int) -> list[list[int]]:
    """Every pair that the items of a search inside one list find, sorted; one that is found twice is there twice."""
    search = Search(distinct, None, max_distance)
    found = np.concatenate([NO_PAIRS, *(search.pairs(item, spanning=False) for item in search.items())])
    return sorted(found.tolist())


def paired(left: np.ndarray, right: np.ndarray, max_distance: int) -> np.ndarray:
    """All pairs of positions of two lists, sorted."""
    return matches(left, right, max_distance=max_distance).nearest_pairs(len(left))[0]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buckets, blocks, scans and items, so that few hashes already meet all their borders."""
    for name, value in {
        "BUCKET_SIZE": 2,
        "BLOCK_ROWS": 3,
        "BLOCK_COLUMNS": 5,
        "COMPARISONS_PER_ITEM": 7,
        "HASHES_PER_SCAN": 11,
        "PAIRS_BEFORE_REDUCTION": 4,
    }.items():
        monkeypatch.setattr(duplicates, name, value)


@given(hashes(), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_near_groups_are_the_components_of_brute_force(phashes: np.ndarray, max_distance: int) -> None:
    found = near_groups(phashes, max_distance=max_distance)
    assert found.dtype == np.int64
    assert found.tolist() == brute_force_groups(phashes, max_distance)
    distinct = np.unique(phashes)
    expected = brute_force(distinct, distinct, max_distance)
    assert searched(distinct, max_distance) == expected[expected[:, 0] < expected[:, 1]].tolist()


@given(hashes(), hashes(), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_matches_are_those_of_brute_force(left: np.ndarray, right: np.ndarray, max_distance: int) -> None:
    found = paired(left, right, max_distance)
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(left, right, max_distance).tolist()
    assert (distances(left[found[:, 0]], right[found[:, 1]]) <= max_distance).all()
    alike = resembling(left, right, max_distance=max_distance)
    assert np.flatnonzero(alike).tolist() == sorted(set(found[:, 0].tolist()))


@given(hashes(), hashes(), st.integers(0, 20), st.integers(1, 4), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_the_nearest_pairs_of_each_and_the_counts_of_all(
    left: np.ndarray, right: np.ndarray, max_distance: int, at_most: int, border: int
) -> None:
    found = matches(left, right, max_distance=max_distance)
    pairs, apart = found.nearest_pairs(at_most)
    assert apart.tolist() == distances(left[pairs[:, 0]], right[pairs[:, 1]]).tolist()
    assert list(map(tuple, pairs.tolist())) == sorted(set(map(tuple, pairs.tolist())))
    expected = brute_force(left, right, max_distance)
    far = distances(left[expected[:, 0]], right[expected[:, 1]])
    for position in range(len(right)):
        nearest = sorted(far[expected[:, 1] == position].tolist())
        assert sorted(apart[pairs[:, 1] == position].tolist()) == nearest[:at_most]
        assert sorted(found.nearest()[found.right.positions == position].tolist()) == nearest[:1]
    for some, all_pairs in (
        (found, expected),
        (found.of_left(0, border), expected[expected[:, 0] < border]),
        (found.of_left(border, len(left)), expected[expected[:, 0] >= border]),
    ):
        assert some.num_pairs == len(all_pairs)
        assert sorted(some.left.positions.tolist()) == sorted(set(all_pairs[:, 0].tolist()))
        assert sorted(some.right.positions.tolist()) == sorted(set(all_pairs[:, 1].tolist()))


def test_one_hash_in_both_a_hundred_thousand_times_is_no_table_of_all_pairs() -> None:
    one = np.zeros(100_000, dtype=np.uint64)
    found = matches(one, one[:1000], max_distance=6)
    assert (found.num_pairs, len(found.pairs)) == (100_000_000, 1)
    tracemalloc.start()
    pairs, _ = found.nearest_pairs(100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 100_000
    assert peak < 20e6


@given(hashes(), st.sampled_from([31, 48, 63]))
@settings(max_examples=20, deadline=None)
def test_large_distances_too(phashes: np.ndarray, max_distance: int) -> None:
    assert paired(phashes, phashes, max_distance).tolist() == brute_force(phashes, phashes, max_distance).tolist()
    assert near_groups(phashes, max_distance=max_distance).tolist() == brute_force_groups(phashes, max_distance)


def test_many_random_hashes_with_the_sizes_of_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    random = np.random.default_rng(0)
    base = random.integers(0, 2**64, 3000, dtype=np.uint64)
    flipped = base[:600].copy()
    for number in range(600):
        for bit in random.choice(64, number % 8, replace=False):
            flipped[number] ^= np.uint64(1 << int(bit))
    phashes = random.permutation(np.concatenate([base, flipped]))
    expected = brute_force(phashes, phashes, 6)
    assert (expected[:, 0] < expected[:, 1]).sum() == 525
    assert paired(phashes, phashes, 6).tolist() == expected.tolist()
    assert near_groups(phashes, max_distance=6).max() + 1 == len(phashes) - 525


@pytest.mark.parametrize("max_distance", range(9))
def test_no_spread_of_the_differing_bits_is_missed(monkeypatch: pytest.MonkeyPatch, max_distance: int) -> None:
    """Bands nearly as wide as they get, and pairs exactly at the limit: with one band less some share none."""
    monkeypatch.setattr(duplicates, "BUCKET_SIZE", 2**-6)
    random = np.random.default_rng(max_distance)
    base = random.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in random.choice(64, max_distance, replace=False)) for _ in base]
    flipped = base ^ np.array(flips, dtype=np.uint64)
    assert paired(base, flipped, max_distance).tolist() == [[number, number] for number in range(300)]
    groups = near_groups(np.concatenate([base, flipped]), max_distance=max_distance)
    assert groups.tolist() == [*range(300)] * 2


def test_a_full_bucket_is_shared_out_among_items() -> None:
    """All hashes agree on the first band: its one bucket becomes many items, and none of them repeats another's."""
    random = np.random.default_rng(1)
    phashes = np.unique(random.integers(0, 2**56, 60, dtype=np.uint64) << np.uint64(8))
    search = Search(phashes, None, 3)
    first = [item for item in search.items() if item.band == 0]
    assert len({(item.first, item.last) for item in first}) == 1
    assert len(first) > 100
    pairs = np.concatenate([search.pairs(item, spanning=False) for item in search.items()])
    expected = brute_force(phashes, phashes, 3)
    assert sorted(map(tuple, pairs.tolist())) == [(i, j) for i, j in expected.tolist() if i < j]


def test_equal_hashes_do_not_multiply() -> None:
    """A million equal hashes have half a billion pairs; their group is found without one of them."""
    phashes = np.full(1_000_000, 12345, dtype=np.uint64)
    phashes[7] = 0
    groups = near_groups(phashes, max_distance=3)
    assert groups[7] == 1
    assert groups.sum() == 1
    alike = resembling(phashes, np.full(1_000_000, 12345, dtype=np.uint64), max_distance=0)
    assert np.flatnonzero(~alike).tolist() == [7]


def test_a_search_for_groups_returns_no_more_pairs_than_connect() -> None:
    centre = 0xF0F0F0F0F0F0F0F0
    phashes = np.unique(np.array([centre ^ (1 << bit) for bit in range(64)], dtype=np.uint64))
    search = Search(phashes, None, 2)
    items = list(search.items())
    assert all(len(search.pairs(item, spanning=True)) < len(phashes) for item in items)
    assert sum(len(search.pairs(item, spanning=False)) for item in items) == 64 * 63 // 2
    assert near_groups(phashes, max_distance=2).tolist() == [0] * 64


def test_nothing_in_nothing_out() -> None:
    nothing = np.zeros(0, dtype=np.uint64)
    one = np.array([7], dtype=np.uint64)
    assert near_groups(nothing, max_distance=6).shape == (0,)
    assert near_groups(one, max_distance=6).tolist() == [0]
    assert paired(nothing, one, 6).shape == paired(one, nothing, 6).shape == NO_PAIRS.shape
    assert paired(one, one, 0).tolist() == [[0, 0]]


@pytest.mark.parametrize("max_distance", [-1, 64])
def test_a_distance_that_no_64_bits_have_is_refused(max_distance: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 63"):
        near_groups(np.zeros(3, dtype=np.uint64), max_distance=max_distance)
