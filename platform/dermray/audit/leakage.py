"""Leakage: samples of evaluation corpora that resemble samples of the training corpora.

    Ray Data, one item a shard: read hashes ─▶ banded search ─▶ Ray Data: read what is in a pair ─▶ report

Of all samples only the hashes are read, of those in a pair their ids and labels, of those that the report shows their
images. Where a corpus holds no hashes (an older one), they are made from its images on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from dermray import images, pieces
from dermray.audit.duplicates import matches
from dermray.audit.leakage_settings import CorpusPart, LeakageConfig
from dermray.audit.matches import Matches
from dermray.audit.nearest import top1 as top1
from dermray.corpus.accounts import require_balance
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import SAMPLE
from dermray.corpus.shards import ShardIndex
from dermray.corpus.shares import DIGESTS_JOIN
from dermray.errors import ImageError, SplitError
from dermray.progress import Progress

# Why a sample is compared with nothing.
UNREADABLE = "no hash, and no image that can be decoded"
# Training samples that are listed for each evaluation sample, nearest first: a picture that stands a thousand times in
# both corpora (a placeholder, an empty frame) would make millions of pairs that say one thing.
PAIRS_PER_SAMPLE = 100
# What the report says of a sample in a pair.
DESCRIBED = ["sample_id", "source", "source_id", "labels", "split"]


@dataclass(frozen=True)
class CorpusHashes:
    """Perceptual hashes of a corpus, or of some splits of it.

    Attributes:
        uri: of the corpus.
        corpus_digest: of the whole corpus, not of the splits.
        manifest: the shards of the chosen splits.
        samples: indices in `manifest` of the samples with a hash, int64 `[N]`, ascending.
        phashes: uint64 `[N]`.
        num_unreadable: samples that have no hash and whose image cannot be decoded either.
    """

    uri: str
    corpus_digest: str
    manifest: Manifest
    samples: np.ndarray
    phashes: np.ndarray
    num_unreadable: int = 0

    @property
    def account(self) -> dict[str, Any]:
        """Every sample is compared or told, as `accounts.require_balance` gives it."""
        return _account(self.uri, self.manifest.num_samples, len(self.samples), self.num_unreadable)


@dataclass(frozen=True)
class JoinedHashes:
    """Hashes of several corpora, one behind the other: sample numbers count through all of them."""

    parts: tuple[CorpusHashes, ...]

    @property
    def uri(self) -> str:
        """Of all of them, for messages."""
        return ", ".join(part.uri for part in self.parts)

    @property
    def corpus_digest(self) -> str:
        """The digest of the one, or those of all in their order, as `ingest.corpora.Corpora.digest` joins them."""
        return DIGESTS_JOIN.join(part.corpus_digest for part in self.parts)

    @property
    def starts(self) -> np.ndarray:
        """First sample of each corpus plus the total at the end, int64 `[num_corpora + 1]`."""
        return np.cumsum([0, *(part.manifest.num_samples for part in self.parts)])

    @property
    def samples(self) -> np.ndarray:
        """Numbers of the samples with a hash, int64 `[N]`, ascending."""
        return np.concatenate([part.samples + start for part, start in zip(self.parts, self.starts, strict=False)])

    @property
    def phashes(self) -> np.ndarray:
        """uint64 `[N]`."""
        return np.concatenate([part.phashes for part in self.parts])

    @property
    def num_unreadable(self) -> int:
        """As of `CorpusHashes`, of all of them."""
        return sum(part.num_unreadable for part in self.parts)

    @property
    def account(self) -> dict[str, Any]:
        """As `CorpusHashes.account`, of all of them."""
        return _account(self.uri, int(self.starts[-1]), len(self.samples), self.num_unreadable)

    def corpus_of(self, samples: np.ndarray) -> np.ndarray:
        """Places in `parts` of the corpora that samples lie in, int64 `[N]`."""
        return np.searchsorted(self.starts, samples, side="right") - 1

    def split(self, samples: np.ndarray) -> Iterator[tuple[CorpusHashes, np.ndarray]]:
        """Each corpus that some ascending samples lie in, with their numbers inside it.

        Of corpora of 10 and 5 samples, `[2, 9, 11]` are `[2, 9]` of the first and `[1]` of the second.
        """
        starts = self.starts
        ends = np.searchsorted(samples, starts[1:-1])
        for part, start, members in zip(self.parts, starts, np.split(samples, ends), strict=False):
            if len(members):
                yield part, members - start


def _account(uri: str, num_samples: int, num_compared: int, num_unreadable: int) -> dict[str, Any]:
    return require_balance(f"hashes of {uri}", num_samples, num_compared, {UNREADABLE: num_unreadable})


@dataclass(frozen=True)
class Comparison:
    """One evaluation corpus against the training corpora.

    Attributes:
        part: what was compared.
        hashes: of it.
        matches: places in `JoinedHashes.samples` of the training corpora that resemble places in `hashes.samples`.
        pairs: the `PAIRS_PER_SAMPLE` nearest of each evaluation sample: training sample by its number through all
            training corpora, and evaluation sample by index in its manifest, int64 `[P, 2]`, sorted.
        distances: bits in which the hashes of a pair differ, int64 `[P]`.
    """

    part: CorpusPart
    hashes: CorpusHashes
    matches: Matches
    pairs: np.ndarray
    distances: np.ndarray

    @property
    def num_pairs_left_out(self) -> int:
        """Pairs that are counted, and not among `pairs`."""
        return self.matches.num_pairs - len(self.pairs)


@dataclass(frozen=True)
class Leakage:
    """What a search came to."""

    training: JoinedHashes
    comparisons: tuple[Comparison, ...]


def check_inputs(config: LeakageConfig) -> None:
    """Refuse a missing corpus or split before a cluster is started for them.

    Raises:
        CorpusError: no corpus there, or no such split in it; names it.
    """
    parts = [(part.uri, part.splits) for part in config.parts()]
    for uri, splits in [*((uri, config.splits) for uri in config.corpus_uris), *parts]:
        try:
            select(Manifest.load(uri), splits)
        except SplitError as error:
            raise SplitError(f"{uri}: {error}") from None


def find_leakage(config: LeakageConfig, *, say: Callable[[str], None] = lambda line: None) -> Leakage:
    """Search every evaluation corpus for what resembles training samples, on the connected Ray cluster.

    Raises:
        CorpusError: as `check_inputs`; or a shard is gone or damaged.
        StorageError: a corpus cannot be read.
    """
    training = JoinedHashes(tuple(read_corpus_hashes(uri, config.splits) for uri in config.corpus_uris))
    for corpus in training.parts:
        say(f"training: {len(corpus.phashes):,} samples of {corpus.uri} ({', '.join(config.splits)})")
    samples, phashes = training.samples, training.phashes
    comparisons = []
    for part in config.parts():
        hashes = read_corpus_hashes(part.uri, part.splits)
        found = matches(phashes, hashes.phashes, max_distance=config.max_distance)
        places, apart = found.nearest_pairs(PAIRS_PER_SAMPLE)
        pairs = np.stack([samples[places[:, 0]], hashes.samples[places[:, 1]]], axis=1)
        comparisons.append(Comparison(part, hashes, found, pairs, apart))
        concerned = len(found.right.positions)
        say(f"{part.name}: {concerned:,} of {len(hashes.phashes):,} samples resemble a training sample")
        if left_out := comparisons[-1].num_pairs_left_out:
            say(f"{part.name}: {left_out:,} pairs beyond a sample's {PAIRS_PER_SAMPLE} nearest are counted, not listed")
    return Leakage(training, tuple(comparisons))


def select(manifest: Manifest, splits: Sequence[str] | None) -> Manifest:
    """The manifest of some splits (None: of all), its shards in their order.

    Raises:
        SplitError: the corpus has no such split.
    """
    if splits is None:
        return manifest
    chosen = {shard.path for split in splits for shard in manifest.select(split).shards}
    return manifest.model_copy(update={"shards": tuple(shard for shard in manifest.shards if shard.path in chosen)})


def read_hashes(corpus_uri: str, manifest: Manifest) -> tuple[list[str], np.ndarray]:
    """Sample ids and their perceptual hashes, uint64 `[N]`, in manifest order, with Ray Data over the shards.

    A hash that the corpus does not hold is made from the image; a sample whose image cannot be decoded is left out.

    Raises:
        CorpusError: a shard is gone or damaged.
    """
    table = _hash_table(ShardIndex.of(corpus_uri, manifest), manifest, ["sample_id"])
    readable = table.filter(table["phash"].is_valid())
    return readable["sample_id"].to_pylist(), readable["phash"].to_numpy()


def read_corpus_hashes(corpus_uri: str, splits: Sequence[str] | None) -> CorpusHashes:
    """As `read_hashes`, of some splits (None: of all), with sample indices instead of ids.

    Raises:
        CorpusError: no corpus, no such split, or a shard is gone or damaged.
    """
    whole = Manifest.load(corpus_uri)
    manifest = select(whole, splits)
    index = ShardIndex.of(corpus_uri, manifest)
    table = _hash_table(index, manifest, [])
    readable = table.filter(table["phash"].is_valid())
    return CorpusHashes(
        index.corpus,
        whole.digest,
        manifest,
        readable["sample"].to_numpy(),
        readable["phash"].to_numpy(),
        table["phash"].null_count,
    )


def describe(hashes: CorpusHashes, samples: np.ndarray) -> pa.Table:
    """`DESCRIBED` of the samples at the given ascending indices, in their order, with Ray Data over the shards.

    Raises:
        CorpusError: a shard is gone or damaged.
    """
    if not len(samples):
        return SAMPLE.empty_table().select(DESCRIBED)
    ends = np.cumsum([shard.num_samples for shard in hashes.manifest.shards])
    parts = np.split(samples, np.searchsorted(samples, ends[:-1]))
    items = {shard.path: part.tolist() for shard, part in zip(hashes.manifest.shards, parts, strict=True) if len(part)}
    index = ShardIndex.of(hashes.uri, hashes.manifest)
    return _over_shards(items, partial(_describe_samples, index=index), "describe_samples").select(DESCRIBED)


def group_hashes(index: ShardIndex, group: int, columns: Sequence[str]) -> pa.Table:
    """`sample` (its index), `phash` and further columns of a row group; null is the hash of what is no image.

    Raises:
        CorpusError: the shard is gone or damaged.
    """
    table = index.read_row_group(group, ["phash", *columns])
    samples = pa.array(np.arange(index.starts[group], index.starts[group + 1]), type=pa.int64())
    known = table["phash"] if "phash" in table.column_names else pa.nulls(table.num_rows, pa.uint64())
    if known.null_count:
        encoded = index.read_row_group(group, ["image"])["image"]
        made = [
            _hash_of(image.as_py()) if phash is None else phash
            for phash, image in zip(known.to_pylist(), encoded, strict=True)
        ]
        known = pa.array(made, type=pa.uint64())
    return pa.table({"sample": samples, "phash": known, **{name: table[name] for name in columns}})


def _hash_table(index: ShardIndex, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """`sample`, `phash` (null: no image) and further columns of every sample, by sample index."""
    ends = np.cumsum([0, *(len(shard.row_groups) for shard in manifest.shards)]).tolist()
    items = {shard.path: list(range(*place)) for shard, place in zip(manifest.shards, pairwise(ends), strict=True)}
    return _over_shards(items, partial(_hash_row_groups, index=index, columns=list(columns)), "read_hashes")


def _over_shards(items: Mapping[str, list[int]], work: Callable[[list[int]], pa.Table], operator: str) -> pa.Table:
    """What the work makes of each item (numbers of one shard, by its path), by sample index."""
    pool = pieces.Pool(noun="shard", operator=operator, kept="run the same command again")
    tables = []
    with Progress("read", len(items), "shards", waits_for=pool.waits_for()) as progress:
        for _, table in pieces.run(items, work, pool):
            progress.advance()
            tables.append(table)
    whole = pa.concat_tables(tables)
    return whole.take(pa.array(np.argsort(whole["sample"].to_numpy())))


def _hash_row_groups(groups: list[int], *, index: ShardIndex, columns: list[str]) -> pa.Table:
    """A worker's side of a shard: its row groups, one after the other."""
    images.use_one_core()
    return pa.concat_tables([group_hashes(index, group, columns) for group in groups])


def _describe_samples(numbers: list[int], *, index: ShardIndex) -> pa.Table:
    """A worker's side of a shard: the rows of some of its samples."""
    samples = np.array(numbers, dtype=np.int64)
    return index.read(samples, DESCRIBED).append_column("sample", pa.array(samples))


def _hash_of(image: bytes) -> int | None:
    try:
        return images.perceptual_hash(image)
    except ImageError:
        return None
