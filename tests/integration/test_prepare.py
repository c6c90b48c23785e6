"""Prepare end to end on the session's Ray cluster: every bad kind of row, resumption, the ceiling, no change."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dermray import images
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import SAMPLE
from dermray.corpus.side_tables import side_index
from dermray.corpus.synthetic import write_corpus
from dermray.errors import CorpusError, StorageError
from dermray.prepare import graph, report
from dermray.prepare.pipeline import PrepareResult, prepare
from dermray.prepare.settings import PrepareConfig
from tests import raw_corpus
from tests.conftest import ROOT
from tests.raw_corpus import content
from tests.table_tasks import in_small_pieces

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_GOOD = 40
# Reasons that a small table alone cannot bring about.
INJECTED_ELSEWHERE = {
    "ambiguous_image": "tests/unit/test_raw_places.py",
    "burned_in_annotation": "tests/unit/test_image_formats.py",
    "too_complex": "tests/unit/test_image_bounds.py",
    "too_elongated": "tests/unit/test_image_bounds.py",
    "unsupported_format": "tests/unit/test_image_formats.py",
    "split_unclear": "tests/unit/test_published_sources.py",
    "excluded_by_source": "tests/unit/test_published_sources.py",
    "in_evaluation_corpus": "tests/integration/test_prepare_growth.py",
    "near_duplicate": "tests/integration/test_prepare_growth.py",
    **dict.fromkeys(
        ("no_key", "key_stood_above", "no_sample", "several_samples", "mask_size"), "tests/unit/test_side_tables.py"
    ),
}
# Of the samples' own table, whose bad rows have no sample.
FACTS = {"uri": "metadata.csv", "key": "source_id", "texts": "[label]"}


def run(raw: Path, output: Path, **options: Any) -> PrepareResult:
    overrides = [f"{key}={value}" for key, value in ({"source": "csv", "rows_per_shard": 8} | options).items()]
    return prepare(parse(PrepareConfig, [f"input={raw}", f"output={output}", *overrides]))


def samples(output: Path) -> list[dict[str, Any]]:
    manifest = Manifest.load(str(output))
    return [row for shard in manifest.shards for row in pq.read_table(output / shard.path).to_pylist()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("with-bad-rows") / "raw"
    return folder, raw_corpus.write(folder, num_good=NUM_GOOD, bad=True)


@pytest.fixture(scope="module")
def prepared(
    corpus: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Path, PrepareResult]:
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    return output, run(corpus[0], output, max_dropped_fraction=0.5)


def test_every_bad_row_is_dropped_with_its_own_reason(
    corpus: tuple[Path, dict[str, str]], prepared: tuple[Path, PrepareResult]
) -> None:
    _, reasons = corpus
    output, result = prepared
    dropped = pq.read_table(output / "report" / "dropped.parquet").to_pylist()
    assert {row["source_id"]: row["reason"] for row in dropped if row["source_id"]} == reasons
    assert [row["reason"] for row in dropped if not row["source_id"]] == ["malformed_row"]
    assert all(row["detail"] for row in dropped)
    assert result.stats["dropped"] == dict(Counter(row["reason"] for row in dropped).most_common())
    assert set(result.stats["dropped"]) == set(report.REASONS) - set(INJECTED_ELSEWHERE)


def test_tasks_read_a_long_table_as_the_driver_does(
    corpus: tuple[Path, dict[str, str]],
    prepared: tuple[Path, PrepareResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_small_pieces(monkeypatch, 1024)
    monkeypatch.setattr(graph, "PIECES_AT_ONCE", 2)
    result = run(corpus[0], tmp_path, max_dropped_fraction=0.5)
    told = json.loads((tmp_path / report.TIMING).read_text())["ray_data"]
    counts = [int(count) for stats in told for count in re.findall(r"MapBatches\(read_table\): (\d+) tasks", stats)]
    assert counts[:2] == [2, 2], "a few pieces at a time"
    assert result.manifest.digest == prepared[1].manifest.digest
    shards = {Path(shard.path).name for shard in result.manifest.shards}
    assert shards == {Path(shard.path).name for shard in prepared[1].manifest.shards}, "the names say what they hold"
    assert (tmp_path / "report/dropped.parquet").read_bytes() == (prepared[0] / "report/dropped.parquet").read_bytes()


def test_no_reason_is_without_a_test(corpus: tuple[Path, dict[str, str]]) -> None:
    """A new reason must be among the bad rows above, or be asserted where it is injected."""
    assert set(report.REASONS) == {*corpus[1].values(), "malformed_row", *INJECTED_ELSEWHERE}
    for reason, file in INJECTED_ELSEWHERE.items():
        assert f'"{reason}"' in (ROOT / file).read_text(encoding="utf-8"), f"{file} says nothing of {reason}"


def test_bad_rows_cost_nothing_else(prepared: tuple[Path, PrepareResult]) -> None:
    output, result = prepared
    found = samples(output)
    assert sorted(row["source_id"] for row in found) == [f"good-{number:03d}" for number in range(NUM_GOOD)]
    assert result.manifest.num_samples == result.stats["samples"] == NUM_GOOD
    assert result.stats["rows"]["in"] == result.stats["rows"]["in_samples"] + result.stats["rows"]["dropped"]
    assert result.stats["captions"] == {"raw": NUM_GOOD + NUM_GOOD // 5, "ontology": NUM_GOOD, "concept": 0, "sub": 0}
    for row in found:
        number = int(row["source_id"].removeprefix("good-"))
        original = images.decode(raw_corpus.photograph(number)).astype(int)
        assert abs(images.decode(row["image"]).astype(int) - original).mean() < 4
        assert row["captions"][0] == {"aspect": "raw", "text": f"caption {number}"}


def test_shards_ontology_and_manifest_agree(prepared: tuple[Path, PrepareResult]) -> None:
    output, result = prepared
    manifest = Manifest.load(str(output))
    assert manifest == result.manifest
    assert set(Ontology.load(str(output))) == set(raw_corpus.LABELS)
    assert {file.name for file in (output / "data").iterdir()} == {Path(shard.path).name for shard in manifest.shards}
    patients: dict[str, set[str]] = {}
    for shard in manifest.shards:
        table = pq.read_table(output / shard.path)
        assert table.schema.equals(SAMPLE)
        assert set(table["split"].to_pylist()) == {shard.split}
        assert table.num_rows == shard.num_samples <= 8
        for row in table.select(["meta", "split"]).to_pylist():
            patients.setdefault(row["meta"]["patient_id"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in patients.values())
    assert manifest.splits.keys() == {"train", "val"}


def test_unchanged_input_is_a_no_op(corpus: tuple[Path, dict[str, str]], prepared: tuple[Path, PrepareResult]) -> None:
    output, first = prepared
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    again = run(corpus[0], output, max_dropped_fraction=0.5)
    assert again.unchanged
    assert again.num_shards_made == 0
    assert again.manifest == first.manifest
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()} == before


def test_half_done_work_is_finished_to_the_same_bytes(
    corpus: tuple[Path, dict[str, str]], prepared: tuple[Path, PrepareResult], tmp_path: Path
) -> None:
    """What a crash leaves: some shards with records, one without, a part file, no manifest."""
    output, first = prepared
    run(corpus[0], tmp_path / "corpus", max_dropped_fraction=0.5)
    assert content(tmp_path / "corpus") == content(output)
    records = sorted((tmp_path / "corpus" / "records").glob("*.parquet"))
    for record in records[::2]:
        record.unlink()
    lost = next(shard for shard in first.manifest.shards if shard.path.startswith(f"data/{records[1].stem[:-16]}"))
    (tmp_path / "corpus" / lost.path).unlink()
    for name in ("data/.train-00000-x.parquet.1-2.part", "report/.report.html.x.part", ".manifest.json.x.part"):
        (tmp_path / "corpus" / name).write_bytes(b"half")
    (tmp_path / "corpus" / "manifest.json").unlink()
    again = run(corpus[0], tmp_path / "corpus", max_dropped_fraction=0.5)
    assert again.num_shards_made == len(records[::2]) + 1
    assert again.num_shards_found == len(records) - again.num_shards_made
    assert content(tmp_path / "corpus") == content(output)
    assert again.manifest.digest == first.manifest.digest


def test_other_settings_replace_the_corpus_and_clear_up(
    corpus: tuple[Path, dict[str, str]],
    prepared: tuple[Path, PrepareResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = {f"side_tables.facts.{key}": value for key, value in FACTS.items()}
    first = run(corpus[0], tmp_path / "corpus", max_dropped_fraction=0.9, split="test", limit=20, **facts)
    assert first.manifest.splits.keys() == {"test"}
    told = first.stats["side_tables"]["facts"]
    assert told["used"] == first.manifest.num_samples == told["in"] - sum(told["told"].values())
    index = side_index(str(tmp_path / "corpus"), first.manifest, "facts")
    beside = [row for table in index.row_groups(["sample_id", "label"]) for row in table.to_pylist()]
    found = {row["sample_id"]: row["labels"] for row in samples(tmp_path / "corpus")}
    assert {row["sample_id"]: [row["label"]] for row in beside} == found
    foreign = [tmp_path / "corpus" / name for name in ("notes.txt", "data/mine.parquet", "records/own.json")]
    for file in foreign:
        file.write_text("not of the corpus", encoding="utf-8")
    run(corpus[0], tmp_path / "corpus", max_dropped_fraction=0.5)
    assert "keeps 2 files that are not of this program's making: 'data/mine.parquet'," in capsys.readouterr().out
    for file in foreign:
        assert file.read_text(encoding="utf-8") == "not of the corpus"
        file.unlink()
    assert content(tmp_path / "corpus") == content(prepared[0])


def test_too_many_bad_rows_stop_the_run(corpus: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"stopped: .* rows are unusable so far: .*rows? [0-9].*max_dropped_fraction=0.01"
    ) as caught:
        run(corpus[0], tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    listed = tmp_path / "report" / "dropped-when-stopped.csv"
    assert str(listed) in str(caught.value)
    rows = list(csv.DictReader(listed.read_text("utf-8-sig").splitlines()))
    assert [row["reason"] for row in rows] == pq.read_table(listed.with_suffix(".parquet"))["reason"].to_pylist() != []
    assert run(corpus[0], tmp_path, max_dropped_fraction=0.5).manifest.num_samples == NUM_GOOD
    assert not list(listed.parent.glob("dropped-when-stopped.*"))


def test_bad_images_count_towards_the_ceiling_too(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=10)
    for number in range(5):
        (tmp_path / "raw" / "images" / f"{number:03d}.jpg").write_bytes(b"")
    with pytest.raises(CorpusError, match="zero_byte"):
        run(tmp_path / "raw", tmp_path / "out", max_dropped_fraction=0.2)
    assert run(tmp_path / "raw", tmp_path / "out", max_dropped_fraction=0.9).manifest.num_samples == 5
    for number in range(10):
        (tmp_path / "raw" / "images" / f"{number:03d}.jpg").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"no image of .* is usable: zero_byte 12 \(rows 1, 2, 3, …\)"):
        run(tmp_path / "raw", tmp_path / "none", max_dropped_fraction=1)
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_an_output_that_cannot_be_written_is_one_clear_error(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(StorageError, match=r"shard \w+-\d+: .*run the same command again"):
        run(corpus[0], tmp_path, max_dropped_fraction=0.5)
    assert not (tmp_path / "manifest.json").exists()


def test_synthetic_corpus_takes_the_road_of_derm1m(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "raw"), num_images=48, seed=3)
    result = run(tmp_path / "raw", tmp_path / "out", source="derm1m", split="{val: 0.2, test: 0.2}", rows_per_shard=32)
    assert result.manifest.num_samples == 48
    assert result.stats["rows"]["dropped"] == 0
    assert result.stats["rows_resolved"] == result.stats["rows_labelled"] > 0
    assert result.stats["captions"]["concept"] > 0
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 20_000
    (account, *_) = json.loads((tmp_path / "out" / "report" / "timing.json").read_text(encoding="utf-8"))["ray_data"]
    assert "MapBatches(make_shard): " in account
