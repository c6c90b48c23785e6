"""Tracking against a real SQLite store: a run's life, resumption, lineage, and the registry with its alias."""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from pydantic import Field

from dermray import redaction, tracking
from dermray.config import Config, TrackingConfig
from dermray.corpus.manifest import Manifest, Shard
from dermray.errors import DermRayError, ModelError, TrackingError
from dermray.tracking import facts
from dermray.tracking.flavour import DermRayModel
from dermray.tracking.spool import Spool
from dermray.vectors.encoder import Encoder
from tests import rotation_model
from tests.corpora import write_model


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


def test_a_run_says_what_it_ran_with(config: TrackingConfig, client: MlflowClient) -> None:
    faster = config.model_copy(update={"system_metrics_interval_s": 0.05})
    with tracking.run(faster, kind="pretrain", name="x", resolved=Settings()) as current:
        deadline = time.monotonic() + 30
        while not any(key.startswith("system/") for key in client.get_run(current.id).data.metrics):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        current.log_artifact("output", "model", "https://user:word@host/m", "f" * 64)
    run = client.get_run(current.id)
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert json.loads(run.data.tags[f"dermray.output.model.{'f' * 16}"]) == {
        "uri": "https://host/m",
        "digest": "f" * 64,
    }
    packages = Path(client.download_artifacts(current.id, facts.PACKAGES_FILE)).read_text().splitlines()
    assert f"mlflow=={mlflow.__version__}" in packages
    hardware = json.loads(Path(client.download_artifacts(current.id, facts.HARDWARE_FILE)).read_text())
    assert hardware["memory_bytes"] == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('+API_KEY = "abcdef123456"', '+API_KEY = "(hidden)"'),
        ("+token: hunter2hunter2", "+token: (hidden)"),
        ("+Authorization: Bearer abc.def.ghi", "+Authorization: Bearer (hidden)"),
        ("+s3 AKIAABCDEFGHIJKLMNOP here", "+s3 (hidden) here"),
        ("+postgresql://me:word@host/db", "+postgresql://(hidden)@host/db"),
        ("+tokens = tokenizer(texts)", "+tokens = tokenizer(texts)"),
        ("+api_key_env: LLM_KEY", "+api_key_env: LLM_KEY"),
    ],
)
def test_a_patch_holds_no_secrets(text: str, kept: str) -> None:
    assert redaction.without_secrets(text) == kept


