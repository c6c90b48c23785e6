"""Digests as arrays: what they are among, and whose a sample is."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dermray.prepare.digests import by_range, distinct, is_among, numbered
from dermray.prepare.held_sides import is_ours

# Few, so that they meet; and one that no signed integer can be.
DIGESTS = st.integers(0, 6) | st.just(2**64 - 1)


@given(st.lists(DIGESTS), st.lists(st.tuples(*[DIGESTS] * 3)))
def test_digests_are_found_as_in_a_set(wanted: list[int], held: list[tuple[int, ...]]) -> None:
    known = {digest for each in held for digest in each}
    ascending = distinct(held)
    assert ascending.tolist() == sorted(known)
    assert is_among(np.array(wanted, np.uint64), ascending).tolist() == [digest in known for digest in wanted]


@given(st.lists(st.integers(0, 6) | st.integers(0, 2**64 - 1)), st.sampled_from([np.uint64, np.int64]))
def test_hashes_are_numbered_in_their_order(drawn: list[int], kind: type[np.generic]) -> None:
    values = np.array(drawn, np.uint64).view(kind)
    ranges = [values[places] for places in by_range(values)]
    assert sorted(value for each in ranges for value in each) == sorted(values)
    assert all(max(low) < min(high) for low, high in itertools.pairwise(ranges))
    different, codes = np.unique(values, return_inverse=True)
    found, count = numbered(values)
    assert (found.tolist(), count) == (codes.tolist(), len(different))


@given(
    st.lists(st.tuples(st.booleans(), st.lists(DIGESTS, max_size=4)), max_size=4),
    st.lists(st.lists(st.lists(DIGESTS, max_size=3), max_size=3), min_size=1, max_size=3),
)
def test_a_sample_is_of_the_first_that_has_brought_one_of_its_images(
    brought: list[tuple[bool, list[int]]], chunks: list[list[list[int]]]
) -> None:
    known = pa.chunked_array([pa.array(chunk, pa.list_(pa.uint64())) for chunk in chunks])
    found = is_ours([(ours, distinct([np.array(digests, np.uint64)])) for ours, digests in brought], known)
    samples = [set(sample) for chunk in chunks for sample in chunk]
    assert found.tolist() == [next((ours for ours, held in brought if sample & {*held}), True) for sample in samples]
