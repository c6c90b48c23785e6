"""Tracking against a real SQLite store: a run's life, resumption, lineage, and the registry with its alias."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from pydantic import Field

from dermray import tracking
from dermray.config import Config, TrackingConfig
from dermray.corpus.manifest import Manifest, Shard
from dermray.errors import TrackingError


class Section(Config):
    rate: float = Field(0.5, description="a rate")
    names: tuple[str, ...] = Field(("a", "b"), description="names")


class Settings(Config):
    corpus: str = Field("s3://bucket/c", description="where")
    empty: str | None = Field(None, description="nothing")
    inner: Section = Section()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module: making one takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def config(store: Path, request: pytest.FixtureRequest) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{store}/mlflow.db", experiment=request.node.name)


@pytest.fixture
def client(config: TrackingConfig) -> MlflowClient:
    return tracking.client(config)


def manifest(sha256: str = "0" * 64) -> Manifest:
    shard = Shard(path="data/a.parquet", split="train", num_samples=3, num_bytes=1, sha256=sha256, row_groups=(3,))
    return Manifest(shards=(shard,))


def runs(client: MlflowClient, config: TrackingConfig) -> list[MlflowRun]:
    experiment = client.get_experiment_by_name(config.experiment)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def steps(client: MlflowClient, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def test_a_run_records_config_code_figures_and_ends_finished(config: TrackingConfig, client: MlflowClient) -> None:
    with tracking.run(config, kind="pretrain", name="first", resolved=Settings()) as current:
        assert client.get_run(current.id).info.status == "RUNNING"
        assert not current.resumed
        current.log_metrics({"loss": 2.0, "lr": 0.1}, step=1)
        current.log_metrics({"loss": 1.5}, step=2)
        current.log_metrics({"final": 7.0})
        current.set_tags({"model_uri": "x"})
        current.log_text("hello", "notes/a.txt")
    (run,) = runs(client, config)
    assert run.info.run_id == current.id
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "corpus": "s3://bucket/c",
        "empty": "None",
        "inner.rate": "0.5",
        "inner.names": "['a', 'b']",
    }
    assert run.data.metrics == {"loss": 1.5, "lr": 0.1, "final": 7.0}
    assert run.data.tags["dermray.kind"] == "pretrain"
    assert run.data.tags["model_uri"] == "x"
    text = Path(client.download_artifacts(current.id, "config.yaml")).read_text()
    assert text == Settings().to_yaml()
    assert Path(client.download_artifacts(current.id, "notes/a.txt")).read_text() == "hello"


@pytest.mark.parametrize(("error", "status"), [(ValueError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_that_breaks_says_so(
    config: TrackingConfig, client: MlflowClient, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), tracking.run(config, kind="pretrain", name="x", resolved=Settings()):
        raise error
    assert [run.info.status for run in runs(client, config)] == [status]


def test_a_restarted_job_goes_on_in_the_same_run(config: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    state_uri = str(tmp_path / "output" / "mlflow.json")

    def attempt(steps: range, *, breaks: bool) -> tracking.Run:
        with tracking.run(config, kind="pretrain", name="x", resolved=Settings(), state_uri=state_uri) as current:
            for step in steps:
                current.log_metrics({"loss": float(step), "lr": 0.1}, step=step)
            current.log_corpus("/data/c", manifest(), context="training")
            if breaks:
                raise ValueError
        return current

    with pytest.raises(ValueError):  # noqa: PT011
        attempt(range(1, 6), breaks=True)
    (before,) = runs(client, config)
    assert before.info.status == "FAILED"
    # From the checkpoint of step 3 on.
    second = attempt(range(4, 9), breaks=False)
    assert second.resumed
    (run,) = runs(client, config)
    assert run.info.run_id == before.info.run_id == second.id
    assert run.info.status == "FINISHED"
    for key in ("loss", "lr"):
        assert steps(client, second.id, key) == list(range(1, 9))
    assert len(run.inputs.dataset_inputs) == 1


def test_a_step_comes_once_also_when_workers_start_over_within_a_job(
    config: TrackingConfig, client: MlflowClient
) -> None:
    with tracking.run(config, kind="pretrain", name="x", resolved=Settings()) as current:
        for step in (1, 2, 3, 4, 5, 4, 5, 6, 7):
            current.log_metrics({"loss": float(step)}, step=step)
            if step % 2 == 0:
                current.log_metrics({"validation": float(step)}, step=step)
    assert steps(client, current.id, "loss") == [1, 2, 3, 4, 5, 6, 7]
    assert steps(client, current.id, "validation") == [2, 4, 6]


def test_a_state_that_names_no_usable_run_begins_a_new_one(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    state_uri = str(tmp_path / "mlflow.json")
    ids = []
    for _ in range(2):
        with tracking.run(config, kind="pretrain", name="x", resolved=Settings(), state_uri=state_uri) as current:
            ids.append(current.id)
        client.delete_run(current.id)
    (tmp_path / "mlflow.json").write_text('{"mlflow_run_id": "0123456789abcdef0123456789abcdef"}')
    with tracking.run(config, kind="pretrain", name="x", resolved=Settings(), state_uri=state_uri) as current:
        ids.append(current.id)
    assert len(set(ids)) == 3
    assert str(current.id) in (tmp_path / "mlflow.json").read_text()


def test_a_store_that_refuses_costs_figures_and_not_the_job(
    config: TrackingConfig, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody deletes the run under the job's feet."""
    with caplog.at_level(logging.WARNING), tracking.run(config, kind="x", name="x", resolved=Settings()) as current:
        client.delete_run(current.id)
        current.log_metrics({"loss": 1.0}, step=2)
    assert "did not take the metrics of step 2" in caplog.text
    assert f"did not take the end of run {current.id}" in caplog.text


