"""Numbers that stand for rows, images and groups, so that nobody has to keep their texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dermray.corpus.schema import MODALITY
from dermray.raw.spill import blocks


def image_digests(table: pa.Table, source_uri: str) -> dict[str, int]:
    """A 64-bit digest of all the rows of each image, by its path; the same whatever the order of the table."""
    digests: dict[str, int] = {}
    for block in blocks(table, 16_384):
        for row in block.to_pylist():
            digests[row["image"]] = (digests.get(row["image"], 0) + row_digest(row, source_uri)) % 2**64
    return digests


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
