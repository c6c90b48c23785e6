"""What must change once all images are known: exact duplicates merge, near-duplicates are marked or left out, and
whatever belongs together comes into one split.

A pure function of the shards' records. It names the shards to be written again and what goes into each; the others
stay as they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dermray.corpus.accounts import require_balance
from dermray.corpus.schema import TRAIN
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import NearDuplicates

NEAR_DUPLICATE = "near_duplicate"
IN_EVALUATION_CORPUS = "in_evaluation_corpus"

# uint64 [N] → group number of each, int64 [N]; those of equal number are near-duplicates.
NearGroups = Callable[[np.ndarray], np.ndarray]
# uint64 [N] → bool [N]: resembles a sample of an evaluation corpus.
Excluded = Callable[[np.ndarray], np.ndarray]


class Ref(NamedTuple):
    """A row of a shard that is there."""

    shard: str
    position: int


class Output(NamedTuple):
    """One sample of a shard to be written: its row, the rows that merge into it, and its group."""

    ref: Ref
    merged: tuple[Ref, ...]
    duplicate_group: str | None


@dataclass(frozen=True)
class Amendment:
    """A shard to be written again from rows of shards.

    Attributes:
        split, index: its place.
        outputs: its samples in order; none: the shard goes.
        notes: the notes of its samples, of schema `records.NOTES`.
        origins: keys of the records whose shards it reads.
    """

    split: str
    index: int
    outputs: tuple[Output, ...]
    notes: pa.Table
    origins: tuple[str, ...]

    @property
    def name(self) -> str:
        """Split and number, as they begin the shard's file name."""
        return f"{self.split}-{self.index:05d}"

    @property
    def key(self) -> str:
        """Name of its record: the shards that it reads are named by content, so the outputs say everything."""
        content = repr((self.split, self.index, self.outputs)).encode()
        return f"{self.name}-{hashlib.sha256(content).hexdigest()[:16]}"


class LeftOut(NamedTuple):
    """A sample that the corpus does not take although its image is good."""

    image: str
    reason: str
    detail: str
    known: tuple[int, ...]


@dataclass(frozen=True)
class Reconciled:
    """The corpus as it shall be: each shard in order, as it is or amended; what is left out; figures."""

    shards: tuple[ShardRecord | Amendment, ...]
    left_out: tuple[LeftOut, ...] = ()
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def amendments(self) -> list[Amendment]:
        """The shards to be written again; not those that go."""
        return [shard for shard in self.shards if isinstance(shard, Amendment) and shard.outputs]


def reconcile(
    held: Sequence[ShardRecord],
    made: Sequence[ShardRecord],
    *,
    policy: NearDuplicates,
    near_groups: NearGroups,
    excluded: Excluded | None = None,
) -> Reconciled:
    """Decide over the samples of a committed corpus (`held`) and new ones (`made`), in this order.

    Of exact duplicates the first stays, held ones before new ones, then by row of the table. A group (duplicates, or
    a patient, lesion, … that no source parts by its own word) comes into one split: a held-out one of those that are
    committed or prescribed, else the one drawn for its smallest digest.
    """
    samples = _Samples(held, made)
    first = samples.first_of_image()
    near = _near(samples, first, policy, near_groups)
    out, reasons = _left_out(samples, first, near, policy, excluded)
    splits = _splits(samples, first, near)
    groups = _group_names(samples, first, near, out) if policy == "mark" else samples.groups
    shards, num_moved = _shards(samples, first, splits, groups, out)
    stays = (first == np.arange(len(first))) & ~out
    told = Counter(reasons[number] for number in np.flatnonzero(out).tolist())
    told["merged"] = int((~stays & ~out).sum())
    require_balance("duplicates", len(samples), sum(shard.notes.num_rows for shard in shards), told)
    marked = [group for group, kept in zip(groups, stays, strict=True) if kept and group]
    return Reconciled(
        shards=shards,
        left_out=tuple(samples.left_out(number, reasons[number]) for number in np.flatnonzero(out).tolist()),
        figures={
            "merged": int((first != np.arange(len(first))).sum()),
            "near_groups": len(set(marked)),
            "near_samples": len(marked),
            "largest_group": max(Counter(marked).values(), default=0),
            "left_out": int((out & (first == np.arange(len(first)))).sum()),
            "moved": num_moved,
        },
    )


