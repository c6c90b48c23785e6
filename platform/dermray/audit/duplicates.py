"""Near-duplicates among 64-bit perceptual hashes: every pair within a Hamming distance, without looking at all pairs.

The 64 bits are cut into `max_distance + 1` bands. Two hashes within that distance agree on at least one band, so only
hashes that share a bucket (a band's value) are compared, block by block, and no pair is missed. Equal hashes are
collapsed beforehand. On a cluster, Ray Data searches ranges of buckets side by side; the hashes lie in its object
store once, and what a worker holds is bounded: the members of its buckets, one block, and the pairs that it found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import ray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dermray import pieces
from dermray.audit.matches import Matches, Members
from dermray.progress import Progress

HASH_BITS = 64
# A bucket costs some microseconds however few it holds: bands are narrowed until buckets hold about so many.
BUCKET_SIZE = 128
# Rows and columns of a block, whose differences then stay in a core's cache; where there are fewer columns, more rows.
BLOCK_ROWS = 16
BLOCK_COLUMNS = 1024
# Comparisons of an item of work: a fraction of a second.
COMPARISONS_PER_ITEM = 1 << 27
# Searches up to this many comparisons are made at once, without workers: starting them takes longer.
COMPARISONS_WITHOUT_WORKERS = 1 << 26
# Hashes whose buckets are worked out at a time.
HASHES_PER_SCAN = 1 << 20
# Pairs that pile up before a search for groups reduces them to what connects the same samples.
PAIRS_BEFORE_REDUCTION = 1 << 20

NO_PAIRS = np.zeros((0, 2), dtype=np.int64)


def near_groups(phashes: np.ndarray, *, max_distance: int) -> np.ndarray:
    """The group of each hash: hashes that a chain of pairs within `max_distance` bits connects share one.

    Args:
        phashes: uint64 `[N]`.
        max_distance: bits, 0 to 63.

    Returns:
        int64 `[N]`: group numbers from 0, in the order in which groups first appear.

    Raises:
        ValueError: `max_distance` is out of range.
    """
    distinct, first, owners = np.unique(phashes, return_index=True, return_inverse=True)
    found = _run(Search(distinct, None, max_distance), spanning=True)
    num_groups, groups = _components(found, len(distinct))
    earliest = np.full(num_groups, len(owners), dtype=np.int64)
    np.minimum.at(earliest, groups, first)
    rank = np.empty(num_groups, dtype=np.int64)
    rank[np.argsort(earliest)] = np.arange(num_groups)
    return rank[groups][owners]


def matches(left: np.ndarray, right: np.ndarray, *, max_distance: int) -> Matches:
    """All pairs of a left and a right hash that differ in at most `max_distance` bits.

    Equal hashes are together: the answer is small however often one hash occurs.

    Args:
        left: uint64 `[N]`.
        right: uint64 `[M]`.
        max_distance: bits, 0 to 63.

    Raises:
        ValueError: `max_distance` is out of range.
    """
    left_distinct, left_owners = np.unique(left, return_inverse=True)
    right_distinct, right_owners = np.unique(right, return_inverse=True)
    found = _run(Search(left_distinct, right_distinct, max_distance), spanning=False)
    apart = distances(left_distinct[found[:, 0]], right_distinct[found[:, 1]])
    left_members = Members.of(left_owners, len(left_distinct))
    return Matches.of(found, apart, left_members, Members.of(right_owners, len(right_distinct)))


def resembling(phashes: np.ndarray, others: np.ndarray, *, max_distance: int) -> np.ndarray:
    """Which hashes differ from some other one in at most `max_distance` bits; however often a hash occurs.

    Args:
        phashes: uint64 `[N]`.
        others: uint64 `[M]`.
        max_distance: bits, 0 to 63.

    Returns:
        bool `[N]`.

    Raises:
        ValueError: `max_distance` is out of range.
    """
    distinct, owners = np.unique(phashes, return_inverse=True)
    near = np.zeros(len(distinct), dtype=bool)
    near[_run(Search(distinct, np.unique(others), max_distance), spanning=False)[:, 0]] = True
    return near[owners]


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ: uint64 of one shape → int64 of that shape."""
    return np.bitwise_count(left ^ right).astype(np.int64)


