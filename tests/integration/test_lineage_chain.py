"""Prepare, sweep, pretrain the best, evaluate, register, promote, serve; and from a served answer back to the rows.

By MAKE's objective, so that its models are shown to go all the way; those of the contrastive one do so in
`test_clinic.py`.

Slow: each stage starts processes that import torch; the work itself takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import mlflow
import pytest
import yaml

from dermray.commands import evaluate, lineage, prepare, pretrain, promote, register, sweep
from tests import raw_corpus
from tests.corpora import write_model, write_prepared_corpus
from tests.printed import alarming
from tests.ray_tasks import failed_tasks
from tests.serving import data_uri, photograph, running

pytestmark = [
    *(pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)),
    # A user would read it on the terminal.
    pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning"),
]

RECIPE = {
    "train": {"epochs": 4, "global_batch_size": 8, "log_every_steps": 5, "max_failures": 0},
    "optim": {"warmup_steps": 2, "weight_decay": 0.0},
    "validation": {"max_samples": 16},
    "objective": {"kind": "make", "sub_captions": 2},
}
KINDS = {
    *("raw", "prepare", "corpus", "sweep", "recipe", "trial"),
    *("pretrain", "model", "evaluate", "report", "register", "version"),
}


def test_from_raw_rows_to_a_served_answer_and_back(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    corpus, best, out = (str(tmp_path / name) for name in ("corpus", "sweep/best.yaml", "out"))
    answer = make_and_ask(tmp_path, corpus, best, out, capfd)
    assert answer["model_info"] | {"name": "chain", "version": "1"} == answer["model_info"]
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    capfd.readouterr()

    of_answer = [f"of={tmp_path / 'answer.json'}", "--verify"]
    assert lineage.main([*of_answer, "format=json"]) == 0
    document = json.loads(capfd.readouterr().out)
    kinds = [node["facts"].get("kind", node["kind"]) for node in document["nodes"]]
    assert set(kinds) >= KINDS - {"trial"}
    assert {one["state"] for one in document["findings"]} == {"same", "unchecked"}
    downwards = lineage.main([f"of={corpus}", "format=json"])
    assert downwards == 0
    document = json.loads(capfd.readouterr().out)
    assert {node["facts"].get("kind", node["kind"]) for node in document["nodes"]} >= KINDS

    weights = Path(out) / "model" / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert lineage.main(of_answer) == 1
    (bad,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("changed", "missing"))]
    assert bad.startswith("changed   model  ")
    assert "open_clip_model.safetensors has the digest" in bad


def make_and_ask(
    folder: Path, corpus: str, best: str, out: str, capfd: pytest.CaptureFixture[str]
) -> dict[str, object]:
    """Every stage by its own entry point; the answer of the server."""
    raw_corpus.write(folder / "raw", num_good=64)
    model = write_model(folder / "start")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), **RECIPE}))
    prepared = ["rows_per_shard=16", "row_group_size=8", "split.val=0.25", "sub_captions=2", "licence=CC-BY-4.0"]
    assert prepare.main(["source=csv", f"input={folder / 'raw'}", f"output={corpus}", *prepared]) == 0
    space = "space.objective.lambda_s={kind: choice, values: [0.7, 0.0]}"
    searched = [f"recipe={folder / 'recipe.yaml'}", f"corpus={corpus}", f"output={folder / 'sweep'}", space]
    failed_before = failed_tasks()
    assert sweep.main([*searched, "search=grid", "num_validations=1", "objective=validation_image_to_text_R_at_5"]) == 0
    assert {key: one for key, one in failed_tasks().items() if key not in failed_before} == {}
    other = write_prepared_corpus(folder / "other", {"train": 16})
    # Without a licence of this one too the model would not be promoted.
    other.model_copy(update={"provenance": {"licences": ["CC0-1.0"]}}).save(str(folder / "other"))
    assert pretrain.main(["--config", best, f"corpus=[{corpus}, {folder / 'other'}]", f"output={out}"]) == 0
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.`dermray.kind` = 'pretrain'", output_format="list"
    )
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"corpus", "other"}
    assert run.data.tags["samples_of_an_epoch"].startswith("an epoch of the split train: ")
    assert alarming(capfd) == []
    trained, report = f"{out}/model", str(folder / "report")
    scored = [f"model={trained}", f"corpus={corpus}", f"output={report}", "tasks=[retrieval]", "bootstrap=20"]
    assert evaluate.main([*scored, "num_actors=1"]) == 0
    metric = "metric=retrieval.image_to_text_R@5"
    assert register.main([f"model={trained}", f"report={report}", "name=chain", "alias=null", metric]) == 0
    assert promote.main(["name=chain", "candidate=1", "alias=production"]) == 0
    image = {"image": data_uri(photograph(1))}
    with running(model="models:/chain@production", device="cpu") as url:
        answer = httpx.post(f"{url}/v1/classify", json={**image, "labels": ["melanoma", "psoriasis"]}, timeout=60)
        concepts = httpx.post(f"{url}/v1/concepts", json={**image, "concepts": ["scale", "ulcer"]}, timeout=60)
    assert answer.status_code == concepts.status_code == 200, answer.text + concepts.text
    assert {each["concept"] for each in concepts.json()["concepts"]} == {"scale", "ulcer"}
    assert alarming(capfd) == []
    return answer.json()
