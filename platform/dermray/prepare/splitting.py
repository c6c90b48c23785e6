"""Which split an image is in: drawn inside each condition in the order of a hash, prescribed, or that of its group.

A driver holds some bytes a row for it (`Narrow`) and no text: images and groups are told apart by 64 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.schema import SPLIT_NAME, TRAIN
from dermray.errors import CorpusError
from dermray.prepare.digests import group_digest, hashes, numbered, numbers_of
from dermray.raw.spill import BLOCK_ROWS, blocks, placed
from dermray.raw.splits import split_name


@dataclass(frozen=True)
class CommittedContents:
    """What a committed corpus holds already, as far as a plan must know.

    Attributes:
        images: digests of the images' rows (`image_digests`), which are left alone, uint64 `[N]`.
        groups: `group_digest` of each group, ascending, uint64 `[G]`.
        split_of_group: number of its split among `splits`, int32 `[G]`.
        splits: names of splits.
        num_shards: numbers that each split's shards have used up.
    """

    images: np.ndarray = field(default_factory=partial(np.zeros, 0, np.uint64))
    groups: np.ndarray = field(default_factory=partial(np.zeros, 0, np.uint64))
    split_of_group: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32))
    splits: Sequence[str] = ()
    num_shards: Mapping[str, int] = field(default_factory=dict)


NOTHING = CommittedContents()
# The golden ratio of 64 bits: products with it, modulo 2 ** 64, spread well.
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Narrow:
    """What a split hangs on, row by row.

    Attributes:
        image: number of the row's image, int32 `[N]`; images are numbered in the order of a seeded hash of their paths.
        drawn: what the row's group is drawn by, or its image where it has no group, uint64 `[N]`.
        grouped: whether it has a group, bool `[N]`.
        label: number of its first label by the alphabet, that of no label being the last, int32 `[N]`.
        prescribed: number of the split that the source prescribes in `splits`, -1 for none, int32 `[N]`.
        splits: the texts of these.
        num_images: how many there are.
        num_labels: how many different ones there are.
    """

    image: np.ndarray
    drawn: np.ndarray
    grouped: np.ndarray
    label: np.ndarray
    prescribed: np.ndarray
    splits: Sequence[str]
    num_images: int
    num_labels: int


def narrow_rows(table: pa.Table, seed: int) -> Narrow:
    """What splits hang on, from usable rows of schema RAW."""
    num_rows = table.num_rows
    image = np.empty(num_rows, np.uint64)
    for rows, block in placed(table.select(["image"])):
        image[rows] = _hashed(block["image"].combine_chunks(), partial(hashes, seed=seed, purpose="order"))
    # The hashes are not kept: to go through the paths once more costs less than 8 bytes a row.
    image, num_images = numbered(image)
    drawn = np.empty(num_rows, np.uint64)
    grouped, label, prescribed = np.empty(num_rows, bool), np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    labels: dict[str, int] = {}
    splits: dict[str, int] = {}
    for rows, block in placed(table.select(["image", "group", "labels", "split"])):
        images, groups = block["image"].combine_chunks(), block["group"].combine_chunks()
        grouped[rows] = groups.is_valid().to_numpy(zero_copy_only=False)
        keys = pc.coalesce(
            pc.binary_join_element_wise("group:", groups, ""), pc.binary_join_element_wise("image:", images, "")
        )
        drawn[rows] = _hashed(keys, partial(hashes, seed=seed, purpose="split"))
        label[rows] = _first_labels(block["labels"].combine_chunks(), labels)
        prescribed[rows] = numbers_of(block["split"].combine_chunks(), splits)
    ranks = np.empty(len(labels) + 1, np.int32)
    ranks[np.argsort(np.array([*labels, ""], dtype=object)[:-1])] = np.arange(len(labels))
    ranks[-1] = len(labels)
    for rows in _slices(num_rows):
        label[rows] = ranks[label[rows]]
    return Narrow(image, drawn, grouped, label, prescribed, list(splits), num_images, len(labels))


def looked_up(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`values[places]`, with little memory besides: NumPy makes int64 of all places that it looks up at once."""
    found = np.empty(len(places), values.dtype)
    for rows in _slices(len(places)):
        found[rows] = values[places[rows]]
    return found


def _slices(num_rows: int) -> Iterator[slice]:
    """Rows in blocks, in order."""
    return (slice(begin, begin + BLOCK_ROWS) for begin in range(0, num_rows, BLOCK_ROWS))


def require_groups(table: pa.Table) -> None:
    """Refuse rows of schema RAW of which there are some and none says which patient or lesion it is of.

    Raises:
        CorpusError: so it is.
    """
    named = (pc.coalesce(block["group"], _lesions(block)) for block in blocks(table))
    if table.num_rows and all(names.null_count == len(names) for names in named):
        raise CorpusError(
            "keep_together=true: no row of the table says which patient or lesion its image is of; name the column "
            "with columns.patient_id=, columns.lesion_id= or columns.group=, or leave keep_together out"
        )


