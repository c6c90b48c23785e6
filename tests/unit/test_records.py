"""Records that a run reads back, with any field missing or of another kind: read, or refused in one line by name."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray import config, storage
from dermray.commands.register import read_metric
from dermray.corpus import exchange
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.synthetic import writer as synthetic
from dermray.errors import DermRayError
from dermray.evaluate import compare, leakage
from dermray.export import manifest as export
from dermray.models import layout as models
from dermray.predict.model import _own_classes
from dermray.prepare import generations, records
from dermray.prepare.records import NOTES, ShardRecord
from dermray.raw.sources import webdataset
from dermray.raw.sources.rows import DroppedRow, RawTable, SourceRequest
from dermray.release import garbage, gate
from dermray.release.golden import Golden
from dermray.tracking import lineage, registry, runs
from dermray.train import checkpoint
from dermray.tuning import population
from dermray.tuning.basis import Basis
from dermray.tuning.plan import plan_trials
from dermray.tuning.records import RECORD_NAME, Exploit, Point, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from dermray.vectors.index import embeddings
from tests.conftest import ROOT
from tests.sweeps import CORPORA
from tests.unit.test_documents import JSON

ODD = (None, True, -1, 10**39, float("nan"), "x", [None], {"x": None})
DIGEST = "0" * 64

Read = Callable[[], object]


def shard_record(at: Path) -> tuple[dict[str, Any], Path, Read]:
    dropped = DroppedRow(1, "a", "a.jpg", "truncated", "")
    shard = Shard(
        path="data/train-00000.parquet", split="train", num_samples=1, num_bytes=3, sha256=DIGEST, row_groups=(1,)
    )
    record = ShardRecord("k", shard, 1, DIGEST, (dropped,), (3,), {"in": {"a": 1}}, {"b": {}}, NOTES.empty_table())
    table = pq.read_table(pa.BufferReader(record.to_bytes()))
    ((key, whole),) = table.schema.metadata.items()
    file, stored = at / "document.json", Path(records.record_uri(str(at), "k"))
    stored.parent.mkdir()

    def read() -> object:
        pq.write_table(table.replace_schema_metadata({key: file.read_bytes()}), stored)
        return records.read_record(str(at), "k")

    return json.loads(whole), file, read


def member(at: Path, document: dict[str, Any]) -> tuple[dict[str, Any], Path, Read]:
    """The .json of one of two samples in a tar: whatever it is, it costs its row at most, and no other."""
    file, good = at / "member.json", json.dumps(document).encode()
    request = SourceRequest(str(at))

    def read() -> object:
        with tarfile.open(at / "a.tar", "w") as archive:
            for name, data in {"a.json": file.read_bytes(), "a.jpg": b"x", "b.json": good, "b.jpg": b"x"}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        found = webdataset.read(request)
        assert found.table.num_rows + len(found.dropped) == 2
        assert all("\n" not in row.detail and row.reason == "malformed_row" for row in found.dropped)
        return found

    return document, file, read


def raw_member(at: Path) -> tuple[dict[str, Any], Path, Read]:
    document = {
        "caption": "a patch", "labels": ["nevus"], "concepts": ["scale"], "age": 3, "sex": "f", "skin_type": 2,
        "source": "s", "source_id": "i", "split": "train", "patient_id": "p", "group": "g", "other": 1,
    }  # fmt: skip
    return member(at, document)


def exchanged(at: Path) -> tuple[dict[str, Any], Path, Read]:
    sample = {"sample_id": "i", "phash": 3, "width": 1, "height": 1, "duplicate_group": None, "source": "s"}
    meta = {"age": 3.0, "sex": "f", "body_site": None, "symptoms": None}
    captions = [{"aspect": "raw", "text": "a patch"}]
    more = {"source_id": "1", "captions": captions, "labels": ["nevus"], "concepts": [], "skin_type": 2, "meta": meta}
    return member(at, exchange.to_document(sample | more | {"split": "train"}))


def generation(at: Path) -> tuple[dict[str, Any], Path, Read]:
    shard = at / "records"
    shard.mkdir()
    dropped = DroppedRow(1, "a", "a.jpg", "truncated", "")
    made = ("train-00000-abc",)
    record = ShardRecord(made[0], None, 1, DIGEST, (dropped,), (3,), {}, {}, NOTES.empty_table())
    records.write_record(str(at), record)
    identity = {"source": "csv", "input": "raw", "table": None, "columns": {}}
    whole = generations.Generation(
        1, identity, {"seed": 0}, made, made, 2, (dropped,), {"root": ["a"]}, (dropped,), (7,), {"duplicates": 1},
        ({"task": "x"},), ({"name": "b"},), (RawTable("raw/metadata.csv", 10, DIGEST),), {"sex": {"?": 1}},
    )  # fmt: skip
    Manifest(shards=(), provenance={"generations": [whole.key]}).save(str(at))
    return whole.to_json(), shard / f"{whole.key}.json", lambda: generations._load(str(at)).ontology


def started(at: Path) -> tuple[dict[str, Any], Path, Read]:
    document = {"key": "k", "corpus_digest": DIGEST, "paths": ["data/part-0.tar"]}
    return document, at / "started.json", lambda: export.read(export.Started, str(at / "started.json"))


def exported(at: Path) -> tuple[dict[str, Any], Path, Read]:
    file = {"path": "images", "num_bytes": 1, "sha256": DIGEST, "num_files": 3}
    document = {
        "key": "k", "corpus_digest": DIGEST, "config": {"format": "csv"}, "made_by": {"dermray": "1"},
        "splits": {"train": {"samples": 1}}, "files": [file],
    }  # fmt: skip
    return document, at / "export.json", lambda: export.read(export.ExportManifest, str(at / "export.json"))


def part_of_export(at: Path) -> tuple[dict[str, Any], Path, Read]:
    file = {"path": "images", "num_bytes": 1, "sha256": DIGEST, "num_files": None}
    return (
        {"files": [file], "counts": {"samples": 1}},
        at / "p.json",
        lambda: export.read(export.PartRecord, str(at / "p.json")),
    )


MAKER = {"name": "m", "embedding_dim": 2, "model_digest": DIGEST, "preprocessing_digest": DIGEST}


def embedded(at: Path) -> tuple[dict[str, Any], Path, Read]:
    part = {"name": "part-00000", "num_images": 1, "num_texts": 0, "failures": {"truncated": 1}}
    document = {
        "format_version": 1, "maker": MAKER, "corpus_uri": "c", "corpus_digest": DIGEST,
        "content": {"texts": False}, "parts": [part],
    }  # fmt: skip
    return document, at / embeddings.MANIFEST_NAME, lambda: embeddings.Embeddings.load(str(at)).num_images


def weights(at: Path) -> tuple[dict[str, Any], Path, Read]:
    """What a model folder says of itself, through all that reads it."""
    (at / models.WEIGHTS_NAME).write_bytes(b"weights")
    readers = (
        models.weights_digest,
        leakage.training_digest_of,
        leakage.training_split_of,
        registry.model_facts,
        lineage._described,
        _own_classes,
    )
    document = {
        "weights_sha256": storage.sha256(at / models.WEIGHTS_NAME), "corpus_digest": DIGEST, "licences": ["CC0"],
        "classes": ["a"], "mlflow_run_id": "r", "mlflow_run_key": "k", "kind": "clip",
        "recipe": {"data": {"split": "train"}},
    }  # fmt: skip
    return document, at / models.DERMRAY_NAME, lambda: [read(str(at)) for read in readers]


def state_of_run(at: Path) -> tuple[dict[str, Any], Path, Read]:
    file = at / "mlflow.json"
    client = SimpleNamespace(get_run=lambda _: SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active")))
    return (
        {"mlflow_run_id": "0" * 32, "run_key": "k"},
        file,
        lambda: (lineage._described(str(at)), runs._usable_state(client, str(file))),
    )


def step(at: Path) -> tuple[dict[str, Any], Path, Read]:
    folder = at / checkpoint.FOLDER / "step-00000001"
    folder.mkdir(parents=True)
    (folder / checkpoint.STATE_NAME).write_bytes(b"state")
    document = {
        "step": 1, "num_bytes": 5, "sha256": DIGEST, "trajectory": {"seed": 0}, "corpus_digest": DIGEST,
        "scores": {"loss": 1.0},
    }  # fmt: skip

    def read() -> object:
        keys = {"trajectory": {"seed": 0}, "corpus_digest": DIGEST}
        return [checkpoint.differences(info, **keys) for info in checkpoint.committed(str(at))]

    return document, folder / checkpoint.MANIFEST_NAME, read


def golden(at: Path) -> tuple[dict[str, Any], Path, Read]:
    vectors = np.eye(2, dtype=np.float32)
    Golden("p", ("a", "b"), (b"jpeg", b"jpeg"), vectors, vectors).save(str(at))
    file = at / "golden.json"
    return json.loads(file.read_text()), file, lambda: Golden.load(str(at))


def answer(at: Path) -> tuple[dict[str, Any], Path, Read]:
    """An answer of a server, looked up in a registry that knows its version."""

    def none(*_: object, **__: object) -> list[object]:
        return []

    def version(name: object, version: object) -> SimpleNamespace:
        return SimpleNamespace(name=name, version=version, run_id="r", tags={}, aliases=(), source="s")

    client = SimpleNamespace(
        get_model_version=version, search_model_versions=none, search_experiments=none, search_runs=none
    )
    document = {"ranking": [], "model_info": {"name": "derm", "version": "1", "digest": DIGEST}}
    return document, at / "answer.json", lambda: lineage._Explorer(client).find(str(at / "answer.json"))


def exploited(at: Path) -> tuple[dict[str, Any], Path, Read]:
    exploit = Exploit(1, "trial-000", 0.1, "trial-001", 0.2, 3, DIGEST, {"optim.lr": 0.1})
    population.save(str(at), 1, [exploit])
    file = Path(population._uri(str(at), 1))
    return json.loads(file.read_text()), file, lambda: population.load(str(at), 1)


def trial(at: Path) -> tuple[dict[str, Any], Path, Read]:
    exploit = Exploit(1, "trial-000", None, "trial-001", 0.2, 3, DIGEST, {"optim.lr": 0.1})
    basis, curve = Basis(DIGEST, {"seed": 0}), [Point(1, 2, 3, {"loss": 1.0})]
    record = TrialRecord("trial-000", {"a": 1}, Status.STOPPED, curve, exploits=[exploit], basis=basis)
    planned = SimpleNamespace(name="trial-000", params={"a": 1}, basis=basis, uri=str(at))

    def read() -> object:
        known = TrialRecord.load(planned)  # type: ignore[arg-type]
        present = {str(at / RECORD_NAME)}
        return (
            known.last_params,
            known.value("loss"),
            TrialRecord.params_at(str(at)),
            garbage._is_over(str(at), present),
        )

    return json.loads(json.dumps(asdict(record))), at / RECORD_NAME, read


def report(at: Path) -> tuple[dict[str, Any], Path, Read]:
    task = {"metrics": {"accuracy": {"value": 0.5}}, "predictions": None}
    document = {
        "model": {"uri": "m", "model_digest": DIGEST}, "corpus": {"uri": "c", "digest": DIGEST}, "tasks": {"t": task},
    }  # fmt: skip

    def read() -> object:
        return [
            gate.load_report(str(at)),
            read_metric(str(at), "t.accuracy"),
            compare.read_report(str(at))["tasks"]["t"],
        ]

    return document, at / "report.json", read


def suite(at: Path) -> tuple[dict[str, Any], Path, Read]:
    document = {"benchmarks": {"ham": {"report": "ham/report.json"}}}
    (at / "ham").mkdir()
    whole, file, _ = report(at / "ham")
    file.write_text(json.dumps(whole))
    return document, at / "report.json", lambda: gate.load_report(str(at))


def leaked(at: Path) -> tuple[dict[str, Any], Path, Read]:
    pq.write_table(pa.table({name: ["a"] for name in leakage.COLUMNS}), at / leakage.PAIRS_NAME)
    document = {
        "training": {"uri": "c", "digest": DIGEST}, "max_distance": 6,
        "evaluations": [{"uri": "e", "split": None, "digest": DIGEST}],
    }  # fmt: skip
    return document, at / leakage.JSON_NAME, lambda: leakage.Leakage.load(str(at))


def made_up(at: Path) -> tuple[dict[str, Any], Path, Read]:
    (at / synthetic.TABLE_NAME).write_text("")
    document = {"num_images": 3, "seed": 0, "generator_version": synthetic.GENERATOR_VERSION}
    return document, at / synthetic.RECORD_NAME, lambda: synthetic._finished(at, 3, 0)


def space(at: Path) -> tuple[dict[str, Any], Path, Read]:
    """A sweep's file, in YAML, of which JSON is a part."""
    document = {
        "recipe": str(ROOT / "jobs/configs/demo.yaml"), "corpus": "c", "output": "o", "num_trials": 4,
        "space": {
            "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
            "train.grad_clip_norm": {"kind": "int", "low": 1, "high": 9},
            "data.crop_scale": {"kind": "choice", "values": [[0.2, 1.0], [0.4, 1.0]]},
        },
        "scheduler": {"kind": "pbt", "quantile_fraction": 0.25}, "overrides": {"train.global_batch_size": 64},
    }  # fmt: skip
    file = at / "sweep.yaml"
    return document, file, lambda: plan_trials(config.parse(SweepConfig, ["--config", str(file)]), CORPORA)


