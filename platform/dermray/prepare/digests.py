"""Numbers that stand for rows, images and groups, so that nobody has to keep their texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.schema import MODALITY
from dermray.raw.spill import placed

# A power of two.
NUM_RANGES = 16


def image_digests(table: pa.Table, source_uri: str) -> np.ndarray:
    """64 bits over all the rows of each row's image, the same whatever the order of the table.

    Rows of the images `[a, b, a]` with the digests `[1, 2, 3]` give `[4, 2, 4]`. Images are told apart by 64 bits of
    their paths.

    Returns:
        uint64 `[N]`, as the rows are.
    """
    images, digests = np.empty(table.num_rows, np.uint64), np.empty(table.num_rows, np.uint64)
    for rows, block in placed(table, 16_384):
        said = block.to_pylist()
        images[rows] = hashes((row["image"] for row in said), 0, "image")
        digests[rows] = np.fromiter((row_digest(row, source_uri) for row in said), np.uint64, len(said))
    codes, num_images = numbered(images)
    # Sums of uint64 are modulo 2 ** 64.
    sums = np.zeros(num_images, np.uint64)
    np.add.at(sums, codes, digests)
    return sums[codes]


def numbered(values: np.ndarray) -> tuple[np.ndarray, int]:
    """`(place of each value among the different ones in order, int32; how many these are)`, with little memory besides.

    Args:
        values: hashes, uint64 or int64 `[N]`.
    """
    codes, num_before = np.empty(len(values), np.int32), 0
    for places in by_range(values):
        found = values[places]
        order = np.argsort(found)
        found = found[order]
        is_new = np.ones(len(found), bool)
        is_new[1:] = found[1:] != found[:-1]
        codes[places[order]] = np.cumsum(is_new, dtype=np.int32) + (num_before - 1)
        num_before += int(np.count_nonzero(is_new))
    return codes, num_before


def by_range(values: np.ndarray) -> Iterator[np.ndarray]:
    """Places of hashes (uint64 or int64), range by range from the lowest; hashes are uniform, so each is small.

    What is made of one range at a time takes a small share of the memory that it takes for all of them.
    """
    kind = np.iinfo(values.dtype)
    step = 2**64 // NUM_RANGES
    for lowest in range(kind.min, kind.max + 1, step):
        places = np.flatnonzero((values >= lowest) & (values <= lowest + step - 1))
        if len(places):
            yield places


def numbers_of(texts: pa.Array, known: dict[str, int]) -> np.ndarray:
    """Number of each text in `known`, which grows with those that are new, int32; -1 for null."""
    encoded = texts.dictionary_encode()
    numbers = np.array([known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()] + [-1], np.int32)
    return numbers[pc.fill_null(encoded.indices, len(numbers) - 1).to_numpy()]


def flat(lists: pa.ChunkedArray) -> np.ndarray:
    """The digests in lists of them, one behind the other, uint64 `[N]`."""
    return pc.list_flatten(lists).to_numpy()


def distinct(digests: Iterable[np.ndarray | tuple[int, ...]]) -> np.ndarray:
    """All of some digests, each once; ascending uint64 `[N]`."""
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *(np.asarray(each, np.uint64) for each in digests)]))


def is_among(digests: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each of some digests is one of others, bool `[N]`; these, many more perhaps, are not sorted again."""
    if not len(ascending):
        return np.zeros(len(digests), bool)
    return ascending[np.minimum(np.searchsorted(ascending, digests), len(ascending) - 1)] == digests


def row_digest(row: Mapping[str, Any], source_uri: str) -> int:
    """64 bits over what a row says and where its image is; not over its place in the table.

    Nor over its modality, which its other cells tell or its source as a whole (a sample that was prepared before has it
    from nowhere else): a corpus from before it was read holds the same rows.
    """
    said = {name: value for name, value in row.items() if name != "row"}
    if not (row.get("prepared") and row.get(MODALITY.name)):
        said.pop(MODALITY.name, None)
    return _digest(source_uri, json.dumps(said, sort_keys=True, ensure_ascii=False))


def without_unknown(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as builds from before modalities were read have it, if it names none."""
    if row.get(MODALITY.name) is not None:
        return row
    return {name: value for name, value in row.items() if name != MODALITY.name}


def group_digest(source: str, group: str) -> int:
    """64 bits that name a group of one source."""
    return _digest(source, group)


def _digest(*parts: str) -> int:
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def hashes(keys: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    """A number of each key, uniform over uint64: what a draw goes by that is the same whatever order a table has."""
    prefix = f"{seed}\0{purpose}\0"
    found = b"".join(hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(found, dtype="<u8")
