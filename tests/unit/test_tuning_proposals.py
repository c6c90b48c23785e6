"""What Optuna proposes, which parameters matter, and the page that shows it: on records of trials that cost nothing."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from dermray.config import parse
from dermray.corpus.manifest import Manifest, Shard
from dermray.ingest.corpora import Corpora
from dermray.train.settings import PretrainConfig
from dermray.tuning import importance, space
from dermray.tuning.plan import plan_trials, with_params
from dermray.tuning.proposals import TPE_STARTUP_TRIALS, proposal
from dermray.tuning.publishing import publish
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from tests.conftest import ROOT
from tests.sweeps import CORPORA, OBJECTIVE, sweep_config

BEST_LR = 1e-3


def tuned(tmp_path, *arguments):
    return sweep_config(
        tmp_path, "space.optim.weight_decay={kind: uniform, low: 0.0, high: 0.2}", "num_validations=2", *arguments
    )


def score(params):
    """Best at one learning rate; a larger batch helps a little; weight decay says nothing."""
    return 1 - abs(math.log10(params["optim.lr"] / BEST_LR)) + params["train.global_batch_size"] / 25600


def record(number, params, status=Status.FINISHED):
    last = 2 if status is Status.FINISHED else 1
    curve = [Point(n, 10 * n, 640 * n, {OBJECTIVE: score(params) * n / 2}) for n in range(1, last + 1)]
    return TrialRecord(f"trial-{number:03d}", params, status, curve)


def search(config, num_trials):
    """A whole search without training."""
    drawn = space.sample(config.ordered_space, num_trials=num_trials, seed=config.seed)
    records = []
    for number in range(num_trials):
        params = proposal(config, number, records) or drawn[number]
        records.append(record(number, params, Status.STOPPED if number % 3 == 1 else Status.FINISHED))
    return records


def test_tpe_finds_what_random_search_misses_and_proposes_the_same_again(tmp_path):
    config = tuned(tmp_path, "search=tpe", "num_trials=24")
    records = search(config, 24)
    drawn = space.sample(config.ordered_space, num_trials=24, seed=config.seed)
    assert [one.params for one in records[:TPE_STARTUP_TRIALS]] == drawn[:TPE_STARTUP_TRIALS]
    assert search(config, 24) == records
    later = [score(one.params) for one in records[12:]]
    assert sum(later) / 12 > sum(score(params) for params in drawn[12:]) / 12 + 0.05
    for one in records:
        assert 2e-4 <= one.params["optim.lr"] <= 4e-3
        assert one.params["train.global_batch_size"] in (64, 128, 256)
    assert proposal(tuned(tmp_path, "num_trials=24"), 20, records) is None, "random search learns nothing"


def test_the_parameter_that_matters_is_found(tmp_path):
    config = tuned(tmp_path, "num_trials=24")
    points = space.sample(config.ordered_space, num_trials=24, seed=1)
    found = importance.of_parameters(config, [record(n, params) for n, params in enumerate(points)])
    shares = found["shares"]
    assert next(iter(shares)) == "optim.lr"
    assert shares["optim.lr"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
    assert importance.of_parameters(config, [record(0, points[0])]) is None


def test_a_proposed_trial_is_a_checked_recipe(tmp_path):
    config = tuned(tmp_path, "search=tpe")
    planned = plan_trials(config, CORPORA)[5]
    params = {"optim.lr": 1e-3, "train.global_batch_size": 128, "optim.weight_decay": 0.05}
    other = with_params(config, planned, params, CORPORA)
    assert (other.name, other.uri, other.config.optim.lr) == (planned.name, planned.uri, 1e-3)
    assert other.num_steps == 4 * (640 // 128)


def test_the_page_and_the_best_recipe(tmp_path):
    config = tuned(tmp_path, "num_trials=8")
    trials = {trial.name: trial for trial in plan_trials(config, CORPORA)}
    states = [Status.FINISHED] * 5 + [Status.STOPPED] * 2 + [Status.FAILED]
    records = [record(n, t.params, s) for n, (t, s) in enumerate(zip(trials.values(), states, strict=True))]
    records[-1] = TrialRecord(records[-1].name, records[-1].params, Status.FAILED, [], "ran <out> of memory", 2)
    result = publish(config, trials, records, seconds=12.0)
    document = json.loads((tmp_path / "sweep" / "trials.json").read_text())
    best = max(records[:5], key=lambda one: score(one.params))
    assert document["best"] == best.name == result.best.name
    assert document["trials_stopped"] == 2
    assert document["samples_trained"] == 5 * 1280 + 2 * 640
    assert document["importance"]["num_trials"] == 7
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("<svg") >= 4
    assert "ran &lt;out&gt; of memory" in page
    assert all(name in page for name in trials)
    arguments = ["--config", str(tmp_path / "sweep" / "best.yaml"), "corpus=c", "output=o"]
    assert parse(PretrainConfig, arguments).optim.lr == best.params["optim.lr"]


def test_seeds_of_one_setting_give_an_interval(tmp_path):
    space_of_six = {
        "seed": "[0, 1, 2]",
        "optim.lr": "[0.001, 0.002]",
        "optim.weight_decay": "[0.1]",
        "train.global_batch_size": "[64]",
    }
    choices = [f"space.{key}={{kind: choice, values: {values}}}" for key, values in space_of_six.items()]
    keys = [f"recipe={ROOT / 'jobs/configs/demo.yaml'}", f"corpus={tmp_path / 'c'}", f"output={tmp_path / 'sweep'}"]
    config = parse(SweepConfig, [*keys, *choices, "search=grid", "num_validations=2", "overrides.num_workers=1"])
    trials = {trial.name: trial for trial in plan_trials(config, CORPORA)}
    assert len(trials) == 6
    records = [record(n, trial.params) for n, trial in enumerate(trials.values())]
    for one in records:
        one.curve[-1].metrics[OBJECTIVE] += 0.01 * one.params["seed"]
    publish(config, trials, records, seconds=1.0)
    best, other = json.loads((tmp_path / "sweep" / "trials.json").read_text())["settings"]
    assert (best["num_seeds"], best["params"]["optim.lr"], other["params"]["optim.lr"]) == (3, 0.001, 0.002)
    # Student's t of two degrees of freedom: 4.3027 standard errors, here of 0.01 over the root of 3.
    assert best["high"] - best["mean"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert "Settings over seeds" in (tmp_path / "sweep" / "sweep.html").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tune" / "spaces").glob("*.yaml")))
def test_every_ready_made_space_gives_trials(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shard = Shard(path="a", split="train", num_samples=1 << 17, num_bytes=1, sha256="0", row_groups=(128,) * 1024)
    config = parse(SweepConfig, ["--config", f"tune/spaces/{name}", f"corpus={tmp_path}", f"output={tmp_path / 'o'}"])
    if config.job == "evaluate":
        assert len(space.grid(config.ordered_space)) == 11
        return
    trials = plan_trials(config, Corpora.of("nowhere", Manifest(shards=(shard,))))
    assert len(trials) == yaml.safe_load((ROOT / "tune" / "spaces" / name).read_text())["num_trials"]