KINDS: dict[str, Callable[[Path], tuple[dict[str, Any], Path, Read]]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        *(
            shard_record,
            raw_member,
            exchanged,
            generation,
            started,
            exported,
            part_of_export,
            embedded,
            weights,
            state_of_run,
            step,
            golden,
            answer,
        ),
        *(exploited, trial, report, suite, leaked, made_up, space),
    )
}


def changed(document: Any, *, depth: int = 0) -> Iterator[Any]:
    """A document with one field of it, or of what it holds, missing or something else."""
    places = list(document) if isinstance(document, dict) else range(len(document))
    for place in places:
        for odd in ODD:
            other = copy.copy(document)
            other[place] = odd
            yield other
        other = copy.copy(document)
        del other[place]
        yield other
        if isinstance(document[place], dict | list) and depth < 5:
            for inner in changed(document[place], depth=depth + 1):
                other = copy.copy(document)
                other[place] = inner
                yield other


def is_answered(read: Read, file: Path) -> str | None:
    """None, or what is wrong with how a file was refused."""
    try:
        read()
    except DermRayError as error:
        said = str(error)
        # Keys come from several files and the command line: of them, the key is named.
        is_named = file.suffix == ".yaml" or file.parent.name in said
        return None if is_named and "\n" not in said and len(said) < 2000 else f"says {said[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_with_anything_wrong_in_it_is_read_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    document, file, read = KINDS[kind](tmp_path)
    file.write_text(json.dumps(document))
    read()
    wrong = {}
    for other in changed(document):
        file.write_text(json.dumps(other))
        if (said := is_answered(read, file)) is not None:
            wrong[json.dumps(other)] = said
    for name, crafted in JSON.items():
        file.write_bytes(crafted if isinstance(crafted, bytes) else crafted.encode())
        if (said := is_answered(read, file)) is not None:
            wrong[name] = said
    assert not wrong, (len(wrong), sorted(set(wrong.values()))[:20])