def belonging(table: pa.Table, narrow: Narrow, seed: int) -> np.ndarray:
    """Random numbers of each image's group and lesion, uint64 `[2, num_images]`; those of its first row."""
    lesions = np.empty(table.num_rows, np.uint64)
    for rows, block in placed(table):
        names = pc.fill_null(_lesions(block), "")
        lesions[rows] = _hashed(names, partial(hashes, seed=seed, purpose="lesion"))
    found = np.empty((2, narrow.num_images), np.uint64)
    # Backwards, so that the first row is the last to be written. Splits are drawn by the same numbers of groups, and
    # the order of a split is to have nothing to do with that: multiplied, they are in another one.
    found[:, narrow.image[::-1]] = np.stack([narrow.drawn * _ODD, lesions])[:, ::-1]
    return found


def _lesions(block: pa.Table) -> pa.Array:
    return pc.struct_field(block["meta"].combine_chunks(), "lesion_id")


def _hashed(texts: pa.Array, function: partial[np.ndarray]) -> np.ndarray:
    """A number of each text, made once for each different one."""
    encoded = texts.dictionary_encode()
    return function(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]


def _first_labels(labels: pa.Array, known: dict[str, int]) -> np.ndarray:
    """Number in `known` of each row's first label by the alphabet; -1 for a row without one."""
    encoded = labels.flatten().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    by_alphabet = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int32)
    rank[by_alphabet] = np.arange(len(names))
    first = np.full(len(labels), len(names), np.int32)
    of_row = pc.list_parent_indices(labels).to_numpy()
    np.minimum.at(first, of_row, rank[encoded.indices.to_numpy(zero_copy_only=False)])
    numbers = np.array([*(known.setdefault(names[place], len(known)) for place in by_alphabet), -1], np.int32)
    return numbers[first]


def split_images(
    table: pa.Table, narrow: Narrow, split: str | Mapping[str, float], seed: int, held: CommittedContents
) -> tuple[list[str], np.ndarray]:
    """`(names of splits, number of each image's split among them, int32 [num_images])`.

    Raises:
        CorpusError: the source prescribes a split whose name cannot be one.
    """
    if isinstance(split, str):
        return [split], np.zeros(narrow.num_images, np.int32)
    wanted = _wanted(narrow.splits, {*split, *held.num_shards})
    names = sorted({TRAIN, *split, *held.splits, *wanted})
    number = {name: place for place, name in enumerate(names)}
    component, drawn = _components(table, narrow, seed)
    strata = np.full(len(drawn), narrow.num_labels, np.int32)
    for rows in _slices(len(narrow.image)):
        np.minimum.at(strata, component[narrow.image[rows]], narrow.label[rows])
    assigned = _draw(drawn, strata, {number[name]: fraction for name, fraction in sorted(split.items())}, number[TRAIN])
    del drawn, strata
    if len(held.groups):
        joining, place = _joining(table, held.groups)
        codes = np.array([number[name] for name in held.splits], np.int32)
        # Later writes win: the last row's group has the word.
        assigned[component[narrow.image[joining]]] = codes[held.split_of_group[place]]
    said = np.array([number[name] for name in wanted], np.int32)
    # Later writes win, so going backwards leaves the first row's word: for its image, and for the images of its group
    # that have none.
    for images, codes in _prescribed(narrow):
        assigned[component[images]] = said[codes]
    splits = looked_up(assigned, component)
    for images, codes in _prescribed(narrow):
        splits[images] = said[codes]
    return names, splits


