"""Images without any text: samples where a run asks for them, and in no batch of what learns from texts."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import SAMPLE
from dermray.errors import CorpusError
from dermray.evaluate.samples import Samples
from dermray.ingest.plan import EpochPlan
from dermray.prepare import report
from dermray.prepare.pipeline import read
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.train.objectives.contrastive import OBJECTIVE
from tests.raw_corpus import photograph

TEXTS = ["a rash", "", "N/A", "a mole", "", ""]
LABELS = ["", "", "", "", "psoriasis", ""]


def settings(folder: Path, columns: list[str], *keys: str) -> PrepareConfig:
    (folder / "raw").mkdir(exist_ok=True)
    with (folder / "raw" / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["image", *columns])
        for number, said in enumerate(zip(TEXTS, LABELS, strict=True)):
            (folder / "raw" / f"{number}.jpg").write_bytes(photograph(number))
            writer.writerow([f"{number}.jpg", *said[: len(columns)]])
    places = [f"input={folder / 'raw'}", f"output={folder / 'corpus'}", "max_dropped_fraction=1"]
    return parse(PrepareConfig, ["source=csv", *places, "split=train", "row_group_size=2", *keys])


def made(config: PrepareConfig) -> tuple[Manifest, list[ShardRecord]]:
    work = read(config)
    records = [ShardMaker(config, work.ontology).make(spec).record for spec in work.plan.shards]
    shards = tuple(record.shard for record in records if record.shard)
    return Manifest(shards=shards, provenance={"untexted": report.untexted(records)}), records


def test_they_are_dropped_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, ["caption", "label"])
    work = read(config)
    assert [(row.row, row.reason) for row in work.plan.dropped] == [(n, "empty_caption") for n in (2, 3, 5, 6)]
    assert "1 rows have a label and no caption" in capsys.readouterr().out
    assert "keep_untexted" not in config.content()
    assert made(config)[0].untexted == {}

    kept = settings(tmp_path, ["caption", "label"], "keep_untexted=true")
    capsys.readouterr()
    manifest, records = made(kept)
    assert "no caption" not in capsys.readouterr().out
    assert manifest.untexted == {"train": 3}
    rows = [row for shard in manifest.shards for row in pq.read_table(tmp_path / "corpus" / shard.path).to_pylist()]
    # The label of the fifth gives it a sentence of its own.
    assert sorted(len(row["captions"]) for row in rows) == [0, 0, 0, 1, 1, 1]
    assert pa.Table.from_pylist(rows, SAMPLE).num_rows == sum(record.num_rows for record in records) == len(TEXTS)


def test_a_table_of_images_alone_is_taken_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="neither captions .* keep_untexted=true to learn from images alone"):
        read(settings(tmp_path, []))
    manifest, _ = made(settings(tmp_path, [], "keep_untexted=true"))
    assert manifest.untexted == {"train": manifest.num_samples} == {"train": len(TEXTS)}


def test_contrastive_learning_draws_none_of_them(tmp_path: Path) -> None:
    assert OBJECTIVE.counts is not None
    config = settings(tmp_path, ["caption", "label"], "keep_untexted=true")
    manifest, _ = made(config)
    run = SimpleNamespace(corpus=config.output, data=SimpleNamespace(verify="auto"))
    drawn = OBJECTIVE.counts(run, split := manifest.select("train"))
    assert drawn is not None
    rows = [row for shard in manifest.shards for row in pq.read_table(tmp_path / "corpus" / shard.path).to_pylist()]
    np.testing.assert_array_equal(drawn(0), [bool(row["captions"]) for row in rows])
    np.testing.assert_array_equal(drawn(7), drawn(0))
    plan = EpochPlan(split, seed=0, epoch=0, global_batch_size=3, counts=drawn(0))
    assert plan.num_draws == 3
    # A corpus of which every sample has a text is drawn from as ever, and not even looked at.
    plain = manifest.model_copy(update={"provenance": {}})
    nowhere = SimpleNamespace(corpus="/nowhere", data=run.data)
    assert OBJECTIVE.counts(nowhere, plain.select("train")) is None


def test_evaluation_has_no_caption_of_them(tmp_path: Path) -> None:
    config = settings(tmp_path, ["caption", "label"], "keep_untexted=true")
    manifest, _ = made(config)
    manifest.save(config.output)
    samples = Samples.load(config.output, "train")
    assert sorted(str(caption) for caption in samples.captions) == ["None"] * 4 + ["a mole", "a rash"]
