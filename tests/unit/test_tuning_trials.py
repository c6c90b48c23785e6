from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import ray.cloudpickle
import yaml

from dermray import storage
from dermray.config import parse
from dermray.corpus.shares import CorpusShare
from dermray.errors import ClaimError, ConfigError, DermRayError, PlanError
from dermray.ingest.corpora import Corpora
from dermray.ledger import FOLDER, claim
from dermray.train import checkpoint, epochs
from dermray.train.settings import PretrainConfig
from dermray.tuning import queues
from dermray.tuning import trial as trial_process
from dermray.tuning.mailbox import Box
from dermray.tuning.plan import Trial, plan_trials, share_cluster
from dermray.tuning.publishing import publish
from dermray.tuning.queues import Queue
from dermray.tuning.records import Point, Status, TrialRecord, best_of, leaderboard, ranked
from dermray.tuning.reports import NAME
from dermray.tuning.settings import SweepConfig
from dermray.tuning.sweep import Ledger
from dermray.tuning.trial import TrialContext
from tests.conftest import ROOT
from tests.sweeps import CORPORA, OBJECTIVE, Notebook, sweep_config


def record(name, status, *values):
    curve = [Point(n, 10 * n, 640 * n, {OBJECTIVE: value}) for n, value in enumerate(values, 1)]
    return TrialRecord(name, {"optim.lr": 0.1}, status, curve)


def test_trials_are_the_recipe_with_overrides_and_drawn_values(tmp_path):
    config = sweep_config(tmp_path, "num_trials=5", "num_validations=4", "overrides.data.captions.raw=0.25")
    trials = plan_trials(config, CORPORA)
    assert [trial.name for trial in trials] == [f"trial-00{n}" for n in range(5)]
    assert trials == plan_trials(config, CORPORA)
    for trial in trials:
        batch = trial.params["train.global_batch_size"]
        assert trial.config.optim.lr == trial.params["optim.lr"]
        assert trial.config.train.global_batch_size == batch
        assert trial.config.train.epochs == 4
        assert trial.config.num_workers == 1
        assert trial.config.model == "dermray_tiny"
        assert trial.config.data.captions == {"raw": 0.25, "ontology": 0.5}
        assert trial.config.output == f"{tmp_path}/sweep/trials/{trial.name}"
        assert trial.num_steps == 4 * (640 // batch)
        # Rungs are equal shares of a training, whatever the batch size.
        assert trial.validation_of(trial.num_steps) <= 4
        assert trial.config.validation.every_steps == -(-trial.num_steps // 4)
        assert trial.samples_at(trial.num_steps) == trial.num_steps * batch


def test_trials_deal_from_all_corpora_by_their_weights(tmp_path):
    shares = f"corpus=[{{uri: {tmp_path / 'a'}, weight: 3}}, {{uri: {tmp_path / 'b'}, weight: 1}}]"
    config = sweep_config(tmp_path, "num_trials=1", shares)
    corpora = Corpora(config.corpus_uris, CORPORA.manifests * 2)
    (trial,) = plan_trials(config, corpora)
    assert trial.config.corpora == (
        CorpusShare(uri=f"{tmp_path}/a", weight=3),
        CorpusShare(uri=f"{tmp_path}/b", weight=1),
    )
    assert trial.num_steps == 4 * (2 * 640 // trial.config.train.global_batch_size)
    assert [part.length for part in epochs._of_corpora(trial.config, corpora)] == [960, 320]
    with pytest.raises(ConfigError, match="corpus: an evaluation scores the samples of one corpus"):
        sweep_config(tmp_path, shares, "job=evaluate")


def test_the_recipe_of_a_trial_is_what_pretrain_takes(tmp_path):
    trial = plan_trials(sweep_config(tmp_path), CORPORA)[2]
    file = tmp_path / "best.yaml"
    file.write_text(trial.recipe_yaml())
    assert not {"corpus", "output", "run_name", "cluster", "tracking"} & yaml.safe_load(trial.recipe_yaml()).keys()
    again = parse(PretrainConfig, ["--config", str(file), "corpus=c", "output=o"])
    assert again.trajectory() == trial.config.trajectory()
    demo = parse(PretrainConfig, ["--config", str(ROOT / "jobs/configs/demo.yaml"), "corpus=c", "output=o"])
    assert again.validation == demo.validation


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["overrides.train.epoch=3"], ConfigError, r"unknown key 'train.epoch', did you mean 'train.epochs'"),
        (["space.optim.rate={kind: uniform, low: 0.1, high: 1}"], ConfigError, "unknown key 'optim.rate'"),
        (["space.optim.lr={kind: choice, values: [a, b]}"], ConfigError, "optim.lr"),
        (["space.train.global_batch_size.values=[1024, 2048, 4096]"], PlanError, r"trial-000 .*fewer than one global"),
        (["overrides.num_workers=7"], PlanError, "7 workers cannot share"),
        (["recipe=nowhere.yaml"], ConfigError, "'nowhere.yaml' does not exist"),
    ],
)
def test_bad_trials_are_refused_before_anything_starts(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message) as refused:
        plan_trials(sweep_config(tmp_path, *arguments), CORPORA)
    assert refused.value.exit_code == 2


