"""jobs/prepare.py as a program: exit codes and one-line errors, and the same road over S3."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from dermray import storage
from dermray.commands import prepare as prepare_job
from dermray.corpus.manifest import Manifest
from tests import raw_corpus
from tests.conftest import ROOT
from tests.s3 import BUCKET, HALF, SHORT_BODY, SLOW_DOWN, FaultyProxy, faulty_s3

COMMON = ["source=csv", "rows_per_shard=8", "tracking.enabled=false"]


def job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return start("prepare", *COMMON, *arguments, **environment)


def start(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def s3(server: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An S3 server on loopback that this process uses."""
    for name, value in {**server.environment, "DERMRAY_S3_CLIENT": "pyarrow"}.items():
        monkeypatch.setenv(name, value)
    storage._remote_filesystem.cache_clear()
    server.reset()
    yield server
    storage._remote_filesystem.cache_clear()


def remote_job(server: FaultyProxy, client: str, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A driver that joins the session's cluster; its tasks reach the server as it does itself."""
    known = {**server.environment, "DERMRAY_S3_CLIENT": client}
    address = ray.get_runtime_context().gcs_address
    told = json.dumps({"runtime_env": {"env_vars": known}})
    return start(name, *arguments, f"cluster.address={address}", **known, RAY_JOB_CONFIG_JSON_ENV_VAR=told)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A raw corpus on disk, and beside it what it gives."""
    folder = tmp_path_factory.mktemp("local")
    raw_corpus.write(folder / "raw", num_good=20)
    (folder / "raw" / "images" / "003.jpg").unlink()
    (folder / "raw" / "images" / "004.jpg").write_bytes(b"")
    arguments = [f"input={folder}/raw", f"output={folder}/out", "max_dropped_fraction=0.5"]
    assert prepare_job.main([*COMMON, *arguments]) == 0
    return folder


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("client", "gone"), [("pyarrow", 1), pytest.param("s3fs", 0, marks=pytest.mark.long, id="s3fs")]
)
def test_s3_in_and_out_equals_local(local: Path, s3: FaultyProxy, client: str, gone: int) -> None:
    """Slow: two drivers start. What the store fails to do is tried again; an object that is gone is a bad row, once."""
    storage.copy_tree(str(local / "raw"), f"s3://{BUCKET}/raw")
    output = f"s3://{BUCKET}/prepared-{client}"
    arguments = ["prepare", *COMMON, f"input=s3://{BUCKET}/raw", f"output={output}", "max_dropped_fraction=0.5"]
    s3.reset()
    for key, fault in {"007": 503, "008": SHORT_BODY, "009": HALF}.items():
        s3.inject(fault, 1, method="GET", key=f"raw/images/{key}.jpg")
    s3.inject(404, gone, method="GET", key="raw/images/011.jpg")
    s3.inject(SLOW_DOWN, 1, method="PUT", key=f"prepared-{client}/data")
    first = remote_job(s3, client, *arguments)
    assert first.returncode == 0, first.stderr
    assert s3.fired == 4 + gone
    assert dropped(output) == ["missing_file"] * (1 + gone) + ["zero_byte"]
    second = remote_job(s3, client, *arguments)
    assert second.returncode == 0, second.stderr
    assert ("unchanged" in second.stdout) == (not gone)
    assert dropped(output) == ["missing_file", "zero_byte"]
    here, there = Manifest.load(str(local / "out")), Manifest.load(output)
    assert there.shards == here.shards
    assert there.digest == here.digest
    files = {f"{output}/{file.relative_to(local / 'out')}" for file in (local / "out").rglob("*") if file.is_file()}
    same = ("manifest.json", "ontology.json", "/data/")
    assert {file for file in storage.list_files(output, recursive=True) if any(part in file for part in same)} == {
        file for file in files if any(part in file for part in same)
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
def test_leakage_between_corpora_on_s3(local: Path, s3: FaultyProxy) -> None:
    """Slow: a driver starts. A corpus leaks into its copy, sample by sample, though the store fails now and then."""
    corpus, copied, output = (f"s3://{BUCKET}/{name}" for name in ("leaking", "evaluated", "leakage"))
    for uri in (corpus, copied):
        storage.copy_tree(str(local / "out"), uri)
    s3.reset()
    for fault in (503, SHORT_BODY):
        s3.inject(fault, 1, method="GET", key="leaking/data/train")
    arguments = [f"corpus={corpus}", f"against=[{copied}#train]", f"output={output}"]
    done = remote_job(s3, "pyarrow", "leakage", *arguments, "tracking.enabled=false")
    assert done.returncode == 0, done.stderr
    assert s3.fired == 2
    num_train = Manifest.load(corpus).select("train").num_samples
    found = [each["num_samples_found"] for each in storage.read_json(f"{output}/leakage.json")["evaluations"]]
    assert found == [num_train]
    pairs = pq.read_table(io.BytesIO(storage.read_bytes(f"{output}/leakage.parquet")))
    assert pairs["sample_id"].to_pylist() == pairs["evaluation_sample_id"].to_pylist()
    assert b"<html" in storage.read_bytes(f"{output}/leakage.html")[:200]


def dropped(output: str) -> list[str]:
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{output}/report/dropped.parquet")))
    return sorted(table["reason"].to_pylist())


def test_a_refused_key_ends_before_ray_starts(tmp_path: Path) -> None:
    done = job(f"input={tmp_path}", f"output={tmp_path}/out", "jpeg_quality=best")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "jpeg_quality" in done.stderr


def test_input_that_is_not_there_is_one_line_before_ray_starts(tmp_path: Path) -> None:
    done = job(f"input={tmp_path}/nowhere", f"output={tmp_path}/out")
    assert done.returncode == 1
    assert f"error: {tmp_path}/nowhere/metadata.csv does not exist" in done.stderr
    assert done.stderr.strip().count("\n") == 0
