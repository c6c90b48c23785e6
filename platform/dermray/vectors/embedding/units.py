"""Images as units of work: one Parquet row group of a prepared corpus, or some image files of a raw data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dermray import storage
from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.raw.spelling import other_spellings


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: its shard, its number there, where its rows stand among the samples, how many count.

    `sha256` is what the digest of the whole shard must be, or None where that is not checked.
    """

    uri: str
    number: int
    position: int
    num_rows: int
    sha256: str | None = None

    def read(self) -> list[bytes | None]:
        """The encoded images.

        Raises:
            CorpusError: the shard is missing or damaged.
        """
        return read_row_group(self, ["image"]).column("image").to_pylist()

    def fingerprint(self) -> str:
        """Hex digest of which images of a corpus these are; what they hold, the corpus's own digest says."""
        return _digest(["row group", storage.name_of(self.uri), self.number, self.num_rows])


@dataclass(frozen=True)
class ImageFiles:
    """Some image files of a raw data set, and where they stand among the samples."""

    uris: tuple[str, ...]
    position: int

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.uris)

    def read(self) -> list[bytes | None]:
        """The encoded images; None for a file that is not there."""
        return [read_file(uri) for uri in self.uris]

    def fingerprint(self) -> str:
        """Hex digest of the files' names, sizes and times of change; one that comes or changes makes another."""
        return _digest(["files", *zip(self.uris, storage.stamps(self.uris), strict=True)])


Images = RowGroup | ImageFiles


def row_groups(corpus: str, split: Manifest, max_samples: int | None = None) -> Iterator[RowGroup]:
    """The row groups of one split's manifest in the prepared corpus at `corpus`, of no more than the first samples."""
    digests = shards.digests_to_check(corpus, split)
    left = split.num_samples if max_samples is None else min(max_samples, split.num_samples)
    position = 0
    for (path, number), size in zip(split.row_group_locations(), split.row_group_sizes(), strict=True):
        num_rows = min(int(size), left - position)
        if num_rows == 0:
            return
        yield RowGroup(storage.inside(corpus, path), number, position, num_rows, digests.get(path))
        position += num_rows


def read_row_group(group: RowGroup, columns: list[str]) -> pa.Table:
    """Columns of a row group, cut to the rows that count.

    Raises:
        CorpusError: the shard is missing or damaged.
    """
    table = shards.read_row_group(group.uri, group.number, columns, sha256=group.sha256)
    return table.slice(0, group.num_rows)


def read_file(uri: str) -> bytes | None:
    """An image file, also if its name is spelt otherwise (see `dermray.raw.spelling`); None where it is not there."""
    data = _bytes_at(uri)
    if data is not None:
        return data
    found = [data for way in other_spellings(uri) if (data := _bytes_at(way)) is not None]
    return found[0] if len(found) == 1 else None


def _bytes_at(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _digest(document: list[Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
