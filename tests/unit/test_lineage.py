"""Lineage from every end of a chain of real files, and verification that names what was tampered with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dermray import storage, tracking
from dermray.commands import lineage as job
from dermray.config import TrackingConfig
from dermray.errors import EvaluationError, ModelError, TrackingError
from dermray.tracking import lineage
from tests.lineage import Chain, ChainConfig

METRICS = {"accuracy": (0.5, 0.4, 0.6)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder, TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"))
    chain.prepare()
    model = chain.pretrain("a")
    chain.register(model, chain.evaluate(model, METRICS))
    return chain


def kinds(graph: lineage.Graph) -> list[str]:
    return sorted(graph.nodes[key].facts.get("kind", graph.nodes[key].kind) for key in graph.nodes)


WHOLE = sorted(["raw", "prepare", "corpus", "pretrain", "model", "evaluate", "report", "register", "version"])


def test_from_a_served_answer_to_the_raw_corpus_and_back(chain: Chain) -> None:
    model = chain.folder / "a" / "model"
    digest = storage.sha256(model / "open_clip_model.safetensors")
    by_version = json.dumps({"ranking": [], "model_info": {"name": "derm", "version": "1", "digest": digest}})
    by_digest = json.dumps({"model_info": {"name": "model", "version": None, "digest": digest}})
    for reference in (by_version, "models:/derm@champion", "models:/derm/1"):
        up = lineage.trace(reference, chain.config)
        assert up.nodes[up.start].kind == "version"
        assert kinds(up) == WHOLE
    for reference in (by_digest, digest, digest[:12], str(model)):
        graph = lineage.trace(reference, chain.config)
        assert graph.nodes[graph.start].digest == digest
        assert {"raw", "corpus", "pretrain", "evaluate", "version"} <= set(kinds(graph))
    corpus = lineage.trace(str(chain.folder / "corpus"), chain.config)
    assert kinds(corpus) == WHOLE
    assert [len(layer) for layer in corpus.layers()] == [1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_from_a_report_and_from_a_run(chain: Chain) -> None:
    report = lineage.trace(str(chain.folder / "a" / "report"), chain.config)
    assert report.nodes[report.start].kind == "report"
    text = report.text()
    assert "came from" in text
    assert text.index("evaluate “evaluate tiny”") < text.index("  corpus  ") < text.index("  raw  ")
    run_id = next(key for key, node in report.nodes.items() if node.facts.get("kind") == "pretrain").partition(":")[2]
    run = lineage.trace(run_id, chain.config)
    assert run.start == f"run:{run_id}"
    assert kinds(run) == WHOLE


def test_a_deployment_stands_behind_its_model(chain: Chain) -> None:
    model = tracking.resolve_model("models:/derm@champion", chain.config)
    run_id = tracking.record_deployment(chain.config, ChainConfig(), model)
    graph = lineage.trace(str(run_id), chain.config)
    assert graph.nodes[graph.start].title == "deploy “deploy derm version 1”"
    (before,) = graph.neighbours(graph.start, "up")
    assert before.startswith("model:")
    assert {"raw", "corpus", "pretrain"} <= set(kinds(graph))
    other = replace(model, name="another", folder_uri=str(chain.folder / "nowhere"), tags={})
    tracking.record_deployment(chain.config, ChainConfig(), other)
    for reference in ("models:/derm@champion", "models:/derm/1"):
        version = lineage.trace(reference, chain.config)
        assert version.neighbours(version.start, "down") == [graph.start], "not what another name's version 1 led to"
        assert "deploy “deploy derm version 1”" in version.text().partition("led to")[2]


def test_a_deployment_under_a_name_of_its_own_stands_behind_its_version(tmp_path: Path) -> None:
    chain = Chain(tmp_path, TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    chain.prepare()
    model = chain.pretrain("a")
    chain.register(model, chain.evaluate(model, METRICS))
    served = replace(tracking.resolve_model("models:/derm@champion", chain.config), name="clinic")
    run_id = tracking.record_deployment(chain.config, ChainConfig(), served)
    version = lineage.trace("models:/derm@champion", chain.config)
    assert version.neighbours(version.start, "down") == [f"run:{run_id}"]


@pytest.mark.parametrize("reference", ["models:/derm/7", "0" * 64, "f" * 32, "nowhere/at/all", '{"ranking": []}'])
def test_what_is_not_known_is_said_in_one_line(chain: Chain, reference: str) -> None:
    with pytest.raises(TrackingError) as caught:
        lineage.trace(reference, chain.config)
    assert "\n" not in str(caught.value)


def test_verification_names_what_was_changed_and_what_is_gone(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["of=models:/derm@champion", f"tracking.uri={chain.config.uri}", f"output={tmp_path}"]
    assert job.main([*arguments, "--verify"]) == 0
    shard = next((chain.folder / "corpus" / "data").glob("*.parquet"))
    report = chain.folder / "a" / "report" / "report.json"
    whole, said = shard.read_bytes(), report.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    report.unlink()
    try:
        capsys.readouterr()
        assert job.main([*arguments, "--verify"]) == 1
        lines = capsys.readouterr().out.splitlines()
    finally:
        shard.write_bytes(whole)
        report.write_bytes(said)
    (changed,) = [line for line in lines if line.startswith("changed")]
    (missing,) = [line for line in lines if line.startswith("missing")]
    assert f"data/{shard.name} is not what the manifest says" in changed
    assert "report.json is gone" in missing
    assert sum(line.startswith("same") for line in lines) == 2
    document = json.loads((tmp_path / job.JSON_NAME).read_text())
    assert {one["state"] for one in document["findings"]} == {"same", "changed", "missing", "unchecked"}
    page = (tmp_path / job.HTML_NAME).read_text()
    assert "<svg" in page
    assert shard.name in page


def test_a_table_that_was_scored_is_part_of_the_chain_and_verified(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, digests = tmp_path / "own.csv", []
    for name, content in (
        ("report.json", '{"model": {"model_digest": "m"}, "corpus": {}, "tasks": {}}'),
        ("own.csv", "own"),
    ):
        (tmp_path / name).write_text(content)
        digests.append(storage.sha256(tmp_path / name))
    with tracking.run(chain.config, kind="evaluate", name="own table", resolved=ChainConfig()) as current:
        current.log_artifact("input", "table", str(table), digests[1])
        current.log_artifact("output", "report", str(tmp_path), digests[0])
    arguments = [f"of={digests[0][:12]}", f"tracking.uri={chain.config.uri}", "--verify"]
    assert job.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "table own.csv" in printed
    assert printed.splitlines()[-1] == "verified: 2 same"
    table.write_text("another")
    assert job.main(arguments) == 1
    assert "1 same, 1 changed" in capsys.readouterr().out


def test_a_report_of_another_model_is_refused_and_found(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    other = chain.pretrain("b", seed=1)
    foreign = chain.folder / "a" / "report"
    with pytest.raises(
        EvaluationError, match=r"report.json is of another model \(.*a/model, weights .*\) than .*b/model"
    ):
        chain.register(other, foreign, name="swapped")
    # What an earlier build let through is found where the chain is verified.
    weights = storage.sha256(other / "open_clip_model.safetensors")
    with tracking.run(chain.config, kind="register", name="by hand", resolved=ChainConfig()) as current:
        current.log_artifact("input", "model", str(other), weights)
        current.log_artifact("input", "report", str(foreign), storage.sha256(foreign / "report.json"))
    assert job.main([f"of={current.id}", f"tracking.uri={chain.config.uri}", "--verify"]) == 1
    printed = capsys.readouterr().out
    assert f"mismatch  report  {foreign}: it is of the model " in printed
    assert f"register “by hand” took it for one of {weights[:12]}" in printed


def test_weights_that_were_replaced_are_not_registered(chain: Chain) -> None:
    model = chain.pretrain("c", seed=2)
    report = chain.evaluate(model, METRICS)
    document = storage.read_json(model / "dermray.json")
    storage.write_json(model / "dermray.json", {**document, "weights_sha256": "0" * 64})
    with pytest.raises(ModelError, match=r"dermray.json beside it names 000000000000: the weights were replaced"):
        chain.register(model, report, name="replaced")
