"""Reading an HNSW graph of faiss from bytes that anybody may have written.

faiss makes room for as much as the bytes announce, and follows neighbours wherever they point. So both are looked at
here: no list is longer than the bytes that are left, every neighbour is a vector of the graph, and a search keeps no
more candidates than anybody needs.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

HNSW_FLAT = b"IHNf"
FLAT = (b"IxFI", b"IxF2")
# dimension, number of vectors, two unused, whether it is trained, metric
_HEADER = struct.Struct("<iqqqBi")
_COUNT = struct.Struct("<Q")
# Of the graph's lists: probabilities, neighbours per level, levels, offsets, neighbours.
_ITEM_BYTES = (8, 4, 4, 8, 4)
# Entry point, highest level, and three settings of building and search.
_TAIL_BYTES = 5 * 4
_MAX_METRIC = 1
# Candidates that a search keeps, for which it makes room each time; ours has 128.
_MAX_SEARCH = 1 << 14


def read(data: bytes) -> Any:
    """The `faiss.IndexHNSWFlat` in `data`.

    Raises:
        ValueError: it is none, announces more than there is, or points to vectors that it does not hold.
        RuntimeError: faiss cannot read it.
    """
    import faiss

    _check_sizes(data)
    graph = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    if not isinstance(graph, faiss.IndexHNSWFlat):
        raise ValueError("no HNSW graph over whole vectors")
    if graph.hnsw.efSearch > _MAX_SEARCH:
        raise ValueError(f"a search of {graph.hnsw.efSearch:,} candidates, over {_MAX_SEARCH:,}")
    _check_links(graph, faiss.downcast_index(graph.storage), faiss.vector_to_array)
    return graph


def _check_sizes(data: bytes) -> None:
    try:
        at = _after_header(data, 0, (HNSW_FLAT,))
        for item_bytes in _ITEM_BYTES:
            at = _after_list(data, at, item_bytes)
        at = _after_header(data, at + _TAIL_BYTES, FLAT)
        _after_list(data, at, 4)
    except struct.error:
        raise ValueError("cut off") from None


def _after_header(data: bytes, at: int, kinds: tuple[bytes, ...]) -> int:
    if data[at : at + 4] not in kinds:
        raise ValueError("no HNSW graph over whole vectors")
    *_, metric = _HEADER.unpack_from(data, at + 4)
    if not 0 <= metric <= _MAX_METRIC:
        raise ValueError(f"an unknown metric, {metric}")
    return at + 4 + _HEADER.size


def _after_list(data: bytes, at: int, item_bytes: int) -> int:
    (count,) = _COUNT.unpack_from(data, at)
    after = at + _COUNT.size + int(count) * item_bytes
    if after > len(data):
        raise ValueError(f"a list of {count:,} items where {len(data) - at:,} bytes are left")
    return after


def _check_links(graph: Any, storage: Any, array: Any) -> None:
    hnsw, size = graph.hnsw, graph.ntotal
    levels, offsets = array(hnsw.levels).astype(np.int64), array(hnsw.offsets).astype(np.int64)
    neighbours, per_level = array(hnsw.neighbors), array(hnsw.cum_nneighbor_per_level).astype(np.int64)
    sound = len(levels) == size and len(offsets) == size + 1 and size > 0
    sound = sound and storage.ntotal == size and storage.d == graph.d
    sound = sound and array(storage.codes).size == size * graph.d * 4
    sound = sound and 0 <= hnsw.entry_point < size and 0 <= hnsw.max_level < len(per_level) - 1
    sound = sound and levels.min() >= 1 and levels.max() < len(per_level) and levels[hnsw.entry_point] > hnsw.max_level
    sound = sound and per_level[0] == 0 and bool((np.diff(per_level) >= 0).all())
    sound = sound and offsets[0] == 0 and bool((np.diff(offsets) == per_level[levels]).all())
    sound = sound and offsets[-1] == len(neighbours) and bool((neighbours >= -1).all() and (neighbours < size).all())
    if not sound or not _on_their_levels(levels, offsets, neighbours, per_level):
        raise ValueError("neighbours that are none of its vectors")


def _on_their_levels(levels: np.ndarray, offsets: np.ndarray, neighbours: np.ndarray, per_level: np.ndarray) -> bool:
    """Whether whoever is a neighbour on a level is on that level himself."""
    place = np.arange(len(neighbours)) - np.repeat(offsets[:-1], np.diff(offsets))
    level = np.searchsorted(per_level, place, side="right") - 1
    is_one = neighbours >= 0
    return bool((levels[neighbours[is_one]] > level[is_one]).all())
