"""The plan: which rows become which sample, split, shard and place."""

from __future__ import annotations

import itertools
import pickle
import resource
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.corpus.ontology import Ontology
from dermray.errors import CorpusError, StorageError
from dermray.prepare import labels
from dermray.prepare.dealing import Dealt, deal
from dermray.prepare.digests import group_digest, image_digests
from dermray.prepare.generations import CommittedCorpus, Generation
from dermray.prepare.plan import Plan, ShardSpec, leaves_root, plan_shards, usable_rows, without_known
from dermray.prepare.records import NOTES, ShardRecord
from dermray.prepare.splitting import CommittedContents, require_groups
from dermray.raw.sources.rows import RAW, DroppedRow, RawRows
from dermray.raw.spill import Spill, collected


def raw_row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "row": number,
        "source": "csv",
        "source_id": f"id{number}",
        "image": f"{number}.jpg",
        "captions": [{"aspect": "raw", "text": "a caption"}],
        "labels": [],
        "concepts": [],
    } | fields


def raw_rows(*rows: dict[str, Any], dropped: tuple[DroppedRow, ...] = ()) -> RawRows:
    return RawRows(pa.Table.from_pylist(list(rows), schema=RAW), dropped)


def plan(raw: RawRows, **options: Any) -> Plan:
    return plan_shards(usable_rows(raw), **({"split": {"val": 0.3}, "seed": 0, "rows_per_shard": 4} | options))


def split_of(made: Plan) -> dict[str, str]:
    return {image: spec.split for spec in made.shards for image in spec.rows["image"].to_pylist()}


def test_rows_of_one_image_stay_together_in_table_order() -> None:
    raw = raw_rows(*(raw_row(number, image=f"{number % 3}.jpg") for number in range(1, 10)))
    made = plan(raw, split="train", rows_per_shard=2)
    assert made.num_images == 3
    assert [len(set(spec.rows["image"].to_pylist())) for spec in made.shards] == [2, 1]
    for spec in made.shards:
        numbers = defaultdict(list)
        for row in spec.rows.to_pylist():
            numbers[row["image"]].append(row["row"])
        assert all(found == sorted(found) and len(found) == 3 for found in numbers.values())


def test_bad_rows_are_dropped_by_reason_and_cost_nothing_else() -> None:
    already = DroppedRow(7, "", "", "malformed_row", "")
    made = plan(
        raw_rows(
            raw_row(1),
            raw_row(2, image=None),
            raw_row(3, image="/etc/passwd"),
            raw_row(4, image="a/../../b.jpg"),
            raw_row(5, captions=[]),
            raw_row(6, image="a/../1.jpg"),
            dropped=(already,),
        ),
        split="train",
    )
    assert [(row.row, row.reason) for row in made.dropped] == [
        (2, "no_image_path"),
        (3, "path_outside_root"),
        (4, "path_outside_root"),
        (5, "empty_caption"),
        (7, "malformed_row"),
    ]
    assert made.num_rows == 7
    assert made.num_images == 1
    assert made.shards[0].rows["row"].to_pylist() == [1, 6]
    assert made.shards[0].rows["image"].to_pylist() == ["1.jpg", "1.jpg"]


@pytest.mark.parametrize(
    ("path", "leaves"),
    [
        ("a.jpg", False),
        ("a b/ü,.jpg", False),
        ("a/../b.jpg", False),
        ("..a/b..jpg", False),
        ("..", True),
        ("../a.jpg", True),
        ("a/../../b.jpg", True),
        ("/a.jpg", True),
        ("//host/a.jpg", True),
        ("s3://bucket/a.jpg", True),
        ("file:///etc/passwd", True),
        ("a\0.jpg", True),
    ],
)
def test_leaves_root(path: str, leaves: bool) -> None:
    assert leaves_root(path) is leaves


def test_a_single_name_puts_everything_there() -> None:
    made = plan(raw_rows(*(raw_row(number, split="val") for number in range(9))), split="test")
    assert set(split_of(made).values()) == {"test"}


def test_prescribed_splits_hold_and_take_their_group_along() -> None:
    made = plan(
        raw_rows(
            raw_row(1, split="Test", group="p"),
            raw_row(2, group="p"),
            raw_row(3, split="train", group="q"),
            raw_row(4, group="q"),
        ),
        split={"val": 1.0},
    )
    assert split_of(made) == {"1.jpg": "test", "2.jpg": "test", "3.jpg": "train", "4.jpg": "train"}


