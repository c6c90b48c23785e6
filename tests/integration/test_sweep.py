"""A sweep of three trials on the session's Ray cluster: one good, one that ASHA stops, one that diverges.

Slow: every trial starts two processes that import torch; training itself takes seconds.
"""

from __future__ import annotations

import json
import time

import pytest
import ray
import yaml
from mlflow import MlflowClient

from dermray import storage
from dermray.commands import sweep as job
from dermray.config import parse
from dermray.errors import DermRayError
from dermray.ingest.corpora import Corpora
from dermray.train import epochs
from dermray.train.settings import PretrainConfig
from dermray.tuning.plan import plan_trials
from dermray.tuning.proposals import TPE_STARTUP_TRIALS, proposal
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from tests.corpora import write_model, write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

OBJECTIVE = "validation_zero_shot_accuracy"
TRIALS = {"good": "trial-000", "poor": "trial-001", "diverging": "trial-002"}
LEARNING_RATES = {"diverging": 1.0e30, "poor": 1.0e-7, "good": 3.0e-3}
# Draws them in the order of TRIALS: the poor one is compared with the good one.
SEED = 0
RECIPE = {
    "train": {
        "epochs": 50,
        "global_batch_size": 16,
        "log_every_steps": 10,
        "checkpoint_every_steps": 50,
        "max_failures": 0,
    },
    "optim": {"warmup_steps": 5, "weight_decay": 0.0},
    "validation": {"max_samples": 24},
}


@pytest.fixture(scope="module")
def swept(ray_cluster, tmp_path_factory):
    """The sweep's folder, its command and its MLflow client."""
    folder = tmp_path_factory.mktemp("sweep")
    write_prepared_corpus(folder / "corpus", {"train": 64, "val": 24})
    model = write_model(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), **RECIPE}))
    command = [
        f"recipe={folder / 'recipe.yaml'}",
        f"corpus={folder / 'corpus'}",
        f"output={folder / 'out'}",
        f"space.optim.lr={{kind: choice, values: {list(LEARNING_RATES.values())}}}",
        "num_validations=4",
        "scheduler.reduction_factor=2",
        f"seed={SEED}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    ]
    assert job.main([*command, "num_trials=3"]) == 0
    return folder, command, MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture(scope="module")
def trials(swept):
    document = json.loads((swept[0] / "out" / "trials.json").read_text())
    by_name = {trial["name"]: trial for trial in document["trials"]}
    return {key: by_name[name] for key, name in TRIALS.items()}


def test_each_trial_ends_as_it_must(trials):
    good, poor, diverging = trials.values()
    assert [trial["status"] for trial in trials.values()] == ["finished", "stopped", "failed"]
    assert {key: trial["params"] for key, trial in trials.items()} == {
        key: {"optim.lr": rate} for key, rate in LEARNING_RATES.items()
    }
    assert "gradients that are not finite" in diverging["error"]
    assert [trial["num_failures"] for trial in trials.values()] == [0, 0, 1]
    assert [point["validation"] for point in good["curve"]] == [1, 2, 3, 4]
    assert [point["step"] for point in good["curve"]] == [50, 100, 150, 200]
    assert good["samples_trained"] == 200 * 16
    assert good[OBJECTIVE] == good["curve"][-1][OBJECTIVE] > 0.8
    assert len(poor["curve"]) < 4
    assert poor["samples_trained"] < good["samples_trained"]


def test_stopped_trials_free_their_cpus(swept):
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


def test_the_best_recipe_is_one_that_pretrain_takes(swept, trials):
    folder, _, _ = swept
    arguments = ["--config", str(folder / "out" / "best.yaml"), f"corpus={folder / 'corpus'}", "output=elsewhere"]
    best = parse(PretrainConfig, arguments)
    assert best.optim.lr == LEARNING_RATES["good"]
    ran = PretrainConfig.model_validate(trials["good"]["config"])
    assert best.trajectory() == ran.trajectory()
    assert best.validation.every_steps is None


def test_trials_are_nested_runs_with_an_end(swept, trials):
    _, _, client = swept
    (experiment,) = [e for e in client.search_experiments() if e.name == "dermray"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["dermray.kind"] == "sweep"]
    children = {run.info.run_name: run for run in runs if run.data.tags["dermray.kind"] == "trial"}
    assert len(runs) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert [children[name].info.status for name in TRIALS.values()] == ["FINISHED", "FINISHED", "FAILED"]
    assert children[TRIALS["diverging"]].data.tags["dermray.error"].startswith("steps ")
    poor = children[TRIALS["poor"]].data
    assert poor.tags["dermray.stopped_by"].startswith("ASHA after validation")
    assert float(poor.params["optim.lr"]) == LEARNING_RATES["poor"]
    history = client.get_metric_history(children[TRIALS["good"]].info.run_id, OBJECTIVE)
    assert [(m.step, m.value) for m in history] == [(p["step"], p[OBJECTIVE]) for p in trials["good"]["curve"]]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_trial"] == TRIALS["good"]
    assert parent.data.metrics["best_objective"] == trials["good"][OBJECTIVE]
    assert parent.data.metrics["trials_stopped"] == 1
    assert parent.data.metrics["samples_share"] < 0.8
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "trials.json", "sweep.html", "leaderboard.txt", "config.yaml"} <= artifacts


