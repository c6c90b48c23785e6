"""The corpora that one run deals from, one behind the other: sample and row group numbers count through all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import Verify
from dermray.corpus.shares import DIGESTS_JOIN
from dermray.corpus.side_tables import RowGroupReader, index_of, require_columns
from dermray.errors import SplitError

# In the metadata of a row group that is read of one corpus among several.
_READ_FROM = b"dermray.corpus"


@dataclass(frozen=True)
class Corpora:
    """One prepared corpus or several.

    Attributes:
        uris: of each.
        manifests: of each, or of one split of each.
    """

    uris: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @classmethod
    def of(cls, uri: str, manifest: Manifest) -> Corpora:
        """A single one."""
        return cls((uri,), (manifest,))

    @classmethod
    def load(cls, uris: Sequence[str]) -> Corpora:
        """Read the manifests.

        Raises:
            CorpusError: one is not there, or malformed; names it.
        """
        return cls(tuple(uris), tuple(Manifest.load(uri) for uri in uris))

    def select(self, split: str) -> Corpora:
        """The split of that name of each.

        Raises:
            SplitError: one has none; names it.
        """
        found = []
        for uri, manifest in zip(self.uris, self.manifests, strict=True):
            try:
                found.append(manifest.select(split))
            except SplitError as error:
                raise error if len(self.uris) == 1 else SplitError(f"{uri}: {error}") from None
        return Corpora(self.uris, tuple(found))

    @property
    def digest(self) -> str:
        """The digest of the one corpus, or those of all in their order, with + between them."""
        return DIGESTS_JOIN.join(manifest.digest for manifest in self.manifests)

    @property
    def one_tree(self) -> bool:
        """Whether all have the same disease tree, or none has one."""
        return len({manifest.ontology_sha256 for manifest in self.manifests}) == 1

    def row_group_sizes(self) -> np.ndarray:
        """Samples of every row group, int64 `[num_row_groups]`."""
        return np.concatenate([manifest.row_group_sizes() for manifest in self.manifests])

    def require_columns(self, columns: Sequence[str]) -> None:
        """Refuse corpora of which one lacks a side table, or a column of it, that these columns are of.

        Raises:
            CorpusError: it is so; names corpus, table, column, and what the corpus has.
        """
        for uri, manifest in zip(self.uris, self.manifests, strict=True):
            require_columns(uri, manifest, columns)

    def index(self, verify: Verify = "auto", columns: Sequence[str] = ()) -> RowGroupReader:
        """Where each sample lies, and what the side tables say of it that these columns are of.

        Raises:
            CorpusError: a corpus has no such side table, or no such column in it.
        """
        parts = [index_of(uri, of, columns, verify) for uri, of in zip(self.uris, self.manifests, strict=True)]
        return parts[0] if len(parts) == 1 else JoinedIndex(tuple(parts))


@dataclass(frozen=True)
class JoinedIndex:
    """Where each sample of several corpora lies."""

    parts: tuple[RowGroupReader, ...]

    @property
    def corpus(self) -> str:
        """Their URIs, for messages that mean all of them."""
        return ", ".join(part.corpus for part in self.parts)

    @property
    def starts(self) -> np.ndarray:
        """First sample of every row group plus the total at the end, int64 `[num_row_groups + 1]`."""
        sizes = np.concatenate([np.diff(part.starts) for part in self.parts])
        return np.concatenate([[0], np.cumsum(sizes)])

    def read_row_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """One row group by its number; its metadata name the corpus.

        Raises:
            CorpusError: its shard is shorter than its manifest says, damaged, or gone.
        """
        for part in self.parts:
            num_groups = len(part.starts) - 1
            if group < num_groups:
                table = part.read_row_group(group, columns)
                return table.replace_schema_metadata({_READ_FROM: part.corpus.encode()})
            group -= num_groups
        raise IndexError(f"{self.corpus} have no row group {group}")


def read_from(metadata: Mapping[bytes, bytes] | None) -> str | None:
    """The corpus that a row group's metadata name; None where there was only one."""
    named = (metadata or {}).get(_READ_FROM)
    return None if named is None else named.decode()
