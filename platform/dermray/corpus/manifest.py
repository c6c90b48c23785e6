"""What has been committed: the shards of a prepared corpus, their row groups, counts, digests and provenance.

`manifest.json` is written last. A folder without it is not a corpus. Sample index `i` of a manifest is the `i`-th
row when its shards are read in order.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermray import storage
from dermray.corpus.schema import SCHEMA_VERSION
from dermray.errors import CorpusError

MANIFEST_NAME = "manifest.json"


def is_corpus(uri: str) -> bool:
    """Whether a prepared corpus was committed at `uri`."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One Parquet file of samples that all belong to one split."""

    path: str = Field(description="relative to the corpus, e.g. data/train-00000-1f3c….parquet")
    split: str
    num_samples: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    sha256: str
    row_groups: tuple[int, ...] = Field(description="samples of each Parquet row group, in order")


class Manifest(_Record):
    """The committed content of a prepared corpus."""

    schema_version: int = SCHEMA_VERSION
    version: int = Field(1, ge=1, description="counts the times that rows have joined the corpus")
    shards: tuple[Shard, ...]
    ontology_sha256: str | None = None
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="what made it: source, input, configuration, code version"
    )

    @classmethod
    def load(cls, uri: str) -> Manifest:
        """Read the manifest of the corpus at `uri` (the folder, or the manifest file itself).

        Raises:
            CorpusError: there is no manifest, it is malformed, or of a schema version this code cannot read.
        """
        file = uri if uri.endswith(".json") else storage.join(uri, MANIFEST_NAME)
        try:
            document = storage.read_json(file)
        except FileNotFoundError:
            raise CorpusError(
                f"{uri} is not a prepared corpus: it has no {MANIFEST_NAME}; run jobs/prepare.py with output={uri}"
            ) from None
        if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
            version = document.get("schema_version") if isinstance(document, dict) else None
            raise CorpusError(
                f"{file} has schema version {version}, this code reads {SCHEMA_VERSION}; prepare the corpus again"
            )
        document.pop("digest", None)
        document.pop("num_samples", None)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            raise CorpusError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def save(self, uri: str) -> None:
        """Commit the corpus at `uri`: from here on it exists."""
        document = self.model_dump(mode="json")
        storage.write_json(
            storage.join(uri, MANIFEST_NAME),
            {"digest": self.digest, "num_samples": self.num_samples, **document},
        )

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the content: shards, their digests and order, and the ontology; not over provenance."""
        content = {
            "schema_version": self.schema_version,
            "shards": [shard.model_dump(mode="json") for shard in self.shards],
            "ontology_sha256": self.ontology_sha256,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def source_digest(self) -> str:
        """SHA-256 (hex) over the sources and what preparation made of their rows; the same rows again give it again."""
        named = {key: self.provenance.get(key) for key in ("sources", "generations")}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, int]:
        """Samples of each split, in order of first appearance."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.num_samples
        return counts

    def select(self, split: str) -> Manifest:
        """The manifest of one split alone; sample indices count from 0 inside it.

        Raises:
            CorpusError: the corpus has no such split.
        """
        shards = tuple(shard for shard in self.shards if shard.split == split)
        if not shards:
            known = ", ".join(f"{name} ({count})" for name, count in self.splits.items()) or "none"
            raise CorpusError(f"the corpus has no split {split!r}; it has: {known}")
        return self.model_copy(update={"shards": shards})

    def row_group_sizes(self) -> np.ndarray:
        """Samples of every row group in manifest order, int64 [num_row_groups]."""
        return np.array([size for shard in self.shards for size in shard.row_groups], dtype=np.int64)

    def row_group_locations(self) -> list[tuple[str, int]]:
        """`(shard path, row group number inside it)` of every row group in manifest order."""
        return [(shard.path, number) for shard in self.shards for number in range(len(shard.row_groups))]
