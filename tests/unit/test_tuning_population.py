"""Population-based training: who exploits whom, what may be perturbed, how a checkpoint is copied, a kill anywhere."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dermray.config import parse
from dermray.errors import CheckpointError, ConfigError
from dermray.train import checkpoint
from dermray.tuning import population, space
from dermray.tuning.generations import Generations
from dermray.tuning.plan import Trial, plan_trials
from dermray.tuning.population import Member
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.reports import NAME
from dermray.tuning.settings import SweepConfig
from tests.conftest import ROOT
from tests.sweeps import CORPORA, OBJECTIVE, Notebook

SPACE = {
    "optim.lr": space.LogUniform(kind="loguniform", low=1e-4, high=1e-2),
    "data.crop_scale": space.Choice(kind="choice", values=[[0.2, 1.0], [0.4, 1.0], [0.8, 1.0]]),
    "data.horizontal_flip": space.Uniform(kind="uniform", low=0.1, high=0.5),
    "train.grad_clip_norm": space.Integer(kind="int", low=1, high=9),
}


def population_config(folder: Path, *arguments: str) -> SweepConfig:
    """Four trials of the demo recipe that differ in the learning rate and pause after two of three validations."""
    return parse(
        SweepConfig,
        [
            *(f"recipe={ROOT / 'jobs/configs/demo.yaml'}", f"corpus={folder / 'corpus'}", f"output={folder / 'sweep'}"),
            *("space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-2}", "scheduler.kind=pbt", "num_trials=4"),
            *("num_validations=3", "overrides.train.global_batch_size=64", "overrides.num_workers=1", *arguments),
        ],
    )


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_perturbed_point_is_in_the_space_and_near_the_old_one(seed, probability):
    random = np.random.default_rng(seed)
    old = space.draw(SPACE, random)
    new = space.explore(SPACE, old, random, resample_probability=probability)
    assert list(new) == list(SPACE)
    assert 1e-4 <= new["optim.lr"] <= 1e-2
    assert 1 <= new["train.grad_clip_norm"] <= 9
    if probability == 0:
        ratio = new["optim.lr"] / old["optim.lr"]
        assert 0.79 < ratio < 1.21
        positions = [SPACE["data.crop_scale"].values.index(p["data.crop_scale"]) for p in (old, new)]
        assert abs(positions[0] - positions[1]) <= 1
        assert new["train.grad_clip_norm"] != old["train.grad_clip_norm"] or old["train.grad_clip_norm"] in (1, 9)


def members(*scores: float | None) -> list[Member]:
    return [
        Member(f"trial-{n:03d}", {"optim.lr": 1e-3}, score, "" if score is None else f"{n}" * 64)
        for n, score in enumerate(scores)
    ]


def decided(config: SweepConfig, *scores: float | None) -> dict[str, str]:
    found = population.exploits(config, members(*scores), generation=1, step=10)
    assert found == population.exploits(config, members(*scores), generation=1, step=10)
    for exploit in found:
        assert exploit.sha256 == exploit.donor[-1] * 64
        assert (exploit.step, exploit.generation) == (10, 1)
    return {exploit.name[-1]: exploit.donor[-1] for exploit in found}


def test_the_worst_go_on_from_the_best(tmp_path):
    config = population_config(tmp_path)
    assert decided(config, 0.1, 0.9, 0.5, 0.4) == {"0": "1"}
    assert decided(config.model_copy(update={"mode": "min"}), 0.1, 0.9, 0.5, 0.4) == {"1": "0"}
    halves = config.model_copy(update={"scheduler": config.scheduler.model_copy(update={"quantile_fraction": 0.5})})
    pairs = decided(halves, 0.1, 0.9, 0.5, 0.4)
    assert set(pairs) == {"0", "3"}
    assert set(pairs.values()) <= {"1", "2"}
    assert decided(config, 0.5, 0.5, 0.5, 0.5) == {}, "no better, no reason"
    assert decided(config, None, 0.9, None, 0.4) == {"0": "1", "2": "1"}, "every failed trial is replaced"
    assert decided(config, None, None, None, None) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["space.model={kind: choice, values: [a, b]}"], r"space\.model: population-based training cannot change it"),
        (["space.train.global_batch_size={kind: choice, values: [64, 128]}"], "train.global_batch_size: population"),
        (["space.optim.warmup_steps={kind: int, low: 1, high: 9}"], "optim.warmup_steps: population"),
        (["search=tpe"], "begins with random or grid trials"),
        (["max_samples=1000"], "max_samples, max_hours: population-based training runs all"),
        (["num_trials=1"], "needs at least 2"),
        (["scheduler.perturbation_interval=3"], "nothing is left to train after 3 validations"),
        (["scheduler.quantile_fraction=0.6"], "scheduler.quantile_fraction"),
    ],
)
def test_what_a_population_cannot_do_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        population_config(tmp_path, *arguments)


def test_both_ends_of_a_range_must_be_what_pretrain_takes(tmp_path):
    config = population_config(tmp_path)
    flip = space.Uniform(kind="uniform", low=0.0, high=7.0)
    with pytest.raises(ConfigError, match=r"data\.horizontal_flip"):
        plan_trials(config.model_copy(update={"space": {**config.space, "data.horizontal_flip": flip}}), CORPORA)


def weights(value: float) -> dict:
    return {"model": {"w": torch.full((3,), value)}}


def train(trial: Trial, record: TrialRecord, score: float, value: float) -> None:
    """A leg without training: a checkpoint and a validation where the trial pauses or ends."""
    step = trial.pause_at or trial.num_steps
    if record.exploits:
        latest = checkpoint.load_latest(trial.uri, trajectory=trial.config.trajectory(), corpus_digest=CORPORA.digest)
        assert latest is not None, "it resumes under its new settings"
    checkpoint.save(
        trial.uri,
        step,
        {"step": step, **weights(value)},
        trajectory=trial.config.trajectory(),
        corpus_digest=CORPORA.digest,
        retention=checkpoint.Retention(2),
    )
    record.add(Point(trial.validation_of(step), step, trial.samples_at(step), {OBJECTIVE: score}))
    record.status = Status.UNFINISHED if trial.pause_at else Status.FINISHED
    record.save(trial)


def leg(generations: Generations, notebook: Notebook, number: int) -> str:
    """Take the next leg and run it; the later a trial's number, the better it is."""
    suggested = generations.suggest(f"tune-{number}")
    name = suggested[NAME]
    train(notebook.trials[name], notebook.records[name], int(name[-1]) / 10, float(name[-1]))
    generations.on_trial_complete(f"tune-{number}")
    return name


