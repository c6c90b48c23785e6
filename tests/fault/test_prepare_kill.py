"""SIGKILL in the middle of jobs/prepare.py: the same command again gives what an undisturbed run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dermray.corpus.manifest import Manifest
from tests import raw_corpus
from tests.raw_corpus import content

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 360
ROWS_PER_SHARD = 24


def command(raw: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "jobs" / "prepare.py"),
        "source=csv",
        f"input={raw}",
        f"output={output}",
        f"rows_per_shard={ROWS_PER_SHARD}",
        # One task at a time, so that a kill finds some shards done and others not.
        "max_tasks=1",
        "cluster.num_cpus=2",
        "tracking.enabled=false",
    ]


def prepare(raw: Path, output: Path) -> str:
    done = subprocess.run(command(raw, output), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_when(process: subprocess.Popen[str], output: Path, num_records: int) -> None:
    """SIGKILL the job and the cluster it started, as soon as so many shards are finished."""
    deadline = time.monotonic() + 180
    while len(list((output / "records").glob("*-*.parquet"))) < num_records:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline, "no shard was finished in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_and_run_again_equals_undisturbed(tmp_path: Path) -> None:
    """Slow: four starts of a Ray cluster."""
    raw_corpus.write(tmp_path / "raw", num_good=NUM_IMAGES)
    prepare(tmp_path / "raw", tmp_path / "undisturbed" / "corpus")
    output = tmp_path / "killed" / "corpus"
    finished: set[Path] = set()
    for num_records in (1, 6):
        with subprocess.Popen(
            command(tmp_path / "raw", output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            kill_when(process, output, num_records)
        assert not (output / "manifest.json").exists(), "the kill came too late to show anything"
        finished = set((output / "records").glob("*-*.parquet"))
        made_at = {record: record.stat().st_mtime_ns for record in finished}
    said = prepare(tmp_path / "raw", output)
    assert f"{len(finished)} found finished" in said
    assert {record: record.stat().st_mtime_ns for record in finished} == made_at
    assert content(output) == content(tmp_path / "undisturbed" / "corpus")
    digests = [Manifest.load(str(tmp_path / name / "corpus")).digest for name in ("undisturbed", "killed")]
    assert digests[0] == digests[1]