def test_the_corpus_is_an_input_of_the_run(config: TrackingConfig, client: MlflowClient) -> None:
    with tracking.run(config, kind="pretrain", name="x", resolved=Settings()) as current:
        current.log_corpus("/data/corpora/derm", manifest(), context="training")
    (run,) = runs(client, config)
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "derm"
    assert given.dataset.digest == manifest().digest[:36]
    assert manifest().digest in given.dataset.source
    assert '"num_samples": 3' in given.dataset.profile
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_a_nested_run_names_its_parent(config: TrackingConfig, client: MlflowClient) -> None:
    with tracking.run(config, kind="sweep", name="sweep", resolved=Settings()) as parent:
        options = {"kind": "trial", "name": "trial", "resolved": Settings(), "parent_id": parent.id}
        with tracking.run(config, **options) as child:
            pass
    assert client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_switched_off_it_takes_everything_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    off = TrackingConfig(enabled=False)
    state_uri = str(tmp_path / "mlflow.json")
    with tracking.run(off, kind="pretrain", name="x", resolved=Settings(), state_uri=state_uri) as current:
        assert current.id is None
        current.log_metrics({"loss": 1.0}, step=1)
        current.log_corpus("/data/c", manifest(), context="training")
        current.log_text("x", "x.txt")
        current.log_folder(str(tmp_path), "x")
        current.set_tags({"a": "b"})
        with pytest.raises(TrackingError, match=r"tracking\.enabled=true"):
            tracking.register(current, name="m", model_uri=str(tmp_path), metric="a.b", value=1.0, corpus_digest="c")
    assert list(tmp_path.iterdir()) == []


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.tracking_uri(TrackingConfig()) == "http://127.0.0.1:5000"
    assert tracking.tracking_uri(TrackingConfig(uri="sqlite:///x.db")) == "sqlite:///x.db"


def register(
    config: TrackingConfig,
    folder: Path,
    value: float,
    *,
    name: str,
    digest: str = "c1",
    metric: str = "zero_shot.accuracy",
) -> tracking.Registration:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(f"{value}")
    with tracking.run(config, kind="register", name="x", resolved=Settings()) as current:
        return tracking.register(
            current, name=name, model_uri=str(folder), metric=metric, value=value, corpus_digest=digest
        )


def test_the_alias_moves_only_to_what_is_not_worse_on_the_same_corpus(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    def add(value: float, digest: str = "c1", metric: str = "zero_shot.accuracy") -> tracking.Registration:
        return register(config, tmp_path / "m", value, name="derm", digest=digest, metric=metric)

    def champion() -> str:
        return str(client.get_model_version_by_alias("derm", tracking.CHAMPION).version)

    first = add(0.5)
    assert (first.version, first.promoted, first.previous) == ("1", True, None)
    worse = add(0.4999)
    assert (worse.version, worse.promoted, worse.previous) == ("2", False, 0.5)
    assert champion() == "1"
    equal = add(0.5)
    assert (equal.version, equal.promoted) == ("3", True)
    better = add(0.75)
    assert (better.promoted, better.previous) == (True, 0.5)
    assert champion() == "4"
    # Scores on another corpus or of another metric cannot be compared.
    assert add(0.1, digest="c2").promoted
    assert add(0.1, digest="c2", metric="retrieval.image_to_text_R@1").promoted
    assert not add(0.05, digest="c2", metric="retrieval.image_to_text_R@1").promoted
    assert champion() == "6"
    assert Counter(v.version for v in client.search_model_versions("name='derm'")).total() == 7


def test_a_registered_model_is_found_by_alias_and_by_version(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    register(config, tmp_path / "m", 0.25, name="found")
    register(config, tmp_path / "m", 0.125, name="found")
    by_alias = tracking.resolve_model("models:/found@champion", config)
    assert (by_alias.name, by_alias.version, by_alias.alias) == ("found", "1", "champion")
    assert by_alias.tags["evaluation_corpus_digest"] == "c1"
    assert client.get_run(by_alias.run_id).info.status == "FINISHED"
    by_version = tracking.resolve_model("models:/found/2", config)
    assert (by_version.version, by_version.alias) == ("2", None)
    for resolved, value in ((by_alias, "0.25"), (by_version, "0.125")):
        assert Path(resolved.folder_uri).is_dir(), "the registry keeps its own copy of the folder"
        assert (Path(resolved.folder_uri) / "open_clip_config.json").read_text() == value


@pytest.mark.parametrize(
    "uri", ["models:/found@nobody", "models:/found/99", "models:/absent@champion", "models:/absent/1", "models:/found"]
)
def test_what_the_registry_does_not_have_is_one_clear_line(config: TrackingConfig, tmp_path: Path, uri: str) -> None:
    register(config, tmp_path / "m", 0.25, name="found")
    with pytest.raises(TrackingError, match="the registry has no .*register one with") as caught:
        tracking.resolve_model(uri, config)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_registry_uri_stays_as_it_is(config: TrackingConfig) -> None:
    for uri, name in (("/models/vit", "vit"), ("local-dir:/models/vit/", "vit"), ("s3://b/m/", "m"), ("RN50", "RN50")):
        resolved = tracking.resolve_model(uri, config)
        assert (resolved.folder_uri, resolved.name, resolved.version) == (uri, name, None)
