"""Duplicates inside a corpus, what joins one later (more rows, another source, the same again), and what it is from."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dermray.commands import lineage as lineage_job
from dermray.commands import prepare as prepare_job
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import CorpusError
from dermray.prepare.pipeline import PrepareResult, prepare
from dermray.prepare.settings import PrepareConfig
from tests import raw_corpus
from tests.raw_corpus import content, recompressed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def run(raw: Path, output: Path, **options: Any) -> PrepareResult:
    overrides = [f"{key}={value}" for key, value in ({"source": "csv", "rows_per_shard": 8} | options).items()]
    return prepare(parse(PrepareConfig, [f"input={raw}", f"output={output}", *overrides]))


def samples(output: Path) -> dict[str, dict[str, Any]]:
    manifest = Manifest.load(str(output))
    tables = [pq.read_table(output / shard.path) for shard in manifest.shards]
    return {row["source_id"]: row for table in tables for row in table.to_pylist()}


def write(folder: Path, rows: list[tuple[str, bytes, str, str]]) -> None:
    """`metadata.csv` and images of `(id, image, caption, label)`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["source_id", "image", "caption", "label"])
        for name, image, caption, label in rows:
            file = folder / f"{name}.jpg"
            if not file.exists() or file.read_bytes() != image:
                file.write_bytes(image)
            writer.writerow([name, file.name, caption, label])


def plain(first: int, last: int) -> list[tuple[str, bytes, str, str]]:
    labels = raw_corpus.LABELS
    return [
        (f"p{number:02d}", raw_corpus.photograph(number), f"caption {number}", labels[number % 3])
        for number in range(first, last)
    ]


def with_duplicates() -> list[tuple[str, bytes, str, str]]:
    """24 photographs, two of them again byte for byte, four again recompressed."""
    rows = plain(0, 24)
    rows += [(f"e{n:02d}", raw_corpus.photograph(n), f"equal {n}", "eczema") for n in (3, 4)]
    rows += [(f"n{n:02d}", recompressed(n), f"near {n}", "psoriasis") for n in (5, 6, 7, 8)]
    return rows


def test_equal_images_merge_and_near_ones_are_marked(tmp_path: Path) -> None:
    write(tmp_path / "raw", with_duplicates())
    result = run(tmp_path / "raw", tmp_path / "out", split="{val: 0.4}")
    found = samples(tmp_path / "out")
    assert len(found) == result.manifest.num_samples == 28
    assert result.stats["duplicates"] == {
        "merged": 2,
        "left_out": 0,
        "moved": result.stats["duplicates"]["moved"],
        "near_groups": 4,
        "near_samples": 8,
        "largest_group": 2,
    }
    assert [caption["text"] for caption in found["p03"]["captions"] if caption["aspect"] == "raw"] == [
        "caption 3",
        "equal 3",
    ]
    assert set(found["p04"]["labels"]) == {"psoriasis", "eczema"}
    for number in (5, 6, 7, 8):
        twins = [found[f"p{number:02d}"], found[f"n{number:02d}"]]
        ids = {twin["sample_id"] for twin in twins}
        assert {twin["duplicate_group"] for twin in twins} == {min(ids)}
        assert len({twin["split"] for twin in twins}) == 1
    assert found["p00"]["duplicate_group"] is None
    assert result.stats["rows"] == {"in": 30, "in_samples": 30, "dropped": 0}
    files = {file.name for file in (tmp_path / "out" / "data").iterdir()}
    assert files == {Path(shard.path).name for shard in result.manifest.shards}
    page = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert "near-duplicate groups" in page
    before = content(tmp_path / "out")
    again = run(tmp_path / "raw", tmp_path / "out", split="{val: 0.4}")
    assert again.unchanged
    assert again.num_shards_made == 0
    assert content(tmp_path / "out") == before


