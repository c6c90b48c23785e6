"""The contract of source readers: one suite, run against every one of them on a folder in its layout."""

from __future__ import annotations

import csv
import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.errors import CorpusError
from dermray.prepare.plan import leaves_root, plan_shards, usable_rows
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.raw import sources, spill, tables
from dermray.raw.fetch import ImageStore
from dermray.raw.sources import READERS, RawRows, SourceRequest
from dermray.raw.sources import csv as csv_reader
from dermray.raw.sources.rows import RAW, RawTable
from tests.raw_sources import LAYOUTS
from tests.table_tasks import backwards, in_small_pieces

SOURCES = sorted(READERS)
TABLES = [source for source in SOURCES if LAYOUTS[source].table]
ARCHIVED = [source for source in SOURCES if LAYOUTS[source].images]


def read(source: str, folder: Path, **request: object) -> RawRows:
    return READERS[source](SourceRequest(str(folder), **request))  # type: ignore[arg-type]


@pytest.fixture
def folder(source: str, tmp_path: Path) -> Path:
    LAYOUTS[source].write(tmp_path)
    return tmp_path


def fetched(folder: Path, raw: RawRows) -> dict[str, bytes | None]:
    store = ImageStore(str(folder), max_bytes=1 << 20, follow_links=False)
    return {row["source_id"]: store.fetch(row["image"]).data for row in raw.table.to_pylist()}


def test_every_reader_has_a_layout() -> None:
    assert set(LAYOUTS) == set(READERS)


