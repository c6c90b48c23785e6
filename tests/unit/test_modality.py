"""The kind of picture: read from tables, kept in shards where a source says it, and nowhere guessed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.config import parse
from dermray.corpus import exchange
from dermray.corpus.manifest import Manifest
from dermray.corpus.modality import MODALITIES, modality
from dermray.corpus.schema import SAMPLE, WHOLE
from dermray.corpus.shards import ShardIndex
from dermray.export import parquet as exported
from dermray.export.parts import Samples
from dermray.prepare import card, report
from dermray.prepare.amend import Amender
from dermray.prepare.digests import image_digests
from dermray.prepare.pipeline import Work, read
from dermray.prepare.reconcile import reconcile
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.raw.sources import READERS, SourceRequest
from tests.raw_corpus import photograph
from tests.raw_sources import LAYOUTS

# What the layouts of tests/raw_sources.py say of each row's picture; of the others nobody says anything.
KNOWN = {
    **{source: {"clinical"} for source in ("fitzpatrick17k", "pad_ufes_20", "skincap", "skincon")},
    "derm7pt": {"clinical", "dermoscopic"},
    "ham10000": {"dermoscopic"},
    "isic": {"dermoscopic"},
}


def write(folder: Path, kinds: list[str], column: str = "modality") -> PrepareConfig:
    """A table of a row for each cell of modalities, the images unlike each other."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["image", "caption", column])
        for number, kind in enumerate(kinds):
            (folder / f"{number}.jpg").write_bytes(photograph(number))
            writer.writerow([f"{number}.jpg", f"caption {number}", kind])
    keys = ["source=csv", f"input={folder}", f"output={folder.parent / 'corpus'}", "split=train", "rows_per_shard=2"]
    return parse(PrepareConfig, [*keys, "near_duplicates=keep"])


def made(config: PrepareConfig, work: Work) -> list[ShardRecord]:
    maker = ShardMaker(config, work.ontology, with_modality=work.with_modality)
    return [maker.make(spec).record for spec in work.plan.shards]


def manifest(records: list[ShardRecord]) -> Manifest:
    shards = tuple(record.shard for record in records if record.shard)
    return Manifest(shards=shards, provenance={"modalities": report.modalities(records)})


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        *(("Dermoscopy", "dermoscopic"), (" dermatoscopic  image", "dermoscopic"), ("clinical: close-up", "clinical")),
        *(("TBP tile: close-up", "total-body"), ("total_body", "total-body"), ("Histopathology", "pathology")),
        *(
            ("RCM: mosaic", "confocal"),
            ("RCM: macroscopic", None),
            ("overview", None),
            ("microscopy", None),
            ("", None),
        ),
        *((kind, kind) for kind in MODALITIES),
    ],
)
def test_only_words_that_say_it_are_read(cell: str, kind: str | None) -> None:
    assert modality(cell) == kind


@pytest.mark.parametrize("source", sorted(READERS))
def test_a_source_says_what_its_layout_guarantees(source: str, tmp_path: Path) -> None:
    LAYOUTS[source].write(tmp_path)
    request = SourceRequest(str(tmp_path))
    raw = READERS[source](request)
    assert set(raw.table["modality"].to_pylist()) == KNOWN.get(source, {None})
    assert not request.findings.unread_modalities
    # A corpus from before it was read holds the same rows.
    without = raw.table.drop_columns("modality")
    assert image_digests(raw.table, "in").tolist() == image_digests(without, "in").tolist()


def test_texts_that_are_not_understood_are_told_with_their_rows_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "raw", ["dermoscopic", "ultrasound", "unknown", "", "ultrasound", "x-ray"], "kind")
    config = config.model_copy(update={"columns": config.columns.model_copy(update={"modality": "kind"})})
    work = read(config)
    told = "3 rows have a modality that is not understood, and kept as written: 'kind: ultrasound' (2), 'kind: x-ray'"
    assert told in (said := capsys.readouterr().out)
    assert "the first: rows 2, 5, 6" in said
    kind = "modalities that are not understood, only kept in meta.extra"
    assert work.told[kind] == {"kind: ultrasound": 2, "kind: x-ray": 1}
    samples = [row for record in made(config, work) for row in rows_of(config, record)]
    assert sorted((row["modality"], row["meta"]["extra"]) for row in samples if row["modality"]) == [
        ("dermoscopic", '{"kind": "dermoscopic"}')
    ]
    assert sum('"ultrasound"' in (row["meta"]["extra"] or "") for row in samples) == 2