@pytest.mark.long
def test_near_duplicates_can_be_left_out_and_evaluation_images_too(tmp_path: Path) -> None:
    write(tmp_path / "raw", with_duplicates())
    write(tmp_path / "exam", [("x", recompressed(0), "an examination", "eczema")])
    run(tmp_path / "exam", tmp_path / "exam-out", split="test")
    result = run(tmp_path / "raw", tmp_path / "out", near_duplicates="drop", exclude=f"[{tmp_path}/exam-out]")
    assert set(samples(tmp_path / "out")) == {name for name, *_ in plain(1, 24)}
    assert result.stats["dropped"] == {"near_duplicate": 4, "in_evaluation_corpus": 1}
    assert result.stats["rows"] == {"in": 30, "in_samples": 25, "dropped": 5}
    dropped = pq.read_table(tmp_path / "out" / "report" / "dropped.parquet").to_pylist()
    assert {row["source_id"] for row in dropped} == {"p00", "n05", "n06", "n07", "n08"}
    assert {row["input"] for row in dropped} == {str(tmp_path / "raw")}
    assert run(tmp_path / "raw", tmp_path / "out", near_duplicates="drop", exclude=f"[{tmp_path}/exam-out]").unchanged


def test_more_rows_join_and_leave_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 20))
    first = run(tmp_path / "raw", tmp_path / "out")
    shards = {shard.path: (tmp_path / "out" / shard.path).read_bytes() for shard in first.manifest.shards}
    table = tmp_path / "raw" / "metadata.csv"
    before = table.read_bytes()
    write(tmp_path / "raw", [*plain(0, 20), *plain(40, 52)])
    second = run(tmp_path / "raw", tmp_path / "out")
    assert second.manifest.version == 2
    assert second.manifest.num_samples == 32
    assert second.manifest.shards[: len(shards)] == first.manifest.shards
    assert {path: (tmp_path / "out" / path).read_bytes() for path in shards} == shards
    assert second.stats["rows"] == {"in": 32, "in_samples": 32, "dropped": 0}
    assert sum(second.stats["labels"].values()) == 32
    assert run(tmp_path / "raw", tmp_path / "out").unchanged
    assert Manifest.load(str(tmp_path / "out")) == second.manifest
    assert (named(first), named(second)) == ([sha256(before)], [sha256(table.read_bytes())])


def named(result: PrepareResult) -> list[str]:
    """Digests of the tables in the manifest; the result has the same."""
    assert [asdict(table) for table in result.tables] == result.manifest.provenance["tables"]
    return [table.sha256 for table in result.tables]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_other_bytes_with_the_same_rows_change_nothing_but_the_tables_digest(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 10))
    first, before = run(tmp_path / "raw", tmp_path / "out"), content(tmp_path / "out")
    table = tmp_path / "raw" / "metadata.csv"
    table.write_bytes(table.read_bytes().replace(b"\r\n", b"\n"))
    second = run(tmp_path / "raw", tmp_path / "out")
    assert second.unchanged
    assert named(second) == [sha256(table.read_bytes())] != named(first)
    assert second.manifest.digest == first.manifest.digest
    assert second.manifest.source_digest == first.manifest.source_digest
    after = content(tmp_path / "out")
    changed = {name for name, data in after.items() if data != before.get(name)}
    (generation,) = second.manifest.provenance["generations"]
    assert changed == {"manifest.json", f"records/{generation}.json"}
    assert after.keys() == before.keys()


