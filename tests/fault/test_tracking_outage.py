"""A real MLflow server that is killed, comes back, and loses its answers: no figure is lost and none comes twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from dermray import tracking
from dermray.config import Config, TrackingConfig
from tests.mlflow_server import MlflowServer
from tests.s3 import RESET, FaultyProxy, faulty_proxy

pytestmark = pytest.mark.long

PATIENCE_S = 60.0


class Settings(Config):
    rate: float = 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def config(server: MlflowServer, tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(uri=server.url, spool=str(tmp_path / "spool"), experiment=tmp_path.name)


def spooled(config: TrackingConfig) -> list[Path]:
    return sorted(Path(str(config.spool)).iterdir())


def only_run(config: TrackingConfig, url: str) -> MlflowRun:
    client = MlflowClient(url)
    (run,) = client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])
    return run


def steps(url: str, run_id: str, key: str = "loss") -> list[int]:
    points = MlflowClient(url).get_metric_history(run_id, key)
    assert all(point.value == point.step / 4 for point in points)
    return [point.step for point in points]


def train(current: tracking.Run, numbers: range) -> None:
    for step in numbers:
        current.log_metrics({"loss": step / 4, "lr": step / 4}, step=step)


def test_a_server_that_is_killed_and_comes_back(
    server: MlflowServer, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dermray.tracking.runs.PATIENCE_S", PATIENCE_S)
    with tracking.run(config, kind="pretrain", name="x", resolved=Settings()) as current:
        train(current, range(1, 1501))
        server.stop()
        train(current, range(1501, 3001))
        current.set_tags({"verdict": "said while it was down"})
        current.log_text("hello", "notes.txt")
        server.start()
        train(current, range(3001, 3101))
    run = only_run(config, server.url)
    assert run.info.status == "FINISHED"
    assert run.data.tags["verdict"] == "said while it was down"
    for key in ("loss", "lr"):
        assert steps(server.url, run.info.run_id, key) == list(range(1, 3101))
    assert spooled(config) == []


KILLED = """
import os, signal, sys
from dermray import tracking
from dermray.config import TrackingConfig
from tests.fault.test_tracking_outage import Settings, train
config = TrackingConfig.model_validate_json(sys.argv[1])
with tracking.run(config, kind="pretrain", name="x", resolved=Settings(), state_uri=sys.argv[2]) as current:
    assert current.id is None
    train(current, range(1, 21))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_jobs_that_begin_and_end_or_are_killed_while_the_server_is_down(
    server: MlflowServer, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_uri = str(tmp_path / "output" / "mlflow.json")
    other = config.model_copy(update={"experiment": f"{config.experiment}-ends"})
    server.stop()
    monkeypatch.setattr("dermray.tracking.runs.PATIENCE_S", 0.0)
    with tracking.run(other, kind="evaluate", name="alone", resolved=Settings()) as current:
        train(current, range(1, 6))
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), state_uri]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert len(spooled(config)) == 2
    server.start()
    monkeypatch.setattr("dermray.tracking.runs.PATIENCE_S", PATIENCE_S)
    # Its checkpoint was of step 14, so that six steps come again.
    with tracking.run(config, kind="pretrain", name="x", resolved=Settings(), state_uri=state_uri) as current:
        assert current.resumed
        train(current, range(15, 31))
    run = only_run(config, server.url)
    assert run.info.run_id == current.id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "0.5"}
    assert steps(server.url, run.info.run_id) == list(range(1, 31))
    # The next run that ends takes along what others have left.
    alone = only_run(other, server.url)
    assert (alone.info.run_name, alone.info.status) == ("alone", "FINISHED")
    assert steps(server.url, alone.info.run_id) == [1, 2, 3, 4, 5]
    assert spooled(config) == []


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    with faulty_proxy(f"127.0.0.1:{server.port}") as proxy:
        yield proxy


def test_a_lost_answer_makes_nothing_twice(
    server: MlflowServer, config: TrackingConfig, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does what it is asked, and the connection breaks before it can say so."""
    monkeypatch.setattr("dermray.tracking.runs.PATIENCE_S", PATIENCE_S)
    through = config.model_copy(update={"uri": proxy.url})
    proxy.inject(RESET, 1, method="POST", key="runs/create")
    proxy.inject(RESET, 2, method="POST", key="runs/log-batch")
    with tracking.run(through, kind="pretrain", name="x", resolved=Settings()) as current:
        train(current, range(1, 1001))
    assert proxy.fired == 3
    run = only_run(config, server.url)
    assert run.info.run_id == current.id
    assert run.info.status == "FINISHED"
    for key in ("loss", "lr"):
        assert steps(server.url, run.info.run_id, key) == list(range(1, 1001))