class _Samples:
    """The notes of all shards in one table, and what each row's place is."""

    def __init__(self, held: Sequence[ShardRecord], made: Sequence[ShardRecord]) -> None:
        self.records = [*held, *made]
        self.num_held_shards = len(held)
        lengths = [record.notes.num_rows for record in self.records]
        self.notes = pa.concat_tables([record.notes for record in self.records]).combine_chunks()
        self.owner = np.repeat(np.arange(len(self.records)), lengths)
        self.position = np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)
        self.is_new = self.owner >= len(held)
        self.splits = [record.place[0] for record in self.records]
        self.split_of = np.array(self.splits, dtype=object)[self.owner]
        self.digests = self.notes["digest"].to_pylist()
        self.phashes = self.notes["phash"].to_numpy()
        self.prescribed = self.notes["prescribed"].to_numpy() | ~self.is_new
        self.groups: list[str | None] = self.notes["duplicate_group"].to_pylist()

    def __len__(self) -> int:
        return len(self.digests)

    def first_of_image(self) -> np.ndarray:
        """For each sample the number of the sample that stays for its image, int64 [N]."""
        codes = self.notes["digest"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        order = np.lexsort((self.position, self.owner, self.notes["row"].to_numpy(), self.is_new))
        first = np.full(int(codes.max(initial=-1)) + 1, -1, dtype=np.int64)
        # Later writes win, so going backwards leaves the first.
        first[codes[order[::-1]]] = order[::-1]
        return first[codes]

    def ref(self, number: int) -> Ref:
        """Where a sample's row is."""
        shard = self.records[self.owner[number]].shard
        assert shard is not None
        return Ref(shard.path, int(self.position[number]))

    def left_out(self, number: int, reason: str) -> LeftOut:
        """A sample that goes, as the report lists it."""
        image = self.notes["image"][number].as_py()
        detail = {
            NEAR_DUPLICATE: "a near-duplicate of another image, which stays (near_duplicates=drop)",
            IN_EVALUATION_CORPUS: "it resembles an image of a corpus named by exclude",
        }[reason]
        return LeftOut(image, reason, detail, tuple(self.notes["known"][number].as_py()))


def _near(samples: _Samples, first: np.ndarray, policy: NearDuplicates, near_groups: NearGroups) -> np.ndarray:
    """Number of the near-duplicate group of each sample, int64 [N]; equal images are in one."""
    if policy == "keep":
        return first
    staying = np.unique(first)
    found = near_groups(samples.phashes[staying])
    labels = np.empty(len(samples), dtype=np.int64)
    labels[staying] = found
    return labels[first]


def _left_out(
    samples: _Samples, first: np.ndarray, near: np.ndarray, policy: NearDuplicates, excluded: Excluded | None
) -> tuple[np.ndarray, dict[int, str]]:
    """Which samples the corpus does not take, bool [N], and why; committed ones always stay."""
    out = np.zeros(len(samples), dtype=bool)
    reasons: dict[int, str] = {}
    if excluded is not None:
        out |= excluded(samples.phashes) & samples.is_new
        out &= samples.is_new[first]
        reasons.update(dict.fromkeys(np.flatnonzero(out).tolist(), IN_EVALUATION_CORPUS))
    if policy == "drop":
        row = samples.notes["row"].to_numpy()
        candidates = np.flatnonzero(~out)
        order = candidates[
            np.lexsort((samples.position[candidates], row[candidates], samples.is_new[candidates], near[candidates]))
        ]
        leader = np.ones(len(order), dtype=bool)
        leader[1:] = near[order[1:]] != near[order[:-1]]
        kept_image = first[order][np.maximum.accumulate(np.where(leader, np.arange(len(order)), 0))]
        goes = order[(first[order] != kept_image) & samples.is_new[first[order]]]
        out[goes] = True
        reasons.update(dict.fromkeys(goes.tolist(), NEAR_DUPLICATE))
    return out, reasons


def _splits(samples: _Samples, first: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Split of each sample, object [N]."""
    component = _components(samples, first, near)
    splits = samples.split_of.copy()
    _, codes = np.unique(splits.astype(str), return_inverse=True)
    low = np.full(int(component.max(initial=-1)) + 1, len(codes))
    high = np.full(len(low), -1)
    np.minimum.at(low, component, codes)
    np.maximum.at(high, component, codes)
    parted = np.flatnonzero((low != high)[component])
    for members in _grouped(parted, component):
        splits[members] = _one_split(samples, members)
    return splits


def _grouped(numbers: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Sample numbers by their label."""
    order = numbers[np.argsort(labels[numbers], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def _components(samples: _Samples, first: np.ndarray, near: np.ndarray) -> np.ndarray:
    """What must be in one split, int64 [N]: linked by image, near-duplicate group, or group of a drawn split."""
    number = len(samples)
    lists = samples.notes["groups"].combine_chunks()
    encoded = lists.flatten().dictionary_encode()
    holders = np.repeat(np.arange(number), lists.value_lengths().to_numpy())
    groups = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    # A source's own word may part a patient; what is committed has been drawn once and for all.
    drawn = ~samples.notes["prescribed"].to_numpy()[holders]
    nodes = number + len(samples.phashes) + len(encoded.dictionary)
    left = np.concatenate([np.arange(number), np.arange(number), holders[drawn]])
    right = np.concatenate([first, number + near, number + len(samples.phashes) + groups[drawn]])
    links = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1][:number].astype(np.int64)


def _one_split(samples: _Samples, members: np.ndarray) -> str:
    fixed = members[samples.prescribed[members]]
    if len(fixed):
        # Held-out data keeps clear of training data, whoever put it there.
        return min(set(samples.split_of[fixed]), key=lambda name: (name == TRAIN, name))
    return str(samples.split_of[min(members, key=lambda number: samples.digests[number])])


def _group_names(samples: _Samples, first: np.ndarray, near: np.ndarray, out: np.ndarray) -> list[str | None]:
    """The group id of each sample: the smallest sample id of its near-duplicates, None for one alone."""
    staying = np.flatnonzero((first == np.arange(len(first))) & ~out)
    _, group, sizes = np.unique(near[staying], return_inverse=True, return_counts=True)
    together = staying[sizes[group] > 1]
    names: dict[int, str] = {}
    for label, sample_id in zip(
        near[together].tolist(), samples.notes["sample_id"].take(together).to_pylist(), strict=True
    ):
        names[label] = min(names.get(label, sample_id), sample_id)
    return [names.get(label) for label in near.tolist()]


def _shards(
    samples: _Samples, first: np.ndarray, splits: np.ndarray, groups: Sequence[str | None], out: np.ndarray
) -> tuple[tuple[ShardRecord | Amendment, ...], int]:
    """Each shard as it is or amended, and how many samples move to another split."""
    merged: dict[int, list[int]] = defaultdict(list)
    others = np.flatnonzero((first != np.arange(len(first))) & ~out)
    for number in others[np.argsort(samples.notes["row"].to_numpy()[others], kind="stable")].tolist():
        merged[int(first[number])].append(number)
    contents: list[list[int]] = [[] for _ in samples.records]
    moving: list[int] = []
    for number in np.flatnonzero((first == np.arange(len(first))) & ~out).tolist():
        if splits[number] == samples.split_of[number]:
            contents[samples.owner[number]].append(number)
        else:
            moving.append(number)
    for number in sorted(moving, key=lambda number: samples.digests[number]):
        contents[_target(samples, str(splits[number]), samples.digests[number])].append(number)
    current = samples.notes["duplicate_group"].to_pylist()
    shards: list[ShardRecord | Amendment] = []
    for owner, (record, numbers) in enumerate(zip(samples.records, contents, strict=True)):
        same = len(numbers) == record.notes.num_rows and all(samples.owner[each] == owner for each in numbers)
        if same and not any(number in merged or groups[number] != current[number] for number in numbers):
            shards.append(record)
        else:
            shards.append(_amendment(samples, record, numbers, merged, groups))
    return tuple(shards), len(moving)


def _target(samples: _Samples, split: str, digest: str) -> int:
    """The shard that takes in a sample: one of its new split's, a new one where there are any."""
    in_split = [number for number, name in enumerate(samples.splits) if name == split]
    new = [number for number in in_split if number >= samples.num_held_shards]
    choice = new or in_split
    return choice[int(digest[:12], 16) % len(choice)]


def _amendment(
    samples: _Samples,
    record: ShardRecord,
    numbers: Sequence[int],
    merged: dict[int, list[int]],
    groups: Sequence[str | None],
) -> Amendment:
    split, index = record.place
    notes = samples.notes.take(pa.array(numbers, pa.int64())).to_pylist()
    used: set[str] = set()
    outputs = []
    for note, number in zip(notes, numbers, strict=True):
        others = merged.get(number, [])
        used.update(samples.records[samples.owner[part]].key for part in (number, *others))
        for other in samples.notes.take(pa.array(others, pa.int64())).to_pylist():
            note["known"] = sorted({*note["known"], *other["known"]})
            note["groups"] = sorted({*note["groups"], *other["groups"]})
            note["prescribed"] |= other["prescribed"]
        note["duplicate_group"] = groups[number]
        outputs.append(Output(samples.ref(number), tuple(map(samples.ref, others)), groups[number]))
    return Amendment(
        split, index, tuple(outputs), pa.Table.from_pylist(notes, schema=samples.notes.schema), tuple(sorted(used))
    )