def test_a_corpus_from_before_tables_had_digests_stays_and_gets_them(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 10))
    result, before = run(tmp_path / "raw", tmp_path / "out"), content(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    (generation,) = (tmp_path / "out" / "records").glob("generation-*.json")
    for file, holder in ((manifest, "provenance"), (generation, None)):
        document = json.loads(file.read_text())
        del (document[holder] if holder else document)["tables"]
        file.write_text(json.dumps(document))
    assert Manifest.load(str(tmp_path / "out")).digest == result.manifest.digest
    assert run(tmp_path / "raw", tmp_path / "out").unchanged
    assert content(tmp_path / "out") == before


def test_a_damaged_table_is_named_and_what_came_of_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw", plain(0, 10))
    tree, table = tmp_path / "raw" / "ontology.json", tmp_path / "raw" / "metadata.csv"
    tree.write_text(json.dumps({"root": list(raw_corpus.LABELS)}))
    tracked = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    arguments = ["source=csv", f"input={tmp_path}/raw", f"output={tmp_path}/out", *tracked]
    assert prepare_job.main(arguments) == 0
    verify = [f"of={tmp_path}/out", *tracked, "--verify"]
    capsys.readouterr()
    assert lineage_job.main(verify) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified: 3 same, 1 unchecked"
    assert lineage_job.main([f"of={sha256(table.read_bytes())}", *tracked]) == 0
    assert "corpus out" in capsys.readouterr().out
    whole = table.read_bytes()
    table.write_bytes(whole.replace(b"caption 3", b"caption 4"))
    tree.unlink()
    assert lineage_job.main(verify) == 1
    lines = capsys.readouterr().out.splitlines()
    (changed,), (missing,) = ([line for line in lines if line.startswith(state)] for state in ("changed", "missing"))
    assert f"{table}: metadata.csv has the digest" in changed
    assert missing == f"missing   table ontology.json  {tree}: ontology.json is gone"


def test_another_source_joins_and_its_duplicates_are_found(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 16))
    first = run(tmp_path / "raw", tmp_path / "out", split="train")
    more = [*plain(60, 66), ("equal", raw_corpus.photograph(2), "seen again", "urticaria")]
    write(tmp_path / "more", [*more, ("near", recompressed(9), "seen nearly", "eczema")])
    second = run(tmp_path / "more", tmp_path / "out", split="train")
    found = samples(tmp_path / "out")
    assert (second.manifest.version, second.manifest.num_samples) == (2, 16 + 6 + 1)
    assert {"aspect": "raw", "text": "seen again"} in found["p02"]["captions"]
    assert "urticaria" in found["p02"]["labels"]
    assert "urticaria" in Ontology.load(str(tmp_path / "out"))
    assert found["near"]["duplicate_group"] == found["p09"]["duplicate_group"] is not None
    assert second.stats["rows"]["in"] == 16 + 8
    assert second.stats["duplicates"]["merged"] == 1
    kept = {shard.path for shard in first.manifest.shards} & {shard.path for shard in second.manifest.shards}
    assert {file.name for file in (tmp_path / "out" / "data").iterdir()} == {
        Path(shard.path).name for shard in second.manifest.shards
    }
    assert len(kept) < len(first.manifest.shards)
    assert [table.uri for table in second.tables] == [f"{tmp_path}/{name}/metadata.csv" for name in ("more", "raw")]
    assert run(tmp_path / "more", tmp_path / "out", split="train").unchanged
    assert run(tmp_path / "raw", tmp_path / "out", split="train").unchanged
    with pytest.raises(CorpusError, match="made with other settings, and it holds csv of .*if_exists=replace"):
        run(tmp_path / "raw", tmp_path / "out", split="train", jpeg_quality=70)
    alone = run(tmp_path / "raw", tmp_path / "out", split="train", if_exists="replace")
    assert (alone.manifest.version, alone.manifest.num_samples) == (1, 16)


def test_a_bad_image_that_is_mended_is_taken_in(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 10))
    (tmp_path / "raw" / "p04.jpg").write_bytes(b"")
    first = run(tmp_path / "raw", tmp_path / "out", max_dropped_fraction=0.5)
    assert first.stats["dropped"] == {"zero_byte": 1}
    write(tmp_path / "raw", plain(0, 12))
    (tmp_path / "raw" / "p04.jpg").write_bytes(b"")
    second = run(tmp_path / "raw", tmp_path / "out", max_dropped_fraction=0.5)
    assert second.stats["rows"] == {"in": 12, "in_samples": 11, "dropped": 1}
    (tmp_path / "raw" / "p04.jpg").write_bytes(raw_corpus.photograph(4))
    third = run(tmp_path / "raw", tmp_path / "out", max_dropped_fraction=0.5)
    assert third.stats["rows"] == {"in": 12, "in_samples": 12, "dropped": 0}
    assert (third.manifest.version, third.manifest.num_samples) == (2, 12)


def test_rows_that_have_gone_make_the_corpus_anew(tmp_path: Path) -> None:
    write(tmp_path / "raw", plain(0, 12))
    run(tmp_path / "raw", tmp_path / "out")
    write(tmp_path / "raw", plain(2, 12))
    result = run(tmp_path / "raw", tmp_path / "out")
    assert (result.manifest.version, result.manifest.num_samples) == (1, 10)
    fresh = run(tmp_path / "raw", tmp_path / "fresh")
    assert content(tmp_path / "fresh") == content(tmp_path / "out")
    assert fresh.manifest == result.manifest