@pytest.mark.parametrize("source", [*TABLES, "parquet"])
@pytest.mark.parametrize("limit", [None, 2])
def test_a_table_in_blocks_gives_the_same_rows(
    source: str, limit: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome() -> list[object]:
        request = SourceRequest(str(folder), limit=limit, tasks=backwards)
        raw = READERS[source](request)
        said = [raw.dropped, raw.not_understood, raw.captions_from, raw.ontology and raw.ontology.to_json()]
        met = [request.rows_met, request.findings, sorted(request.tables)]
        return [raw.table.to_pylist(), *said, *met]

    expected = outcome()
    monkeypatch.setattr(tables, "MAX_ROWS", 1)
    assert outcome() == expected
    in_small_pieces(monkeypatch)
    monkeypatch.setattr(spill, "MAX_HELD_BYTES", 0)
    assert outcome() == expected


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_of_the_schema_and_the_same_each_time(source: str, folder: Path) -> None:
    raw = read(source, folder)
    assert raw.table.schema.equals(RAW)
    raw.table.validate(full=True)
    for field in RAW:
        assert field.nullable or raw.table[field.name].null_count == 0, field.name
    ids = raw.table["source_id"].to_pylist()
    assert ids == list(LAYOUTS[source].ids)
    assert len(set(ids)) == len(ids)
    again = read(source, folder)
    assert again.table.equals(raw.table)
    assert (again.dropped, again.num_rows) == (raw.dropped, len(ids) + len(raw.dropped))


@pytest.mark.parametrize("source", SOURCES)
def test_tables_and_tree_are_noted_with_their_digests(source: str, folder: Path) -> None:
    request = SourceRequest(str(folder), limit=1)
    READERS[source](request)
    read = [str(file) for file in folder.rglob("*") if file.suffix == ".csv" or file.name == ONTOLOGY_NAME]
    assert request.tables == {
        uri: RawTable(uri, len(data), hashlib.sha256(data).hexdigest())
        for uri, data in ((uri, Path(uri).read_bytes()) for uri in read)
    }


@pytest.mark.parametrize("source", SOURCES)
def test_images_are_inside_the_root_and_there(source: str, folder: Path) -> None:
    raw = read(source, folder)
    assert not any(leaves_root(path) for path in raw.table["image"].to_pylist())
    assert all(fetched(folder, raw).values())


@pytest.mark.parametrize("source", SOURCES)
def test_labels_resolve_and_placeholders_are_nulls(source: str, folder: Path) -> None:
    layout, raw = LAYOUTS[source], read(source, folder)
    rows = {row["source_id"]: row for row in raw.table.to_pylist()}
    assert any(row["labels"] == [layout.label] for row in rows.values())
    ontology = raw.ontology or Ontology.flat(label for row in rows.values() for label in row["labels"])
    assert all(ontology.resolve_all(label).labels for row in rows.values() for label in row["labels"])
    blank = rows[layout.blank]
    assert (blank["labels"], blank["hierarchy"], blank["skin_type"]) == ([], None, None)
    said = {key: value for key, value in blank["meta"].items() if key not in ("lesion_id", "extra")}
    assert set(said.values()) == {None}
    texts = [caption["text"] for row in rows.values() for caption in row["captions"]]
    assert texts
    assert all(text == " ".join(text.split()) != "" for text in texts)
    assert set(raw.captions_from) <= {"raw", "ontology", "concept", "sub"}


@pytest.mark.parametrize("source", [source for source in SOURCES if LAYOUTS[source].together])
def test_what_belongs_together_is_a_group(source: str, folder: Path) -> None:
    raw = read(source, folder)
    groups = dict(zip(raw.table["source_id"].to_pylist(), raw.table["group"].to_pylist(), strict=True))
    first, second = LAYOUTS[source].together or ("", "")
    assert groups[first] == groups[second] is not None
    assert groups[LAYOUTS[source].blank] != groups[first]


@pytest.mark.parametrize("source", SOURCES)
def test_limit_takes_the_first_rows(source: str, folder: Path) -> None:
    whole, limited = read(source, folder).table.to_pylist(), read(source, folder, limit=1)
    # Derm1M's limit counts for each of its tables, and a row of derm7pt has two images.
    assert 0 < limited.num_rows <= 2
    first = [row for row in whole if row["row"] == 1]
    assert limited.table.to_pylist()[: len(first)] == first


@pytest.mark.parametrize("source", SOURCES)
def test_every_row_is_planned_or_dropped_and_a_reader_that_loses_one_is_caught(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sources.read(source, SourceRequest(str(folder)))
    plan = plan_shards(usable_rows(raw), split={"val": 0.3}, seed=0, rows_per_shard=2)
    assert sum(len(spec.rows) for spec in plan.shards) + len(plan.dropped) == plan.num_rows == raw.num_rows
    # What an image folder or a table becomes is made in the reader's module, for Parquet in that of `csv`.
    module = sys.modules[READERS[source].__module__] if source != "parquet" else csv_reader
    whole = module.assemble
    for first, last in ((0, -1), (1, None)):
        monkeypatch.setattr(module, "assemble", lambda first=first, last=last, **columns: whole(**columns)[first:last])
        with pytest.raises(AssertionError, match=rf"source {source}: \d+ rows in, \d+ used"):
            sources.read(source, SourceRequest(str(folder)))


@pytest.mark.parametrize("source", SOURCES)
def test_rows_become_samples(source: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw, output = read(source, folder), tmp_path_factory.mktemp("out")
    config = PrepareConfig(source=source, input=str(folder), output=str(output), split="test", sub_captions=8)
    plan = plan_shards(usable_rows(raw), split="test", seed=0, rows_per_shard=100)
    ontology = raw.ontology or Ontology.flat(raw.table["labels"].combine_chunks().flatten().unique().to_pylist())
    (spec,) = plan.shards
    record, made, _ = ShardMaker(config, ontology).make(spec)
    assert made
    assert record.dropped == ()
    assert record.row_counts["rows"]["labelled"] == record.row_counts["rows"]["resolved"] > 0
    assert record.sample_counts["captions"]["sub"] >= record.sample_counts["captions"]["raw"]
    again, made, _ = ShardMaker(config, ontology).make(spec)
    assert (again, made) == (record, False)


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_table_is_named(source: str, tmp_path: Path) -> None:
    expected = LAYOUTS[source].table or str(tmp_path)
    with pytest.raises(CorpusError, match=expected):
        read(source, tmp_path)


@pytest.mark.parametrize("source", TABLES)
def test_a_missing_column_is_named(source: str, folder: Path) -> None:
    file, column = folder / str(LAYOUTS[source].table), LAYOUTS[source].column
    with file.open(encoding="utf-8", newline="") as content:
        rows = list(csv.reader(content))
    place = rows[0].index(str(column))
    with file.open("w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows([*row[:place], *row[place + 1 :]] for row in rows)
    with pytest.raises(CorpusError, match=rf"{file.name} has no column '{column}'.*its columns are: "):
        read(source, folder)


@pytest.mark.parametrize("source", TABLES)
def test_an_empty_table_and_malformed_rows(source: str, folder: Path) -> None:
    file = folder / str(LAYOUTS[source].table)
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + "too,few\n", encoding="utf-8")
    raw = read(source, folder)
    assert [row.reason for row in raw.dropped].count("malformed_row") == 1
    assert raw.table["source_id"].to_pylist() == list(LAYOUTS[source].ids)
    file.write_text(whole.splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"{file.name} has no rows"):
        read(source, folder)


@pytest.mark.parametrize("inner", [True, False], ids=["folder in the archive", "folder named by the archive"])
@pytest.mark.parametrize("source", ARCHIVED)
def test_images_may_lie_in_archives(source: str, folder: Path, inner: bool) -> None:
    plain = fetched(folder, read(source, folder))
    for name in LAYOUTS[source].images:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for file in sorted((folder / name).rglob("*.*")):
                archive.write(file, file.relative_to(folder if inner else folder / name))
        shutil.rmtree(folder / name)
    raw = read(source, folder)
    assert all(".zip!/" in path for path in raw.table["image"].to_pylist())
    assert fetched(folder, raw) == plain


@pytest.mark.parametrize("source", ARCHIVED)
def test_a_truncated_archive_is_named(source: str, folder: Path) -> None:
    for name in LAYOUTS[source].images:
        shutil.rmtree(folder / name)
        (folder / f"{name}.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CorpusError, match=r"\.zip is not a complete zip archive"):
        read(source, folder)


@pytest.mark.parametrize("source", ARCHIVED)
def test_images_that_are_nowhere_stay_missing_files(source: str, folder: Path) -> None:
    for name in LAYOUTS[source].images:
        shutil.rmtree(folder / name)
    assert not any(fetched(folder, read(source, folder)).values())
