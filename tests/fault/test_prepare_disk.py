"""A disk that is really full: one clear error, nothing published, and the same command goes on once there is room."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dermray import entry, images, storage
from dermray.errors import StorageError
from jobs import prepare as prepare_job
from tests import raw_corpus
from tests.raw_corpus import content

PAGE_BYTES = 4096
NUM_IMAGES = 32


@dataclass(frozen=True)
class Disk:
    """A file system of its own in memory."""

    path: Path

    def resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", self.path], check=True, timeout=30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no disk can be filled up")
    if mounted.returncode:
        pytest.skip(f"a disk of its own may not be mounted here, so none can be filled up: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True, timeout=30)


def test_a_full_disk_is_a_clear_error_and_leaves_the_old_content(disk: Disk) -> None:
    uri = str(disk.path / "state.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(StorageError, match=rf"^{uri}: .*No space left on device.*; free some space there$"):
        storage.write_bytes(uri, bytes(2 << 20))

    def write_staged() -> None:
        with storage.staged(uri) as aside:
            aside.write_bytes(bytes(2 << 20))

    with pytest.raises(StorageError, match=rf"^{uri}: .*No space left on device.*; free some space there$"):
        write_staged()
    assert {file.name: file.read_bytes() for file in disk.path.iterdir()} == {"state.bin": b"old"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_prepare_goes_on_when_there_is_room(disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too small for the shards, then for the report, then large enough."""
    raw = tmp_path / "raw"
    raw_corpus.write(raw, num_good=NUM_IMAGES)
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        noise = images.encode_jpeg(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), 90)
        (raw / "images" / f"{number:03d}.jpg").write_bytes(noise)
    output = disk.path / "corpus"

    def run(output: Path) -> tuple[int, str]:
        arguments = ["source=csv", f"input={raw}", f"output={output}", "rows_per_shard=4", "tracking.enabled=false"]
        code = entry.run_job(lambda: prepare_job.main(arguments))
        return code, capsys.readouterr().err

    assert run(tmp_path / "undisturbed" / "corpus")[0] == 0
    expected = content(tmp_path / "undisturbed" / "corpus")
    assert sum(map(len, expected.values())) > 1 << 20

    code, error = run(output)
    assert code == 1
    shard = re.search(r"error: shard (\w+-\d+): ", error)
    assert shard
    assert f"{output}/data/{shard[1]}-" in error
    assert "No space left on device" in error
    assert "; free some space there; finished shards are kept: run the same command again to go on" in error
    nothing_published(output)

    shards = [data for name, data in expected.items() if name.endswith(".parquet")]
    pages = sum(-(-len(data) // PAGE_BYTES) + 1 for data in shards)
    disk.resize((pages + 16) * PAGE_BYTES)
    code, error = run(output)
    assert code == 1
    assert f"error: {output}/" in error
    assert "No space left on device; free some space there" in error
    nothing_published(output)

    disk.resize(64 << 20)
    assert run(output) == (0, "")
    assert content(output) == expected


def nothing_published(output: Path) -> None:
    assert not (output / "manifest.json").exists()
    assert not list(output.rglob(f"*{storage.PART}"))
    for file in (output / "data").glob("*.parquet"):
        assert file.stem.rpartition("-")[2] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
