"""Whole jobs whose output is on a full disk: one line that names disk and file, no half result, the old one stays."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dermray import entry, storage
from tests.corpora import write_model, write_prepared_corpus
from tests.fault.conftest import Disk
from tests.raw_corpus import content
from tests.serving import save_embeddings

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]

PAGE_BYTES = 4096
NUM_SAMPLES = 48


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, a model and embeddings."""
    folder = tmp_path_factory.mktemp("inputs")
    write_prepared_corpus(folder / "corpus", {"train": NUM_SAMPLES, "val": 12})
    write_model(folder / "model")
    save_embeddings(folder / "embeddings", rows=200)
    save_embeddings(folder / "other-embeddings", rows=200, seed=1)
    return folder


@dataclass(frozen=True)
class Case:
    """A job; what it leaves last; how another result may go into its place; with how many free pages it is tried."""

    job: str
    arguments: tuple[str, ...]
    last: str
    again: tuple[str, ...]
    pages: tuple[int, ...]


CASES = {
    "embed": Case("embed", ("corpus={inputs}/corpus", "model={inputs}/model", "num_actors=1"), "embeddings.json",
                  (), (0, 12)),
    "export": Case("export", ("corpus={inputs}/corpus", "format=webdataset"), "export.json",
                   (), (0, 12)),
    "index": Case("index", ("embeddings={inputs}/embeddings",), "index.json",
                  ("embeddings={inputs}/other-embeddings",), (0, 4)),
    "leakage": Case("leakage", ("corpus={inputs}/corpus", "against=[{inputs}/corpus#val]"), "leakage.json",
                    ("max_distance=1",), (0, 4)),
    "evaluate": Case("evaluate", ("corpus={inputs}/corpus", "model={inputs}/model", "split=val", "bootstrap=20",
                                  "num_actors=1", "cache={inputs}/cache"), "report.json", ("bootstrap=21",), (0, 4)),
    "evaluate's cache": Case("evaluate", ("corpus={inputs}/corpus", "model={inputs}/model", "split=val", "bootstrap=20",
                                          "num_actors=1", "cache={disk}/cache"), "report.json", ("bootstrap=21",),
                             (0, 4)),
}  # fmt: skip


def run(job: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what stands on stderr."""
    capsys.readouterr()
    module = importlib.import_module(f"jobs.{job}")
    code = entry.run_job(lambda: module.main([*arguments, "tracking.enabled=false"]))
    return code, capsys.readouterr().err


def stays(last: str, before: dict[str, bytes], after: dict[str, bytes]) -> bool:
    """Whether all that was there is. Files of the next index, which name their content, may lie beside it."""
    kept = {name: data for name, data in after.items() if name in before or "-" not in name}
    return last in after and kept == before


def no_part_is_left(folder: Path) -> None:
    assert not list(folder.rglob(f"*{storage.PART}"))


@pytest.mark.parametrize("name", CASES)
def test_a_job_on_a_full_disk_ends_in_one_line_and_leaves_no_half_result(
    name: str, disk: Disk, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    shutil.rmtree(inputs / "cache", ignore_errors=True)
    output = disk.path / "out"
    arguments = [one.format(inputs=inputs, disk=disk.path) for one in (*case.arguments, "output={disk}/out")]
    for pages in case.pages:
        disk.leave(pages * PAGE_BYTES)
        code, said = run(case.job, arguments, capsys)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (1, 1), said
        assert "Traceback" not in said
        assert f"{disk.path}/" in errors[0]
        assert "No space left on device" in errors[0]
        assert "free some space there" in errors[0]
        assert not (output / case.last).exists()
        # What is published together is not there in part.
        assert case.job not in ("leakage", "evaluate") or not content(output)
        no_part_is_left(disk.path)
    (disk.path / "filler").unlink()
    disk.resize(64 << 20)
    assert run(case.job, arguments, capsys)[0] == 0
    assert (output / case.last).exists()

    before = content(output)
    for pages in case.pages if case.again else ():
        disk.leave(pages * PAGE_BYTES)
        code, said = run(case.job, [*arguments, *(one.format(inputs=inputs) for one in case.again)], capsys)
        assert code == 1, said
        assert "No space left on device" in said
        no_part_is_left(disk.path)
        assert stays(case.last, before, content(output))


def test_a_registration_on_a_full_disk_registers_nothing(
    disk: Disk, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The golden vectors go into the model's own folder."""
    from dermray import tracking
    from dermray.commands import register
    from dermray.config import TrackingConfig

    disk.resize(64 << 20)
    model = Path(shutil.copytree(inputs / "model", disk.path / "model"))
    report = tmp_path / "report"
    evaluated = [f"corpus={inputs}/corpus", f"model={model}", "split=val", "bootstrap=20", f"cache={inputs}/cache"]
    assert run("evaluate", [*evaluated, f"output={report}", "num_actors=1"], capsys)[0] == 0
    store = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [f"model={model}", f"report={report}", "name=derm", f"tracking.uri={store}"]
    disk.leave(0)
    before = content(model)
    assert entry.run_job(lambda: register.main(arguments)) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{model}/golden.json" in error
    assert "No space left on device" in error
    assert content(model) == before
    (disk.path / "filler").unlink()
    assert entry.run_job(lambda: register.main(arguments)) == 0
    versions = tracking.client(TrackingConfig(uri=store)).search_model_versions("name='derm'")
    assert [version.version for version in versions] == ["1"] or [int(v.version) for v in versions] == [1]