def rows_of(config: PrepareConfig, record: ShardRecord) -> list[dict[str, Any]]:
    assert record.shard
    return pq.read_table(Path(config.output) / record.shard.path).to_pylist()


def schemas(config: PrepareConfig, records: list[ShardRecord]) -> list[pa.Schema]:
    return [pq.read_schema(Path(config.output) / record.shard.path) for record in records if record.shard]


def test_all_shards_of_a_corpus_have_the_column_or_none_has(tmp_path: Path) -> None:
    config = write(tmp_path / "raw", ["", "clinical", "", ""])
    records = made(config, read(config))
    assert [pq.read_schema(tmp_path / "corpus" / record.shard.path) for record in records if record.shard] == [
        WHOLE
    ] * 2
    assert (manifest(records).modalities, report.modalities(records)) == ({"clinical": 1}, {"clinical": 1})
    counts = {"modalities": {"clinical": 1}, "samples": 4}
    assert report._with_unknown(counts) == {"clinical": 1, "unknown": 3}

    silent = write(tmp_path / "silent", ["", "", "", ""])
    silent = silent.model_copy(update={"output": str(tmp_path / "other")})
    records = made(silent, read(silent))
    assert [pq.read_schema(tmp_path / "other" / record.shard.path) for record in records if record.shard] == [
        SAMPLE
    ] * 2
    assert report.modalities(records) == {}
    index = ShardIndex.of(silent.output, manifest(records))
    read_back = index.read(np.arange(4), ["sample_id", "modality"])
    assert read_back["modality"].to_pylist() == [None] * 4
    assert read_back.schema.field("modality").type == WHOLE.field("modality").type
    # A column that is left at its default is no other setting than builds without it had.
    assert "modality" not in silent.content()["columns"]


def test_shards_with_and_without_the_column_are_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path / "raw", ["", "", ""])
    records = made(old, read(old))
    new = write(tmp_path / "more", ["clinical", "", "dermoscopic"])
    more = made(new, read(new))
    # The second table's images are those of the first: equal ones merge, and are written again.
    decided = reconcile(records, more, policy="keep", near_groups=lambda hashes: np.arange(len(hashes)))
    amender = Amender(old.output, old.row_group_size, read(old).ontology, with_modality=True)
    final = [amender.make(each) for each in decided.amendments]
    whole = manifest(final)
    assert whole.modalities == {"clinical": 1, "dermoscopic": 1}
    mixed = manifest([*records, *more])
    told = ShardIndex.of(old.output, mixed).read(np.arange(6), ["modality"])["modality"].to_pylist()
    assert sorted(map(str, told)) == ["None"] * 4 + ["clinical", "dermoscopic"]

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    card.write(old.output, mixed)
    found = datasets.load_dataset(old.output, cache_dir=str(tmp_path / "cache"))["train"]
    # The shards that were written again lie there too, as long as nobody commits.
    assert set(found["modality"]) == {None, "clinical", "dermoscopic"}
    assert found.features.arrow_schema.field("captions").type.value_type.num_fields == 2


def test_an_export_gives_it_back_and_names_none_where_none_is_known(tmp_path: Path) -> None:
    config = write(tmp_path / "raw", ["clinical", ""])
    records = made(config, read(config))
    whole = manifest(records)
    samples = Samples.of(config.output, whole, ["train"])
    rows = list(samples.rows("train", 0, 2, samples.columns.names))
    documents = [exchange.to_document(row) for row in rows]
    assert [document.get("modality", "not named") for document in documents] == [
        row["modality"] or "not named" for row in rows
    ]
    assert [exchange.from_document(each)["modality"] for each in documents] == [row["modality"] for row in rows]
    with pytest.raises(ValueError, match="modality"):
        exchange.from_document({**documents[0], "modality": "x-ray"})
    assert "modality" in exported.exported(samples.columns).names
    plain = whole.model_copy(update={"provenance": {}})
    assert "modality" not in exported.exported(Samples.of(config.output, plain, ["train"]).columns).names
    back = READERS["parquet"](SourceRequest(config.output)).table
    assert sorted(map(str, back["modality"].to_pylist())) == ["None", "clinical"]
    changed = back.set_column(back.column_names.index("modality"), "modality", back["modality"].fill_null("pathology"))
    assert image_digests(back, "in").tolist() != image_digests(changed, "in").tolist()
