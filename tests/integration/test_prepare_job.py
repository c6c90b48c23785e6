"""jobs/prepare.py as a program: exit codes and one-line errors, and the same road over S3."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dermray import storage
from dermray.corpus.manifest import Manifest
from tests import raw_corpus
from tests.s3 import BUCKET, SHORT_BODY, FaultyProxy, faulty_s3

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["source=csv", "rows_per_shard=8", "cluster.num_cpus=2", "tracking.enabled=false"]


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "prepare.py"), *COMMON, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An S3 server on loopback that this process and its children use."""
    with faulty_s3() as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        storage._remote_filesystem.cache_clear()
        yield proxy
        storage._remote_filesystem.cache_clear()


@pytest.mark.slow
def test_s3_in_and_out_equals_local(tmp_path: Path, s3: FaultyProxy) -> None:
    """Slow: three starts of a Ray cluster. The store fails now and then; what it says is tried again."""
    raw_corpus.write(tmp_path / "raw", num_good=20)
    (tmp_path / "raw" / "images" / "003.jpg").unlink()
    (tmp_path / "raw" / "images" / "004.jpg").write_bytes(b"")
    storage.copy_tree(str(tmp_path / "raw"), f"s3://{BUCKET}/raw")
    local = job(f"input={tmp_path}/raw", f"output={tmp_path}/out", "max_dropped_fraction=0.5")
    assert local.returncode == 0, local.stderr
    s3.reset()
    s3.inject(503, 2, method="GET", key="raw/images/007.jpg")
    s3.inject(SHORT_BODY, 1, method="GET", key="raw/images/008.jpg")
    remote = [
        job(f"input=s3://{BUCKET}/raw", f"output=s3://{BUCKET}/prepared", "max_dropped_fraction=0.5") for _ in range(2)
    ]
    assert [done.returncode for done in remote] == [0, 0], remote[0].stderr
    assert s3.fired == 3
    assert "unchanged" in remote[1].stdout
    here, there = Manifest.load(str(tmp_path / "out")), Manifest.load(f"s3://{BUCKET}/prepared")
    assert there.shards == here.shards
    assert there.digest == here.digest
    dropped = pq.read_table(io.BytesIO(storage.read_bytes(f"s3://{BUCKET}/prepared/report/dropped.parquet")))
    assert sorted(set(dropped["reason"].to_pylist())) == ["missing_file", "zero_byte"]


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