def test_a_line_that_a_disk_has_lost_costs_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool.begin(tmp_path, "k")
    spool.append({"kind": "a"})
    spool.append({"kind": "b"}, durable=True)
    with spool.path.open("r+b") as file:
        file.write(b"\0\0\0\0")
    assert [record["kind"] for record, _ in spool.pending(1)] == ["nothing"]
    assert [record["kind"] for record, _ in spool.pending(1000)] == ["nothing", "b"]
    assert "a line is no record" in caplog.text
    assert Spool.left_over(spool.path) is None, "its writer is alive"
    spool.acknowledge(spool.pending(1)[0][1])
    spool.close()
    again = Spool.left_over(spool.path)
    assert again is not None
    assert again.has_been_read
    assert [record["kind"] for record, _ in again.pending(1000)] == ["b"]
    again.acknowledge(again.pending(1000)[-1][1])
    again.close()
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("job", "commit"),
    [
        ({"metadata": {"git_commit": "0123456789abcdef"}}, {"mlflow.source.git.commit": "0123456789abcdef"}),
        ({"metadata": {"git_commit": "$(rm -rf)"}}, {}),
        ({"metadata": {}}, {}),
        (["no job"], {}),
        (None, {}),
    ],
)
def test_a_shipped_checkout_has_rays_digest_and_the_commit_of_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Any, commit: dict[str, str]
) -> None:
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123abcd" / "platform"
    folder.mkdir(parents=True)
    monkeypatch.setattr(facts, "__file__", str(folder / "facts.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    if job is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert facts.code_version() == ({"dermray.code_package": "_ray_pkg_0123abcd", **commit}, "")


def test_another_process_ends_a_run_at_the_time_it_gives(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    state_uri = str(tmp_path / "mlflow.json")
    options: dict[str, Any] = {"kind": "trial", "name": "x", "resolved": Settings(), "state_uri": state_uri}
    with tracking.run(config, **options) as current:
        pass
    ended_at = time.time() - 7
    with tracking.run(config, **options, ended_at=ended_at) as again:
        again.set_tags({"dermray.trial_status": "finished"})
    (run,) = runs(client, config)
    assert run.info.run_id == current.id
    assert run.info.end_time == int(ended_at * 1000)
    assert run.data.tags["dermray.trial_status"] == "finished"


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


def test_of_two_runs_of_one_key_the_older_stays(config: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    """What MLflow's own repetition of a call leaves, whose answer was lost."""
    with tracking.run(config, kind="x", name="makes the experiment", resolved=Settings()):
        pass
    experiment = client.get_experiment_by_name(config.experiment).experiment_id
    older, newer = (
        client.create_run(experiment, start_time=time, tags={"dermray.run_key": "k"}).info.run_id for time in (1, 2)
    )
    state = tmp_path / "mlflow.json"
    state.write_text('{"mlflow_run_id": null, "run_key": "k"}')
    with tracking.run(config, kind="x", name="x", resolved=Settings(), state_uri=str(state)) as current:
        assert current.id == older
    assert client.get_run(newer).info.lifecycle_stage == "deleted"
    assert client.get_run(older).data.params["inner.rate"] == "0.5"


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_is_deleted_under_the_job_s_feet_gets_its_records_when_it_is_restored(
    config: TrackingConfig, client: MlflowClient, caplog: pytest.LogCaptureFixture, monkeypatch: Any, what: str
) -> None:
    monkeypatch.setattr("dermray.tracking.runs.PATIENCE_S", 0.5)
    with caplog.at_level(logging.WARNING), tracking.run(config, kind="x", name="x", resolved=Settings()) as current:
        experiment = client.get_run(current.id).info.experiment_id
        if what == "run":
            client.delete_run(current.id)
        else:
            client.delete_experiment(experiment)
        current.log_metrics({"loss": 1.0}, step=2)
    assert f"mlflow {what}s restore --{what}-id {current.id if what == 'run' else experiment}" in caplog.text
    assert tracking.deliver_left_over(config).num_kept >= 1
    if what == "run":
        client.restore_run(current.id)
    else:
        client.restore_experiment(experiment)
    tracking.deliver_left_over(config)
    assert steps(client, current.id, "loss") == [2]
    assert client.get_run(current.id).info.status == "FINISHED"


def test_a_deleted_experiment_is_refused_before_the_work(config: TrackingConfig, client: MlflowClient) -> None:
    with tracking.run(config, kind="x", name="x", resolved=Settings()) as current:
        experiment = client.get_run(current.id).info.experiment_id
    client.delete_experiment(experiment)
    refusal = rf"was deleted in MLflow: restore it with `mlflow experiments restore --experiment-id {experiment}`, or"
    with pytest.raises(TrackingError, match=refusal), tracking.run(config, kind="x", name="x", resolved=Settings()):
        raise AssertionError("the work began")


def test_a_figure_that_mlflow_does_not_take_costs_no_other(
    config: TrackingConfig, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracking.run(config, kind="x", name="x", resolved=Settings()) as current:
        for step in range(1, 9):
            current.log_metrics({"loss" if step != 5 else "lo@ss": float(step)}, step=step)
    assert steps(client, current.id, "loss") == [1, 2, 3, 4, 6, 7, 8]
    assert "did not take the metrics of step 5: " in caplog.text


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
        options = {"kind": "trial", "name": "trial", "resolved": Settings(), "parent_key": parent.key}
        with tracking.run(config, **options) as child:
            pass
    assert client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_a_run_of_which_mlflow_heard_before_its_parent_is_nested_once_that_comes(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    options = {"kind": "trial", "name": "trial", "resolved": Settings(), "parent_key": "the-parent"}
    with tracking.run(config, **options) as child:
        pass
    assert "mlflow.parentRunId" not in client.get_run(child.id).data.tags
    # A sweep that began while MLflow was out of reach remembers its key alone.
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_key": "the-parent"}))
    with tracking.run(
        config, kind="sweep", name="sweep", resolved=Settings(), state_uri=str(tmp_path / "mlflow.json")
    ) as parent:
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


def test_a_registered_model_embeds_and_classifies_through_mlflow(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As somebody who only uses MLflow has it: our own clients leave it as it is.
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(config.uri))
    folder = write_model(tmp_path / "m", provenance={"licences": ["CC-BY-NC-4.0"], "classes": ["melanoma", "acne"]})
    with tracking.run(config, kind="register", name="x", resolved=Settings()) as current:
        tracking.register(
            current, name="whole", model_uri=str(folder), metric="a.b", value=0.5, corpus_digest="c", alias=None
        )
    version = client.get_model_version("whole", "1")
    assert (version.tags["licence"], version.tags["commercial_use"]) == ("CC-BY-NC-4.0", "forbidden")
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("whole", tracking.CHAMPION)
    logged = client.get_logged_model(version.tags["dermray.logged_model_id"])
    assert (str(logged.status), logged.source_run_id) == ("READY", current.id)
    assert client.get_run(current.id).outputs.model_outputs[0].model_id == logged.model_id
    loaded = mlflow.pyfunc.load_model("models:/whole/1")
    example = loaded.input_example
    assert loaded.metadata.signature.params is not None
    encoder = Encoder.load(folder)
    (row,) = loaded.predict(example, params={"classify": True}).to_dict("records")
    photo = example["image"][0]
    np.testing.assert_allclose(row["embedding"], encoder.encode_images([photo])[0], atol=1e-6)
    assert sum(row["probabilities"]) == pytest.approx(1)
    assert row["label"] == ["melanoma", "acne"][int(np.argmax(row["probabilities"]))]
    (named,) = loaded.predict(example, params={"labels": ["a", "b", "c"]}).to_dict("records")
    assert len(named["probabilities"]) == 3
    (text,) = loaded.predict(pd.DataFrame({"text": ["a mole"]})).to_dict("records")
    np.testing.assert_allclose(text["embedding"], encoder.encode_texts(["a mole"])[0], atol=1e-6)
    table = pd.DataFrame({"image": [photo, photo[: len(photo) // 2], photo]})
    several = loaded.predict(table, params={"classify": True}).to_dict("records")
    assert [row["error"] for row in several] == [None, "truncated", None]
    assert several[0] == several[2]
    assert (several[0].keys(), several[0]["label"]) == (row.keys(), row["label"])
    # In a batch of two and alone, the last bit may be another one.
    for key in ("embedding", "probability", "probabilities"):
        np.testing.assert_allclose(several[0][key], row[key], atol=1e-6)
    assert (several[1]["embedding"], several[1]["probabilities"]) == (None, [])
    assert pd.isna(several[1]["label"])
    with pytest.raises(Exception, match="row 0: give either image"):
        loaded.predict(pd.DataFrame({"text": [None]}))


def test_a_model_of_a_kind_of_ones_own_answers_through_mlflow_and_takes_no_place_of_another_kind(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(config.uri))
    folder = tmp_path / "turned"
    rotation_model.save(rotation_model.layers(12), str(folder), {})

    def add(name: str) -> tracking.Registration:
        with tracking.run(config, kind="register", name="x", resolved=Settings()) as current:
            return tracking.register(
                current, name=name, model_uri=str(folder), metric="turned.accuracy", value=0.5, corpus_digest="c"
            )

    assert add("rotated").promoted
    version = client.get_model_version("rotated", "1")
    assert version.tags["dermray.kind"] == "rotation"
    assert client.get_logged_model(version.tags["dermray.logged_model_id"]).model_type == "rotation"
    loaded = mlflow.pyfunc.load_model("models:/rotated/1")
    assert [column.name for column in loaded.metadata.signature.inputs] == ["image"]
    photo = loaded.input_example["image"][0]
    rows = loaded.predict(pd.DataFrame({"image": [photo, photo[: len(photo) // 2]]})).to_dict("records")
    encoder = Encoder.load(folder)
    (expected,), _ = encoder.predict_readable([photo])
    assert expected is not None
    np.testing.assert_allclose(rows[0]["prediction"]["turns"], expected["turns"], atol=1e-6)
    np.testing.assert_allclose(rows[0]["embedding"], encoder.encode_images([photo])[0], atol=1e-6)
    assert rows[0]["error"] is None
    assert (rows[1]["prediction"], rows[1]["embedding"], rows[1]["error"]) == (None, None, "truncated")
    with pytest.raises(
        ModelError, match="takes no texts and ranks no classes; it gives vectors of images, predictions"
    ):
        DermRayModel(str(folder)).predict(pd.DataFrame({"image": [photo]}), params={"labels": ["a"]})

    register(config, tmp_path / "clip", 0.25, name="mixed")
    with pytest.raises(TrackingError, match=r"models:/mixed@champion is a model of the kind clip, and this one is of"):
        add("mixed")
    assert len(client.search_model_versions("name='mixed'")) == 1


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


class Executed:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def test_a_version_that_points_at_other_weights_is_refused_and_nothing_of_it_is_unpickled(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    folder, foreign = write_model(tmp_path / "m"), write_model(tmp_path / "foreign", seed=1)
    facts = tracking.registry.model_facts(str(folder))
    # What MLflow's own loader would run: somebody else's module and a pickle beside the weights.
    (foreign / "python_model.pkl").write_bytes(pickle.dumps(Executed(marker)))
    (foreign / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl\n"
    )
    client.create_registered_model("turned")
    turned = client.create_model_version("turned", str(foreign), tags=facts)
    with pytest.raises(TrackingError, match=r"models:/turned/1 was registered with the weights .* holds weights"):
        tracking.resolve_model(f"models:/turned/{turned.version}", config)
    empty = client.create_model_version("turned", str(tmp_path / "nowhere"), tags=facts)
    with pytest.raises(TrackingError, match="holds no weights"):
        tracking.resolve_model(f"models:/turned/{empty.version}", config)
    honest = client.create_model_version("turned", str(foreign), tags=tracking.registry.model_facts(str(foreign)))
    found = tracking.resolve_model(f"models:/turned/{honest.version}", config)
    assert Encoder.load(found.folder_uri).info.embedding_dim > 0
    # Its digest is right, and its bytes are a pickle all the same.
    (foreign / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Executed(marker)}, foreign / "open_clip_pytorch_model.bin")
    (foreign / "dermray.json").unlink()
    with pytest.raises(DermRayError):
        Encoder.load(str(foreign))
    assert not marker.exists()
