"""Which samples of two corpora resemble each other, kept by distinct hashes: small however often one hash occurs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Members:
    """Positions of each distinct hash: `positions[starts[k] : starts[k + 1]]` are those of the `k`-th."""

    positions: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, num_distinct: int) -> Members:
        """Positions in a list, from the number of each one's distinct hash, int64 `[N]`."""
        counts = np.bincount(owners, minlength=num_distinct)
        return cls(np.argsort(owners, kind="stable").astype(np.int64), np.concatenate([[0], np.cumsum(counts)]))

    def counts(self, distinct: np.ndarray) -> np.ndarray:
        """How often each of some distinct hashes occurs."""
        return self.starts[distinct + 1] - self.starts[distinct]

    def take(self, distinct: np.ndarray) -> Members:
        """Those of some distinct hashes."""
        counts = self.counts(distinct)
        return Members(self.positions[_ranges(self.starts[distinct], counts)], np.concatenate([[0], np.cumsum(counts)]))

    def within(self, first: int, end: int) -> Members:
        """Those at positions from `first` to before `end`; a hash that stands at none of these has none."""
        kept = (self.positions >= first) & (self.positions < end)
        return Members(self.positions[kept], np.concatenate([[0], np.cumsum(kept)])[self.starts])


@dataclass(frozen=True)
class Matches:
    """Which of two lists of hashes resemble each other, equal hashes together.

    Of the lists `[8, 8, 0]` and `[9, 8]` at a distance of 1 bit, `pairs` are `[[0, 0], [0, 1]]`: 8 with 8 and with 9,
    which stand at `[0, 1]` of the left list and at `[1]` and `[0]` of the right one.

    Attributes:
        pairs: numbers of a distinct left and right hash, int64 `[F, 2]`.
        distances: bits in which they differ, int64 `[F]`.
        left, right: where in the lists each of these hashes stands.
    """

    pairs: np.ndarray
    distances: np.ndarray
    left: Members
    right: Members

    @classmethod
    def of(cls, pairs: np.ndarray, distances: np.ndarray, left: Members, right: Members) -> Matches:
        """Matches among all hashes of two lists, of which those in no pair are left out."""
        left_found, first = np.unique(pairs[:, 0], return_inverse=True)
        right_found, second = np.unique(pairs[:, 1], return_inverse=True)
        numbers = np.stack([first, second], axis=1).astype(np.int64)
        return cls(numbers, distances, left.take(left_found), right.take(right_found))

    @property
    def num_pairs(self) -> int:
        """Pairs of positions."""
        return int((self.left.counts(self.pairs[:, 0]) * self.right.counts(self.pairs[:, 1])).sum())

    def of_left(self, first: int, end: int) -> Matches:
        """Those of the left positions from `first` to before `end`."""
        left = self.left.within(first, end)
        kept = left.counts(self.pairs[:, 0]) > 0
        return Matches.of(self.pairs[kept], self.distances[kept], left, self.right)

    def nearest(self) -> np.ndarray:
        """Distance of the nearest left hash of each right position in a pair, int64 `[len(right.positions)]`."""
        best = np.full(len(self.right.starts) - 1, np.iinfo(np.int64).max)
        np.minimum.at(best, self.pairs[:, 1], self.distances)
        return np.repeat(best, np.diff(self.right.starts))

    def nearest_pairs(self, at_most: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each right position its nearest left ones; which of equally near ones is the same each time.

        Returns:
            Left and right position of each pair, int64 `[P, 2]`, sorted; and how far they are apart, int64 `[P]`.
        """
        order = np.lexsort((self.pairs[:, 0], self.distances, self.pairs[:, 1]))
        pairs, apart = self.pairs[order], self.distances[order]
        counts = self.left.counts(pairs[:, 0])
        # Left positions before these of the same right hash: of counts [3, 2] of one and [4] of another, [0, 3, 0].
        before = np.cumsum(counts) - counts
        before -= before[np.searchsorted(pairs[:, 1], pairs[:, 1])]
        counts = np.clip(at_most - before, 0, counts)
        found = expand(pairs, counts, self.left, self.right)
        apart = np.repeat(apart, counts * self.right.counts(pairs[:, 1]))
        order = np.lexsort((found[:, 1], found[:, 0]))
        return found[order], apart[order]


def expand(found: np.ndarray, counts: np.ndarray, left: Members, right: Members) -> np.ndarray:
    """Pairs of distinct hashes → pairs of the first so many left and of all right positions of each."""
    pair = np.repeat(np.arange(len(found)), counts)
    first = left.positions[_ranges(left.starts[found[:, 0]], counts)]
    partners = right.counts(found[pair, 1])
    second = right.positions[_ranges(right.starts[found[pair, 1]], partners)]
    return np.stack([np.repeat(first, partners), second], axis=1)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, …` of each length, one behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
