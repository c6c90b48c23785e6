"""Which sample goes into which split, shard and place: a pure function of rows, configuration and what is committed.

Rows of one image become one sample. Splits are drawn inside each condition, in the order of a hash of the group, and
never part a group. The order inside a split is a seeded shuffle of its images, or of groups of images that are kept
together, so every shard is a random draw of its split. Rows that join a committed corpus follow their groups and come
into shards of their own.
"""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.accounts import require_balance
from dermray.corpus.schema import TRAIN
from dermray.prepare.dealing import Dealt, deal
from dermray.prepare.splitting import NOTHING, CommittedContents, belonging, looked_up, narrow_rows, split_images
from dermray.raw.sources.rows import DroppedRow, RawRows
from dermray.raw.spill import blocks, collected, placed

# Reasons for which a row is dropped before its image is looked at, in the order in which they are tried.
NO_IMAGE_PATH = "no_image_path"
PATH_OUTSIDE_ROOT = "path_outside_root"
EMPTY_CAPTION = "empty_caption"
DETAILS = {
    NO_IMAGE_PATH: "the table gives no image path",
    PATH_OUTSIDE_ROOT: "the image path is absolute or leaves the input folder",
    EMPTY_CAPTION: "the row has no caption",
}
# A part of a path that is empty or dots, or a character that no path has: what `posixpath.normpath` changes, and all
# that leaves a folder.
_ODD_PATH = r"(?:^|/)\.{0,2}(?:/|$)|\x00"


@dataclass(frozen=True)
class ShardSpec:
    """The rows of one shard, in the order of its samples; rows of one image follow each other.

    `dealt` are its rows, or where they lie on the driver's disk; a worker gets them with it.
    """

    split: str
    index: int
    dealt: pa.Table | Dealt

    @property
    def rows(self) -> pa.Table:
        """Its rows, of schema RAW."""
        return self.dealt if isinstance(self.dealt, pa.Table) else self.dealt.read()

    @property
    def num_rows(self) -> int:
        """How many these are."""
        return int(self.dealt.num_rows)

    @property
    def num_images(self) -> int:
        """How many images these are of."""
        return int(pc.count_distinct(self.rows["image"]).as_py())

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSpec, (self.split, self.index, self.rows)

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


def usable_rows(raw: RawRows, *, keep_untexted: bool = False) -> Usable:
    """Drop the rows that need no look at their image; `keep_untexted`: not those without a caption."""
    table, looked_at = raw.table, [_look(block, keep_untexted) for block in blocks(raw.table)]
    dropped = [*raw.dropped, *(row for found in looked_at if found for row in found.dropped)]
    if any(looked_at):
        table = collected(map(_kept, blocks(table), looked_at), table.schema)
    require_balance("usable rows", raw.num_rows, table.num_rows, Counter(row.reason for row in dropped))
    return Usable(table, tuple(sorted(dropped, key=lambda row: row.row)))


def plan_shards(
    usable: Usable,
    *,
    split: str | Mapping[str, float],
    seed: int,
    rows_per_shard: int,
    held: CommittedContents = NOTHING,
    keep_together: bool = False,
) -> Plan:
    """Assign splits, shuffle, cut into shards; `keep_together`: images of a group follow each other.

    Raises:
        CorpusError: the source prescribes a split whose name cannot be one.
        StorageError: the rows are too many for memory, and the disk for temporary files is full.
    """
    table = usable.table
    places, num_images, cuts = _placed(table, split, seed, rows_per_shard, held, keep_together)
    dealt = deal(table, places, [shard for _, _, shard in cuts])
    shards = tuple(ShardSpec(name, index, rows) for (name, index, _), rows in zip(cuts, dealt, strict=True))
    num_rows = table.num_rows + len(usable.dropped)
    reasons = Counter(row.reason for row in usable.dropped)
    require_balance("plan of shards", num_rows, sum(spec.num_rows for spec in shards), reasons)
    return Plan(shards, usable.dropped, num_rows, num_images)


def _placed(
    table: pa.Table,
    split: str | Mapping[str, float],
    seed: int,
    rows_per_shard: int,
    held: CommittedContents,
    keep_together: bool,
) -> tuple[np.ndarray, int, list[tuple[str, int, range]]]:
    """`(place of each row's image, number of images, shards as _cut gives them)`; what it took is not kept."""
    narrow = narrow_rows(table, seed)
    names, splits = split_images(table, narrow, split, seed, held)
    belongs = belonging(table, narrow, seed) if keep_together else None
    places, cuts = _cut(names, splits, rows_per_shard, held.num_shards, belongs)
    return looked_up(places, narrow.image), narrow.num_images, cuts


