"""Which sample goes into which split, shard and place: a pure function of rows, configuration and what is committed.

Rows of one image become one sample. Splits are drawn inside each condition, in the order of a hash of the group, and
never part a group. The order inside a split is a seeded shuffle, so every shard is a random draw of its split. Rows
that join a committed corpus follow their groups and come into shards of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dermray.errors import CorpusError
from dermray.prepare.settings import SPLIT_NAME, TRAIN
from dermray.prepare.sources.rows import DroppedRow, RawRows

# Reasons for which a row is dropped before its image is looked at, in the order in which they are tried.
NO_IMAGE_PATH = "no_image_path"
PATH_OUTSIDE_ROOT = "path_outside_root"
EMPTY_CAPTION = "empty_caption"
DETAILS = {
    NO_IMAGE_PATH: "the table gives no image path",
    PATH_OUTSIDE_ROOT: "the image path is absolute or leaves the input folder",
    EMPTY_CAPTION: "the row has no caption",
}


@dataclass(frozen=True)
class ShardSpec:
    """The rows of one shard, in the order of its samples; rows of one image follow each other."""

    split: str
    index: int
    rows: pa.Table

    @property
    def name(self) -> str:
        """Split and number, as they begin the shard's file name."""
        return f"{self.split}-{self.index:05d}"


@dataclass(frozen=True)
class Plan:
    """What there is to do. `num_images` counts the samples if no image is bad."""

    shards: tuple[ShardSpec, ...]
    dropped: tuple[DroppedRow, ...]
    num_rows: int
    num_images: int


@dataclass(frozen=True)
class Usable:
    """The rows that need a look at their image, paths normalised; and the others, dropped."""

    table: pa.Table
    dropped: tuple[DroppedRow, ...]


@dataclass(frozen=True)
class Holdings:
    """What a committed corpus holds already, as far as a plan must know.

    Attributes:
        images: digests of the images' rows (`image_digests`), which are left alone.
        splits: the split of each group, by `group_digest`.
        num_shards: numbers that each split's shards have used up.
    """

    images: frozenset[int] = frozenset()
    splits: Mapping[int, str] = field(default_factory=dict)
    num_shards: Mapping[str, int] = field(default_factory=dict)


NOTHING = Holdings()


def usable_rows(raw: RawRows) -> Usable:
    """Drop the rows that need no look at their image."""
    reasons = _reasons(raw.table)
    dropped = [*raw.dropped, *_dropped(raw.table, reasons)]
    table = raw.table.filter(pc.is_null(reasons)).combine_chunks()
    images = table["image"].combine_chunks()
    paths = pa.array([posixpath.normpath(path) for path in images.to_pylist()], pa.string())
    table = table.set_column(table.column_names.index("image"), table.schema.field("image"), paths)
    return Usable(table, tuple(sorted(dropped, key=lambda row: row.row)))