def test_the_same_command_again_trains_nothing(swept, capsys):
    folder, command, client = swept
    out = folder / "out"
    models = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    checkpoints = set(out.glob("trials/*/checkpoints/*"))
    best = (out / "best.yaml").read_text().partition("\n")[2]
    # The first two trials of the same draw; the third, which failed, would be tried again.
    assert job.main([*command, "num_trials=2"]) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == models
    assert set(out.glob("trials/*/checkpoints/*")) == checkpoints
    assert (out / "best.yaml").read_text().partition("\n")[2] == best
    printed = capsys.readouterr().out
    assert "best: trial-000" in printed
    assert len(client.search_runs([client.get_experiment_by_name("dermray").experiment_id])) == 4


def test_a_model_that_does_not_exist_is_refused_before_any_trial(swept):
    folder, command, _ = swept
    arguments = [*command, "num_trials=1", f"output={folder / 'other'}", f"overrides.model={folder / 'nowhere'}"]
    with pytest.raises(DermRayError, match=r"trial-000 \(optim\.lr=0\.003\): .*nowhere is not a model folder"):
        job.main(arguments)
    assert not (folder / "other").exists()


def test_an_objective_that_is_not_reported_is_named(swept):
    _, command, _ = swept
    with pytest.raises(DermRayError, match=r"does not report 'validation_loss'; it reports .*validation_zero_shot"):
        job.main([*command, "num_trials=1", "objective=validation_loss", "tracking.enabled=false"])


def test_tpe_proposes_from_what_was_there_and_the_budget_ends_the_sweep(swept):
    folder, command, _ = swept
    arguments = [
        *(entry for entry in command if not entry.startswith(("space.", "output=", "num_validations="))),
        *(f"output={folder / 'tpe'}", "space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-2}"),
        *("search=tpe", "num_trials=9", "num_validations=1", "overrides.train.epochs=2", "tracking.enabled=false"),
        f"max_samples={TPE_STARTUP_TRIALS * 128 + 1}",
    ]
    config = parse(SweepConfig, arguments)
    corpora = Corpora.load(config.corpus_uris)
    planned = plan_trials(config, corpora)
    # As an earlier process of the sweep has left them.
    earlier = []
    for trial in planned[:TPE_STARTUP_TRIALS]:
        score = 1 - abs(trial.params["optim.lr"] - 1e-3)
        point = Point(1, trial.num_steps, trial.samples_at(trial.num_steps), {OBJECTIVE: score})
        earlier.append(TrialRecord(trial.name, trial.params, Status.FINISHED, [point], basis=trial.basis))
        earlier[-1].save(trial)
        trajectory = epochs.trajectory(trial.config, corpora)
        result = {"model_uri": "m", "weights_sha256": "w", "metrics": {}, "num_steps": trial.num_steps}
        summary = {**result, "trajectory": trajectory, "corpus_digest": corpora.digest}
        storage.write_json(f"{trial.uri}/summary.json", summary)
    assert job.main(arguments) == 0
    document = json.loads((folder / "tpe" / "trials.json").read_text())
    trials = {trial["name"]: trial for trial in document["trials"]}
    assert sorted(trials) == [f"trial-{n:03d}" for n in range(TPE_STARTUP_TRIALS + 1)], "then the samples were used up"
    proposed = trials[f"trial-{TPE_STARTUP_TRIALS:03d}"]
    assert proposed["params"] == proposal(config, TPE_STARTUP_TRIALS, earlier) != planned[TPE_STARTUP_TRIALS].params
    assert proposed["status"] == "finished"
    trained = json.loads((folder / "tpe" / "trials" / proposed["name"] / "model" / "dermray.json").read_text())
    assert trained["recipe"]["optim"]["lr"] == proposed["params"]["optim.lr"]
