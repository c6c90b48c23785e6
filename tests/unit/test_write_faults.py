"""Every way in which the project writes x everything that goes wrong in a store: whole, or one error with its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import s3fs
import torch

from dermray import exclusive, ledger, models, object_stores, storage
from dermray.audit import leakage_report
from dermray.audit.leakage import Comparison as Compared
from dermray.audit.leakage import CorpusHashes, JoinedHashes, Leakage
from dermray.audit.leakage_settings import LeakageConfig
from dermray.audit.matches import Matches, Members
from dermray.corpus.manifest import Manifest
from dermray.errors import ClaimError, StorageError
from dermray.evaluate.comparison import Comparison
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.report import Report
from dermray.export.settings import ExportConfig
from dermray.export.work import begin, commit, plan
from dermray.prepare import report
from dermray.prepare.records import NOTES, ShardRecord, write_record
from dermray.prepare.rewriting.cache import Cache
from dermray.prepare.shard import write_shard
from dermray.raw.sources.rows import DroppedRow
from dermray.release.golden import Golden
from dermray.train import checkpoint, failures
from dermray.tuning.records import TrialRecord
from dermray.vectors.embedding import store
from dermray.vectors.index.vectors import build
from tests import without_ray
from tests.corpora import sample, write_model, write_prepared_corpus
from tests.s3 import (
    BUCKET,
    EXPIRED,
    GARBLED,
    KEPT_HALF,
    LOST,
    RESET,
    SHORT_BODY,
    SLOW_DOWN,
    UNLISTED,
    FaultyProxy,
    faulty_s3,
)
from tests.serving import save_embeddings

LASTING = 1_000_000
# What the store does, how often, and whether the write gets through all the same.
FAULTS: dict[str, tuple[int | str, int, bool]] = {
    "500 three times": (500, 3, True),
    "500": (500, LASTING, False),
    "503": (503, LASTING, False),
    "slow down": (SLOW_DOWN, LASTING, False),
    "403": (403, LASTING, False),
    "404": (404, LASTING, False),
    "expired": (EXPIRED, LASTING, False),
    "reset": (RESET, 1, True),
    "short answer": (SHORT_BODY, 1, True),
    "keeps half once": (KEPT_HALF, 1, True),
    "keeps half": (KEPT_HALF, LASTING, False),
    "garbles once": (GARBLED, 1, True),
    "garbles": (GARBLED, LASTING, False),
    "loses once": (LOST, 1, True),
    "loses": (LOST, LASTING, False),
}
# Those that some ways of writing meet each time; all of them at all ways take some minutes.
FEW = ("403", "keeps half")
BASE = f"s3://{BUCKET}/written"


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with faulty_s3() as running:
        yield running


@pytest.fixture
def s3(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The store; clients do not try again by themselves, and our own pauses are short."""
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("DERMRAY_S3_TIMEOUT_S", "20")
    # What a report of leakage shows is read by workers.
    without_ray.use(monkeypatch)
    monkeypatch.setattr(storage, "FIRST_BACKOFF_S", 0.0005)
    monkeypatch.setattr(exclusive, "SETTLE_S", 0.01)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 4)
    monkeypatch.setattr(object_stores, "CLIENT_ATTEMPTS", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    storage._remote_filesystem.cache_clear()
    proxy.reset()
    yield proxy
    proxy.reset()
    storage._remote_filesystem.cache_clear()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written from: a corpus, embeddings, a model and a checkpoint on the local disk."""
    folder = tmp_path_factory.mktemp("here")
    write_prepared_corpus(folder / "corpus", {"train": 6}, row_group_size=3)
    save_embeddings(folder / "embeddings", num_parts=1, rows=20)
    write_model(folder / "model")
    _checkpoint(str(folder / "donor"), 4)
    (folder / "large.bin").write_bytes(bytes(range(256)) * 16)
    return folder


def _staged(output: str, here: Path) -> None:
    with storage.staged(f"{output}/staged.bin") as path:
        path.write_bytes((here / "large.bin").read_bytes())


def _shard(output: str, here: Path) -> None:
    rows = [{**sample(index, "train"), "phash": index, "duplicate_group": None} for index in range(3)]
    write_shard(output, "train-00000", "train", rows, 2)


def _record(output: str, here: Path) -> None:
    notes = NOTES.empty_table()
    write_record(output, ShardRecord("train-00000-x", None, 0, "", (), (), {}, {}, notes))


def _dropped(output: str, here: Path) -> None:
    row = DroppedRow(1, "a", "a.jpg", "truncated", "ends early")
    report.write_dropped(f"{output}/dropped.parquet", [("/data/raw", row)])


def _leakage(output: str, here: Path) -> None:
    uri = str(here / "corpus")
    manifest = Manifest.load(uri)
    hashes = CorpusHashes(uri, manifest.digest, manifest, np.arange(6), np.arange(6, dtype=np.uint64))
    config = LeakageConfig(corpus=uri, output=output, against=("/data/other",))
    pairs = np.array([[0, 1], [2, 3]])
    apart, alone = np.array([0, 2]), Members.of(np.arange(6), 6)
    compared = Compared(config.parts()[0], hashes, Matches.of(pairs, apart, alone, alone), pairs, apart)
    leakage_report.write(config, Leakage(JoinedHashes((hashes,)), (compared,)))


def _evaluation(output: str, here: Path) -> None:
    found = ClassPredictions(["a", "b"], np.array([0, 1]), np.eye(2, dtype=np.float32), ("x", "y"))
    document = {
        "model": {"model_digest": "m", "preprocessing_digest": "p"},
        "corpus": {"split": "test", "digest": "c"},
    }
    Report(document, "<html></html>", {"zero_shot": found}).save(output)


def _vectors(output: str, here: Path) -> None:
    store.write(store.Part(f"{output}/part.parquet", {"num_rows": 2}), np.eye(2, dtype=np.float32), ["", ""])


def _export(format: Any) -> Callable[[str, Path], None]:
    def write(output: str, here: Path) -> None:
        work = plan(ExportConfig(corpus=str(here / "corpus"), output=output, format=format))
        found = begin(work)
        commit(work, {part: found.get(part) or work.write(part) for part in work.parts})

    return write


def _model(output: str, here: Path) -> None:
    model, _, _ = models.create(str(here / "model"))
    models.save(model, output, model_cfg=models.architecture(str(here / "model")), provenance={"corpus": "c"})


def _checkpoint(output: str, step: int) -> checkpoint.CheckpointInfo:
    state = {"step": step, "w": torch.full((8,), float(step))}
    return checkpoint.save(
        output, step, state, trajectory={"seed": 0}, corpus_digest="c", retention=checkpoint.Retention(1)
    )


def _adopt(output: str, here: Path) -> None:
    (donor,) = checkpoint.committed(str(here / "donor"))
    checkpoint.adopt(donor, output, trajectory={"seed": 0}, corpus_digest="c", sha256=donor.sha256)


def _cache(output: str, here: Path) -> None:
    cache = Cache(output, limit=2)
    cache.add({"a" * 64: ["a red patch"]})
    cache.add_failed({"b" * 64: "llm_refused"})


def _golden(output: str, here: Path) -> None:
    vectors = np.eye(2, dtype=np.float32)
    Golden("p", ("a", "b"), (b"jpeg", b"jpeg"), vectors, vectors).save(output)


def _trial(output: str, here: Path) -> None:
    TrialRecord("trial-000", {"optim.lr": 0.1}).save(SimpleNamespace(uri=f"{output}/trial-000"))  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[str, Path], object]] = {
    "write_bytes": lambda output, here: storage.write_bytes(f"{output}/a.bin", bytes(5000)),
    "write_text": lambda output, here: storage.write_text(f"{output}/a b.txt", "größe"),
    "write_json": lambda output, here: storage.write_json(f"{output}/nested/a.json", {"a": [1, None]}),
    "staged": _staged,
    "upload": lambda output, here: storage.upload(here / "large.bin", f"{output}/large.bin"),
    "copy_tree": lambda output, here: storage.copy_tree(here / "corpus" / "data", output),
    "manifest": lambda output, here: Manifest.load(str(here / "corpus")).save(output),
    "shard": _shard,
    "record": _record,
    "dropped rows": _dropped,
    "leakage": _leakage,
    "evaluation": _evaluation,
    "comparison": lambda output, here: Comparison({"comparisons": {}}, "<html></html>").save(output),
    "embedding store": _vectors,
    "index": lambda output, here: build(str(here / "embeddings"), output),
    "export webdataset": _export("webdataset"),
    "export open_clip_csv": _export("open_clip_csv"),
    "export parquet": _export("parquet"),
    "export make_table": _export("make_table"),
    "export instruct": _export("instruct"),
    "model folder": _model,
    "checkpoint": lambda output, here: _checkpoint(output, 8),
    "adopted checkpoint": _adopt,
    "rewriting cache": _cache,
    "golden embeddings": _golden,
    "trial": _trial,
    "failure note": lambda output, here: failures.record(output, 0, 4, checkpoint.CheckpointError("on purpose")),
}


def content(uri: str) -> dict[str, bytes]:
    return {file: storage.read_bytes(file) for file in storage.list_files(uri, recursive=True)}


def check(write: Callable[[], object], fault: str, uri: str, proxy: FaultyProxy, whole: dict[str, bytes]) -> None:
    """The fault at one object: whole in the end, or one error that names it, and nothing committed that lacks it."""
    kind, times, survives = FAULTS[fault]
    proxy.reset()
    proxy.inject(kind, times, method="PUT", key=storage.name_of(uri).replace(" ", "%20"))
    if survives:
        write()
    else:
        with pytest.raises(StorageError) as caught:
            write()
        assert type(caught.value) is StorageError
        assert uri in str(caught.value)
        assert "\n" not in str(caught.value)
    assert proxy.fired >= (min(times, 3) if survives else 1)
    proxy.reset()
    found = content(BASE)
    if survives:
        assert found == whole
    else:
        assert found.get(uri) != whole[uri] or not whole[uri]
        # Only what came before it is there: no manifest or page tells of what is not.
        assert {name: data for name, data in found.items() if name != uri}.items() < whole.items()


def matrix(name: str, faults: Iterable[str], s3: FaultyProxy, here: Path, *, last_only: bool = False) -> None:
    """Each fault at the first and at the last object that a way of writing makes, by name."""

    def write() -> object:
        return WRITERS[name](BASE, here)

    def clear() -> None:
        storage.remove(BASE)

    clear()
    write()
    whole = content(BASE)
    assert whole
    objects = list(whole)
    for fault in faults:
        for uri in {objects[-1 if last_only else 0], objects[-1]}:
            clear()
            check(write, fault, uri, s3, whole)
    clear()


@pytest.mark.parametrize("name", ["write_bytes", "upload", "copy_tree", "evaluation", "export parquet", "checkpoint"])
def test_every_write_is_whole_or_one_error(name: str, s3: FaultyProxy, here: Path) -> None:
    matrix(name, FEW, s3, here, last_only=True)


@pytest.mark.parametrize("name", ["leakage", "evaluation", "comparison", "index"])
def test_a_run_that_stood_still_and_wakes_before_it_commits_leaves_nothing(
    name: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim has gone meanwhile, and with it the right to write."""
    without_ray.use(monkeypatch)
    output = str(tmp_path / "output")
    manifests = {"leakage.json", "report.json", "comparison.json", "index.json"}
    with ledger.claim(output):
        storage.remove(storage.join(output, ledger.FOLDER))
        with pytest.raises(ClaimError, match="its claim was removed"):
            WRITERS[name](output, here)
    assert not manifests & {storage.name_of(uri) for uri in content(output)}
    assert name == "index" or content(output) == {}
    WRITERS[name](output, here)
    assert manifests & {storage.name_of(uri) for uri in content(output)}


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_every_write_under_every_fault(name: str, s3: FaultyProxy, here: Path) -> None:
    matrix(name, FAULTS, s3, here)


@pytest.mark.parametrize(("client", "faults"), [("pyarrow", FAULTS), ("s3fs", FEW)])
def test_every_fault(
    client: str, faults: Iterable[str], s3: FaultyProxy, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMRAY_S3_CLIENT", client)
    matrix("staged", faults, s3, here)


@pytest.mark.long
@pytest.mark.parametrize("name", ["write_bytes", "staged", "checkpoint", "evaluation", "export parquet"])
def test_every_fault_through_s3fs(name: str, s3: FaultyProxy, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMRAY_S3_CLIENT", "s3fs")
    matrix(name, FAULTS, s3, here)


# Faults of objects that are sent in parts: method, part of the request's address, what and how often, whole in the end.
PARTS: dict[str, tuple[str, str, int | str, int, bool]] = {
    "all parts 403": ("PUT", "partNumber", 403, LASTING, False),
    "part 2 alone 500": ("PUT", "partNumber=2", 500, LASTING, False),
    "part 2 once": ("PUT", "partNumber=2", 500, 1, True),
    "part 2 lost once": ("PUT", "partNumber=2", LOST, 1, True),
    "part 3 kept by half": ("PUT", "partNumber=3", KEPT_HALF, LASTING, False),
    "not begun": ("POST", "uploads", SLOW_DOWN, LASTING, False),
    "not completed": ("POST", "uploadId=", 500, LASTING, False),
    "not completed once": ("POST", "uploadId=", 500, 1, True),
    "completed without an answer": ("POST", "uploadId=", RESET, 1, True),
    "completing refused": ("POST", "uploadId=", 403, LASTING, False),
}
LARGE = 2 * object_stores.PART_BYTES + 12_345


def _large_bytes(output: str, data: bytes) -> None:
    storage.write_bytes(f"{output}/large.bin", data)


def _large_file(output: str, data: bytes) -> None:
    with storage.staged(f"{output}/large.bin") as path:
        path.write_bytes(data)


def parts(
    write: Callable[[str, bytes], None], faults: Iterable[str], s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of a large object that replaces a small one: the new or the old is there, never a piece."""
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 2)
    data, uri = os.urandom(LARGE), f"{BASE}/large.bin"
    for fault in faults:
        method, key, kind, times, survives = PARTS[fault]
        storage.write_bytes(uri, b"old")
        s3.reset()
        s3.inject(kind, times, method=method, key=key)
        if survives:
            write(BASE, data)
        else:
            with pytest.raises(StorageError, match=uri):
                write(BASE, data)
        assert s3.fired >= 1
        s3.reset()
        if fault != "part 3 kept by half":
            assert storage.read_bytes(uri) == (data if survives else b"old")


@pytest.mark.parametrize("client", ["pyarrow", "s3fs"])
def test_a_large_object_is_whole_or_one_error(client: str, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMRAY_S3_CLIENT", client)
    parts(_large_file, ["all parts 403", "not completed"], s3, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("client", ["pyarrow", "s3fs"])
@pytest.mark.parametrize("write", [_large_bytes, _large_file])
def test_a_large_object_under_every_fault(
    client: str, write: Callable[[str, bytes], None], s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMRAY_S3_CLIENT", client)
    parts(write, PARTS, s3, monkeypatch)


def test_a_good_checkpoint_stays_while_newer_ones_fail(s3: FaultyProxy) -> None:
    """Retention keeps one; the store takes no state after the first."""
    storage.remove(BASE)
    _checkpoint(BASE, 10)
    for step, kind in ((20, 403), (30, KEPT_HALF), (40, LOST), (50, GARBLED)):
        s3.inject(kind, LASTING, method="PUT", key=f"step-{step:08d}/state.pt")
        with pytest.raises(StorageError, match=rf"step-{step:08d}/state\.pt"):
            _checkpoint(BASE, step)
        latest = checkpoint.load_latest(BASE, trajectory={"seed": 0}, corpus_digest="c")
        assert latest is not None
        assert latest[0].step == 10
    _checkpoint(BASE, 60)
    assert [info.step for info in checkpoint.committed(BASE)] == [60]
    storage.remove(BASE)


def test_checkpoints_that_are_listed_late_or_deleted_cost_no_other(s3: FaultyProxy) -> None:
    storage.remove(BASE)
    _checkpoint(BASE, 10)
    s3.inject(UNLISTED, LASTING, method="GET", key="list-type=2")
    _checkpoint(BASE, 20)
    assert s3.fired
    s3.reset()
    assert [info.step for info in checkpoint.committed(BASE)] == [10, 20]
    storage.remove(f"{BASE}/checkpoints/step-00000020/state.pt")
    latest = checkpoint.load_latest(BASE, trajectory={"seed": 0}, corpus_digest="c")
    assert latest is not None
    assert latest[0].step == 10
    storage.remove(BASE)


def test_expired_credentials_are_said_and_cost_nothing(s3: FaultyProxy) -> None:
    storage.remove(BASE)
    _checkpoint(BASE, 10)
    s3.inject(EXPIRED, LASTING, method="PUT", key="step-00000020")
    with pytest.raises(StorageError, match=r"state\.pt: .*expired: renew them and run the same command again"):
        _checkpoint(BASE, 20)
    assert s3.fired == 1 or s3.requests.count(s3.requests[-1]) == 1
    s3.reset()
    assert [info.step for info in checkpoint.committed(BASE)] == [10]
    s3.inject(EXPIRED, LASTING, method="GET", key="state.pt")
    s3.inject(EXPIRED, LASTING, method="HEAD", key="state.pt")
    with pytest.raises(StorageError, match=r"step-00000010/state\.pt"):
        checkpoint.load_latest(BASE, trajectory={"seed": 0}, corpus_digest="c")
    s3.reset()
    storage.remove(BASE)


@pytest.mark.parametrize("client", ["pyarrow", pytest.param("s3fs", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [
        "embedding store",
        "shard",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("record", "export webdataset", "export parquet")),
    ],
)
def test_expired_credentials_are_said_by_every_writer(
    name: str, client: str, s3: FaultyProxy, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They expire at the last object: one line says so, asked once, and nothing is there that tells of it."""
    monkeypatch.setenv("DERMRAY_S3_CLIENT", client)
    storage.remove(BASE)
    WRITERS[name](BASE, here)
    whole = content(BASE)
    storage.remove(BASE)
    last = list(whole)[-1]
    s3.reset()
    s3.inject(EXPIRED, LASTING, method="PUT", key=storage.name_of(last))
    with pytest.raises(StorageError, match="expired: renew them and run the same command again") as caught:
        WRITERS[name](BASE, here)
    assert str(caught.value).startswith(f"{last}: ")
    assert "\n" not in str(caught.value)
    assert s3.fired == 1
    s3.reset()
    assert content(BASE).items() <= {uri: data for uri, data in whole.items() if uri != last}.items()
    WRITERS[name](BASE, here)
    assert content(BASE) == whole
    storage.remove(BASE)