class Item(NamedTuple):
    """A piece of a search: of the blocks of a band's buckets `first … last` every `num_parts`-th, from `part` on."""

    band: int
    first: int
    last: int
    part: int
    num_parts: int
    num_comparisons: int


class Band(NamedTuple):
    """Some neighbouring bits of a hash, as a shift and a mask."""

    shift: np.uint64
    mask: np.uint64


@dataclass(frozen=True)
class Search:
    """A search among distinct hashes, cut into items that can be done anywhere and in any order.

    Attributes:
        left: uint64 `[N]`, distinct.
        right: uint64 `[M]`, distinct; None: pairs inside `left`.
        max_distance: bits, 0 to 63.
    """

    left: np.ndarray
    right: np.ndarray | None
    max_distance: int

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance < HASH_BITS:
            raise ValueError(f"max_distance must lie between 0 and {HASH_BITS - 1}, got {self.max_distance}")

    def bands(self) -> list[Band]:
        """`max_distance + 1` bands, as wide as the 64 bits allow and as narrow as the number of hashes asks for."""
        num_bands = self.max_distance + 1
        largest = max(len(self.left), 0 if self.right is None else len(self.right), 1)
        wanted = max(0, round(np.log2(largest / BUCKET_SIZE)))
        width, wider = divmod(HASH_BITS, num_bands)
        bands, start = [], 0
        for number in range(num_bands):
            bits = width + (number < wider)
            bands.append(Band(np.uint64(start), np.uint64((1 << min(bits, wanted)) - 1)))
            start += bits
        return bands

    def comparisons(self, band: Band) -> np.ndarray:
        """Comparisons that each bucket of a band takes, int64 `[number of buckets]`."""
        sizes = _bucket_sizes(self.left, band)
        if self.right is None:
            return sizes * (sizes - 1) // 2
        return sizes * _bucket_sizes(self.right, band)

    def items(self) -> Iterator[Item]:
        """Items of about equal work that together make the search."""
        for number, band in enumerate(self.bands()):
            work = self.comparisons(band)
            before = np.cumsum(work) - work
            chunks = before // COMPARISONS_PER_ITEM
            firsts = np.flatnonzero(np.diff(chunks, prepend=-1))
            lasts = np.append(firsts[1:], len(work)) - 1
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                total = int(work[first : last + 1].sum())
                num_parts = max(1, round(total / COMPARISONS_PER_ITEM))
                if total:
                    each = total // num_parts
                    yield from (Item(number, first, last, part, num_parts, each) for part in range(num_parts))

    def pairs(self, item: Item, *, spanning: bool) -> np.ndarray:
        """Pairs of one item, int64 `[P, 2]`; a pair belongs to the first band on which its hashes agree.

        With `spanning` as many of them as connect the same hashes, at most one less than there are hashes.
        """
        kept: list[np.ndarray] = []
        waiting = 0
        for found in self._blocks(item):
            kept.append(found)
            waiting += len(found)
            if spanning and waiting > PAIRS_BEFORE_REDUCTION:
                kept, waiting = [_forest(np.concatenate(kept))], 0
        together = np.concatenate([NO_PAIRS, *kept])
        return _forest(together) if spanning else together

    def _blocks(self, item: Item) -> Iterator[np.ndarray]:
        """Near pairs of each block of an item, those of earlier bands left out."""
        bands = self.bands()
        left, left_starts = _buckets(self.left, bands[item.band], item)
        right, right_starts = left, left_starts
        if self.right is not None:
            right, right_starts = _buckets(self.right, bands[item.band], item)
        number = 0
        for bucket in range(len(left_starts) - 1):
            end, right_end = int(left_starts[bucket + 1]), int(right_starts[bucket + 1])
            num_columns = max(1, right_end - int(right_starts[bucket]))
            num_rows = max(BLOCK_ROWS, BLOCK_ROWS * BLOCK_COLUMNS // num_columns)
            for start in range(int(left_starts[bucket]), end, num_rows):
                number += 1
                if number % item.num_parts == item.part:
                    rows = left[start : min(start + num_rows, end)]
                    # Inside one bucket of one corpus, a pair is looked at from its earlier member.
                    columns = right[start if self.right is None else int(right_starts[bucket]) : right_end]
                    yield from self._compare(rows, columns, bands[: item.band])

    def _compare(self, rows: np.ndarray, columns: np.ndarray, earlier: list[Band]) -> Iterator[np.ndarray]:
        row_hashes = self.left[rows]
        column_hashes = (self.left if self.right is None else self.right)[columns]
        for start in range(0, len(columns), BLOCK_COLUMNS):
            differences = row_hashes[:, None] ^ column_hashes[None, start : start + BLOCK_COLUMNS]
            near = np.flatnonzero(np.bitwise_count(differences) <= self.max_distance)
            if not len(near):
                continue
            row, column = np.divmod(near, differences.shape[1])
            difference = differences.ravel()[near]
            column += start
            fresh = column > row if self.right is None else np.ones(len(near), dtype=bool)
            for band in earlier:
                fresh &= (difference >> band.shift) & band.mask != 0
            yield np.stack([rows[row[fresh]], columns[column[fresh]]], axis=1)


def _components(pairs: np.ndarray, num_nodes: int) -> tuple[int, np.ndarray]:
    """Number of connected components, and that of each node."""
    edges = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(num_nodes, num_nodes))
    num_components, components = connected_components(edges, directed=False)
    return int(num_components), components


