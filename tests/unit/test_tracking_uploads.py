"""Uploads of MLflow's own client to S3 x everything that goes wrong there: whole, or told and still to come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dermray import storage, tracking
from dermray.config import Config, TrackingConfig
from dermray.errors import TrackingError
from dermray.tracking import delivery, runs
from tests.s3 import BUCKET, EXPIRED, KEPT_HALF, LOST, SLOW_DOWN, FaultyProxy, faulty_s3

LASTING = 1_000_000
# Method, part of the request's address, what the store does.
FAULTS: dict[str, tuple[str, str, int | str]] = {
    "500": ("PUT", "note.txt", 500),
    "403": ("PUT", "note.txt", 403),
    "404": ("PUT", "note.txt", 404),
    "slow down": ("PUT", "note.txt", SLOW_DOWN),
    "expired": ("PUT", "note.txt", EXPIRED),
    "keeps half": ("PUT", "note.txt", KEPT_HALF),
    "loses": ("PUT", "note.txt", LOST),
    "part 2 refused": ("PUT", "partNumber=2", 500),
    "not completed": ("POST", "uploadId=", 500),
    "completing refused": ("POST", "uploadId=", 403),
    "completing lost": ("POST", "uploadId=", LOST),
}
# All of them take a minute and more.
FEW = ("403", "keeps half", "completing lost")
NOTE = "größe"
# MLflow sends a file in parts from 8 MiB on.
LARGE = os.urandom((8 << 20) + 12_345)


class Settings(Config):
    rate: float = 0.5


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with faulty_s3() as running:
        yield running


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def config(
    proxy: FaultyProxy, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingConfig]:
    """A store whose artifacts lie in S3; nobody tries again by himself."""
    for name, value in {**proxy.environment, "MLFLOW_S3_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(runs, "PATIENCE_S", 0.1)
    monkeypatch.setattr(delivery, "FIRST_BACKOFF_S", 0.01)
    proxy.reset()
    storage._remote_filesystem.cache_clear()
    made = TrackingConfig(
        uri=database, spool=str(tmp_path / "spool"), experiment=tmp_path.name, system_metrics_interval_s=0
    )
    tracking.client(made).create_experiment(tmp_path.name, artifact_location=f"s3://{BUCKET}/{tmp_path.name}")
    yield made
    proxy.reset()
    storage._remote_filesystem.cache_clear()


def the_run(client: MlflowClient, config: TrackingConfig) -> Any:
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault in FEW else pytest.mark.long) for fault in FAULTS]
)
def test_a_lost_upload_is_told_its_run_is_not_finished_and_it_comes_later(
    fault: str, proxy: FaultyProxy, config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, key, kind = FAULTS[fault]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large.bin").write_bytes(LARGE if key != "note.txt" else b"small")
    (folder / "empty.txt").touch()
    # Of the run that is at work there: neither is read.
    (folder / ".claim").mkdir()
    (folder / ".claim" / "00000001.json").symlink_to("gone")
    (folder / ".report.html.1-2.part").symlink_to("gone")
    proxy.inject(kind, LASTING, method=method, key=key)
    with tracking.run(config, kind="prepare", name="x", resolved=Settings()) as current:
        current.log_folder(str(folder), "files")
        current.log_text(NOTE, "nested/note.txt")
    assert proxy.fired
    name = "nested/note.txt" if key == "note.txt" else "large.bin"
    told = [record.getMessage() for record in caplog.records if "waits in" in record.getMessage()]
    assert told
    assert name in told[-1] or key != "note.txt"
    assert "artifact store" in told[-1]
    client = tracking.client(config)
    assert the_run(client, config).info.status == "RUNNING"
    with pytest.raises(TrackingError, match=r"artifact store (did not take|took) .* waits$") as caught:
        tracking.deliver_left_over(config)
    assert "\n" not in str(caught.value)
    proxy.reset()
    assert tracking.deliver_left_over(config).num_delivered == 1
    run = the_run(client, config)
    assert run.info.status == "FINISHED"
    where = run.info.artifact_uri
    assert storage.read_bytes(f"{where}/nested/note.txt") == NOTE.encode()
    assert storage.read_bytes(f"{where}/files/large.bin") == (folder / "large.bin").read_bytes()
    assert storage.size_bytes(f"{where}/files/empty.txt") == 0
    assert len(storage.list_files(f"{where}/files", recursive=True)) == 2


def test_a_model_of_which_a_file_is_lost_is_not_registered(
    proxy: FaultyProxy, config: TrackingConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    for kind in (KEPT_HALF, LOST, 403):
        proxy.reset()
        proxy.inject(kind, LASTING, method="PUT", key="weights.bin")
        with (
            tracking.run(config, kind="register", name="x", resolved=Settings()) as current,
            pytest.raises(TrackingError, match=r"model is not registered: the artifact store .*run the same command"),
        ):
            tracking.register(current, name="lost", model_uri=str(folder), metric="score", value=1.0, corpus_digest="c")
        assert proxy.fired
    assert tracking.client(config).search_model_versions("name='lost'") == []


def test_a_store_that_shows_no_list_is_believed(
    proxy: FaultyProxy, config: TrackingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.inject(403, LASTING, method="GET", key="list-type=2")
    with tracking.run(config, kind="prepare", name="x", resolved=Settings()) as current:
        current.log_text(NOTE, "note.txt")
        assert current.connected()
    assert proxy.fired
    assert "uploads are not looked for" in caplog.text
    assert the_run(tracking.client(config), config).info.status == "FINISHED"
