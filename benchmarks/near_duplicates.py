"""Near-duplicate search over as many hashes as Derm1M has images: `python benchmarks/near_duplicates.py`.

Synthetic 64-bit hashes with 32 bits set, as the median makes them, with planted near-duplicates at every distance up
to the limit and one hash that occurs thousands of times. Every planted pair must be found; the time is that of the
whole search on a cluster that is up. Beside it stands what comparing all pairs would take one core with the same
vectorised operations, reckoned from some of the rows.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from dermray import cluster, entry
from dermray.audit.duplicates import HASH_BITS, matches, near_groups
from dermray.config import ClusterConfig

NUM_HASHES = 403_563
MAX_DISTANCE = 6
NUM_PLANTED = 14_000
NUM_IDENTICAL = 4_000
ROUNDS = 3
# Rows of the all-pairs comparison that are really made.
NUM_ROWS_COMPARED = 400


def main() -> int:
    """Search three times, check what was found, print seconds."""
    phashes, planted = make_hashes(np.random.default_rng(0))
    cluster.connect(ClusterConfig())
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        groups = near_groups(phashes, max_distance=MAX_DISTANCE)
        seconds.append(time.perf_counter() - started)
        missed = int((groups[planted[:, 0]] != groups[planted[:, 1]]).sum())
        print(
            f"{len(phashes):,} hashes in {seconds[-1]:.1f} s: {len(phashes) - groups.max() - 1:,} lie in the group of "
            f"an earlier one; {missed} of {len(planted):,} planted pairs missed"
        )
        if missed:
            return 1
    started = time.perf_counter()
    found = matches(phashes, phashes[planted[:, 1]], max_distance=MAX_DISTANCE)
    taken = time.perf_counter() - started
    pairs = set(map(tuple, found.nearest_pairs(len(phashes))[0].tolist()))
    missed = sum((original, copy) not in pairs for copy, original in enumerate(planted[:, 0].tolist()))
    print(f"{len(planted):,} of them against all in {taken:.1f} s: {found.num_pairs:,} pairs; {missed} planted missed")
    if missed:
        return 1
    bare = compare_all(phashes)
    print(
        f"median {np.median(seconds):.1f} s; all pairs on one core: {bare:.0f} s, {bare / np.median(seconds):.0f} times"
    )
    return 0


def make_hashes(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, and the planted pairs of positions int64 `[NUM_PLANTED, 2]`."""
    phashes = np.empty(NUM_HASHES, dtype=np.uint64)
    for start in range(0, NUM_HASHES, 65_536):
        keys = random.random((min(65_536, NUM_HASHES - start), HASH_BITS), dtype=np.float32)
        ones = (keys < np.median(keys, axis=1, keepdims=True)).astype(np.uint8)
        phashes[start : start + len(keys)] = np.packbits(ones, axis=1).view(">u8").ravel()
    places = random.permutation(NUM_HASHES)
    phashes[places[:NUM_IDENTICAL]] = phashes[places[0]]
    planted = places[NUM_IDENTICAL : NUM_IDENTICAL + 2 * NUM_PLANTED].reshape(-1, 2)
    copies = phashes[planted[:, 0]]
    for number in range(NUM_PLANTED):
        for bit in random.choice(HASH_BITS, number % (MAX_DISTANCE + 1), replace=False):
            copies[number] ^= np.uint64(1 << int(bit))
    phashes[planted[:, 1]] = copies
    return phashes, planted


def compare_all(phashes: np.ndarray) -> float:
    """Seconds that comparing every pair once would take on one core, from some of the rows."""
    started = time.perf_counter()
    for row in phashes[:NUM_ROWS_COMPARED]:
        np.flatnonzero(np.bitwise_count(phashes ^ row) <= MAX_DISTANCE)
    return (time.perf_counter() - started) / NUM_ROWS_COMPARED * len(phashes) / 2


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
