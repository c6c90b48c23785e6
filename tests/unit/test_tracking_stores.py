"""A tracking store that does not answer, or answers as none of MLflow's does; a signal while a run begins there."""

from __future__ import annotations

import contextlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT

from dermray.commands import collect_garbage, deliver, evaluate, lineage, promote
from dermray.config import TrackingConfig
from dermray.errors import TrackingError
from dermray.tracking import store
from dermray.tracking.spool import Spool

# Asked to end when MLflow has just heard of the run, and its own process does not know that yet.
ASKED_TO_END = """
import os, signal, sys, time
from dermray import entry, tracking
from dermray.config import Config, TrackingConfig
from dermray.tracking import runs

class Asked(runs.Delivery):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        while self.courier.run_id is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

def main():
    runs.Delivery = Asked
    with tracking.run(TrackingConfig(uri=sys.argv[1]), kind="prepare", name="x", resolved=Config()):
        raise AssertionError("the work had begun")

sys.exit(entry.run_job(main))
"""


def test_a_signal_while_the_run_begins_leaves_none_that_seems_to_run(
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", ASKED_TO_END, uri]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(TrackingConfig().experiment)
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["KILLED"]


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """A server of something else than MLflow, and its address; status 0: an address where nobody is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        if status:
            thread.start()
        else:
            server.server_close()
        yield f"http://127.0.0.1:{server.server_port}"
        if status:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "MLflow at {uri} is out of reach (.*): start it, or give another address with tracking.uri=URI"),
        (500, "MLflow at {uri} is out of reach (.*): start it, or give another address with tracking.uri=URI"),
        (401, "MLflow at {uri} lets nobody in with these credentials"),
        (404, "what answers at {uri} is no MLflow server (.*): give the address of one with tracking.uri=URI"),
        (200, "what answers at {uri} is no MLflow server (.*): give the address of one with tracking.uri=URI"),
    ],
)
def test_a_store_that_does_not_answer_is_one_line_of_every_job(tmp_path: Path, status: int, said: str) -> None:
    commands: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "lineage of a model": (lineage.main, ["of=models:/a@b"]),
        "lineage of a digest": (lineage.main, ["of=0123456789abcdef"]),
        "promote": (promote.main, ["candidate=1"]),
        "roll back": (promote.main, ["roll_back=true"]),
        "evaluate": (evaluate.main, ["model=models:/a@b", f"corpus={tmp_path}", f"output={tmp_path}/out"]),
        "collect garbage": (collect_garbage.main, [f"roots=[{tmp_path}]"]),
        "deliver": (deliver.main, [f"tracking.spool={tmp_path}/spool"]),
    }
    with answering(status) as uri:
        spool = Spool.begin(tmp_path / "spool", "k")
        spool.append({"kind": "begin", "key": "k", "experiment": "e", "tracking_uri": uri})
        spool.close()
        for name, (main, arguments) in commands.items():
            with pytest.raises(TrackingError) as caught:
                main([*arguments, f"tracking.uri={uri}"])
            assert re.match(said.replace("(.*)", r"\(.*\)").format(uri=re.escape(uri)), str(caught.value)), name
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("login", "is_told"), [("", True), ("writer:Kan4ry-S3cret@", False)])
def test_mlflow_tells_where_a_run_is_unless_it_would_tell_a_password(
    login: str, is_told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name, "false")
    mlflow = store.client(TrackingConfig(uri=f"http://{login}127.0.0.1:9"))._tracking_client
    run = SimpleNamespace(data=SimpleNamespace(tags={}), info=SimpleNamespace(experiment_id="1", run_name="a run"))
    monkeypatch.setattr(mlflow.store, "get_run", lambda _: run)
    mlflow._log_url("0123")
    assert ("/runs/0123" in capsys.readouterr().out) == is_told
