"""Population-based training of two trials, killed with SIGKILL after the exploit: the same command goes on with it.

Slow: each of the two generations starts two processes a trial that import torch, and the one that was killed twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient

from dermray.commands import sweep as job
from dermray.train import checkpoint
from tests.conftest import ROOT
from tests.corpora import write_model, write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

DEADLINE_S = 240
POOR, GOOD = "trial-000", "trial-001"
LEARNING_RATES = {POOR: 1.0e-7, GOOD: 3.0e-3}
# A fifth less than the donor's.
PERTURBED = 2.4e-3
PAUSE, NUM_STEPS = 80, 160
# By then the driver has heard of the first steps after the pause.
KILLED_AFTER = PAUSE + 40
RECIPE = {
    "train": {
        "epochs": NUM_STEPS / 4,
        "global_batch_size": 16,
        "log_every_steps": 1,
        "checkpoint_every_steps": 10,
        "keep_checkpoints": 99,
        "max_failures": 0,
    },
    "optim": {"warmup_steps": 5, "weight_decay": 0.0},
    "validation": {"max_samples": 24},
}


def state_of(trial: Path, step: int) -> dict:
    return torch.load(trial / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)


def losses(client: MlflowClient, run_id: str) -> dict[int, float]:
    history = client.get_metric_history(run_id, "loss")
    assert len({point.step for point in history}) == len(history), "no step twice"
    return {point.step: point.value for point in history}


def test_a_killed_population_goes_on_from_the_donors_checkpoint(ray_cluster: None, tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 64, "val": 24})
    model = write_model(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), **RECIPE}))
    out, store = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [
        *(f"recipe={tmp_path / 'recipe.yaml'}", f"corpus={tmp_path / 'corpus'}", f"output={out}"),
        "space.optim.lr={kind: loguniform, low: 1.0e-7, high: 3.0e-3, steps: 2}",
        *("search=grid", "scheduler.kind=pbt", "scheduler.resample_probability=0", "num_validations=2", "seed=1"),
        f"tracking.uri={store}",
    ]
    good, poor = out / "trials" / GOOD, out / "trials" / POOR
    log = tmp_path / "killed.log"
    with log.open("wb") as sink:
        killed = subprocess.Popen(
            [sys.executable, str(ROOT / "tune" / "sweep.py"), *arguments],
            stdout=sink,
            stderr=sink,
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            start_new_session=True,
        )
        end = time.monotonic() + DEADLINE_S
        # The exploit was carried out, and a trial has come further.
        while not any(info.step >= KILLED_AFTER for trial in (good, poor) for info in checkpoint.committed(str(trial))):
            assert killed.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert not (poor / "summary.json").exists(), "the kill came too late to prove anything"

    assert job.main(arguments) == 0
    (exploit,) = json.loads((out / "population" / "generation-001.json").read_text())["exploits"]
    assert (exploit["name"], exploit["donor"], exploit["step"]) == (POOR, GOOD, PAUSE)
    assert exploit["donor_score"] > exploit["score"]
    theirs, donors = state_of(poor, PAUSE), state_of(good, PAUSE)
    assert theirs["step"] == PAUSE
    assert all(torch.equal(theirs["model"][key], value) for key, value in donors["model"].items())
    moments = zip(theirs["optimiser"]["state"].values(), donors["optimiser"]["state"].values(), strict=True)
    assert all(torch.equal(ours["exp_avg_sq"], other["exp_avg_sq"]) for ours, other in moments)

    document = json.loads((out / "trials.json").read_text())
    trials = {trial["name"]: trial for trial in document["trials"]}
    assert {trial["status"] for trial in trials.values()} == {"finished"}
    assert trials[POOR]["exploits"] == [exploit]
    assert trials[POOR]["drawn"] == {"optim.lr": LEARNING_RATES[POOR]}
    assert trials[POOR]["config"]["optim"]["lr"] == exploit["params"]["optim.lr"] == PERTURBED
    provenance = json.loads((poor / "model" / "dermray.json").read_text())
    assert provenance["exploits"] == [exploit]
    assert exploit["sha256"][:12] in (out / "sweep.html").read_text()

    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("dermray").experiment_id])
    names = {run.info.run_name: run for run in runs}
    assert len(runs) == len(names) == 3, "one parent and two trials, before and after"
    assert {run.info.status for run in runs} == {"FINISHED"}
    of_good, of_poor = (losses(client, names[name].info.run_id) for name in (GOOD, POOR))
    # The loss of a step is computed with the weights before it, on samples that depend on the step alone.
    assert of_poor[PAUSE] != pytest.approx(of_good[PAUSE], rel=1e-3)
    assert of_poor[PAUSE + 1] == pytest.approx(of_good[PAUSE + 1], rel=1e-6)
    assert names[POOR].data.tags["dermray.exploit.001"].startswith(f"{GOOD} step {PAUSE} {exploit['sha256']}")