def test_a_prescribed_split_takes_the_name_that_the_user_gives_it() -> None:
    raw = raw_rows(*(raw_row(number, split=said) for number, said in enumerate(["Val", "dev", "Tests", "mine"])))
    made = split_of(plan(raw, split={"validation": 0.0, "dev": 0.0}))
    assert list(dict(sorted(made.items())).values()) == ["validation", "dev", "test", "mine"]
    joined = plan_shards(
        usable_rows(raw),
        split={"val": 0.1},
        seed=0,
        rows_per_shard=4,
        held=CommittedContents(num_shards={"validation": 3}),
    )
    assert split_of(joined)["0.jpg"] == "val"
    joined = plan_shards(
        usable_rows(raw), split={}, seed=0, rows_per_shard=4, held=CommittedContents(num_shards={"validation": 3})
    )
    assert split_of(joined)["0.jpg"] == "validation"


def test_a_prescribed_split_that_cannot_be_a_name() -> None:
    with pytest.raises(CorpusError, match=r"prescribes the split 'a/b'"):
        plan(raw_rows(raw_row(1, split="a/b")))


def test_fractions_are_met_in_every_condition() -> None:
    conditions = ["common"] * 3000 + ["rare"] * 40 + [None] * 100
    rows = [raw_row(n, labels=[label] if label else []) for n, label in enumerate(conditions)]
    made = plan(raw_rows(*rows), split={"val": 0.1, "test": 0.2}, rows_per_shard=500)
    counts: Counter[tuple[str, str | None]] = Counter()
    splits = split_of(made)
    for number, label in enumerate(conditions):
        counts[splits[f"{number}.jpg"], label] += 1
    for label, size in Counter(conditions).items():
        assert abs(counts["val", label] - 0.1 * size) <= 1
        assert abs(counts["test", label] - 0.2 * size) <= 1


def test_conditions_of_a_few_images_are_right_on_average() -> None:
    rows = [raw_row(number, labels=[f"condition {number // 2}"]) for number in range(2000)]
    counts = Counter(split_of(plan(raw_rows(*rows), split={"val": 0.1}, rows_per_shard=500)).values())
    assert counts["val"] == pytest.approx(200, abs=60)


def test_rows_that_join_a_corpus_follow_their_groups_into_shards_of_their_own() -> None:
    rows = raw_rows(*(raw_row(number, group=f"p{number % 4}") for number in range(40)))
    splits = {group_digest("csv", "p1"): 1, group_digest("csv", "p2"): 0, group_digest("other", "p0"): 2}
    held = CommittedContents(
        groups=np.array(sorted(splits), np.uint64),
        split_of_group=np.array([splits[group] for group in sorted(splits)], np.int32),
        splits=["train", "val", "x"],
        num_shards={"train": 7},
    )
    made = plan_shards(usable_rows(rows), split={"val": 0.5}, seed=0, rows_per_shard=100, held=held)
    splits = split_of(made)
    assert {splits[f"{number}.jpg"] for number in range(1, 40, 4)} == {"val"}
    assert {splits[f"{number}.jpg"] for number in range(2, 40, 4)} == {"train"}
    assert "x" not in splits.values()
    assert {spec.split: spec.index for spec in made.shards} == {"train": 7, "val": 0}


def test_known_images_are_left_alone_until_a_row_of_theirs_changes() -> None:
    first = usable_rows(raw_rows(raw_row(1), raw_row(2, image="1.jpg", labels=["x"]), raw_row(3)))
    known = image_digests(first.table, "/input")
    assert known.dtype == np.uint64
    assert known[0] == known[1] != known[2], "a digest is of all rows of an image"
    moved = usable_rows(raw_rows(raw_row(9, **{"source_id": "id3", "image": "3.jpg"}), raw_row(4), raw_row(1)))
    new = without_known(moved, image_digests(moved.table, "/input"), known)
    assert new.table["image"].to_pylist() == ["4.jpg", "1.jpg"]
    assert without_known(first, known, known).table.num_rows == 0
    assert without_known(first, image_digests(first.table, "/elsewhere"), known).table.num_rows == 3


def test_the_seed_changes_splits_and_order() -> None:
    raw = raw_rows(*(raw_row(number) for number in range(200)))
    first, second = plan(raw, seed=0), plan(raw, seed=1)
    assert split_of(first) != split_of(second)
    assert first.shards[0].rows["row"].to_pylist() != sorted(first.shards[0].rows["row"].to_pylist())


def test_nothing_is_left() -> None:
    made = plan(raw_rows(raw_row(1, captions=[])))
    assert made.shards == ()
    assert len(made.dropped) == 1


tables = st.lists(
    st.tuples(st.integers(0, 12), st.one_of(st.none(), st.integers(0, 5)), st.booleans()), min_size=1, max_size=40
)