def _forest(pairs: np.ndarray) -> np.ndarray:
    """Pairs that connect what the given ones connect, one less than there are nodes in each component."""
    nodes, local = np.unique(pairs, return_inverse=True)
    _, components = _components(local.reshape(-1, 2), len(nodes))
    _, first = np.unique(components, return_index=True)
    roots = first[components]
    joined = roots != np.arange(len(nodes))
    return np.stack([nodes[roots[joined]], nodes[joined]], axis=1)


def _bucket_sizes(hashes: np.ndarray, band: Band) -> np.ndarray:
    sizes = np.zeros(int(band.mask) + 1, dtype=np.int64)
    for start in range(0, len(hashes), HASHES_PER_SCAN):
        values = (hashes[start : start + HASHES_PER_SCAN] >> band.shift) & band.mask
        sizes += np.bincount(values.astype(np.int64), minlength=len(sizes))
    return sizes


def _buckets(hashes: np.ndarray, band: Band, item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the hashes in an item's buckets, bucket by bucket, and where each begins, plus the end."""
    positions, values = [], []
    for start in range(0, len(hashes), HASHES_PER_SCAN):
        value = ((hashes[start : start + HASHES_PER_SCAN] >> band.shift) & band.mask).astype(np.int64)
        inside = np.flatnonzero((value >= item.first) & (value <= item.last))
        positions.append(inside + start)
        values.append(value[inside])
    value = np.concatenate(values)
    order = np.argsort(value, kind="stable")
    starts = np.searchsorted(value[order], np.arange(item.first, item.last + 2))
    return np.concatenate(positions)[order], starts


def _run(search: Search, *, spanning: bool) -> np.ndarray:
    """All pairs of a search, int64 `[P, 2]` in any order: here if it is small, else with Ray Data."""
    items = list(search.items())
    found: Iterable[np.ndarray]
    if sum(item.num_comparisons for item in items) <= COMPARISONS_WITHOUT_WORKERS:
        found = (search.pairs(item, spanning=spanning) for item in items)
    else:
        found = _run_on_ray(search, items, spanning)
    return np.concatenate([NO_PAIRS, *found])


def _run_on_ray(search: Search, items: list[Item], spanning: bool) -> Iterator[np.ndarray]:
    """Pairs of each item; the hashes lie in the object store once, and workers map them from there."""
    kept = ray.put(search)
    pool = pieces.Pool(noun="part", operator="search_duplicates", kept="run the same command again")
    numbered = {str(number): item for number, item in enumerate(items)}
    counted = Progress("search for near-duplicates", len(items), "parts", waits_for=pool.waits_for())
    with counted as progress:
        for _, found in pieces.run(numbered, partial(_search_item, search=kept, spanning=spanning), pool):
            progress.advance()
            yield found


def _search_item(item: Item, *, search: ray.ObjectRef, spanning: bool) -> np.ndarray:
    found: np.ndarray = ray.get(search).pairs(item, spanning=spanning)
    return found
