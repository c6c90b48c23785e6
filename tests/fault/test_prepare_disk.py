"""A disk that is really full: one clear error, nothing published, and the same command goes on once there is room."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray import entry, images, ledger, storage
from dermray.commands import prepare as prepare_job
from dermray.errors import StorageError
from dermray.train import checkpoint
from dermray.vectors.embedding import store
from tests import raw_corpus
from tests.corpora import write_model
from tests.fault.conftest import Disk
from tests.raw_corpus import content

PAGE_BYTES = 4096
NUM_IMAGES = 32


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


def test_a_claim_on_a_full_disk_is_a_clear_error_and_leaves_none(disk: Disk) -> None:
    (disk.path / "large.bin").write_bytes(bytes(1 << 20))
    for output in (str(disk.path), str(disk.path / "out")):
        with pytest.raises(StorageError, match=rf"^{output}/.*No space left on device.*; free some space there$"):
            ledger.claim(output).__enter__()
    (disk.path / "large.bin").unlink()
    with ledger.claim(str(disk.path)):
        pass


def test_a_checkpoint_that_does_not_fit_names_its_file_and_leaves_the_older(disk: Disk) -> None:
    """torch itself says "unexpected pos 768 vs 662"."""

    def save(step: int, num_weights: int) -> None:
        state = {"step": step, "model": {"w": torch.zeros(num_weights)}}
        checkpoint.save(
            str(disk.path), step, state, trajectory={}, corpus_digest="c", retention=checkpoint.Retention(1)
        )

    save(4, 8)
    file = disk.path / "checkpoints" / "step-00000008" / "state.pt"
    with pytest.raises(StorageError, match=rf"^{file}: .*No space left on device.*; free some space there$"):
        save(8, 1 << 20)
    latest = checkpoint.load_latest(str(disk.path), trajectory={}, corpus_digest="c")
    assert latest is not None
    assert latest[0].step == 4
    disk.resize(64 << 20)
    save(8, 1 << 20)
    assert [info.step for info in checkpoint.committed(str(disk.path))] == [8]


def test_vectors_that_do_not_fit_name_their_file_and_are_not_taken_for_whole(disk: Disk, tmp_path: Path) -> None:
    """What evaluation and embedding keep: parts that were there stay, one that does not fit is made again."""
    disk.resize(256 << 10)
    model = write_model(tmp_path / "model")
    kept = store.Store.of(str(disk.path / "features"), str(model), precision="fp32")
    parts = [kept.texts([f"text {number} {row}" for row in range(512)]) for number in range(8)]
    vectors = np.random.default_rng(0).standard_normal((512, 32)).astype(np.float32)
    words = [f"key {row}" for row in range(512)]

    def fill() -> int:
        for number, part in enumerate(parts):
            try:
                store.write(part, vectors, words)
            except StorageError as error:
                message = rf"{part.uri}: .*No space left on device.*; free some space there"
                return number if re.fullmatch(message, str(error)) else -1
        return len(parts)

    num_written = fill()
    assert 0 < num_written < len(parts)
    said: list[str] = []
    found = kept.read(parts, said.append)
    assert [one is not None for one in found] == [number < num_written for number in range(len(parts))]
    assert not said
    assert not list(disk.path.rglob(f"*{storage.PART}"))
    with pytest.raises(StorageError, match=r"model\.json: .*No space left on device.*; free some space there$"):
        describe_when_full(kept, disk)
    disk.resize(64 << 20)
    kept.describe()
    assert fill() == len(parts)
    assert all(one is not None and np.array_equal(one.values, vectors) for one in kept.read(parts))


def describe_when_full(kept: store.Store, disk: Disk) -> None:
    """No page is left."""
    with suppress(OSError), (disk.path / "other").open("wb", buffering=0) as file:
        while file.write(bytes(PAGE_BYTES)):
            pass
    kept.describe()


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