@given(tables, st.integers(0, 3), st.integers(1, 7))
def test_plan_is_whole_and_never_parts_a_group(
    drawn: list[tuple[int, int | None, bool]], seed: int, rows_per_shard: int
) -> None:
    rows = [
        raw_row(
            number,
            image=f"{image}.jpg",
            group=None if group is None else f"g{group}",
            captions=[{"aspect": "raw", "text": "x"}] if captioned else [],
        )
        for number, (image, group, captioned) in enumerate(drawn)
    ]
    made = plan(raw_rows(*rows), split={"val": 0.4, "test": 0.2}, seed=seed, rows_per_shard=rows_per_shard)
    planned = [row for spec in made.shards for row in spec.rows["row"].to_pylist()]
    assert sorted(planned + [row.row for row in made.dropped]) == list(range(len(rows)))
    splits = split_of(made)
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["captions"] and row["group"]:
            groups[row["group"]].add(splits[row["image"]])
    assert all(len(found) == 1 for found in groups.values())
    for spec in made.shards:
        assert 1 <= len(set(spec.rows["image"].to_pylist())) <= rows_per_shard
    images = [image for spec in made.shards for image in dict.fromkeys(spec.rows["image"].to_pylist())]
    assert len(images) == len(set(images)) == made.num_images


@given(tables, st.randoms(use_true_random=False))
def test_order_of_the_table_does_not_matter(drawn: list[tuple[int, int | None, bool]], random: Any) -> None:
    rows = [
        raw_row(number, image=f"{image}.jpg", group=None if group is None else f"g{group}")
        for number, (image, group, _) in enumerate(drawn)
    ]
    shuffled = random.sample(rows, len(rows))

    def images(made: Plan) -> list[tuple[str, list[str]]]:
        return [(spec.name, list(dict.fromkeys(spec.rows["image"].to_pylist()))) for spec in made.shards]

    assert images(plan(raw_rows(*rows))) == images(plan(raw_rows(*shuffled)))