def plan_shards(
    usable: Usable, *, split: str | Mapping[str, float], seed: int, rows_per_shard: int, held: Holdings = NOTHING
) -> Plan:
    """Assign splits, shuffle, cut into shards.

    Raises:
        CorpusError: the source prescribes a split whose name cannot be one.
    """
    table = usable.table
    encoded = table["image"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy().astype(np.int64)
    splits = _splits(names, codes, table, split, seed, held.splits)
    shards = _cut(table, codes, _order(names, seed), splits, rows_per_shard, held.num_shards)
    return Plan(tuple(shards), usable.dropped, table.num_rows + len(usable.dropped), len(names))


def without_known(usable: Usable, source_uri: str, known: frozenset[int]) -> Usable:
    """The rows of images that a corpus does not hold with the same rows already."""
    digests = image_digests(usable.table, source_uri)
    new = [digests[path] not in known for path in usable.table["image"].to_pylist()]
    return Usable(usable.table.filter(pa.array(new, pa.bool_())), usable.dropped)


def image_digests(table: pa.Table, source_uri: str) -> dict[str, int]:
    """A 64-bit digest of all the rows of each image, by its path; the same whatever the order of the table."""
    digests: dict[str, int] = {}
    for batch in table.to_batches(max_chunksize=16_384):
        for row in batch.to_pylist():
            digests[row["image"]] = (digests.get(row["image"], 0) + row_digest(row, source_uri)) % 2**64
    return digests


def row_digest(row: Mapping[str, Any], source_uri: str) -> int:
    """64 bits over what a row says and where its image is; not over its place in the table."""
    said = {name: value for name, value in row.items() if name != "row"}
    return _digest(source_uri, json.dumps(said, sort_keys=True, ensure_ascii=False))


def group_digest(source: str, group: str) -> int:
    """64 bits that name a group of one source."""
    return _digest(source, group)


def _digest(*parts: str) -> int:
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def leaves_root(path: str) -> bool:
    """True if a relative path, as written, points outside the folder it is relative to."""
    normal = posixpath.normpath(path)
    return normal.startswith("/") or normal == ".." or normal.startswith("../") or "\0" in path or "://" in path


def _reasons(table: pa.Table) -> pa.Array:
    images = table["image"].combine_chunks()
    # A null path gives null here, and is caught by the first case.
    outside = pa.array([path is not None and leaves_root(path) for path in images.to_pylist()], pa.bool_())
    captioned = pc.greater(pc.list_value_length(table["captions"].combine_chunks()), 0)
    cases = pc.make_struct(pc.is_null(images), outside, pc.invert(captioned))
    return pc.case_when(cases, NO_IMAGE_PATH, PATH_OUTSIDE_ROOT, EMPTY_CAPTION)


def _dropped(table: pa.Table, reasons: pa.Array) -> list[DroppedRow]:
    bad = table.select(["row", "source_id", "image"]).append_column("reason", reasons).filter(pc.is_valid(reasons))
    return [
        DroppedRow(row["row"], row["source_id"], row["image"] or "", row["reason"], DETAILS[row["reason"]])
        for row in bad.to_pylist()
    ]


def _splits(
    names: list[str],
    codes: np.ndarray,
    table: pa.Table,
    split: str | Mapping[str, float],
    seed: int,
    held: Mapping[int, str],
) -> np.ndarray:
    """Split name of each image, object [num_images]."""
    if isinstance(split, str):
        return np.full(len(names), split, dtype=object)
    groups = table["group"].combine_chunks()
    component, keys = _components(names, codes, groups)
    assigned = _draw(keys, _strata(component, codes, table, len(keys)), split, seed)
    if held:
        for row, digest in _group_digests(table):
            if digest in held:
                assigned[component[codes[row]]] = held[digest]
    prescribed = table["split"].combine_chunks()
    if prescribed.null_count == len(prescribed):
        return assigned[component]
    return _prescribe(assigned, component, codes, prescribed)


def _draw(keys: list[str], strata: np.ndarray, split: Mapping[str, float], seed: int) -> np.ndarray:
    """Split name of each component, object [num_components]: of every stratum each split gets its fraction.

    Inside a stratum the components with the smallest hashes come first. What a fraction leaves of a whole component is
    rounded up or down by a draw of the stratum's own, so that strata of a few components are right on average.
    """
    drawn = _hashes(keys, seed, "split")
    order = np.lexsort((drawn, strata))
    edges = np.flatnonzero(np.diff(strata[order], prepend=-1, append=-1))
    assigned = np.full(len(keys), TRAIN, dtype=object)
    for first, last in itertools.pairwise(edges):
        members = order[first:last]
        luck = int(drawn[members].min()) * 0x9E3779B97F4A7C15 % 2**64 / 2.0**64
        share, begin = 0.0, 0
        for name, fraction in sorted(split.items()):
            share += fraction
            end = min(len(members), int(share * len(members) + luck))
            assigned[members[begin:end]] = name
            begin = end
    return assigned


def _strata(component: np.ndarray, codes: np.ndarray, table: pa.Table, num_components: int) -> np.ndarray:
    """Number of each component's stratum, int64 [num_components]: its first label by the alphabet, or none."""
    labels = table["labels"].combine_chunks()
    encoded = labels.flatten().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    rank = np.empty(len(names) + 1, dtype=np.int64)
    rank[np.argsort(np.array(names, dtype=object))] = np.arange(len(names))
    rank[-1] = len(names)
    strata = np.full(num_components, len(names), dtype=np.int64)
    of_row = component[codes[pc.list_parent_indices(labels).to_numpy()]]
    np.minimum.at(strata, of_row, rank[encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)])
    return strata


