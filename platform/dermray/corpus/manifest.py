"""What has been committed: the shards of a prepared corpus, their row groups, counts, digests and provenance.

`manifest.json` is written last. A folder without it is not a corpus. Sample index `i` of a manifest is the `i`-th
row when its shards are read in order.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from dermray import documents, links, storage
from dermray.corpus.schema import SCHEMA_VERSION
from dermray.errors import CorpusError, SplitError

MANIFEST_NAME = "manifest.json"


def is_corpus(uri: str) -> bool:
    """Whether a prepared corpus was committed at `uri`."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


def _what_is_there(uri: str) -> str:
    """Why nothing was found at `uri`, for humans: the folder is another one, or there is none of that name."""
    if storage.exists(uri):
        advice = "give the folder that was the output of jobs/prepare.py"
        return f"it is there, but has no {MANIFEST_NAME}; {advice}"
    missing, parent = uri, uri.rpartition("/")[0]
    while parent.strip("/") and not parent.endswith(":/") and not storage.exists(parent):
        missing, parent = parent, parent.rpartition("/")[0]
    if not parent.strip("/") or parent.endswith(":/"):
        return "there is no such folder"
    name, folders = storage.name_of(missing), [storage.name_of(folder) for folder in storage.list_folders(parent)]
    near = difflib.get_close_matches(name, folders, n=1)
    return f"{parent} has no {name!r}" + (f"; did you mean {storage.join(parent, near[0])}?" if near else "")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# A name in a record that is joined onto its folder.
Inside = Annotated[str, AfterValidator(storage.relative)]
# What a column of a side table holds: texts, numbers (float64), or masks (PNG files of `dermray.masks`).
SideKind = Literal["text", "number", "mask"]


class Shard(_Record):
    """One Parquet file of samples that all belong to one split."""

    path: Inside = Field(description="relative to the corpus, e.g. data/train-00000-1f3c….parquet")
    split: Inside
    # More fit into no file that a machine reads whole; work is planned by these numbers before a shard is opened.
    num_samples: int = Field(gt=0, le=1 << 24)
    num_bytes: int = Field(gt=0)
    sha256: str
    row_groups: tuple[int, ...] = Field(description="samples of each Parquet row group, in order")


class SideShard(_Record):
    """What a side table says of the samples of one shard: a Parquet file with as many rows and the same row groups."""

    path: Inside = Field(description="relative to the corpus, e.g. sides/masks/train-00000-1f3c….parquet")
    num_bytes: int = Field(gt=0)
    sha256: str


class SideTable(_Record):
    """A table of what only some tasks know of the samples (`dermray.corpus.side_tables`)."""

    name: Inside
    columns: dict[str, SideKind] = Field(description="what each holds, besides sample_id")
    shards: tuple[SideShard, ...] = Field(description="one of each shard of samples, in their order")


class Manifest(_Record):
    """The committed content of a prepared corpus."""

    schema_version: int = SCHEMA_VERSION
    version: int = Field(1, ge=1, description="counts the times that rows have joined the corpus")
    shards: tuple[Shard, ...]
    ontology_sha256: str | None = None
    side_tables: tuple[SideTable, ...] = ()
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="what made it: source, input, configuration, code version"
    )

    @field_validator("provenance")
    @classmethod
    def _counts(cls, found: dict[str, Any]) -> dict[str, Any]:
        for name in ("untexted", "modalities"):
            counts = found.get(name, {})
            if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
                raise ValueError(f"{name} must be numbers of samples by name")
        return found

    @classmethod
    def load(cls, uri: str) -> Manifest:
        """Read the manifest of the corpus at `uri` (the folder, or the manifest file itself).

        Raises:
            CorpusError: there is no manifest, it is malformed, of a schema version this code cannot read, or a file of
                the corpus is a link that leads out of its folder.
        """
        file = uri if uri.endswith(".json") else storage.join(uri, MANIFEST_NAME)
        try:
            document = storage.read_json(file)
        except FileNotFoundError:
            raise CorpusError(f"{uri} is not a prepared corpus: {_what_is_there(uri)}") from None
        if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
            version = document.get("schema_version") if isinstance(document, dict) else None
            raise CorpusError(
                f"{file} has schema version {version}, this code reads {SCHEMA_VERSION}; prepare the corpus again"
            )
        document.pop("digest", None)
        document.pop("num_samples", None)
        try:
            found = cls.model_validate(document)
        except ValidationError as error:
            raise CorpusError(f"{file}: {documents.first_fault(error)}") from None
        for shard in found.shards:
            if min(shard.row_groups, default=0) < 1 or sum(shard.row_groups) != shard.num_samples:
                raise CorpusError(f"{file}: row_groups of {shard.path} are not those of {shard.num_samples:,} samples")
        for table in found.side_tables:
            if len(table.shards) != len(found.shards):
                raise CorpusError(f"{file}: side table {table.name!r} has other shards than the samples")
        folder, _, name = file.rpartition("/")
        beside = (shard.path for table in found.side_tables for shard in table.shards)
        outside = links.linked_outside(folder, (name, *(shard.path for shard in found.shards), *beside))
        if outside is not None:
            raise CorpusError(
                f"{storage.join(folder, outside)} is reached by a symbolic link that leads out of the corpus: copy "
                "what it names into the folder, or let the whole folder be the link"
            )
        return found

    def save(self, uri: str) -> None:
        """Commit the corpus at `uri`: from here on it exists."""
        # A corpus without side tables is what it was before there were any, and is read by what was built then.
        document = self.model_dump(mode="json", exclude=None if self.side_tables else {"side_tables"})
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
        """SHA-256 (hex) over the content: shards, their digests and order, side tables, ontology; not provenance."""
        content: dict[str, Any] = {
            "schema_version": self.schema_version,
            "shards": [shard.model_dump(mode="json") for shard in self.shards],
            "ontology_sha256": self.ontology_sha256,
        }
        if self.side_tables:
            content["side_tables"] = [table.model_dump(mode="json") for table in self.side_tables]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def source_digest(self) -> str:
        """SHA-256 (hex) over the sources and what preparation made of their rows; the same rows again give it again."""
        named = {key: self.provenance.get(key) for key in ("sources", "generations")}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    @property
    def untexted(self) -> dict[str, int]:
        """Samples of which no text says anything, by split; splits without such are not named."""
        return dict(self.provenance.get("untexted", {}))

    @property
    def modalities(self) -> dict[str, int]:
        """Samples of each kind of picture that a source names (`corpus.modality`); empty where none says it."""
        return dict(self.provenance.get("modalities", {}))

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
            SplitError: the corpus has no such split.
        """
        shards = tuple(shard for shard in self.shards if shard.split == split)
        if not shards:
            known = ", ".join(f"{name} ({count})" for name, count in self.splits.items()) or "none"
            raise SplitError(f"the corpus has no split {split!r}; it has: {known}")
        kept = [number for number, shard in enumerate(self.shards) if shard.split == split]
        sides = tuple(
            table.model_copy(update={"shards": tuple(table.shards[number] for number in kept)})
            for table in self.side_tables
        )
        return self.model_copy(update={"shards": shards, "side_tables": sides})

    def row_group_sizes(self) -> np.ndarray:
        """Samples of every row group in manifest order, int64 [num_row_groups]."""
        return np.array([size for shard in self.shards for size in shard.row_groups], dtype=np.int64)

    def row_group_locations(self) -> list[tuple[str, int]]:
        """`(shard path, row group number inside it)` of every row group in manifest order."""
        return [(shard.path, number) for shard in self.shards for number in range(len(shard.row_groups))]