def without_known(usable: Usable, digests: np.ndarray, known: np.ndarray) -> Usable:
    """The rows of images that a corpus does not hold with the same rows already.

    Args:
        digests: `image_digests` of the rows, uint64 `[N]`.
        known: of the images that it holds, uint64 `[K]`.
    """
    is_new = np.isin(digests, known, invert=True)
    return Usable(collected(_chosen(usable.table, is_new), usable.table.schema), usable.dropped)


def _chosen(table: pa.Table, wanted: np.ndarray) -> Iterator[pa.Table]:
    """The wanted rows of a table, bool `[N]`, block by block."""
    for rows, block in placed(table):
        yield block.filter(pa.array(wanted[rows]))


def leaves_root(path: str) -> bool:
    """True if a relative path, as written, points outside the folder it is relative to."""
    normal = posixpath.normpath(path)
    return normal.startswith("/") or normal == ".." or normal.startswith("../") or "\0" in path or "://" in path


class _Look(NamedTuple):
    """Why each row of a block is dropped, null where it is not; the dropped rows; the paths of all, normalised."""

    reasons: pa.Array
    dropped: list[DroppedRow]
    paths: pa.Array


def _look(block: pa.Table, keep_untexted: bool) -> _Look | None:
    """What there is to change in a block of raw rows; None where it may stay as it is."""
    images = block["image"].combine_chunks()
    reasons = _reasons(block, images, keep_untexted)
    # Nearly all paths are normal as they are.
    odd = pc.fill_null(pc.match_substring_regex(images, _ODD_PATH), False)
    if reasons.null_count == len(reasons) and not pc.any(odd).as_py():
        return None
    paths = pc.replace_with_mask(
        images, odd, pa.array([posixpath.normpath(path) for path in images.filter(odd).to_pylist()], pa.string())
    )
    return _Look(reasons, _dropped(block, reasons), paths)


def _kept(block: pa.Table, found: _Look | None) -> pa.Table:
    if found is None:
        return block
    place = block.column_names.index("image")
    return block.set_column(place, block.schema.field("image"), found.paths).filter(pc.is_null(found.reasons))


def _reasons(block: pa.Table, images: pa.Array, keep_untexted: bool) -> pa.Array:
    odd = pc.match_substring_regex(images, _ODD_PATH)
    # A null path gives null here, and is caught by the first case.
    leaving = pa.array([leaves_root(path) for path in images.filter(odd).to_pylist()], pa.bool_())
    outside = pc.replace_with_mask(odd, pc.fill_null(odd, False), leaving)
    captioned = pc.greater_equal(pc.list_value_length(block["captions"].combine_chunks()), 0 if keep_untexted else 1)
    cases = pc.make_struct(pc.is_null(images), outside, pc.invert(captioned))
    return pc.case_when(cases, NO_IMAGE_PATH, PATH_OUTSIDE_ROOT, EMPTY_CAPTION)


def _dropped(table: pa.Table, reasons: pa.Array) -> list[DroppedRow]:
    bad = table.select(["row", "source_id", "image"]).append_column("reason", reasons).filter(pc.is_valid(reasons))
    return [
        DroppedRow(row["row"], row["source_id"], row["image"] or "", row["reason"], DETAILS[row["reason"]])
        for row in bad.to_pylist()
    ]


def _cut(
    names: Sequence[str],
    splits: np.ndarray,
    rows_per_shard: int,
    taken: Mapping[str, int],
    belongs: np.ndarray | None,
) -> tuple[np.ndarray, list[tuple[str, int, range]]]:
    """`(place of each image in the corpus [num_images], (split, number, places) of each shard)`; train comes first."""
    places = np.empty(len(splits), dtype=np.int32)
    cuts: list[tuple[str, int, range]] = []
    begin = 0
    for split in sorted((names[code] for code in np.unique(splits)), key=lambda name: (name != TRAIN, name)):
        members = np.flatnonzero(splits == names.index(split))
        if belongs is not None:
            # Groups [b a b c] are laid as [a b b c] by their numbers, which are random, and in a group its lesions.
            groups, lesions = belongs[:, members]
            members = members[np.lexsort((lesions, groups))]
        end = begin + len(members)
        places[members] = np.arange(begin, end, dtype=np.int32)
        begins = range(begin, end, rows_per_shard)
        numbers = itertools.count(taken.get(split, 0))
        cuts += [
            (split, number, range(first, min(first + rows_per_shard, end)))
            for number, first in zip(numbers, begins, strict=False)
        ]
        begin = end
    return places, cuts
