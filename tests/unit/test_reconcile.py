"""Duplicates, groups and splits over records: nothing lost, nothing parted, the same on every run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.audit.duplicates import near_groups
from dermray.corpus.manifest import Shard
from dermray.prepare.reconcile import Amendment, Reconciled, reconcile
from dermray.prepare.records import NOTES, ShardRecord
from dermray.prepare.settings import NearDuplicates

# Far apart from each other, and each with room for near ones beside it.
CENTRES = [0, 0xFFFFFFFF, 0xFFFF0000FFFF0000, 0xAAAAAAAAAAAAAAAA]


def note(number: int, *, digest: int | None = None, phash: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "sample_id": f"id{number:03d}",
        "digest": f"{number if digest is None else digest:024x}",
        "phash": phash,
        "image": f"{number}.jpg",
        "row": number,
        "known": [number],
        "groups": [],
        "prescribed": False,
        "duplicate_group": None,
    } | fields


def record(name: str, notes: pa.Table | list[dict[str, Any]]) -> ShardRecord:
    table = notes if isinstance(notes, pa.Table) else pa.Table.from_pylist(notes, schema=NOTES)
    shard = Shard(
        path=f"data/{name}.parquet",
        split=name.split("-")[0],
        num_samples=max(table.num_rows, 1),
        num_bytes=1,
        sha256="0",
        row_groups=(max(table.num_rows, 1),),
    )
    return ShardRecord(name, shard, table.num_rows, "", (), (), {}, {}, table)


def decide(
    made: list[ShardRecord],
    held: list[ShardRecord] | None = None,
    policy: NearDuplicates = "mark",
    excluded: Any = None,
) -> Reconciled:
    return reconcile(
        held or [],
        made,
        policy=policy,
        near_groups=lambda phashes: near_groups(phashes, max_distance=6),
        excluded=excluded,
    )


def committed(result: Reconciled) -> list[ShardRecord]:
    """The records as they are once all amendments are written."""
    return [
        record(shard.key, shard.notes) if isinstance(shard, Amendment) else shard
        for shard in result.shards
        if not isinstance(shard, Amendment) or shard.outputs
    ]


def split_of(result: Reconciled) -> dict[str, str]:
    return {row["sample_id"]: made.place[0] for made in committed(result) for row in made.notes.to_pylist()}


def groups_of(result: Reconciled) -> dict[str, str | None]:
    return {row["sample_id"]: row["duplicate_group"] for made in committed(result) for row in made.notes.to_pylist()}


def test_without_duplicates_everything_stays() -> None:
    made = [
        record("train-00000-a", [note(n, phash=CENTRES[n]) for n in range(3)]),
        record("val-00000-b", [note(3, phash=CENTRES[3])]),
    ]
    result = decide(made)
    assert list(result.shards) == made
    assert not any(result.figures.values())


def test_equal_images_merge_into_the_first_of_the_table() -> None:
    made = [
        record("train-00000-a", [note(5, digest=1), note(6, phash=CENTRES[1])]),
        record("train-00001-b", [note(2, digest=1, groups=[7]), note(9, digest=1)]),
    ]
    result = decide(made)
    first, second = result.shards
    assert isinstance(first, Amendment)
    assert isinstance(second, Amendment)
    assert [output.ref for output in first.outputs] == [("data/train-00000-a.parquet", 1)]
    (output,) = second.outputs
    assert output.ref == ("data/train-00001-b.parquet", 0)
    assert output.merged == (("data/train-00000-a.parquet", 0), ("data/train-00001-b.parquet", 1))
    assert second.notes.to_pylist()[0]["known"] == [2, 5, 9]
    assert second.notes.to_pylist()[0]["groups"] == [7]
    assert second.origins == ("train-00000-a", "train-00001-b")
    assert result.figures["merged"] == 2


def test_near_duplicates_are_marked_and_come_into_one_split() -> None:
    made = [
        record("train-00000-a", [note(1, phash=0b11), note(2, phash=CENTRES[2])]),
        record("val-00000-b", [note(3, phash=0b1111), note(4, phash=CENTRES[3])]),
    ]
    result = decide(made)
    assert groups_of(result) == {"id001": "id001", "id002": None, "id003": "id001", "id004": None}
    assert len({split_of(result)["id001"], split_of(result)["id003"]}) == 1
    assert result.figures == {
        "merged": 0, "near_groups": 1, "near_samples": 2, "largest_group": 2, "left_out": 0, "moved": 1,
    }  # fmt: skip
    assert groups_of(decide(made, policy="keep")) == dict.fromkeys(["id001", "id002", "id003", "id004"])


def test_dropping_keeps_the_first_and_names_the_others() -> None:
    made = [
        record("train-00000-a", [note(2, phash=0b11), note(1, phash=0b1), note(3, phash=CENTRES[2]), note(4, digest=2)])
    ]
    result = decide(made, policy="drop")
    assert set(groups_of(result)) == {"id001", "id003"}
    assert {(out.image, out.reason) for out in result.left_out} == {
        ("2.jpg", "near_duplicate"),
        ("4.jpg", "near_duplicate"),
    }
    assert sorted(known for out in result.left_out for known in out.known) == [2, 4]


@pytest.mark.parametrize("prescribed", ["test-00000-b", "train-00000-b"])
def test_a_prescribed_split_wins_and_a_held_out_one_before_training(prescribed: str) -> None:
    drawn = record("val-00000-a", [note(1, phash=1)])
    word = record(prescribed, [note(2, phash=3, prescribed=True)])
    assert set(split_of(decide([drawn, word])).values()) == {prescribed.split("-")[0]}
    training = record("train-00001-c", [note(3, phash=7, prescribed=True)])
    expected = "test" if prescribed.startswith("test") else "train"
    assert set(split_of(decide([training, word])).values()) == {expected}


def test_a_source_may_part_a_patient_by_its_own_word_and_a_draw_may_not() -> None:
    parted = [
        record("train-00000-a", [note(1, groups=[9], prescribed=True)]),
        record("val-00000-b", [note(2, phash=CENTRES[1], groups=[9], prescribed=True)]),
    ]
    assert split_of(decide(parted)) == {"id001": "train", "id002": "val"}
    drawn = [
        record("train-00000-a", [note(1, groups=[9])]),
        record("val-00000-b", [note(2, phash=CENTRES[1], groups=[9])]),
    ]
    assert len(set(split_of(decide(drawn)).values())) == 1


def test_what_resembles_an_evaluation_corpus_is_left_out_but_never_what_is_committed() -> None:
    held = record("train-00000-a", [note(1, phash=1)])
    made = record("train-00001-b", [note(2, phash=CENTRES[1]), note(3, phash=CENTRES[2])])
    result = decide([made], [held], excluded=lambda phashes: phashes <= CENTRES[1])
    assert set(split_of(result)) == {"id001", "id003"}
    assert [(out.image, out.reason) for out in result.left_out] == [("2.jpg", "in_evaluation_corpus")]


def test_committed_samples_come_before_new_ones() -> None:
    held = record("train-00000-a", [note(50, digest=1), note(51, phash=CENTRES[1])])
    made = record("val-00000-b", [note(1, digest=1), note(2, phash=CENTRES[1] ^ 1)])
    result = decide([made], [held], policy="drop")
    assert set(split_of(result)) == {"id050", "id051"}
    assert result.figures["merged"] == 1
    assert [out.image for out in result.left_out] == ["2.jpg"]


def test_an_emptied_shard_goes() -> None:
    made = [record("train-00000-a", [note(1, digest=4)]), record("train-00001-b", [note(2, digest=4)])]
    gone = [shard for shard in decide(made).shards if isinstance(shard, Amendment) and not shard.outputs]
    assert [shard.index for shard in gone] == [1]


def test_a_sample_that_takes_the_place_of_another_is_seen() -> None:
    made = [
        record("test-00000-a", [note(4, digest=0)]),
        record("train-00000-b", [note(0, digest=4), note(1, digest=0)]),
    ]
    result = decide(made, policy="drop")
    assert split_of(result) == {"id000": "test"}
    assert all(isinstance(shard, Amendment) for shard in result.shards)


samples = st.lists(
    st.tuples(
        st.integers(0, 14),  # digest
        st.sampled_from(CENTRES),
        st.integers(0, 3),  # bits beside the centre
        st.sets(st.integers(0, 4), max_size=2),  # groups
        st.booleans(),  # prescribed
        st.sampled_from(["train", "val", "test"]),
    ),
    min_size=1,
    max_size=30,
)


def records_of(drawn: list[Any], first: int, number_of_shard: int) -> list[ShardRecord]:
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, (digest, centre, bits, groups, prescribed, split) in enumerate(drawn, first):
        # Equal images have equal hashes.
        phash = CENTRES[digest % 4] if digest <= 4 else centre ^ ((1 << bits) - 1)
        unique = digest if digest <= 4 else 100 + number
        fields = {"digest": unique, "phash": phash, "groups": sorted(groups), "prescribed": prescribed}
        shards[split].append(note(number, **fields))
    return [record(f"{split}-{number_of_shard:05d}-x", notes) for split, notes in sorted(shards.items())]


def rows_of(records: list[ShardRecord]) -> list[dict[str, Any]]:
    return [row | {"split": made.place[0]} for made in records for row in made.notes.to_pylist()]


@given(samples, st.sampled_from(["keep", "mark", "drop"]), st.integers(0, 30))
def test_nothing_is_lost_nothing_is_parted_and_twice_is_once(
    drawn: list[Any], policy: NearDuplicates, cut: int
) -> None:
    earlier = records_of(drawn[:cut], 0, 0)
    held = committed(decide(earlier, policy=policy)) if earlier else []
    made = records_of(drawn[cut:], cut, 1)
    result = decide(made, held, policy)
    before, final = rows_of([*held, *made]), rows_of(committed(result))
    out = {sample.image for sample in result.left_out}
    # Each image is once there, and all that it brought is known, unless it is left out.
    assert sorted(row["digest"] for row in final) == sorted(
        {row["digest"] for row in before if row["image"] not in out}
    )
    known = {digest for row in final for digest in row["known"]} | {
        d for sample in result.left_out for d in sample.known
    }
    assert known == {digest for row in before for digest in row["known"]}
    together: dict[Any, set[str]] = defaultdict(set)
    labels = near_groups(np.array([row["phash"] for row in final], np.uint64), max_distance=6)
    for row, label in zip(final, labels.tolist(), strict=True):
        if policy != "keep":
            together["near", label].add(row["split"])
        if not row["prescribed"]:
            for group in row["groups"]:
                together["group", group].add(row["split"])
    assert all(len(splits) == 1 for splits in together.values())
    again = decide([], committed(result), policy)
    assert not any(isinstance(shard, Amendment) for shard in again.shards)
    assert [shard.key for shard in decide(made, held, policy).shards] == [shard.key for shard in result.shards]
