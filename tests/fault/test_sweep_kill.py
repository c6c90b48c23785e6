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
from typing import Any

import pytest
import ray
import yaml
from mlflow import MlflowClient

from dermray.commands import sweep as job
from dermray.train import checkpoint
from tests.conftest import ROOT
from tests.corpora import write_model, write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

DEADLINE_S = 240
RECIPE: dict[str, Any] = {
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
        time.sleep(0.005)


class Killed:
    """A sweep of two trials, one after the other, that is killed as often as it takes."""

    def __init__(self, folder: Path, *, epochs: int = RECIPE["train"]["epochs"]) -> None:
        self.folder = folder
        self.trials = folder / "out" / "trials"
        self.store = f"sqlite:///{folder}/mlflow.db"
        write_prepared_corpus(folder / "corpus", {"train": 64, "val": 24})
        model = write_model(folder / "model")
        recipe = {"model": str(model), **RECIPE, "train": {**RECIPE["train"], "epochs": epochs}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.arguments = [
            *(f"recipe={folder / 'recipe.yaml'}", f"corpus={folder / 'corpus'}", f"output={folder / 'out'}"),
            "space.optim.lr={kind: choice, values: [0.003, 0.001]}",
            *("search=grid", "scheduler.kind=none", "num_validations=2", f"tracking.uri={self.store}"),
        ]

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Begin it, or go on, and end it with SIGKILL as soon as a condition holds."""
        log = self.folder / "killed.log"
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tune" / "sweep.py"), *self.arguments],
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
            wait_for(condition, process, log)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL

    def curve(self, trial: str) -> list[int]:
        """Numbers of the validations that a trial's record has."""
        file = self.trials / trial / "trial.json"
        return [point["validation"] for point in json.loads(file.read_text())["curve"]] if file.exists() else []

    def finish(self) -> tuple[dict[str, Any], MlflowClient, dict[str, Any]]:
        """The same command once more: its document, and a client with the runs of MLflow by name, each there once."""
        assert job.main(self.arguments) == 0
        document = json.loads((self.folder / "out" / "trials.json").read_text())
        found = [(trial["name"], trial["status"]) for trial in document["trials"]]
        assert sorted(found) == [(FIRST, "finished"), (SECOND, "finished")]
        client = MlflowClient(self.store)
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
            assert self.curve(name) == [1, 2], "no validation twice"
        return document, client, names


def test_a_killed_sweep_goes_on_where_it_was(ray_cluster: None, tmp_path: Path) -> None:
    sweep = Killed(tmp_path)
    sweep.kill_when(lambda: bool(checkpoint.committed(str(sweep.trials / SECOND))))
    assert not (sweep.trials / SECOND / "summary.json").exists(), "the kill came too late to prove anything"
    weights = sweep.trials / FIRST / "model" / "open_clip_model.safetensors"
    first = weights.stat().st_mtime_ns
    resumed_at = checkpoint.committed(str(sweep.trials / SECOND))[-1].step

    document, client, names = sweep.finish()
    assert weights.stat().st_mtime_ns == first
    attempts = [file.path for file in client.list_artifacts(names[SECOND].info.run_id, "attempts")]
    assert len(attempts) == 1
    assert resumed_at < document["trials"][0]["num_steps"]


def test_a_sweep_that_is_killed_between_its_steps_loses_and_counts_nothing_twice(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Before its first trial, as a validation has been counted, and as a trial has just ended."""
    sweep = Killed(tmp_path, epochs=30)
    sweep.kill_when(lambda: (tmp_path / "out" / "mlflow.json").exists())
    assert not sweep.curve(FIRST)
    assert not checkpoint.committed(str(sweep.trials / FIRST))
    sweep.kill_when(lambda: bool(sweep.curve(FIRST)))
    assert sweep.curve(FIRST) == [1]
    assert not (sweep.trials / FIRST / "summary.json").exists(), "the kill came too late to prove anything"
    sweep.kill_when(lambda: (sweep.trials / FIRST / "summary.json").exists())
    assert not checkpoint.committed(str(sweep.trials / SECOND)), "the kill came too late to prove anything"
    weights = sweep.trials / FIRST / "model" / "open_clip_model.safetensors"
    first = weights.stat().st_mtime_ns
    sweep.finish()
    assert weights.stat().st_mtime_ns == first