def _group_digests(table: pa.Table) -> Iterator[tuple[int, int]]:
    """`(row, group digest)` of every row that has a group."""
    for row, (source, group) in enumerate(zip(table["source"].to_pylist(), table["group"].to_pylist(), strict=True)):
        if group is not None:
            yield row, group_digest(source, group)


def _prescribe(assigned: np.ndarray, component: np.ndarray, codes: np.ndarray, prescribed: pa.Array) -> np.ndarray:
    """A prescribed split holds for its image, and for the images of its group that have none."""
    rows = np.flatnonzero(prescribed.is_valid().to_numpy(zero_copy_only=False))
    wanted = np.array([name.lower() for name in prescribed.drop_null().to_pylist()], dtype=object)
    for name in sorted(set(wanted)):
        if not SPLIT_NAME.fullmatch(name):
            raise CorpusError(f"the table prescribes the split {name!r}: a name has letters, digits and _ only")
    # Later writes win, so going backwards leaves the first row's word.
    assigned = assigned.copy()
    assigned[component[codes[rows[::-1]]]] = wanted[::-1]
    splits = assigned[component]
    splits[codes[rows[::-1]]] = wanted[::-1]
    return splits


def _components(names: list[str], codes: np.ndarray, groups: pa.Array) -> tuple[np.ndarray, list[str]]:
    """What must stay together: `(component of each image [num_images], key of each component)`.

    Images are linked through their groups. The key is the component's smallest group name, or the image's path
    where it has no group, so it does not depend on the order of the table.
    """
    encoded = groups.dictionary_encode()
    group_names = encoded.dictionary.to_pylist()
    grouped = np.flatnonzero(encoded.indices.is_valid().to_numpy(zero_copy_only=False))
    linked = encoded.indices.drop_null().to_numpy().astype(np.int64) + len(names)
    num_nodes = len(names) + len(group_names)
    links = coo_array((np.ones(len(grouped), dtype=np.int8), (codes[grouped], linked)), shape=(num_nodes, num_nodes))
    num_components, component = connected_components(links, directed=False)
    keys: list[str | None] = [None] * num_components
    for position, name in enumerate([*(f"image:{name}" for name in names), *(f"group:{name}" for name in group_names)]):
        held = keys[component[position]]
        # "group:" sorts before "image:", so a group's name wins.
        if held is None or name < held:
            keys[component[position]] = name
    return component[: len(names)], [key for key in keys if key is not None]


def _order(names: list[str], seed: int) -> np.ndarray:
    """Image numbers in shuffled order, the same whatever order the table has."""
    return np.argsort(_hashes(names, seed, "order"), kind="stable")


def _hashes(keys: list[str], seed: int, purpose: str) -> np.ndarray:
    """A number of each key, uniform over uint64."""
    prefix = f"{seed}\0{purpose}\0"
    digests = b"".join(hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8")


def _cut(
    table: pa.Table,
    codes: np.ndarray,
    order: np.ndarray,
    splits: np.ndarray,
    rows_per_shard: int,
    taken: Mapping[str, int],
) -> list[ShardSpec]:
    shards: list[ShardSpec] = []
    rows_of_image = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[rows_of_image], np.arange(len(order) + 1))
    for split in sorted(set(splits), key=lambda name: (name != TRAIN, name)):
        members = order[splits[order] == split]
        for index, first in enumerate(range(0, len(members), rows_per_shard), taken.get(split, 0)):
            chosen = members[first : first + rows_per_shard]
            rows = np.concatenate([rows_of_image[starts[image] : starts[image + 1]] for image in chosen])
            shards.append(ShardSpec(split, index, table.take(pa.array(rows))))
    return shards
