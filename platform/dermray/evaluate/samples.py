"""The samples that are scored: everything about them but their pixels, in manifest order.

Images are read where they are encoded (`dermray.evaluate.features`); the few that a report shows are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dermray import storage
from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology

RAW_ASPECT = "raw"
_COLUMNS = ["sample_id", "captions", "labels"]


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: its shard, its number there, where its rows stand in the split, and how many count."""

    uri: str
    number: int
    position: int
    num_rows: int


@dataclass(frozen=True)
class Samples:
    """The samples of one split, in manifest order. All lists have one entry a sample."""

    uri: str
    split: str
    # digest of the whole corpus, not of the split
    corpus_digest: str
    row_groups: tuple[RowGroup, ...]
    ids: list[str]
    # the raw caption, None where there is none
    captions: list[str | None]
    # ontology nodes; may be empty
    labels: list[list[str]]
    ontology: Ontology

    @classmethod
    def load(cls, uri: str, split: str, *, max_samples: int | None = None) -> Samples:
        """Read captions and labels of a split of the prepared corpus at `uri`.

        Raises:
            CorpusError: no corpus, no such split (the message lists those there are), or a damaged shard.
        """
        uri = storage.normalise(uri)
        manifest = Manifest.load(uri)
        row_groups = tuple(_row_groups(uri, manifest.select(split), max_samples))
        rows: list[dict[str, Any]] = []
        for group in row_groups:
            rows.extend(read_row_group(group, _COLUMNS).to_pylist())
        labels = [list(row["labels"]) for row in rows]
        known = manifest.ontology_sha256 is not None
        return cls(
            uri=uri,
            split=split,
            corpus_digest=manifest.digest,
            row_groups=row_groups,
            ids=[row["sample_id"] for row in rows],
            captions=[_raw_caption(row["captions"]) for row in rows],
            labels=labels,
            ontology=Ontology.load(uri) if known else Ontology.flat({one for each in labels for one in each}),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def read_images(self, indices: list[int]) -> dict[int, bytes]:
        """Encoded images of a few samples, by their index."""
        starts = np.array([group.position for group in self.row_groups])
        wanted: dict[int, list[int]] = {}
        for index in sorted(set(indices)):
            wanted.setdefault(int(np.searchsorted(starts, index, "right")) - 1, []).append(index)
        found: dict[int, bytes] = {}
        for number, members in wanted.items():
            group = self.row_groups[number]
            column = read_row_group(group, ["image"]).column("image")
            found.update({index: column[index - group.position].as_py() for index in members})
        return found


def read_row_group(group: RowGroup, columns: list[str]) -> pa.Table:
    """Columns of a row group, cut to the rows that count.

    Raises:
        CorpusError: the shard is missing or damaged.
    """
    return shards.read_row_group(group.uri, group.number, columns).slice(0, group.num_rows)


def _row_groups(uri: str, split: Manifest, max_samples: int | None) -> Iterator[RowGroup]:
    left = split.num_samples if max_samples is None else min(max_samples, split.num_samples)
    position = 0
    for (path, number), size in zip(split.row_group_locations(), split.row_group_sizes(), strict=True):
        num_rows = min(int(size), left - position)
        if num_rows == 0:
            return
        yield RowGroup(storage.join(uri, path), number, position, num_rows)
        position += num_rows


def _raw_caption(captions: list[dict[str, str]]) -> str | None:
    return next((each["text"] for each in captions if each["aspect"] == RAW_ASPECT and each["text"].strip()), None)
