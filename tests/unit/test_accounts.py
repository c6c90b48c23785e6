"""Rows in = samples + rows told: every job goes through the one check, and one that loses a row is caught by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dermray.audit.leakage import CorpusHashes
from dermray.config import parse
from dermray.corpus.accounts import OTHER_SPLIT, require_balance, told_in_words
from dermray.evaluate.tables import Layout, RawTable
from dermray.export import work
from dermray.export.settings import ExportConfig
from dermray.ingest.plan import EpochPlan
from dermray.prepare import plan, reconcile, shard
from dermray.train.epochs import LEFT_OVER, NOT_DRAWN
from dermray.train.pretrain import samples_of_an_epoch
from dermray.train.settings import PretrainConfig
from dermray.vectors.index import embed, vectors
from dermray.vectors.index.settings import EmbedConfig
from tests import raw_corpus
from tests.corpora import write_prepared_corpus
from tests.serving import save_embeddings
from tests.unit import test_reconcile
from tests.unit.test_prepare_shard import make, settings

Patch = pytest.MonkeyPatch


def test_rows_in_are_rows_used_and_rows_told() -> None:
    figures = require_balance("x", 5, 2, {"a": 3, "b": 0})
    assert figures == {"in": 5, "used": 2, "told": {"a": 3}}
    assert told_in_words(figures, "rows") == "2 of 5 rows; left out: a 3"
    assert told_in_words(require_balance("x", 2, 2, {})) == "2 of 2 samples"
    with pytest.raises(AssertionError, match=r"x: 5 rows in, 2 used, 2 told \(a 2\)"):
        require_balance("x", 5, 2, {"a": 2, "b": 0})
    for used, told in ((6, {}), (6, {"a": -1})):
        with pytest.raises(AssertionError, match="x: 5 rows in, 6 used"):
            require_balance("x", 5, used, told)


def of_plan(folder: Path, patch: Patch) -> None:
    raw_corpus.write(folder / "raw", num_good=4)
    whole = plan.deal

    def less(*given: Any) -> list[pa.Table]:
        first, *others = whole(*given)
        return [first.slice(1), *others]

    patch.setattr(plan, "deal", less)
    make(settings(folder / "raw", folder / "out"))


def of_shard(folder: Path, patch: Patch) -> None:
    raw_corpus.write(folder / "raw", num_good=4)
    whole = shard.ShardMaker._fetched
    patch.setattr(shard.ShardMaker, "_fetched", lambda maker, rows: iter(list(whole(maker, rows))[:-1]))
    make(settings(folder / "raw", folder / "out"))


def of_duplicates(folder: Path, patch: Patch) -> None:
    whole = reconcile._shards
    patch.setattr(reconcile, "_shards", lambda *given: (whole(*given)[0][:-1], 0))
    test_reconcile.decide([test_reconcile.record("train-00000-a", [test_reconcile.note(1), test_reconcile.note(2)])])


def of_table(folder: Path, patch: Patch) -> None:
    raw_corpus.write(folder, num_good=4)
    layout = Layout(image=("image",), label=("label",), optional=frozenset({"label"}))
    table = RawTable.read(str(folder / "metadata.csv"), layout)
    assert table.samples(None, max_samples=3)
    replace(table, rows=table.rows[:-1]).samples(None)


def of_export(folder: Path, patch: Patch) -> None:
    write_prepared_corpus(folder / "corpus", {"train": 4, "val": 3})
    config = ExportConfig(corpus=str(folder / "corpus"), output=str(folder / "out"), format="parquet", splits=["train"])
    planned = work.plan(config)
    work.begin(planned)
    written = {part: planned.write(part) for part in planned.parts}
    manifest, _ = work.commit(planned, written)
    assert manifest.samples == {"in": 7, "used": 4, "told": {OTHER_SPLIT: 3}}
    short = {
        part: record.model_copy(update={"counts": record.counts | {"samples": part.last - part.first - 1}})
        for part, record in written.items()
    }
    work.commit(planned, short)


def of_embeddings(folder: Path, patch: Patch) -> None:
    manifest = write_prepared_corpus(folder / "corpus", {"train": 6, "val": 3})
    config = EmbedConfig(model="m", corpus=str(folder / "corpus"), output=str(folder / "out"), splits=["train"])
    pieces = embed.plan(config, manifest)
    size = sum(group.num_rows for group in pieces[0].groups)
    part = embed.Part(name="part-00000", num_images=size - 1, num_texts=0, failures={"truncated": 1})
    account = embed.accounted(manifest, pieces, [part])
    assert account == {"in": 9, "used": 5, "told": {OTHER_SPLIT: 3, "truncated": 1}}
    embed.accounted(manifest, pieces, [part.model_copy(update={"failures": {}})])


def of_index(folder: Path, patch: Patch) -> None:
    save_embeddings(folder / "embeddings", num_parts=1, rows=6)
    manifest = vectors.build(str(folder / "embeddings"), str(folder / "index"))
    assert manifest.samples == {"in": 6, "used": 6, "told": {}}
    whole = vectors.vectors_of
    patch.setattr(vectors, "vectors_of", lambda table: whole(table)[:-1])
    vectors.build(str(folder / "embeddings"), str(folder / "index"))


def of_leakage(folder: Path, patch: Patch) -> None:
    manifest = write_prepared_corpus(folder / "corpus", {"train": 6})
    hashes = CorpusHashes("corpus", "d", manifest, np.arange(5), np.arange(5, dtype=np.uint64), 1)
    assert hashes.account["used"] == 5
    _ = replace(hashes, num_unreadable=0).account


def of_epoch(folder: Path, patch: Patch) -> None:
    write_prepared_corpus(folder / "corpus", {"train": 10, "val": 3})
    config = parse(PretrainConfig, [f"corpus={folder / 'corpus'}", "output=o", "train.global_batch_size=4"])
    assert samples_of_an_epoch(config) == f"an epoch of the split train: 8 of 10 samples; left out: {LEFT_OVER} 2"
    keys = [f"corpus={folder / 'corpus'}", "output=o", "train.global_batch_size=4"]
    choosy = parse(PretrainConfig, [*keys, "objective.kind=tests.choosy:OBJECTIVE"])
    assert samples_of_an_epoch(choosy) == (
        f"an epoch of the split train draws 6 of 10 samples; left out: {NOT_DRAWN} 4; "
        f"of its draws: 8 of 9 draws; left out: {LEFT_OVER} 1"
    )
    whole = EpochPlan.num_streams.fget
    assert whole is not None
    patch.setattr(EpochPlan, "num_streams", property(lambda plan: whole(plan) - 1))
    samples_of_an_epoch(config)


JOBS: dict[str, Callable[[Path, Patch], None]] = {
    "plan of shards": of_plan,
    "shard": of_shard,
    "duplicates": of_duplicates,
    "metadata.csv": of_table,
    "export": of_export,
    "embeddings": of_embeddings,
    "index": of_index,
    "hashes of": of_leakage,
    "epoch": of_epoch,
}


@pytest.mark.parametrize("what", JOBS)
def test_a_job_that_loses_a_row_is_caught(what: str, tmp_path: Path, monkeypatch: Patch) -> None:
    with pytest.raises(AssertionError, match=rf"{what}.*: \d+ rows in, \d+ used"):
        JOBS[what](tmp_path, monkeypatch)
