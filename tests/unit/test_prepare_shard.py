"""Making shards and reports without Ray: bytes, records, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from dermray import images
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import SAMPLE, sample_id
from dermray.errors import CorpusError, StorageError
from dermray.prepare import card, report
from dermray.prepare.commit import publish
from dermray.prepare.generations import Generation, content, identity
from dermray.prepare.plan import Plan, plan_shards, usable_rows
from dermray.prepare.records import ShardRecord, read_record
from dermray.prepare.samples import build_sample, resolve_labels
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker, made_by
from dermray.raw.sources import READERS, SourceRequest
from dermray.raw.sources.rows import RAW
from tests import raw_corpus

TREE = Ontology(
    {"root": ["inflammatory", "melanoma"], "inflammatory": ["psoriasis", "eczema"], "eczema": ["hand eczema"]}
)


def settings(raw: Path, output: Path, **options: Any) -> PrepareConfig:
    overrides = [f"{key}={value}" for key, value in options.items()]
    return parse(PrepareConfig, ["source=csv", f"input={raw}", f"output={output}", "split=train", *overrides])


def planned(config: PrepareConfig) -> Plan:
    raw = READERS["csv"](SourceRequest(config.input, keep_untexted=config.keep_untexted))
    usable = usable_rows(raw, keep_untexted=config.keep_untexted)
    return plan_shards(usable, split=config.split, seed=config.seed, rows_per_shard=config.rows_per_shard)


def make(config: PrepareConfig) -> tuple[list[ShardRecord], list[bool]]:
    maker = ShardMaker(config, TREE)
    made = [maker.make(spec) for spec in planned(config).shards]
    return [each.record for each in made], [each.fresh for each in made]


def committed(records: list[ShardRecord]) -> Manifest:
    shards = tuple(record.shard for record in records if record.shard)
    return Manifest(shards=shards, provenance={"made_by": made_by(), "sources": [{"source": "csv"}]})


def generation(config: PrepareConfig, records: list[ShardRecord]) -> Generation:
    plan = planned(config)
    keys = tuple(record.key for record in records)
    return Generation(
        number=1,
        identity=identity(config),
        content=content(config),
        made=keys,
        final=keys,
        num_rows=plan.num_rows,
        dropped=(*plan.dropped, *(row for record in records for row in record.dropped)),
        ontology=TREE.to_json(),
        figures={"merged": 0, "left_out": 0, "moved": 0},
    )


def reported(config: PrepareConfig, records: list[ShardRecord]) -> dict[str, Any]:
    """Write the report of a corpus; returns its figures."""
    generations, manifest = [generation(config, records)], committed(records)
    stats = report.summarise(generations, records, records, manifest, TREE)
    timing = {"stages": {"plan": 1.0}, "tasks": {}, "ray_data": ["Operator 1 MapBatches(make_shard): 3 tasks executed"]}
    report.write(config, generations, records, manifest, stats, timing)
    return stats


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    raw_corpus.write(folder, num_good=12, bad=True)
    return folder


def test_shard_is_a_parquet_file_of_the_schema(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path, image_size=64, row_group_size=5)
    (record,), _ = make(config)
    assert record.shard is not None
    file = pq.ParquetFile(tmp_path / record.shard.path)
    assert file.schema_arrow.equals(SAMPLE, check_metadata=True)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    assert tuple(group.num_rows for group in groups) == record.shard.row_groups == (5, 5, 2)
    codecs = {groups[0].column(n).path_in_schema: groups[0].column(n).compression for n in range(groups[0].num_columns)}
    assert codecs.pop("image") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
    for sample in file.read().to_pylist():
        assert sample["sample_id"] == sample_id("csv", sample["image"])
        assert images.inspect(sample["image"]) == ("JPEG", sample["width"], sample["height"])
        assert min(sample["width"], sample["height"]) == 64


def test_datasets_reads_a_corpus_and_not_its_records(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    config = settings(raw, tmp_path / "corpus", split="{val: 0.4}")
    records, _ = make(config)
    timing: dict[str, Any] = {"stages": {}, "tasks": {}, "ray_data": []}
    for _ in range(2):
        publish(config, committed(records), [generation(config, records)], records, records, timing)
        found = datasets.load_dataset(config.output, cache_dir=str(tmp_path / "cache"))
        assert {split: len(part) for split, part in found.items()} == committed(records).splits
        assert len(found) == 2
    shown = found["val"].cast_column("image", datasets.Image())
    assert shown[0]["image"].size == (found["val"][0]["width"], found["val"][0]["height"])
    readme = tmp_path / "corpus" / card.CARD_NAME
    readme.write_text("my own notes")
    card.write(config.output, committed(records))
    assert readme.read_text() == "my own notes"


def test_samples_hold_the_union_of_their_rows(raw: Path, tmp_path: Path) -> None:
    (record,), _ = make(settings(raw, tmp_path))
    assert record.shard is not None
    rows = {row["source_id"]: row for row in pq.read_table(tmp_path / record.shard.path).to_pylist()}
    assert sorted(rows) == [f"good-{number:03d}" for number in range(12)]
    assert rows["good-010"]["captions"] == [
        {"aspect": "raw", "text": "caption 10"},
        {"aspect": "ontology", "text": "This is a skin photo diagnosed as inflammatory, psoriasis."},
        {"aspect": "raw", "text": "another caption 10"},
    ]
    assert rows["good-010"]["labels"] == ["psoriasis"]
    assert rows["good-010"]["skin_type"] == 2
    assert rows["good-010"]["meta"]["patient_id"] == "patient 5"


def test_sub_captions_when_asked(raw: Path, tmp_path: Path) -> None:
    plain, _ = make(settings(raw, tmp_path))
    explicit, fresh = make(settings(raw, tmp_path, sub_captions=0))
    assert (explicit, fresh) == (plain, [False])
    (record,), _ = make(settings(raw, tmp_path, sub_captions=3))
    assert record.shard is not None
    assert record.key != plain[0].key
    rows = {row["source_id"]: row for row in pq.read_table(tmp_path / record.shard.path).to_pylist()}
    assert [caption["text"] for caption in rows["good-010"]["captions"] if caption["aspect"] == "sub"] == [
        "caption 10",
        "another caption 10",
    ]
    config = settings(raw, tmp_path, sub_captions=3)
    stats = reported(config, [record])
    assert stats["captions"] == {"raw": 15, "ontology": 12, "concept": 0, "sub": 15}
    assert stats["pairs"] == 27


def test_sentences_that_the_source_brings_are_not_made_again() -> None:
    brought = [
        {"aspect": "raw", "text": "Red. Scaly."},
        {"aspect": "ontology", "text": "its own"},
        *({"aspect": "sub", "text": f"part {number}"} for number in range(5)),
    ]
    row = {
        **dict.fromkeys(RAW.names),
        "source": "x",
        "source_id": "1",
        "captions": brought,
        "labels": ["psoriasis"],
        "concepts": ["red"],
    }
    more = {**row, "captions": [{"aspect": "sub", "text": f"more {number}"} for number in range(5)]}
    image = images.standardise(raw_corpus.photograph(1), image_size=64, jpeg_quality=90, max_pixels=10**6, min_side=8)
    resolutions = [resolve_labels(each, TREE) for each in (row, more)]
    sample = build_sample([row, more], resolutions, image, "train", TREE, num_sub_captions=8)
    found = [(caption["aspect"], caption["text"]) for caption in sample["captions"]]
    assert found[:2] == [("raw", "Red. Scaly."), ("ontology", "its own")]
    assert [text for aspect, text in found if aspect == "concept"] == ["This skin photo shows red."]
    assert [text for aspect, text in found if aspect == "sub"] == [
        *(f"part {number}" for number in range(5)),
        *(f"more {number}" for number in range(3)),
    ]


def test_record_counts_every_row(raw: Path, tmp_path: Path) -> None:
    (record,), _ = make(settings(raw, tmp_path))
    assert record.num_rows == len(record.dropped) + 12 + 3
    assert record.sample_counts["captions"] == {"ontology": 12, "raw": 15}
    assert record.row_counts["rows"] == {"labelled": 15, "resolved": 15}
    assert record.row_counts["formats"] == {"JPEG": 12}
    assert record.notes.num_rows == 12
    assert len(record.dropped_images) == len({row.image for row in record.dropped})
    assert ShardRecord.from_bytes(record.to_bytes()) == record
    assert read_record(str(tmp_path), record.key) == record


def test_a_damaged_record_is_named(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path)
    (record,), _ = make(config)
    (tmp_path / "records" / f"{record.key}.parquet").write_bytes(b"half of a re")
    with pytest.raises(CorpusError, match=rf"{record.key}.parquet is damaged .* remove it"):
        make(config)


def test_a_finished_shard_is_not_made_again(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path, rows_per_shard=5)
    first, fresh = make(config)
    assert all(fresh)
    made_at = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()}
    again, fresh = make(config)
    assert not any(fresh)
    assert again == first
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()} == made_at


def test_bytes_depend_on_content_alone(raw: Path, tmp_path: Path) -> None:
    first, _ = make(settings(raw, tmp_path / "a", num_fetch_threads=1))
    second, _ = make(settings(raw, tmp_path / "b", num_fetch_threads=16))
    assert first == second
    assert first[0].shard is not None
    path = first[0].shard.path
    assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("option", [{"jpeg_quality": 70}, {"image_size": 64}, {"row_group_size": 3}, {"min_side": 40}])
def test_other_settings_are_another_shard(raw: Path, tmp_path: Path, option: dict[str, int]) -> None:
    base, _ = make(settings(raw, tmp_path))
    other, fresh = make(settings(raw, tmp_path, **option))
    assert fresh == [True]
    assert base[0].key != other[0].key


def test_damage_after_the_fact_is_noticed(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=4)
    config = settings(tmp_path / "raw", tmp_path / "out")
    (record,), _ = make(config)
    assert record.shard is not None
    shard = tmp_path / "out" / record.shard.path
    whole = shard.read_bytes()
    (spec,) = planned(config).shards
    for damage in (lambda: shard.write_bytes(whole[:-10]), shard.unlink):
        damage()
        # A later shard may have taken this one's place, so its record will do unless the file itself is needed.
        assert make(config) == ([record], [False])
        again, fresh, _ = ShardMaker(config, TREE).make(spec, needs_file=True)
        assert (again, fresh) == (record, True)
        assert shard.read_bytes() == whole
    (tmp_path / "raw" / "images" / "001.jpg").write_bytes(raw_corpus.photograph(77))
    (changed,), fresh = make(config)
    assert fresh == [True]
    assert changed.notes["sample_id"] != record.notes["sample_id"]


def test_a_file_that_turns_up_later_is_taken(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=4)
    image = tmp_path / "raw" / "images" / "002.jpg"
    content = image.read_bytes()
    image.unlink()
    config = settings(tmp_path / "raw", tmp_path / "out")
    (lacking,), _ = make(config)
    assert [row.reason for row in lacking.dropped] == ["missing_file"]
    image.write_bytes(content)
    (complete,), _ = make(config)
    assert complete.dropped == ()
    assert complete.shard is not None
    assert complete.shard.num_samples == 4


def test_links_may_be_followed_when_asked(raw: Path, tmp_path: Path) -> None:
    refused, _ = make(settings(raw, tmp_path))
    followed, _ = make(settings(raw, tmp_path, follow_links=True))

    def names(records: list[ShardRecord]) -> set[str]:
        return {row.source_id for row in records[0].dropped}

    assert names(refused) - names(followed) == {"bad-link"}


def test_a_full_disk_publishes_nothing(raw: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "out"
    blocked.mkdir()
    (blocked / "data").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises((OSError, StorageError)):
        make(settings(raw, blocked))
    assert not (blocked / "records").exists()


@pytest.mark.parametrize(
    ("labels", "hierarchy", "found", "unresolved"),
    [
        (["psoriasis"], None, ("psoriasis",), ()),
        (["psoriasis, eczema"], None, ("psoriasis", "eczema"), ()),
        (["eczema", "hand eczema"], None, ("hand eczema",), ()),
        (["pompholyx"], "inflammatory, eczema, pompholyx", ("eczema",), ("pompholyx",)),
        (["pompholyx"], None, (), ("pompholyx",)),
        ([], "inflammatory, eczema", (), ()),
    ],
)
def test_labels_of_a_row(
    labels: list[str], hierarchy: str | None, found: tuple[str, ...], unresolved: tuple[str, ...]
) -> None:
    assert resolve_labels({"labels": labels, "hierarchy": hierarchy}, TREE) == (found, unresolved)


def test_report_is_a_function_of_the_result(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path, rows_per_shard=5)
    records, _ = make(config)
    stats = reported(config, records)
    assert stats["rows"]["in"] == stats["rows"]["in_samples"] + stats["rows"]["dropped"]
    assert stats["levels"][1] == {"level": 2, "nodes": 2, "seen": 2, "covered": 2, "labels": 8}
    assert stats["captions"] == {"raw": 15, "ontology": 12, "concept": 0, "sub": 0}
    first = {file: (tmp_path / file).read_bytes() for file in (report.REPORT, report.STATS, report.DROPPED)}
    assert reported(config, list(records)) == stats
    assert first == {file: (tmp_path / file).read_bytes() for file in first}
    page = first[report.REPORT].decode()
    assert "Operator 1 MapBatches(make_shard): 3 tasks executed" in page
    for expected in ("too_many_pixels", "data:image/jpeg;base64,", "psoriasis", "report/dropped.parquet"):
        assert expected in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_no_share_of_originals_is_above_the_whole_where_equal_images_merge() -> None:
    counts = {"origins": {"csv": 63}, "sizes": {"512 px": 63}, "formats": {"JPEG": 40, "PNG": 23}}
    cards = report._shares({**counts, "skin_types": {"unknown": 62}, "body_sites": {}, "samples": 62})
    assert [sum(card["counts"].values()) / card["of"] for card in cards] == [1.0] * 4


def test_report_lists_what_was_not_resolved_with_suggestions(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=6)
    table = tmp_path / "raw" / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("psoriasis", "psoriassis"), encoding="utf-8")
    config = settings(tmp_path / "raw", tmp_path / "out")
    records, _ = make(config)
    stats = reported(config, records)
    assert list(stats["unresolved_labels"]) == ["psoriassis"]
    assert [each["name"] for each in stats["suggestions"]["psoriassis"]] == ["psoriasis"]
    assert "psoriasis" not in stats["labels"]
    by_level = {level["level"]: level for level in stats["levels"]}
    assert (by_level[1]["seen"], by_level[1]["covered"]) == (1, 2)
    page = (tmp_path / "out" / report.REPORT).read_text(encoding="utf-8")
    assert "psoriassis" in page
    assert "perhaps" in page


def test_report_shows_images_without_texts(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=3)
    table = tmp_path / "raw" / "metadata.csv"
    names = pacsv.read_csv(table)["image"].to_pylist()[:3]
    table.write_text("\n".join(["image", *names]) + "\n", encoding="utf-8")
    config = settings(tmp_path / "raw", tmp_path / "out", keep_untexted="true")
    records, _ = make(config)
    num_samples = reported(config, records)["samples"]
    page = (tmp_path / "out" / report.REPORT).read_text(encoding="utf-8")
    assert page.count('class="shot"') == num_samples > 0


def test_report_escapes_what_the_table_says(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=3)
    table = tmp_path / "raw" / "metadata.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("caption 1", "<script>alert(1)</script>"), encoding="utf-8"
    )
    config = settings(tmp_path / "raw", tmp_path / "out")
    records, _ = make(config)
    reported(config, records)
    page = (tmp_path / "out" / report.REPORT).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_lost_rows_are_a_bug_that_shows(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path, rows_per_shard=5)
    records, _ = make(config)
    with pytest.raises(AssertionError, match="rows in"):
        report.summarise([generation(config, records)], records[1:], records, Manifest(shards=()), TREE)
