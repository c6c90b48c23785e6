"""Outputs where this account may not write: one line names the place and says what to do, whatever was written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dermray import ledger, object_stores, storage
from dermray.errors import StorageError
from tests import raw_corpus
from tests.conftest import ROOT
from tests.corpora import write_prepared_corpus
from tests.serving import save_embeddings

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="dermray-rights-") as name:
        os.chmod(name, 0o755)
        raw_corpus.write(Path(name, "raw"), num_good=4)
        write_prepared_corpus(Path(name, "corpus"), {"train": 4})
        save_embeddings(Path(name, "embeddings"))
        yield Path(name)


@pytest.fixture
def read_only(folder: Path) -> Path:
    path = folder / "read-only"
    path.mkdir()
    (path / ".claim").mkdir()
    for each in (path / ".claim", path):
        each.chmod(0o555)
    return path


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere. Another account may not read Python's own files, so what may be imported is before."""
    object_stores.store_errors()
    ledger.Holder.this_process()
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def _stage(uri: str) -> None:
    with storage.staged(f"{uri}/a.bin") as path:
        path.write_bytes(b"content")


def _claim(uri: str) -> None:
    with ledger.claim(uri):
        raise AssertionError("claimed")


@pytest.mark.parametrize(
    "write",
    [
        lambda uri: storage.write_bytes(f"{uri}/a.bin", b"content"),
        lambda uri: storage.write_bytes(f"{uri}/nested/a.bin", b"content"),
        lambda uri: storage.upload(__file__, f"{uri}/a.py"),
        _stage,
        _claim,
        lambda uri: _claim(f"{uri}/nested"),
    ],
)
def test_a_folder_that_may_not_be_written_to_is_named(write: Callable[[str], None], read_only: Path) -> None:
    with as_nobody(), pytest.raises(StorageError, match=r"Permission denied.*; this account may not: change") as caught:
        write(str(read_only))
    assert str(caught.value).startswith(str(read_only))
    assert "\n" not in str(caught.value)
    assert [path.name for path in read_only.rglob("*")] == [".claim"]


@pytest.mark.parametrize(
    "command",
    [
        "prepare.py source=csv input=raw tracking.enabled=false",
        "index.py embeddings=embeddings tracking.enabled=false",
        pytest.param("pretrain.py corpus=corpus toy=true tracking.enabled=false", marks=pytest.mark.long),
        pytest.param("export.py corpus=corpus format=parquet tracking.enabled=false", marks=pytest.mark.long),
        pytest.param("embed.py corpus=corpus model=model tracking.enabled=false", marks=pytest.mark.long),
        pytest.param("synthesize.py num_images=4", marks=pytest.mark.long),
    ],
)
def test_a_job_whose_output_may_not_be_written_to_ends_in_one_line(command: str, folder: Path, read_only: Path) -> None:
    rights: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to take that right away")
        rights = ["setpriv", "--bounding-set", "-dac_override"]
    job, *arguments = command.split()
    done = subprocess.run(
        [*rights, sys.executable, str(ROOT / "jobs" / job), *arguments, f"output={read_only}/out"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(read_only) in errors[0]
    assert "Permission denied" in errors[0]
    assert "rights" in errors[0]
