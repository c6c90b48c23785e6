"""SIGKILL of a whole sweep, then the same command: finished trials stay, one under way goes on, the MLflow run is one.

Slow: every trial starts two processes that import torch, and the one that was killed does so twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml
from mlflow import MlflowClient

from dermray.train import checkpoint
from tests.conftest import ROOT
from tests.corpora import write_model, write_prepared_corpus
from tune import sweep as job

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

DEADLINE_S = 240
RECIPE = {
    "train": {
        "epochs": 60,
        "global_batch_size": 16,
        "log_every_steps": 5,
        "checkpoint_every_steps": 20,
        "max_failures": 0,
    },
    "optim": {"warmup_steps": 5, "weight_decay": 0.0},
    "validation": {"max_samples": 24},
}
FIRST, SECOND = "trial-000", "trial-001"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_where_it_was(ray_cluster: None, tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 64, "val": 24})
    model = write_model(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), **RECIPE}))
    store = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [
        *(f"recipe={tmp_path / 'recipe.yaml'}", f"corpus={tmp_path / 'corpus'}", f"output={tmp_path / 'out'}"),
        "space.optim.lr={kind: choice, values: [0.003, 0.001]}",
        *("search=grid", "scheduler.kind=none", "num_validations=2", f"tracking.uri={store}"),
    ]
    trials = tmp_path / "out" / "trials"
    log = tmp_path / "killed.log"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with log.open("wb") as sink:
        killed = subprocess.Popen(
            [sys.executable, str(ROOT / "tune" / "sweep.py"), *arguments],
            stdout=sink,
            stderr=sink,
            env=environment,
            start_new_session=True,
        )
        wait_for(lambda: bool(checkpoint.committed(str(trials / SECOND))), killed, log)
        os.killpg(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert not (trials / SECOND / "summary.json").exists(), "the kill came too late to prove anything"
    first = (trials / FIRST / "model" / "open_clip_model.safetensors").stat().st_mtime_ns
    resumed_at = checkpoint.committed(str(trials / SECOND))[-1].step

    assert job.main(arguments) == 0
    assert (trials / FIRST / "model" / "open_clip_model.safetensors").stat().st_mtime_ns == first
    document = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert sorted((trial["name"], trial["status"]) for trial in document["trials"]) == [
        (FIRST, "finished"),
        (SECOND, "finished"),
    ]
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("dermray").experiment_id])
    names = {run.info.run_name: run for run in runs}
    assert len(runs) == len(names) == 3, "one parent and two trials, before and after"
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.data.tags["dermray.kind"] == "sweep"]
    for name in (FIRST, SECOND):
        assert names[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        points = client.get_metric_history(names[name].info.run_id, "loss")
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), "no step twice"
        assert steps[-1] == document["trials"][0]["num_steps"]
    attempts = [file.path for file in client.list_artifacts(names[SECOND].info.run_id, "attempts")]
    assert len(attempts) == 1
    assert resumed_at < document["trials"][0]["num_steps"]
