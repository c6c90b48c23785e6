"""First jobs at once on a new SQLite store, and a store that another process keeps locked: real processes."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dermray import tracking
from dermray.config import TrackingConfig
from dermray.errors import TrackingError

# One process imports MLflow, which takes seconds, and becomes several that begin at the same moment.
FIRST_JOBS = """
import os, sys
from dermray import tracking
from dermray.config import Config, TrackingConfig
folder, count = sys.argv[1], int(sys.argv[2])
read, write = os.pipe()
children = []
for number in range(count):
    if not (child := os.fork()):
        os.close(write)
        os.read(read, 1)
        config = TrackingConfig(
            uri=f"sqlite:///{folder}/new.db", spool=f"{folder}/spool", system_metrics_interval_s=0
        )
        with tracking.run(config, kind="prepare", name=f"first-{number}", resolved=Config()) as current:
            current.log_metrics({"loss": 1.0}, step=1)
        os._exit(0)
    children.append(child)
os.close(write)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""
# Ended, as by SIGKILL, when a table is there and MLflow has not noted that it is.
ENDED = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from dermray import tracking
from dermray.config import TrackingConfig
made = []
@event.listens_for(Engine, "before_cursor_execute")
def end(connection, cursor, statement, *_):
    if made:
        os._exit(9)
    if "CREATE TABLE evaluation_datasets" in statement:
        made.append(statement)
tracking.client(TrackingConfig(uri=sys.argv[1]))
"""
HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def locked(database: Path, seconds: float) -> Iterator[None]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(database), str(seconds)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            holder.kill()


def test_first_jobs_on_a_new_store_all_succeed(tmp_path: Path) -> None:
    count = 4
    command = [sys.executable, "-c", FIRST_JOBS, str(tmp_path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/new.db")
    runs = client.search_runs([client.get_experiment_by_name(TrackingConfig().experiment).experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"first-{number}" for number in range(count)]
    assert {(run.info.status, run.data.metrics["loss"]) for run in runs} == {("FINISHED", 1.0)}


def test_a_job_that_is_ended_while_it_makes_the_store_leaves_one_that_opens(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db")
    assert subprocess.run([sys.executable, "-c", ENDED, config.uri], check=False, timeout=120).returncode == 9
    assert len(tracking.client(config).search_experiments()) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [".m.db.lock", "m.db"]


@pytest.mark.long
def test_a_locked_database_is_waited_for_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = tmp_path / "m.db"
    sqlite3.connect(database).close()
    # SQLite itself waits five seconds.
    with locked(database, 8.0):
        client = tracking.client(TrackingConfig(uri=f"sqlite:///{database}"))
    assert [record.getMessage() for record in caplog.records if "locked" in record.getMessage()] == [
        f"another process has locked {database}: waiting up to 60 s"
    ]
    assert len(client.search_experiments()) == 1


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("not a database, but long enough to be taken for the first page of one" * 20)
    with pytest.raises(TrackingError, match=r"m\.db: .*file is not a database.*; give a database") as caught:
        tracking.client(TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db"))
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_what_a_run_says_while_the_database_is_locked_comes_later(tmp_path: Path) -> None:
    from dermray.config import Config

    database = tmp_path / "m.db"
    config = TrackingConfig(uri=f"sqlite:///{database}", spool=str(tmp_path / "spool"), system_metrics_interval_s=0)
    tracking.client(config)
    with tracking.run(config, kind="prepare", name="x", resolved=Config()) as current:
        run_id = current.connected()[1]
        with locked(database, 30.0):
            for step in range(100):
                current.log_metrics({"loss": float(step)}, step=step)
            current.set_tags({"note": "said meanwhile"})
            # Longer than SQLite waits by itself: the record is refused, kept and sent again.
            current._link.delivery.flush(8.0)  # type: ignore[union-attr]
    client = MlflowClient(config.uri)
    assert len(client.get_metric_history(run_id, "loss")) == 100
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["note"]) == ("FINISHED", "said meanwhile")
