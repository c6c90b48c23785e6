"""A sweep tells no figures of another corpus, model or settings as its own: refused before Ray or MLflow hear of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dermray import storage
from dermray.commands import sweep as job
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.errors import DermRayError
from dermray.ingest.corpora import Corpora
from dermray.train import checkpoint, epochs
from dermray.train.settings import PretrainConfig
from dermray.tuning import evaluations
from dermray.tuning.plan import plan_trials, with_params
from dermray.tuning.publishing import publish
from dermray.tuning.records import AnyTrial, Point, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from tests.conftest import ROOT
from tests.corpora import write_model, write_prepared_corpus
from tests.sweeps import CORPORA, OBJECTIVE

SEARCHES = {
    "random": ["num_trials=2"],
    "tpe": ["num_trials=2", "search=tpe"],
    "population": ["num_trials=2", "scheduler.kind=pbt"],
}


class ReachedRayError(Exception):
    """The sweep was not refused."""


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: object) -> None:
        raise ReachedRayError

    monkeypatch.setattr(job.cluster, "connect", connect)


def corpus(folder: Path, **changes: object) -> str:
    """The manifest of the 640 samples; of its shards nothing is read before Ray is."""
    (shard,) = CORPORA.manifests[0].shards
    splits = [shard, shard.model_copy(update={"split": "val", "path": "data/b.parquet"})]
    Manifest(shards=tuple(each.model_copy(update=changes) for each in splits)).save(str(folder))
    return str(folder)


def trainings(folder: Path, *arguments: str) -> list[str]:
    space = "space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-2}"
    return [
        *(f"recipe={ROOT / 'jobs/configs/demo.yaml'}", f"output={folder / 'sweep'}", space, "num_validations=4"),
        *("overrides.train.global_batch_size=64", "overrides.num_workers=1", "tracking.enabled=false", *arguments),
    ]


def finish(trial: AnyTrial, *, objective: str = OBJECTIVE) -> None:
    """As a sweep that was here before has left the trial."""
    point = Point(1, trial.num_steps, trial.samples_at(trial.num_steps), {objective: 0.5})
    TrialRecord(trial.name, trial.params, Status.FINISHED, [point], basis=trial.basis).save(trial)


def forget(trial: AnyTrial) -> None:
    """As an earlier version has left its record."""
    file = Path(trial.uri) / "trial.json"
    document = json.loads(file.read_text())
    del document["basis"]
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("search", SEARCHES)
def test_trainings_on_something_else_are_refused_and_the_same_go_on(
    search: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, moved, other = (
        corpus(tmp_path / name, **changes)
        for name, changes in {"first": {}, "moved": {}, "other": {"sha256": "1"}}.items()
    )
    weighted = "corpus=[{{uri: {}, weight: {}}}, {{uri: {}, weight: 1}}]"
    begun = trainings(tmp_path, *SEARCHES[search], weighted.format(first, 3, other))
    config = parse(SweepConfig, begun)
    corpora = Corpora.load(config.corpus_uris)
    one, last = plan_trials(config, corpora)
    if search == "tpe":
        last = with_params(config, last, {"optim.lr": 0.00123}, corpora)
    for trial in (one, last):
        finish(trial)
    shares = weighted.format(first, 2, other)
    for changes, said in {
        (f"corpus={first}",): r"other corpora \(2, now 1\); corpus\.0\.weight was 3\.0, now None",
        (weighted.format(other, 3, first),): r"another corpus 1 of 2 \(digest",
        (shares,): r"corpus\.0\.weight was 3\.0, now 2\.0.*give the sweep another output, or what it began with",
        ("overrides.model=ViT-B-32",): "model was 'dermray_tiny', now 'ViT-B-32'",
        ("overrides.train.epochs=8",): r"train\.epochs was 12\.0, now 8\.0",
        ("overrides.validation.max_samples=32",): r"validation\.max_samples was 256, now 32",
        ("num_validations=2",): r"validation\.every_steps was \d+, now",
    }.items():
        with pytest.raises(DermRayError, match=rf"trial-000 .*trials/trial-000/trial\.json holds .*{said}"):
            job.main([*begun, *changes])
    with pytest.raises(ReachedRayError):
        job.main([*begun, weighted.format(moved, 3, other), "overrides.cpus_per_worker=1", "overrides.train.grace_s=9"])
    assert "earlier version" not in capsys.readouterr().err
    forget(last)
    with pytest.raises(ReachedRayError):
        job.main(begun)
    assert capsys.readouterr().err.count("trial-001: an earlier version wrote down the figures") == 1


def test_proposals_from_another_space_are_refused(tmp_path: Path) -> None:
    """A proposed trial keeps its point whatever the space is, so that its values tell no other space."""
    begun = trainings(tmp_path, *SEARCHES["tpe"], f"corpus={corpus(tmp_path / 'first')}", "num_trials=3")
    config = parse(SweepConfig, begun)
    corpora = Corpora.load(config.corpus_uris)
    trials = plan_trials(config, corpora)
    finish(trials[0])
    finish(with_params(config, trials[1], {"optim.lr": 0.00123}, corpora))
    was = r"space\.optim\.lr was \{'low': 0\.0001, 'high': 0\.01, 'kind': 'loguniform'\}, now "
    for changed, said in {
        "space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-1}": rf"{was}\{{'low': 0\.0001, 'high': 0\.1",
        "space.optim.lr={kind: uniform, low: 1.0e-4, high: 1.0e-2}": rf"{was}\{{'low': 0\.0001, .*'uniform'\}}",
        "space.optim.beta1={kind: choice, values: [0.8, 0.9]}": r"space\.optim\.beta1 was None, now \{'kind': 'choice'",
    }.items():
        with pytest.raises(
            DermRayError, match=rf"trials/trial-000/trial\.json holds a trial of something else: {said}"
        ):
            job.main([*begun, changed])
    for same in ([], ["num_trials=9"], ["space.optim.lr={kind: loguniform, high: 0.01, low: 0.0001}"]):
        with pytest.raises(ReachedRayError):
            job.main([*begun, *same])
    file = Path(trials[0].uri) / "trial.json"
    document = json.loads(file.read_text())
    del document["basis"]["space"]
    file.write_text(json.dumps(document))
    Path(trials[1].uri, "trial.json").unlink()
    with pytest.raises(ReachedRayError):
        job.main([*begun, "space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-1}"])


def test_what_an_earlier_version_trained_is_compared_by_its_checkpoint(tmp_path: Path) -> None:
    first, other = corpus(tmp_path / "first"), corpus(tmp_path / "other", sha256="1")
    begun = trainings(tmp_path, *SEARCHES["tpe"], f"corpus={first}")
    config = parse(SweepConfig, begun)
    corpora = Corpora.load(config.corpus_uris)
    one, last = plan_trials(config, corpora)
    stopped = with_params(config, last, {"optim.lr": 0.00123}, corpora)
    for trial in (one, stopped):
        finish(trial)
        forget(trial)
    keys = {"trajectory": epochs.trajectory(stopped.config, corpora), "corpus_digest": corpora.digest}
    checkpoint.save(stopped.uri, 10, {"step": 10}, **keys, retention=checkpoint.Retention(1))
    with pytest.raises(ReachedRayError):
        job.main(begun)
    with pytest.raises(DermRayError, match=r"trial-001 \(optim\.lr=0\.00123\): .* was trained on another corpus"):
        job.main([*begun, f"corpus={other}"])
    TrialRecord(one.name, one.params, Status.FAILED).save(one)
    assert TrialRecord.load(one).basis == one.basis, "what has no figures has nothing that could be another's"


def test_evaluations_of_something_else_are_refused_and_the_same_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prepared_corpus(tmp_path / "first", {"train": 16, "val": 8})
    write_prepared_corpus(tmp_path / "other", {"train": 24, "val": 8})
    models = {seed: write_model(tmp_path / f"model-{seed}", seed=seed) for seed in (0, 1)}
    begun = [
        *("--config", str(ROOT / "tune/spaces/linear_probe.yaml"), f"overrides.model={models[0]}"),
        *(f"corpus={tmp_path / 'first'}", f"output={tmp_path / 'sweep'}", "tracking.enabled=false", "search=random"),
        "num_trials=2",
    ]
    config = parse(SweepConfig, begun)
    trials = evaluations.plan_evaluations(config)
    for trial in trials:
        finish(trial, objective=config.objective)
    for changes, said in {
        (f"corpus={tmp_path / 'other'}",): r"another corpus \(digest",
        (f"overrides.model={models[1]}",): "model was 'weights [0-9a-f]{64}', now 'weights ",
        ("overrides.split=train",): "split was 'val', now 'train'",
    }.items():
        with pytest.raises(DermRayError, match=rf"trials/trial-000/trial\.json holds a trial of .*{said}"):
            job.main([*begun, *changes])
    proposed, *_ = evaluations.plan_evaluations(parse(SweepConfig, [*begun, "search=tpe"]))
    assert (trials[0].basis.space, list(proposed.basis.space or {})) == (None, ["space.probe_cost"])
    moved = storage.join(str(tmp_path), "moved")
    models[0].rename(moved)
    forget(trials[1])
    report = Path(trials[1].uri) / "report.json"
    told = {"uri": "m", "model_digest": storage.sha256(f"{moved}/open_clip_model.safetensors")}
    document = {
        "model": told, "corpus": {"uri": "c", "digest": trials[1].basis.corpus_digest}, "tasks": {},
        "config": trials[1].config.recorded() | {"tasks": ["linear_probe", "knn"]},
    }  # fmt: skip
    report.write_text(json.dumps(document | {"model": told | {"model_digest": "0" * 64}}))
    with pytest.raises(DermRayError, match=r"trial-001/report\.json is of something else: model was 'weights 0000"):
        job.main([*begun, f"overrides.model={moved}"])
    report.write_text(json.dumps(document))
    with pytest.raises(ReachedRayError):
        job.main([*begun, f"overrides.model={moved}", f"overrides.cache={tmp_path}", "overrides.batch_size=2"])
    assert "warning: trial-001: an earlier version" in capsys.readouterr().err
    again = [*begun, f"overrides.model={moved}"]
    config, other = (parse(SweepConfig, [*again, *more]) for more in ([], ["objective=knn/odd"]))
    trials = evaluations.plan_evaluations(config)
    with pytest.raises(DermRayError, match="no score 'knn/odd'; there are linear_probe"):
        evaluations.sweep(other, trials, parent_key=None, say=print)
    result = evaluations.sweep(config, trials, parent_key=None, say=print)
    assert [record.status for record in result.records] == [Status.FINISHED] * 2
    models[1].rename(models[0])
    with pytest.raises(DermRayError, match="model was 'weights "):
        job.main(begun)


@pytest.mark.parametrize("named", ["{0}", "[{{uri: {0}, weight: 2}}, {{uri: {1}, weight: 0.5}}]", "[{0}, {1}]"])
def test_the_command_that_the_best_recipe_prints_deals_from_the_same_corpora(named: str, tmp_path: Path) -> None:
    folders = [corpus(tmp_path / name, sha256=name) for name in ("it's, one", "two: {2}")]
    quoted = folders if named == "{0}" else [json.dumps(folder) for folder in folders]
    config = parse(SweepConfig, trainings(tmp_path, "num_trials=1", f"corpus={named.format(*quoted)}"))
    (trial,) = plan_trials(config, Corpora.load(config.corpus_uris))
    finish(trial)
    publish(config, {trial.name: trial}, [TrialRecord.load(trial)], seconds=1.0)
    best = tmp_path / "sweep" / "best.yaml"
    python, script, *arguments = shlex.split(best.read_text().splitlines()[1].removeprefix("#"))
    assert (python, script) == ("python", "jobs/pretrain.py")
    again = parse(PretrainConfig, [str(best) if given == "THIS_FILE" else given for given in arguments])
    assert again.corpora == trial.config.corpora
    assert again.trajectory() == trial.config.trajectory()