def test_cpus_are_shared_so_that_no_trial_waits_for_another(tmp_path):
    config = sweep_config(tmp_path)
    trials = plan_trials(config, CORPORA)
    at_once, shared = share_cluster(config, trials, num_cpus=4, num_gpus=0)
    assert at_once == 1
    assert {trial.config.cpus_per_worker for trial in shared} == {2.0}
    config = sweep_config(tmp_path, "max_concurrent_trials=3")
    at_once, shared = share_cluster(config, trials, num_cpus=4, num_gpus=0)
    assert at_once == 3
    assert {trial.config.cpus_per_worker for trial in shared} == {0.667}
    assert {trial.config.threads_per_worker for trial in shared} == {max(1, os.cpu_count() // 3)}
    config = sweep_config(tmp_path, "max_concurrent_trials=3", "overrides.cpus_per_worker=3")
    trials = plan_trials(config, CORPORA)
    with pytest.raises(ConfigError, match=r"need 12\.03 CPUs, the cluster has 4; lower max_concurrent_trials"):
        share_cluster(config, trials, num_cpus=4, num_gpus=0)


def test_gpus_bound_the_trials_at_once(tmp_path):
    config = sweep_config(tmp_path, "overrides.num_workers=2")
    trials = plan_trials(config, CORPORA)
    assert share_cluster(config, trials, num_cpus=64, num_gpus=8)[0] == 4
    config = sweep_config(tmp_path, "overrides.num_workers=2", "max_concurrent_trials=5")
    with pytest.raises(ConfigError, match="need 10 GPUs, the cluster has 8"):
        share_cluster(config, trials, num_cpus=64, num_gpus=8)


def test_finished_trials_rank_before_stopped_ones():
    found = [
        record("early", Status.STOPPED, 0.9),
        record("late", Status.STOPPED, 0.1, 0.2),
        record("good", Status.FINISHED, 0.3, 0.2, 0.6),
        record("better", Status.FINISHED, 0.1, 0.1, 0.7),
        record("broken", Status.FAILED),
    ]
    assert [r.name for r in ranked(found, OBJECTIVE, "max")] == ["better", "good", "late", "early", "broken"]
    assert best_of(found, OBJECTIVE, "max").name == "better"
    assert best_of(found, OBJECTIVE, "min").name == "good"
    lines = leaderboard(found, OBJECTIVE, "max").splitlines()
    assert lines[1].split() == ["better", "finished", "0.7000", "3", "1,920", "optim.lr=0.1"]
    assert lines[5].split()[:3] == ["broken", "failed", "-"]


def test_without_a_finished_trial_there_is_no_best():
    failed = record("a", Status.FAILED)
    failed.error = "the loss became nan"
    with pytest.raises(DermRayError, match=r"no trial .* ran to its end; a: the loss became nan"):
        best_of([failed, record("b", Status.STOPPED, 0.5)], OBJECTIVE, "max")


def test_a_record_survives_and_a_repeated_validation_replaces_the_earlier(tmp_path):
    trial = plan_trials(sweep_config(tmp_path), CORPORA)[0]
    fresh = TrialRecord.load(trial)
    assert fresh.status is Status.UNFINISHED
    for value in (0.1, 0.2):
        fresh.add(Point(1, 10, 640, {OBJECTIVE: value}))
    fresh.add(Point(2, 20, 1280, {OBJECTIVE: 0.3}))
    fresh.end(Status.STOPPED, "")
    fresh.save(trial)
    again = TrialRecord.load(trial)
    assert again == fresh
    again.end(Status.STOPPED, "")
    assert again.ended_at == fresh.ended_at, "hearing of it again changes nothing"
    assert [point.metrics[OBJECTIVE] for point in again.curve] == [0.2, 0.3]
    assert again.samples_trained == 1280
    assert json.loads((tmp_path / "sweep/trials/trial-000/trial.json").read_text())["status"] == "stopped"
    other = plan_trials(sweep_config(tmp_path, "seed=1"), CORPORA)[0]
    with pytest.raises(DermRayError, match="a trial of another sweep"):
        TrialRecord.load(other)
    again.end(Status.FINISHED, "")
    assert again.ended_at > fresh.ended_at


def handed_out(queue):
    suggested = queue.suggest("tune")
    return suggested if isinstance(suggested, str) else suggested[NAME]


def test_no_trial_starts_once_the_samples_are_used_up_but_one_that_was_begun_goes_on(tmp_path):
    config = sweep_config(tmp_path, "max_samples=2000")
    trials, book = plan_trials(config, CORPORA), Notebook()
    queue = Queue(config, trials, CORPORA, book)
    for number, samples in ((0, 1200), (1, 799)):
        assert handed_out(queue) == f"trial-00{number}"
        book.records[f"trial-00{number}"].add(Point(1, 10, samples, {OBJECTIVE: 0.1}))
    assert handed_out(queue) == "trial-002", "1,999 are less than 2,000"
    book.records["trial-002"].add(Point(1, 10, 1, {OBJECTIVE: 0.1}))
    assert handed_out(queue) == Queue.FINISHED
    for name, one in book.records.items():
        one.save(next(trial for trial in trials if trial.name == name))
    again = Queue(config, trials, CORPORA, Notebook())
    assert [handed_out(again) for _ in range(4)] == ["trial-000", "trial-001", "trial-002", Queue.FINISHED]


def test_no_trial_starts_once_the_hours_are_over(tmp_path, monkeypatch):
    config = sweep_config(tmp_path, "max_hours=0.5")
    now = 1000.0
    monkeypatch.setattr(queues.time, "monotonic", lambda: now)
    queue = Queue(config, plan_trials(config, CORPORA), CORPORA, Notebook())
    assert handed_out(queue) == "trial-000"
    now += 1799
    assert handed_out(queue) == "trial-001"
    now += 1
    assert handed_out(queue) == Queue.FINISHED


def test_a_sweep_tells_how_many_trials_have_ended_and_an_eta_and_writes_while_it_is_its_own(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    told: list[str] = []
    trials = plan_trials(config, CORPORA)[:3]
    with claim(config.output) as mine:
        ledger = Ledger(config, mine, None, told.append, num_trials=3)
        _tells(ledger, trials, config, told)
        storage.remove(storage.join(config.output, FOLDER))
        with pytest.raises(ClaimError, match="its claim was removed") as caught:
            ledger._end(trials[2], Status.FAILED, "late")
        assert ledger.refusal is caught.value, "of an error in a callback Tune passes on the text alone"
        assert TrialRecord.load(trials[2]).status is Status.STOPPED
        with pytest.raises(ClaimError):
            publish(config, ledger.trials, list(ledger.records.values()), seconds=1.0)
    assert not storage.exists(storage.join(config.output, "best.yaml"))


def _tells(ledger: Ledger, trials: list[Trial], config: SweepConfig, told: list[str]) -> None:
    assert ledger.standing() == "0 of 3 trials have ended"
    for trial in trials:
        ledger.trials[trial.name], ledger.records[trial.name] = trial, TrialRecord.load(trial)
    places = [f"{trial.name} has yet to train" for trial in trials]
    assert ledger.standing() == f"0 of 3 trials have ended; {', '.join(places)}", "nothing is done by which to tell"
    ledger.records[trials[0].name].add(Point(1, 1, 8, {config.objective: 0.5}))
    ledger.steps = {trials[1].name: 3}
    places[:2] = [f"{trial.name} step {step}/{trial.num_steps}" for trial, step in zip(trials, (1, 3), strict=False)]
    eta = r"ETA \d+:\d\d:\d\d if the others take as long"
    assert re.fullmatch(rf"0 of 3 trials have ended; {', '.join(places)}; {eta}", ledger.standing())
    assert ray.cloudpickle.dumps(ledger), "Tune keeps its callbacks"
    for trial, status in zip(trials, (Status.FINISHED, Status.FAILED, Status.STOPPED), strict=True):
        ledger._end(trial, status)
    said = re.compile(rf"(\d) of 3 trials have ended; .*{eta}")
    assert [match[1] for match in map(said.fullmatch, told) if match] == ["1", "2"]
    assert len(told) == 5


def test_validations_reach_a_trial_in_order_and_hold_up_neither_a_stopped_trainer_nor_a_later_attempt() -> None:
    async def handed_over() -> list[object]:
        box, taken = Box(), []
        await box.open("a")
        lost = asyncio.create_task(box.take_validation("a"))
        await asyncio.sleep(0)
        # The process that waits is lost; another one trains.
        await box.open("a")
        puts = [asyncio.create_task(box.put_validation("a", {"step": step}, None)) for step in (1, 2)]
        closing = asyncio.create_task(box.close("a"))
        await asyncio.sleep(0)
        assert [put.done() for put in (*puts, closing)] == [True, False, False], "it waits for the one before"
        taken += [await box.take_validation("a") for _ in range(3)]
        await asyncio.gather(*puts, closing)
        await box.put_validation("a", {"step": 3}, None)
        waiting = asyncio.create_task(box.put_validation("a", {"step": 4}, None))
        await asyncio.sleep(0)
        await box.put_stop("a")
        await asyncio.wait_for(asyncio.gather(waiting, box.put_validation("a", {"step": 5}, None), box.close("a")), 60)
        assert not lost.done()
        lost.cancel()
        return taken

    assert asyncio.run(handed_over()) == [{"step": 1}, {"step": 2}, None]


@pytest.mark.parametrize("status", [Status.UNFINISHED, Status.FAILED, Status.STOPPED])
def test_a_validation_that_a_killed_driver_has_not_heard_of_is_told_from_its_checkpoint(
    status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the trial was stopped: what its trainer did meanwhile is nobody's."""
    trial = plan_trials(sweep_config(tmp_path, "num_trials=1", "num_validations=4"), CORPORA)[0]
    every = trial.validates_every
    known = TrialRecord(trial.name, trial.params, status, [Point(1, every, 1, {OBJECTIVE: 0.1})])
    for number in (1, 2, 3):
        checkpoint.save(
            trial.uri, number * every, {"step": number}, trajectory={}, corpus_digest="c",
            retention=checkpoint.Retention(3), scores={OBJECTIVE: 0.1 * number} if number < 3 else None,
        )  # fmt: skip
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(trial_process, "_train_and_tell", lambda *_: told.append((0, 0.0)))
    monkeypatch.setattr(trial_process.tune, "report", lambda one: told.append((one["validation"], one[OBJECTIVE])))
    handed = SimpleNamespace(trial=SimpleNamespace(remote=lambda name: None))
    answers = iter([[None], [(trial, known)]])
    monkeypatch.setattr(trial_process.ray, "get", lambda _: next(answers))
    trial_process.run_trial(TrialContext(handed, None), {NAME: trial.name})  # type: ignore[arg-type]
    assert told == [(1, 0.1)] + ([(2, 0.2), (0, 0.0)] if status is not Status.STOPPED else [])


@pytest.mark.parametrize("end", ["finished", "failed", "stopped"])
def test_a_trial_tells_tune_each_validation_and_ends_as_its_training_does(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: SimpleQueue[dict[str, int] | None] = SimpleQueue()
    ignored = SimpleNamespace(remote=lambda name: None)
    taken = SimpleNamespace(remote=lambda name: waiting.get())
    mailbox = SimpleNamespace(open=ignored, close=ignored, take_validation=taken)
    told: list[dict[str, int]] = []
    aborted, ended = threading.Event(), threading.Event()

    def train(*_: object) -> None:
        for step in (1, 2):
            waiting.put({"step": step})
        waiting.put(None)
        if end == "stopped":
            aborted.wait(60)
            time.sleep(0.05)
        ended.set()
        if end == "failed":
            raise DermRayError("odd")

    def report(figures: dict[str, int]) -> None:
        told.append(figures)
        if end == "stopped":
            aborted.set()
            raise SystemExit(0)

    monkeypatch.setattr(trial_process.ray, "get", lambda value: value)
    monkeypatch.setattr(trial_process.tune, "report", report)
    monkeypatch.setattr(trial_process, "_train", train)
    given = SimpleNamespace(name="trial-000"), None, TrialContext(mailbox, None)
    expected = {"finished": contextlib.nullcontext(), "failed": pytest.raises(DermRayError, match="odd")}
    with expected.get(end, pytest.raises(SystemExit)):
        trial_process._train_and_tell(*given)
    assert ended.is_set()
    assert told == ([{"step": 1}] if end == "stopped" else [{"step": 1}, {"step": 2}])