drawn_rows = st.lists(
    st.tuples(
        st.sampled_from(["1.jpg", "./1.jpg", "2.jpg", "a/../3.jpg", "4.jpg", "/5.jpg", None]),
        st.sampled_from([None, "g0", "g1", "g2"]),
        st.sampled_from([[], ["eczema"], ["psoriasis", "eczema"], ["melanoma"], ["zoster, eczema"]]),
        st.sampled_from([None, None, "Val", "mine"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@given(drawn_rows, st.integers(1, 9))
def test_a_table_on_the_disk_gives_what_it_gives_in_memory(drawn: list[tuple[Any, ...]], rows_per_block: int) -> None:
    raw = raw_rows(
        *(
            raw_row(number, image=image, group=group, labels=said, split=split, prepared=prepared)
            for number, (image, group, said, split, prepared) in enumerate(drawn, 1)
        )
    )
    cut = (raw.table.slice(first, rows_per_block) for first in range(0, len(drawn), rows_per_block))
    spilled = replace(raw, table=collected(cut, RAW, max_held_bytes=0))
    assert spilled.table["row"].num_chunks == -(-len(drawn) // rows_per_block)
    tree = Ontology.folded(labels.counted(raw.table))

    def outcome(each: RawRows) -> tuple[object, ...]:
        made = plan(each, split={"val": 0.4})
        usable = usable_rows(each)
        return (
            [(spec.name, spec.rows.to_pylist()) for spec in made.shards],
            (made.dropped, made.num_rows, made.num_images),
            labels.counted(each.table),
            labels.survey(each.table, tree, has_tree=False, by_name=True),
            labels.conflicts(usable.table, tree),
        )

    assert outcome(spilled) == outcome(raw)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 2000))
def test_shards_on_the_disk_hold_what_they_hold_in_memory(drawn: list[int], per_shard: int, max_bytes: int) -> None:
    places = np.unique(drawn, return_inverse=True)[1].astype(np.int32)
    table = raw_rows(*(raw_row(number, image=f"{place}.jpg") for number, place in enumerate(places))).table
    num_images = int(places.max()) + 1
    shards = [range(first, min(first + per_shard, num_images)) for first in range(0, num_images, per_shard)]
    expected = [[number for place in shard for number in np.flatnonzero(places == place)] for shard in shards]
    assert [rows["row"].to_pylist() for rows in deal(table, places, shards)] == expected
    cut = collected((table.slice(first, 7) for first in range(0, len(drawn), 7)), RAW, max_held_bytes=0)
    dealt = deal(cut, places, shards, max_held_bytes=max_bytes)
    specs = [ShardSpec("train", number, rows) for number, rows in enumerate(dealt)]
    assert [spec.rows["row"].to_pylist() for spec in specs] == expected
    assert [spec.num_rows for spec in specs] == [len(rows) for rows in expected]
    # A worker gets its rows and no path of the driver's disk.
    assert [pickle.loads(pickle.dumps(spec)).dealt.equals(spec.rows) for spec in specs] == [True] * len(specs)


def test_two_images_of_one_hash_are_told_and_not_mixed() -> None:
    table = raw_rows(raw_row(1), raw_row(2)).table
    with pytest.raises(AssertionError, match="choose another seed"):
        deal(table, np.zeros(2, np.int32), [range(1)])


def test_a_shard_on_the_disk_leaves_with_the_last_that_reads_it() -> None:
    table = raw_rows(*(raw_row(number) for number in range(40))).table
    spill = Spill(RAW)
    spill.append(table.slice(0, 10))
    spill.append(table.slice(10, 30))
    dealt = Dealt(spill.done(), 1, 30)
    rows = dealt.read()
    del dealt, spill
    assert rows.equals(table.slice(10, 30))
    assert len(pickle.dumps(ShardSpec("train", 0, rows))) < 2 * table.nbytes


def test_a_full_folder_of_temporary_files_is_named() -> None:
    table = raw_rows(*(raw_row(number, source_id="x" * 10_000) for number in range(400))).table
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow: to the writer it is a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="TMPDIR names another folder"):
            collected([table], RAW, max_held_bytes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def meta(patient: str | None, lesion: str | None) -> dict[str, Any]:
    return {"patient_id": patient, "lesion_id": lesion}


def test_images_of_a_patient_and_of_a_lesion_follow_each_other_where_they_are_kept_together() -> None:
    """The order is another one, and nothing else: splits, shards' sizes and rows stay."""
    number = range(1, 61)
    rows = [raw_row(n, group=f"p{n % 7}", meta=meta(f"p{n % 7}", f"l{n % 14}" if n % 3 else None)) for n in number]
    apart, together = (plan(raw_rows(*rows), keep_together=flag) for flag in (False, True))
    assert split_of(apart) == split_of(together)
    assert [(spec.name, spec.num_rows) for spec in apart.shards] == [(s.name, s.num_rows) for s in together.shards]
    for split in ("train", "val"):
        found = [row for spec in together.shards if spec.split == split for row in spec.rows.to_pylist()]
        patients = [row["group"] for row in found]
        lesions = [(row["group"], row["meta"]["lesion_id"]) for row in found]
        for names in (patients, lesions):
            assert sum(1 for _ in itertools.groupby(names)) == len(set(names))
        others = [row["group"] for spec in apart.shards if spec.split == split for row in spec.rows.to_pylist()]
        assert sum(1 for _ in itertools.groupby(others)) > len(set(others))
    with pytest.raises(CorpusError, match="keep_together=true: no row of the table says which patient or lesion"):
        require_groups(raw_rows(raw_row(1), raw_row(2)).table)
    for rows in ([], [raw_row(1), raw_row(2, group="p")], [raw_row(1, meta=meta(None, "l"))]):
        require_groups(raw_rows(*rows).table)


def test_patients_of_many_images_stand_anywhere_where_they_are_kept_together() -> None:
    """As often in the first half as in the second; ordered by their first image they would all come first."""
    rows = [raw_row(n, group=f"p{n % 40}" if n <= 400 else f"single {n}") for n in range(1, 801)]
    made = plan(raw_rows(*rows), split="train", rows_per_shard=800, keep_together=True)
    found = [row["group"] for row in made.shards[0].rows.to_pylist()]
    many = [place for place, group in enumerate(found) if not group.startswith("single")]
    assert 120 < sum(place < 400 for place in many) < 280


def committed(*shards: tuple[str, list[list[int]], list[list[int]]]) -> CommittedCorpus:
    """A corpus of shards of (name, groups, known digests), each of samples, and of an image that was left out."""
    records = {}
    for name, groups, known in shards:
        notes = [
            {"sample_id": "", "digest": "", "phash": 0, "image": "", "row": 0, "prescribed": False} | lists
            for lists in ({"groups": each, "known": digests} for each, digests in zip(groups, known, strict=True))
        ]
        table = pa.Table.from_pylist(notes, schema=NOTES)
        records[name] = ShardRecord(name, None, len(notes), "", (), (), {}, {}, table)
    generation = Generation(1, {}, {}, tuple(records), tuple(records), 0, (), {}, left_out_images=(2**64 - 1, 5))
    return CommittedCorpus((generation,), records)


def test_what_a_corpus_holds_is_ascending_digests_and_a_group_is_where_it_was_put_last() -> None:
    top = 2**63 + 1
    corpus = committed(
        ("train-00003-a", [[7, top], []], [[5, top], [1]]), ("val-00000-b", [[7]], [[1]]), ("train-00001-c", [], [])
    )
    held = corpus.contents()
    assert (held.images.dtype, held.images.tolist()) == (np.uint64, [1, 5, top, 2**64 - 1])
    assert [held.splits[number] for number in held.split_of_group] == ["val", "train"]
    assert (held.groups.dtype, held.groups.tolist()) == (np.uint64, [7, top])
    assert held.num_shards == {"train": 4, "val": 1}
    assert CommittedCorpus().contents().images.tolist() == []