def _prescribed(narrow: Narrow) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and splits of the rows that have one prescribed, from the last row to the first, some at a time."""
    for rows in reversed([*_slices(len(narrow.prescribed))]):
        has_one = narrow.prescribed[rows] >= 0
        yield narrow.image[rows][has_one][::-1], narrow.prescribed[rows][has_one][::-1]


def _wanted(written: Sequence[str], known: set[str]) -> list[str]:
    """The split that each prescribed text means.

    Splits that the user has named, or that a corpus has, are `known`: where it calls one `validation`, `Val` is that.
    """
    as_known = {split_name(name): name for name in sorted(known)} | {name: name for name in known}
    plain = [name.strip().lower() for name in written]
    said = [name if name in known else split_name(name) for name in plain]
    wanted = [as_known.get(name, name) for name in said]
    for name in sorted(set(wanted)):
        if not SPLIT_NAME.fullmatch(name):
            raise CorpusError(f"the table prescribes the split {name!r}: a name has letters, digits and _ only")
    return wanted


def _draw(drawn: np.ndarray, strata: np.ndarray, split: Mapping[int, float], otherwise: int) -> np.ndarray:
    """Number of each component's split, int32 [num_components]: of every stratum each split gets its fraction.

    Inside a stratum the components with the smallest hashes come first. What a fraction leaves of a whole component is
    rounded up or down by a draw of the stratum's own, so that strata of a few components are right on average.
    """
    order = np.lexsort((drawn, strata))
    edges = [0, *np.cumsum(np.bincount(strata)).tolist()]
    assigned = np.full(len(drawn), otherwise, np.int32)
    for first, last in itertools.pairwise(edges):
        members = order[first:last]
        if not len(members):
            continue
        luck = int(drawn[members].min()) * 0x9E3779B97F4A7C15 % 2**64 / 2.0**64
        share, begin = 0.0, 0
        for name, fraction in split.items():
            share += fraction
            end = min(len(members), int(share * len(members) + luck))
            assigned[members[begin:end]] = name
            begin = end
    return assigned


def _joining(table: pa.Table, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose group is among some ascending digests, and its place among these, both int64 `[M]`."""
    joining, places, first = [], [], 0
    for block in blocks(table):
        groups = block["group"].combine_chunks()
        rows = np.flatnonzero(groups.is_valid().to_numpy(zero_copy_only=False))
        named = zip(block["source"].combine_chunks().take(rows).to_pylist(), groups.take(rows).to_pylist(), strict=True)
        digests = np.fromiter((group_digest(source, group) for source, group in named), np.uint64, len(rows))
        place = np.minimum(np.searchsorted(held, digests), len(held) - 1)
        found = held[place] == digests
        joining.append(first + rows[found])
        places.append(place[found])
        first += block.num_rows
    return np.concatenate([np.zeros(0, np.int64), *joining]), np.concatenate([np.zeros(0, np.int64), *places])


def _components(table: pa.Table, narrow: Narrow, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What must stay together: `(component of each image [num_images], what each is drawn by [num_components])`.

    Images are linked through their groups. A component is drawn by its smallest group name, or by the image's path
    where it has no group, so it does not depend on the order of the table.
    """
    group_drawn = narrow.drawn[narrow.grouped]
    group, num_groups = numbered(group_drawn)
    distinct = np.empty(num_groups, np.uint64)
    for rows in _slices(len(group)):
        distinct[group[rows]] = group_drawn[rows]
    del group_drawn
    image = narrow.image[narrow.grouped]
    # One group of each image; where it has others, they are linked to that one.
    group_of = np.full(narrow.num_images, -1, np.int32)
    for rows in _slices(len(group)):
        group_of[image[rows]] = group[rows]
    num_grouped, of_group = _linked(group, looked_up(group_of, image), num_groups)
    del group, image
    alone = group_of < 0
    num_alone = np.count_nonzero(alone)
    component = looked_up(of_group, group_of) if num_grouped else np.empty(narrow.num_images, np.int32)
    component[alone] = np.arange(num_grouped, num_grouped + num_alone, dtype=np.int32)
    del group_of, alone
    drawn = np.empty(num_grouped + num_alone, np.uint64)
    # A row's image that has no group is drawn by itself; one that has gets its group's word.
    for rows in _slices(len(narrow.image)):
        drawn[component[narrow.image[rows]]] = narrow.drawn[rows]
    drawn[of_group] = distinct
    sizes = np.bincount(of_group, minlength=num_grouped)
    several = np.flatnonzero(sizes[of_group] > 1)
    if len(several):
        names = _group_names(table, set(distinct[several].tolist()), seed)
        smallest: dict[int, str] = {}
        for place in several.tolist():
            name = names[int(distinct[place])]
            smallest[of_group[place]] = min(name, smallest.get(of_group[place], name))
        drawn[list(smallest)] = hashes((f"group:{name}" for name in smallest.values()), seed, "split")
    return component, drawn


def _linked(left: np.ndarray, right: np.ndarray, num_groups: int) -> tuple[int, np.ndarray]:
    """`(number of components, component of each group)` of groups that are linked pair by pair."""
    differ = np.flatnonzero(left != right)
    if not len(differ):
        return num_groups, np.arange(num_groups, dtype=np.int32)
    # Not at the top: each process that makes shards would load it, and has no use for it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = (np.ones(len(differ), np.int8), (left[differ], right[differ]))
    return connected_components(coo_array(links, shape=(num_groups, num_groups)), directed=False)


def _group_names(table: pa.Table, wanted: set[int], seed: int) -> dict[int, str]:
    """The names of some groups, by what they are drawn by."""
    names: dict[int, str] = {}
    for block in blocks(table):
        found = block["group"].combine_chunks().drop_null().unique().to_pylist()
        drawn = hashes((f"group:{name}" for name in found), seed, "split").tolist()
        names.update((hashed, name) for hashed, name in zip(drawn, found, strict=True) if hashed in wanted)
    return names
