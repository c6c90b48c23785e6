"""Export end to end on the session's Ray cluster: each format, again, and after a crash; and the job as a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dermray import storage
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.synthetic import write_corpus
from dermray.errors import StorageError
from dermray.export.manifest import EXPORT_NAME, STATE
from dermray.export.pipeline import ExportResult, export
from dermray.export.settings import ExportConfig
from dermray.export.work import begin, plan
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parents[2]
# Format → source that reads it back; `instruct` holds no whole samples.
FORMATS = {"webdataset": "webdataset", "open_clip_csv": "csv", "parquet": "parquet", "instruct": None}
NUM_IMAGES = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_corpus(str(folder / "raw"), num_images=NUM_IMAGES, seed=5)
    options = ["split={val: 0.3}", "rows_per_shard=8", "row_group_size=4", "sub_captions=2"]
    arguments = ["source=derm1m", f"input={folder}/raw", f"output={folder}/corpus", *options]
    assert prepare(parse(PrepareConfig, arguments)).manifest.num_samples == NUM_IMAGES
    return folder / "corpus"


def run(corpus: Path, output: Path, format: str, **options: Any) -> ExportResult:
    overrides = [f"{key}={value}" for key, value in ({"samples_per_file": 7} | options).items()]
    work = plan(parse(ExportConfig, [f"corpus={corpus}", f"output={output}", f"format={format}", *overrides]))
    return export(work, begin(work))


def content(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}


def samples(corpus: Path) -> dict[str, dict[str, Any]]:
    """All that a corpus holds, by id."""
    manifest = Manifest.load(str(corpus))
    rows = [row for shard in manifest.shards for row in pq.read_table(corpus / shard.path).to_pylist()]
    return {row["sample_id"]: row for row in rows}


@pytest.mark.parametrize(
    "format", [name if name == "parquet" else pytest.param(name, marks=pytest.mark.long) for name in sorted(FORMATS)]
)
def test_out_and_in_again_after_a_crash(format: str, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(corpus, output, format)
    assert (first.totals["samples"], first.num_parts_found, first.unchanged) == (NUM_IMAGES, 0, False)
    assert first.totals["captions"] >= NUM_IMAGES
    whole = content(output)
    again = run(corpus, output, format)
    assert (again.num_parts_written, again.unchanged, again.manifest) == (0, True, first.manifest)
    assert content(output) == whole
    # What a crash leaves: some parts with records, one whose file is gone, and no manifest.
    records = sorted(file for file in (output / STATE).iterdir() if file.name != "started.json")
    records[0].unlink()
    storage.remove(output / first.manifest.files[-1].path)
    (output / EXPORT_NAME).unlink()
    finished = run(corpus, output, format)
    assert (finished.num_parts_written, finished.unchanged) == (2, False)
    assert content(output) == whole
    if FORMATS[format] is None:
        return
    arguments = [f"source={FORMATS[format]}", f"input={output}", f"output={tmp_path}/back", "rows_per_shard=8"]
    back = prepare(parse(PrepareConfig, arguments))
    assert back.stats["rows"]["dropped"] == 0
    assert samples(tmp_path / "back") == samples(corpus)
    assert back.manifest.splits == Manifest.load(str(corpus)).splits


def test_an_output_that_cannot_be_written_is_one_clear_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(StorageError, match=r"tar-val-0000\d: .*run the same command again"):
        run(corpus, tmp_path, "webdataset")
    assert not (tmp_path / EXPORT_NAME).exists()
    (tmp_path / "val").unlink()
    assert run(corpus, tmp_path, "webdataset").totals["samples"] == NUM_IMAGES


def test_the_job_needs_no_cluster_where_there_is_nothing_to_do(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out", "webdataset")

    def job(*options: str) -> subprocess.CompletedProcess[str]:
        common = [f"corpus={corpus}", f"output={tmp_path}/out", "format=webdataset", "tracking.enabled=false"]
        # No cluster is at this address.
        options = ("cluster.address=127.0.0.1:1", *options)
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "export.py"), *common, *options],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    unchanged = job("samples_per_file=7")
    assert unchanged.returncode == 0, unchanged.stderr
    assert f"unchanged: {tmp_path}/out holds these {NUM_IMAGES} samples already" in unchanged.stdout
    refused = job("samples_per_file=8")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "holds an export of this corpus by other settings" in refused.stderr