def test_generations_copy_the_donors_checkpoint_and_go_on_after_a_kill_anywhere(tmp_path, monkeypatch):
    config = population_config(tmp_path)
    trials = plan_trials(config, CORPORA)
    (first_pause, second_pause) = population.pauses(config.scheduler.perturbation_interval, trials[0])
    notebook = Notebook()
    generations = Generations(config, trials, CORPORA, notebook)
    assert generations.num_legs == 12
    assert [leg(generations, notebook, n) for n in range(3)] == ["trial-000", "trial-001", "trial-002"]
    # Killed before the last of the generation; a new process hands out what is left, and waits for it.
    generations = Generations(config, trials, CORPORA, notebook)
    assert generations.suggest("a")[NAME] == "trial-003"
    assert generations.suggest("b") is None
    train(notebook.trials["trial-003"], notebook.records["trial-003"], 0.3, 3.0)
    generations.on_trial_complete("a")
    # Killed between the copy and the record of the exploit.
    monkeypatch.setattr(TrialRecord, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generations.suggest("b")
    monkeypatch.undo()
    assert population.load(config.output, 1) is not None
    generations = Generations(config, trials, CORPORA, notebook)
    names = [leg(generations, notebook, n) for n in range(4)]
    assert names == [trial.name for trial in trials]
    (exploit,) = notebook.records["trial-000"].exploits
    assert (exploit.donor, exploit.step, exploit.score, exploit.donor_score) == ("trial-003", first_pause, 0.0, 0.3)
    worst = notebook.trials["trial-000"]
    assert worst.config.optim.lr == exploit.params["optim.lr"] != trials[0].params["optim.lr"]
    assert worst.pause_at == second_pause
    copied = torch.load(f"{worst.uri}/checkpoints/step-{first_pause:08d}/state.pt", weights_only=True)
    assert copied["model"]["w"].tolist() == [3.0] * 3
    # The last generation hands out all, also those that have come to their end, and then there is none.
    assert [leg(generations, notebook, n) for n in range(4)] == names
    assert len(notebook.records["trial-000"].exploits) == 2
    assert notebook.trials["trial-000"].pause_at is None
    assert generations.suggest("c") == Generations.FINISHED
    assert TrialRecord.load(trials[0]).last_params == notebook.trials["trial-000"].params
    assert math.isclose(TrialRecord.load(trials[3]).value(OBJECTIVE), 0.3)


def test_a_score_that_was_lost_with_the_sweep_is_that_of_the_checkpoint(tmp_path):
    config = population_config(tmp_path, "num_trials=2")
    trials = plan_trials(config, CORPORA)
    (pause, _) = population.pauses(config.scheduler.perturbation_interval, trials[0])
    for trial, score in zip(trials, (0.9, 0.2), strict=True):
        checkpoint.save(
            trial.uri,
            pause,
            {"step": pause, **weights(score)},
            trajectory=trial.config.trajectory(),
            corpus_digest=CORPORA.digest,
            retention=checkpoint.Retention(2),
            scores={OBJECTIVE: score},
        )
    notebook = Notebook()
    assert Generations(config, trials, CORPORA, notebook).suggest("a")[NAME] == "trial-000"
    (exploit,) = population.load(config.output, 1)
    assert (exploit.name, exploit.score, exploit.donor, exploit.donor_score) == ("trial-001", 0.2, "trial-000", 0.9)
    assert TrialRecord.load(trials[1]).value_at(1, OBJECTIVE) == 0.2


def test_a_donor_that_is_not_what_was_meant_is_not_copied(tmp_path):
    config = population_config(tmp_path)
    good, poor = plan_trials(config, CORPORA)[:2]
    train(good, TrialRecord.load(good), 0.9, 9.0)
    (donor,) = checkpoint.committed(good.uri)
    keys = {"trajectory": poor.config.trajectory(), "corpus_digest": CORPORA.digest}
    with pytest.raises(CheckpointError, match="is damaged or was replaced"):
        checkpoint.adopt(donor, poor.uri, sha256="0" * 64, **keys)
    with pytest.raises(CheckpointError, match="another corpus"):
        checkpoint.adopt(donor, poor.uri, sha256=donor.sha256, **(keys | {"corpus_digest": "0" * 64}))
    assert checkpoint.committed(poor.uri) == []
